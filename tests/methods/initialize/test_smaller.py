"""The cutting: whole sizes are the identity, a permutation keeps the function, wrong sizes are refused."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from lilliput.errors import UserError
from lilliput.methods.initialize._resize import FFN, HEADS, KV, parent_sizes
from lilliput.methods.initialize._smaller import Kept, cut, queries_of, share_of
from lilliput.methods.initialize.hypercloning import HyperCloning
from lilliput.methods.initialize.weight_selection import WeightSelection
from lilliput.methods.initialize.weight_subcloning import WeightSubcloning
from lilliput.methods.prune.heads import rows_of

WHOLE = {"width": 1.0, "heads": 1.0, "ffn": 1.0, "depth": 1.0}
METHODS = [WeightSelection, WeightSubcloning]


def logits(work, model):
    with torch.inference_mode():
        return work.forward(model, work.calibration[0])


def shuffled(sizes, generator):
    """Every feature, head group and neuron in another order, heads and neurons another in each block."""

    def order(n):
        return torch.randperm(n, generator=generator)

    inside = {}
    for block in range(sizes.blocks):
        groups = order(sizes.kv_heads)
        queries = rows_of(queries_of(groups, sizes), sizes.head_dim)
        inside[block] = {HEADS: queries, KV: rows_of(groups, sizes.head_dim), FFN: order(sizes.ffn)}
    return Kept(range(sizes.blocks), order(sizes.width), inside)


def test_a_permutation_keeps_the_function(any_work):
    sizes = parent_sizes(any_work.model, "test")
    model = cut(any_work.model, "test", sizes, sizes, shuffled(sizes, torch.Generator().manual_seed(0)), True)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), any_work.model.parameters())]
    assert sum(changed) > len(changed) / 2
    torch.testing.assert_close(logits(any_work, model), logits(any_work, any_work.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_whole_sizes_are_the_identity(any_work, method):
    model = method(**WHOLE).apply(any_work.model, any_work)
    mine, theirs = model.state_dict(), any_work.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_model_can_be_cut_and_runs(any_work, method):
    model = method().apply(any_work.model, any_work)
    assert type(model) is type(any_work.model)
    assert logits(any_work, model).shape == logits(any_work, any_work.model).shape
    assert torch.isfinite(logits(any_work, model)).all()
    assert parent_sizes(model, "test") == method().sizes(parent_sizes(any_work.model, "test"))


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_what_it_saved(any_work, method, tmp_path):
    model = method().apply(any_work.model, any_work)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(any_work, again), logits(any_work, model))


def test_shares_are_rounded_to_whole_parts(work):
    before = parent_sizes(work.model, "test")
    assert [share_of(n, share) for n, share in ((3, 0.5), (4, 0.5), (9, 0.01), (7, 1.0))] == [2, 2, 1, 7]
    after = WeightSelection(width=0.75, heads=0.5, ffn=0.4, depth=0.5).sizes(before)
    assert after == dataclasses.replace(before, width=24, heads=2, kv_heads=1, ffn=19, blocks=2)


def test_sizes_that_no_model_of_the_kind_has_are_refused(work, make_work):
    with pytest.raises(UserError, match=r"no LlamaForCausalLM of width 25, heads 2.* not a multiple"):
        WeightSelection(width=25 / 32).apply(work.model)
    gpt2 = make_work("gpt2")
    with pytest.raises(UserError, match=r"width must be heads x 8"):
        WeightSelection(width=0.5, heads=0.25).apply(gpt2.model)


def test_impossible_sizes_are_refused_before_the_data_is_read(make_work, monkeypatch):
    gpt2 = make_work("gpt2")
    monkeypatch.setattr(gpt2, "forward", lambda *_: pytest.fail("it read the data"))
    with pytest.raises(UserError, match=r"width must be heads x 8"):
        WeightSubcloning(width=0.5, heads=0.25).apply(gpt2.model, gpt2)


class Counting(LlamaForCausalLM):
    """A model that stores a buffer."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(3))


def test_stored_buffers_come_along(work):
    model = Counting(work.model.config).eval()
    model.seen += 7
    assert WeightSelection().apply(model).seen.tolist() == [7, 7, 7]


def test_nothing_is_shared_with_the_parent(any_work):
    model = HyperCloning().apply_(any_work.model, None, {"": HyperCloning()})
    addresses = {t.data_ptr() for t in any_work.model.state_dict().values()}
    assert not addresses & {t.data_ptr() for t in model.state_dict().values()}


def test_indices_that_do_not_make_the_sizes_are_refused(work):
    sizes = parent_sizes(work.model, "test")
    kept = shuffled(sizes, torch.Generator())
    kept.width = kept.width[:-1]
    with pytest.raises(UserError, match="keeps 31 width of 32"):
        cut(work.model, "test", sizes, sizes, kept, True)
