"""What layers that borrow keys and values have of their own; the rest is tested with shared attention."""

import pytest
import torch
from span_models import build, names, work_of

from lilliput.methods.layers._span_layers import BorrowingAttention, LendingAttention, attended, mixed, probabilities
from lilliput.methods.layers.shared_kv import SharedKv


def test_by_default_the_last_quarter_borrows_and_no_data_is_needed():
    model = SharedKv().apply(build(num_hidden_layers=8))
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    assert kinds[-3:] == [LendingAttention, BorrowingAttention, BorrowingAttention]
    assert not set(kinds[:-3]) & {LendingAttention, BorrowingAttention}
    assert {name for name, _ in model.model.layers[7].self_attn.named_children()} == {"q_proj", "o_proj"}


def test_spans_where_attention_is_alike_may_be_several():
    work = work_of(build(num_hidden_layers=6))
    model = SharedKv(choice="similar", share=0.5).apply(work.model, work)
    assert sum(isinstance(layer.self_attn, BorrowingAttention) for layer in model.model.layers) == 3


def test_a_layer_that_made_the_same_keys_and_values_loses_nothing():
    work = work_of(build())
    layers = work.model.model.layers
    with torch.no_grad():
        layers[2].self_attn.o_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.zero_()
        for name in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm"):
            layers[3].get_submodule(name).load_state_dict(layers[2].get_submodule(name).state_dict())
    shared = SharedKv().apply(work.model, layers=names(3))
    for batch in work.test:
        torch.testing.assert_close(work.forward(shared, batch), work.forward(work.model, batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_in_one_call_is_that_by_probabilities(mask, queries):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, queries, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 7, 8, generator=generator)
    seen = torch.rand(2, 1, queries, 7, generator=generator) > 0.4
    seen[..., 0] = True
    given = {None: None, "bool": seen, "float": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}[mask]
    expected = mixed(probabilities(q, k, given, 0.4), v)
    torch.testing.assert_close(attended(q, k, v, given, 0.4), expected, rtol=1e-4, atol=1e-4)
