"""Masks with gated adapters: what they learn, how they draft, and that texts stay the model's own."""

import pytest
import torch
import torch.nn.functional as F

from lilliput.errors import UserError
from lilliput.methods.decode import GatedLoraMtp, Tally
from lilliput.methods.decode._ahead import Reading
from lilliput.methods.decode._draft import NOTHING
from lilliput.methods.decode.gated_lora_mtp import _Guesses, lesson_loss

OPTIONS = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_new_masks_are_near_the_average_token_and_their_adapters_silent(model):
    part = GatedLoraMtp(masks=16, rank=4).new(model)
    table = model.get_input_embeddings().weight.detach()
    assert float((part.first.mean(0) - table.mean(0)).norm()) < float(table.norm(dim=1).mean())
    assert len({tuple(row) for row in part.first.tolist()}) == 16
    assert all(not up.any() and bool(down.any()) for down, up in zip(part.down, part.up))
    z, previous = torch.randn(3, 32), torch.randn(3, 32)
    assert torch.equal(part.sampler(previous, z), z)
    again, other = GatedLoraMtp(masks=16, rank=4).new(model), GatedLoraMtp(masks=16, rank=4, seed=1).new(model)
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), again.parameters()))
    assert not torch.equal(part.into.weight, other.into.weight)


def test_the_sampler_reads_the_token_before(model, make_rows):
    part = make_rows("masks", model)
    previous, z = torch.randn(3, 32), torch.randn(3, 32)
    read = torch.cat([previous / (previous.square().mean(1, keepdim=True) + torch.finfo().eps).sqrt(), z], 1)
    expected = z + F.silu(read @ part.into.weight.T + part.into.bias) @ part.out.weight.T + part.out.bias
    torch.testing.assert_close(part.sampler(previous, z), expected)


def test_the_loss_asks_each_mask_for_the_token_after_its_own_place(model, make_rows, prompt):
    part, ids, anchors = make_rows("masks", model), prompt(9), torch.tensor([1, 4])
    found = lesson_loss(model, part, ids, anchors)
    z = Reading(model, ids, 0).ahead(part, anchors)[0]
    expected, n = torch.zeros(()), 0
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        for anchor in anchors.tolist():
            for j in (1, 2, 3):
                p = out.logits[0, anchor + j].softmax(-1)
                guesses = [z[n], part.sampler(model.model.embed_tokens(ids[0, anchor + j]), z[n])]
                expected += sum((p * (p.log() - model.lm_head(g).log_softmax(-1))).sum() for g in guesses) / 6
                expected += (z[n] - out.hidden_states[-1][0, anchor + j]).square().mean() / 6
                n += 1
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


def test_drafts_go_on_from_the_token_guessed_before(model, make_rows):
    part = make_rows("masks", model)
    guesses, hidden = _Guesses(part, model, "quadratic"), torch.randn(3, 32)
    found, last = [], 7
    with torch.no_grad():
        for z in hidden:
            last = int(model.lm_head(part.sampler(model.model.embed_tokens(torch.tensor(last)), z)).argmax())
            found.append(last)
    ids = torch.tensor([5, 6, 7])
    assert guesses.propose(ids, 100, hidden).tokens == found
    assert guesses.propose(ids, 2, hidden).tokens == found[:2]
    assert guesses.propose(ids, 2, hidden).is_chain
    assert guesses.propose(ids, 2, None) is NOTHING


def test_training_lowers_the_loss_and_leaves_the_model_alone(llama_work):
    model, settings = llama_work.model, GatedLoraMtp(masks=2, rank=4, steps=60, lr=3e-3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters, history = settings.train_(settings.new(model), llama_work)
    assert sum(history.losses[-10:]) < 0.9 * sum(history.losses[:10])
    assert not adapters.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_masks_that_learned_the_text_save_passes(counting_work):
    settings = GatedLoraMtp(masks=3, rank=8, steps=150, lr=1e-2)
    adapters, model, ids = settings.train(counting_work), counting_work.model, torch.arange(5, 15)[None]
    expected, speed = model.generate(ids, **OPTIONS), {}
    for mode in ("quadratic", "linear"):
        tally = Tally()
        found = model.generate(
            ids, custom_generate=settings.with_(mode=mode), adapters=adapters, tally=tally, **OPTIONS
        )
        assert torch.equal(found, expected)
        speed[mode] = tally.tokens_per_step
    assert speed["quadratic"] > 2
    assert 1.5 < speed["linear"] <= speed["quadratic"]


def test_sampled_texts_follow_the_models_own_distribution(make_llama, make_rows, draws_are_likely):
    model = make_llama(layers=1, vocabulary=4)
    assert draws_are_likely(model, GatedLoraMtp(), {"adapters": make_rows("masks", model)})


def test_adapters_that_do_not_fit_are_refused(model, make_llama, make_rows, prompt, cnn_work, llama_work):
    with pytest.raises(UserError, match=r"adapters=adapters"):
        model.generate(prompt(), custom_generate=GatedLoraMtp(), max_new_tokens=5)
    with pytest.raises(UserError, match="does not have; train one for it"):
        make_llama(layers=1).generate(
            prompt(), custom_generate=GatedLoraMtp(), adapters=make_rows("masks", model), max_new_tokens=5
        )
    with pytest.raises(UserError, match="TinyCnn"):
        GatedLoraMtp().train(cnn_work)
    llama_work.training = [{"input_ids": torch.full((2, 3), 5)}]
    with pytest.raises(UserError, match="3 tokens teach nothing 4 tokens ahead"):
        GatedLoraMtp(steps=1).train(llama_work)
