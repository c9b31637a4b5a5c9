"""Both back ends against a model that reads every text anew."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.decode._backends import LeanBackend, TorchBackend, backend, head_name
from lilliput.methods.decode._draft import Draft

TREE = Draft([10, 11, 12, 13, 14, 15], [-1, -1, 0, 1, 1, 4])


@pytest.fixture
def anew(model):
    """`anew(text)`: logits (V,) after a text, read without a cache."""

    def logits(text):
        with torch.no_grad():
            return model(torch.tensor([text]), use_cache=False).logits[0, -1]

    return logits


def ways(text, draft):
    """The text before each row of logits that a draft gives."""
    found = [text]
    for token, parent in zip(draft.tokens, draft.parents):
        found.append([*found[parent + 1], token])
    return found


def close(logits, expected):
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", ["torch", "lean"])
def test_logits_are_those_of_the_texts_through_drafts_and_rewinds(runtime, model, anew):
    engine, text = backend(runtime, model, 64), [5, 6, 7]
    for draft, kept in ((Draft.chain([8, 9, 10]), 2), (Draft(), 0), (Draft.chain([20, 21]), 0), (Draft.chain([30]), 1)):
        logits = engine.extend(torch.tensor(text[engine.filled :]), draft)
        close(logits, [anew(way) for way in ways(text, draft)])
        engine.rewind(len(text) + kept)
        assert engine.filled == len(text) + kept
        text = [*text, *draft.tokens[:kept], 40, 41]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("held", [0, 3])
def test_every_node_of_a_tree_reads_its_own_way_alone(attention, held, model, anew):
    model.set_attn_implementation(attention)
    engine, text = TorchBackend(model, look=True), [5, 6, 7, 8]
    if held:
        engine.extend(torch.tensor(text[:held]))
    logits = engine.extend(torch.tensor(text[held:]), TREE)
    close(logits, [anew(way) for way in ways(text, TREE)])
    assert engine.hidden.shape == (7, 32)
    close(model.lm_head(engine.hidden).detach(), list(logits))
    engine.gather(4, [1, 4, 5])
    engine.rewind(7)
    close(engine.extend(torch.tensor([50])), [anew([*text, 11, 14, 15, 50])])


def test_lean_refuses_trees_with_the_way_out(model):
    engine = LeanBackend(model, 64)
    with pytest.raises(UserError, match="runtime='torch'"):
        engine.extend(torch.tensor([5]), TREE)


def test_a_long_prompt_costs_lean_no_logits_but_the_last(model, monkeypatch):
    engine, rows = LeanBackend(model, 64), []
    run = engine.decoder._run
    monkeypatch.setattr(engine.decoder, "_run", lambda *a: rows.append(len(found := run(*a))) or found)
    engine.extend(torch.arange(3, 40), Draft.chain([1, 2]))
    assert rows == [1, 2]


def test_the_head_is_found_by_its_place(model, tiny_cnn):
    assert head_name(model) == "lm_head"
    with pytest.raises(UserError, match="TinyCnn"):
        head_name(tiny_cnn)
