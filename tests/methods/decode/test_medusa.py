"""Medusa heads: what they learn, and the tree that grows from their guesses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lilliput.errors import UserError
from lilliput.methods.decode import Medusa, Tally
from lilliput.methods.decode.medusa import MedusaHeads, grow, lesson


def test_new_heads_repeat_what_they_read():
    hidden = torch.randn(4, 7, 32)
    assert torch.equal(MedusaHeads(3, 32)(hidden), hidden.expand(3, -1, -1, -1))


def test_heads_are_residual_maps():
    heads, hidden = MedusaHeads(2, 8), torch.randn(5, 8)
    torch.nn.init.normal_(heads.weight)
    torch.nn.init.normal_(heads.bias)
    for w, b, found in zip(heads.weight, heads.bias, heads(hidden)):
        torch.testing.assert_close(found, hidden + F.silu(hidden @ w.T + b))


def test_a_lesson_is_what_the_model_says_some_places_later(llama_work):
    model, batch = llama_work.model, llama_work.training[0]
    rows, width = batch["input_ids"].shape
    hidden, taught = lesson(model, batch, 2, 10_000, torch.Generator().manual_seed(0))
    assert hidden.shape == (rows * (width - 2), 32)
    with torch.no_grad():
        logits = model(batch["input_ids"], use_cache=False).logits
        own = model.lm_head(hidden)
    places = [(r, c) for r in range(rows) for c in range(width - 2)]
    assert sorted(own[:, 0].tolist()) == pytest.approx(sorted(float(logits[r, c, 0]) for r, c in places), abs=1e-5)
    for i in range(len(own)):
        r, c = places[int((logits[:, : width - 2].reshape(-1, 64) - own[i]).norm(dim=1).argmin())]
        torch.testing.assert_close(taught[:, i], logits[r, c + 1 : c + 3])


def test_training_lowers_the_loss_and_leaves_the_model_alone(llama_work):
    before = {k: v.clone() for k, v in llama_work.model.state_dict().items()}
    heads, history = Medusa(heads=2, steps=60, lr=3e-3).train_(MedusaHeads(2, 32), llama_work)
    assert sum(history.losses[-10:]) < 0.9 * sum(history.losses[:10])
    assert not heads.training
    assert all(torch.equal(v, before[k]) for k, v in llama_work.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in llama_work.model.parameters())


def test_heads_that_learned_the_text_save_passes(counting_work):
    heads = Medusa(heads=3, steps=150, lr=1e-2).train(counting_work)
    tally, options = Tally(), {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model, ids = counting_work.model, torch.arange(5, 15)[None]
    found = model.generate(ids, custom_generate=Medusa(nodes=6), heads=heads, tally=tally, **options)
    assert torch.equal(found, model.generate(ids, **options))
    assert tally.tokens_per_step > 2


def test_a_tree_holds_the_likeliest_beginnings():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, generator=generator).log_softmax(-1)
    best = logits.topk(4)
    scores, tokens = best.values.tolist(), best.indices.tolist()
    draft = grow(scores, tokens, 10)
    found = []
    for node in range(10):
        way = [i for i in range(10) if bool(draft.lineage()[node, i])]
        found.append(tuple(draft.tokens[i] for i in way))
    every = {}
    for depth in (1, 2, 3):
        for ranks in itertools.product(range(4), repeat=depth):
            every[tuple(tokens[i][r] for i, r in enumerate(ranks))] = sum(scores[i][r] for i, r in enumerate(ranks))
    best_ten = sorted(every, key=lambda way: -every[way])[:10]
    assert set(found) == set(best_ten)
    assert all(parent < node for node, parent in enumerate(draft.parents))


def test_a_tree_ends_where_there_is_nothing_more():
    assert len(grow([[0.0, -1.0]], [[4, 5]], 100).tokens) == 2
    assert len(grow([[0.0, -1.0], [math.log(0.5)] * 2], [[4, 5], [6, 7]], 100).tokens) == 6


def test_heads_that_do_not_fit_are_refused(model, prompt, cnn_work, llama_work):
    with pytest.raises(UserError, match=r"heads=heads"):
        model.generate(prompt(), custom_generate=Medusa(), max_new_tokens=5)
    with pytest.raises(UserError, match="read 16 values, this model has 32"):
        model.generate(prompt(), custom_generate=Medusa(), heads=MedusaHeads(2, 16), max_new_tokens=5)
    with pytest.raises(UserError, match="TinyCnn"):
        Medusa().train(cnn_work)
    llama_work.training = [{"input_ids": torch.full((2, 3), 5)}]
    with pytest.raises(UserError, match="3 tokens teach no 3 heads"):
        Medusa(steps=1).train(llama_work)
