"""Streams in the upper blocks: what they learn, which nodes get them, and that texts stay the model's own."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.decode import SpeculativeStreaming, Tally
from lilliput.methods.decode._ahead import Reading
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode.medusa import grow
from lilliput.methods.decode.speculative_streaming import ThinLinear, _Guesses, lesson_loss, likeliest

TREE = Draft([3, 4, 5, 3, 4], [-1, -1, 0, 1, 2])
OPTIONS = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_thin_maps_are_nothing_when_new_and_linear_then():
    thin, x = ThinLinear(8, 3), torch.randn(5, 8)
    assert torch.equal(thin(x), x)
    torch.nn.init.normal_(thin.down)
    torch.nn.init.normal_(thin.up)
    torch.testing.assert_close(thin(x), x @ (torch.eye(8) + thin.up @ thin.down).T)


def test_streams_start_from_what_the_entry_block_reads(model, make_rows):
    part, read = make_rows("streams", model), torch.randn(2, 4, 32)
    assert part.entry == 1
    assert all(name.startswith("model.layers.1.") for name in part.sizes)
    found = part.start(read)
    assert found.shape == (2, 4, 3, 32)
    torch.testing.assert_close(found[1, 2, 0], part.branch(read[1, 2]) + part.first[0])
    assert not torch.equal(found[1, 2, 0], found[1, 2, 1])


def test_the_loss_asks_each_stream_for_the_token_after_its_own_place(model, make_rows, prompt):
    part, ids, anchors = make_rows("streams", model), prompt(9), torch.tensor([1, 4])
    found = lesson_loss(model, part, ids, anchors)
    z, n = Reading(model, ids, 1).ahead(part, anchors)[0], 0
    expected = torch.zeros(())
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)

        def divergence(place, read):
            p = out.logits[0, place].softmax(-1)
            return (p * (p.log() - model.lm_head(read).log_softmax(-1))).sum()

        for anchor in anchors.tolist():
            for j in (1, 2, 3):
                expected += 0.8 ** (j - 1) * divergence(anchor + j, z[n]) / 6
                n += 1
            early = model.model.norm(part.early(out.hidden_states[1][0, anchor]))
            expected += divergence(anchor, early) / 2
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_node_is_as_likely_as_the_way_to_it():
    scores = torch.full((6, 8), -9.0)
    scores[0, 3], scores[0, 4] = -1.0, -2.0  # nodes 0 and 1, behind the text
    scores[1, 5] = -4.0  # node 2, behind node 0: -5
    scores[2, 3] = -1.0  # node 3, behind node 1: -3
    scores[3, 4] = -0.5  # node 4, behind node 2: -5.5
    assert likeliest(scores, TREE, 0) == [0]
    assert likeliest(scores, TREE, 1) == [0, 1]
    assert likeliest(scores, TREE, 3) == [0, 1, 2, 4]
    assert likeliest(scores, TREE, 4) == [0, 1, 2, 3, 4]
    assert likeliest(scores, TREE, 99) == [0, 1, 2, 3, 4, 5]


def test_weak_nodes_are_told_by_the_early_estimate(model, make_rows):
    part, read = make_rows("streams", model), torch.randn(6, 32)
    with torch.no_grad():
        scores = model.lm_head(model.model.norm(part.early(read))).log_softmax(-1)
        assert _Guesses(SpeculativeStreaming(kept=2), part, model).choose(read, TREE) == likeliest(scores, TREE, 2)
        assert _Guesses(SpeculativeStreaming(kept=5), part, model).choose(read, TREE) == [0, 1, 2, 3, 4, 5]


def test_guesses_grow_the_tree_of_the_streams(model, make_rows):
    guesses = _Guesses(SpeculativeStreaming(nodes=7, branch=2), make_rows("streams", model), model)
    hidden, ids = torch.randn(3, 32), torch.tensor([5, 6])
    with torch.no_grad():
        best = model.lm_head(hidden).log_softmax(-1).topk(2)
    draft = guesses.propose(ids, 100, hidden)
    expected = grow(best.values.tolist(), best.indices.tolist(), 7)
    assert (draft.tokens, draft.parents) == (expected.tokens, expected.parents)
    assert max(guesses.propose(ids, 1, hidden).depths()) == 0
    assert guesses.propose(ids, 1, None) is NOTHING


def test_training_lowers_the_loss_and_leaves_the_model_alone(llama_work):
    model, settings = llama_work.model, SpeculativeStreaming(streams=2, layers=1, steps=60, lr=3e-3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    streams, history = settings.train_(settings.new(model), llama_work)
    assert sum(history.losses[-10:]) < 0.9 * sum(history.losses[:10])
    assert not streams.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layers", [1, 2])
def test_streams_that_learned_the_text_save_passes(layers, counting_work):
    settings = SpeculativeStreaming(streams=3, layers=layers, nodes=6, steps=150, lr=1e-2)
    streams, model, ids = settings.train(counting_work), counting_work.model, torch.arange(5, 15)[None]
    expected, speed = model.generate(ids, **OPTIONS), {}
    for kept in (6, 3, 0):
        tally, decoder = Tally(), settings.with_(kept=kept)
        found = model.generate(ids, custom_generate=decoder, streams=streams, tally=tally, **OPTIONS)
        assert torch.equal(found, expected)
        speed[kept] = tally.tokens_per_step
    assert speed[6] > 2
    assert speed[3] > 2
    assert 1 < speed[0] < speed[6]


def test_sampled_texts_follow_the_models_own_distribution(make_llama, make_rows, draws_are_likely):
    model = make_llama(layers=1, vocabulary=4)
    assert draws_are_likely(model, SpeculativeStreaming(nodes=4, kept=1), {"streams": make_rows("streams", model)})


def test_streams_that_do_not_fit_are_refused(model, make_rows, prompt, cnn_work, llama_work):
    with pytest.raises(UserError, match=r"streams=streams"):
        model.generate(prompt(), custom_generate=SpeculativeStreaming(), max_new_tokens=5)
    with pytest.raises(UserError, match="pass through 4 blocks, the model has 2; lower layers"):
        SpeculativeStreaming().train(llama_work)
    with pytest.raises(UserError, match="TinyCnn"):
        SpeculativeStreaming().train(cnn_work)
    llama_work.training = [{"input_ids": torch.full((2, 3), 5)}]
    with pytest.raises(UserError, match="3 tokens teach nothing 3 tokens ahead"):
        SpeculativeStreaming(steps=1, layers=1).train(llama_work)
