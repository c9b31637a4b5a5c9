"""Layers of seeds: their weights, products, bytes, and what is refused. The search is tested with its kernel."""

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.kernels import seed_linear as kernel
from lilliput.methods.quantize.seeds import SeedLinear, Seeds


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "columns"), [(4, 96), (3, 96), (4, 30), (3, 30)])
def test_a_layer_multiplies_with_weights_near_the_original(bits, columns):
    w, bias, x = gaussian(20, columns), gaussian(20), gaussian(2, 5, columns, seed=3)
    layer = SeedLinear.from_weight(w, bias, bits, candidates=4, pick=True)
    weights = kernel.reference(layer.codes, 20, columns, bits, layer.offset).float()
    torch.testing.assert_close(layer.dequantized(), weights)
    torch.testing.assert_close(layer(x), x @ weights.T + bias, rtol=1e-4, atol=1e-4)
    assert (weights - w).norm() < {4: 0.15, 3: 0.26}[bits] * w.norm()
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 3])
def test_exactly_so_many_bits_per_weight(bits):
    assert SeedLinear(96, 64, bits, 0).weight_bytes * 8 == bits * 96 * 64


def test_a_layer_builds_without_memory_exports_and_compiles():
    layer = SeedLinear.from_weight(gaussian(20, 64), None, 4, candidates=1, pick=False)
    with torch.device("meta"):
        again = SeedLinear(**layer.rebuild_config())
    again.load_state_dict(layer.state_dict(), assign=True)
    x = gaussian(3, 64)
    assert torch.equal(again(x), layer(x))
    model = nn.Sequential(layer)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert torch.equal(program.module()(gaussian(7, 64)), layer(gaussian(7, 64)))
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_wrong_sizes_and_weights_are_refused():
    for bad in ({"bits": 2}, {"offset": 91}, {"offset": -127}, {"in_features": 0}):
        with pytest.raises(UserError):
            SeedLinear(**({"in_features": 64, "out_features": 8, "bits": 4, "offset": 0} | bad))
    layer = SeedLinear(64, 8, 4, 0)
    layer.codes = layer.codes[:100]
    with pytest.raises(UserError, match="100 bytes"):
        layer(gaussian(1, 64))
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer '0': the weights are not"):
        Seeds().apply(model)
