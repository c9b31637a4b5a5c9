"""Factored layers: equal to the layer at full rank, recognised, and put together again."""

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.factorize._factors import (
    branches_for,
    compose_layer,
    factor_layer,
    factored_layers,
    is_factored,
    is_plain_conv,
    own_names,
    ranks_for,
    shape_like,
)

LAYERS = {
    "linear": (nn.Linear(10, 6), (2, 5, 10)),
    "linear-no-bias": (nn.Linear(6, 10, bias=False), (3, 6)),
    "conv": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    "stride-dilation": (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, bias=False), (2, 4, 11, 11)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 7, 7)),
    "row-kernel": (nn.Conv2d(5, 4, (1, 5), padding=(0, 2), stride=(1, 2)), (1, 5, 6, 8)),
    "pointwise": (nn.Conv2d(6, 9, 1, stride=2), (2, 6, 7, 7)),
    "padded-pointwise": (nn.Conv2d(6, 4, 1, padding=1), (1, 6, 5, 5)),
}


def full_ranks(layer):
    out, inp = layer.weight.shape[:2]
    matrix = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    return (min(out, inp),) if matrix else (out, inp)


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_reproduces_the_layer(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    torch.testing.assert_close(factor_layer(layer, full_ranks(layer))(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("branches", [1, 2])
def test_composition_is_one_layer_that_computes_the_same(name, branches):
    layer, shape = LAYERS[name]
    branches = branches_for(layer, branches)
    factors = factor_layer(layer, ranks_for(layer, 0.7, branches=branches), branches)
    x = torch.randn(shape)
    composed = compose_layer(factors)
    assert type(composed) is type(layer)
    assert composed.weight.shape == layer.weight.shape
    torch.testing.assert_close(composed(x), factors(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_noise_of_the_same_shapes_for_timing(name):
    layer, shape = LAYERS[name]
    ranks = ranks_for(layer, 0.5)
    real, noise = factor_layer(layer, ranks), shape_like(layer, ranks)
    assert [p.shape for p in real.parameters()] == [p.shape for p in noise.parameters()]
    assert noise(torch.randn(shape)).shape == layer(torch.randn(shape)).shape


def test_ranks_can_be_multiples_and_divide_into_branches():
    layer = nn.Conv2d(48, 96, 3)
    assert all(r % 16 == 0 for r in ranks_for(layer, 0.5, multiple=16))
    assert all(r % 4 == 0 for r in ranks_for(layer, 0.3, branches=4))
    assert branches_for(nn.Conv2d(3, 96, 3), 8) == 3
    assert branches_for(nn.Linear(8, 8), 4) == 1


def test_what_is_and_is_not_factored():
    conv = factor_layer(nn.Conv2d(6, 8, 3), (3, 3))
    assert is_factored(conv)
    assert is_factored(factor_layer(nn.Linear(8, 8), (2,)))
    assert not is_factored(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert not is_factored(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert not is_factored(nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 3, 1)))
    assert list(factored_layers(nn.ModuleDict({"a": nn.ReLU(), "b": conv}))) == ["b"]
    with pytest.raises(UserError, match="ReLU"):
        compose_layer(nn.Sequential(nn.ReLU(), nn.ReLU()))


def test_shared_weights_and_factors_are_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["f"] = factor_layer(nn.Linear(8, 8), (2,))
    assert [n for n in own_names(model) if n] == ["c", "f"]


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_grouped_and_specially_padded_convolutions_are_no_targets(options):
    assert not is_plain_conv(nn.Conv2d(4, 4, 3, **options))
