import dataclasses

import pytest
import torch
from torch import nn

from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.metrics.roofline import LayerCost, distance, layer_costs, limit_ms

TOY = dataclasses.replace(
    Device.load("laptop"),
    cores=2,
    caches_bytes={"L2": 1000},
    bandwidth_gbps={"L2": (10.0, 20.0), "memory": (1.0, 1.0)},
    peak_gops={"fp32": 4.0, "int8": 16.0},
)


def test_linear():
    costs = layer_costs(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5, bias=False)), torch.ones(3, 10))
    assert costs == [
        LayerCost("0", 4 * (200 + 20), 4 * 3 * 30, 2 * 3 * 200, "fp32"),
        LayerCost("2", 4 * 100, 4 * 3 * 25, 2 * 3 * 100, "fp32"),
    ]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2), (2, 4, 33)),
        (nn.Conv2d(4, 6, (3, 1), padding=1), (2, 4, 9, 7)),
        (nn.Conv2d(8, 8, 3, groups=8, dilation=2), (1, 8, 12, 12)),
        (nn.Conv3d(2, 3, 2), (1, 2, 5, 5, 5)),
        (nn.Linear(7, 3), (2, 5, 7)),
    ],
)
def test_operations_agree_with_the_counter_of_torch(layer, shape):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.ones(shape)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    (cost,) = layer_costs(layer, x)
    assert cost.ops == counter.get_total_flops()
    assert cost.weight_bytes == sum(p.numel() * 4 for p in layer.parameters())


def test_arithmetic_follows_the_weights():
    (cost,) = layer_costs(nn.Linear(8, 8).bfloat16(), torch.ones(1, 8).bfloat16())
    assert (cost.dtype, cost.weight_bytes) == ("bf16", 2 * 72)


def test_an_embedding_moves_only_the_rows_it_looks_up():
    (cost,) = layer_costs(nn.Embedding(1000, 8), torch.zeros(2, 3, dtype=torch.long))
    assert (cost.weight_bytes, cost.ops) == (4 * 6 * 8, 0)


class Packed(nn.Module):
    """A packed layer with a plain one inside, as a fallback may have."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 16, 8
        self.inner = nn.Linear(16, 8)

    @property
    def weight_bytes(self):
        return 64

    def forward(self, x):
        return self.inner(x)


def test_a_packed_module_states_its_bytes_and_hides_what_is_inside():
    costs = layer_costs(nn.Sequential(Packed()), torch.ones(3, 16))
    assert costs == [LayerCost("0", 64, 4 * 3 * 24, 2 * 3 * 128, "int8")]
    Packed.compute_dtype = "fp32"
    assert layer_costs(Packed(), torch.ones(3, 16))[0].dtype == "fp32"


def test_a_language_model_counts_its_head_each_time(tiny_llama):
    costs = {c.name: c for c in layer_costs(tiny_llama, input_ids=torch.ones(1, 6, dtype=torch.long))}
    assert costs["lm_head"].weight_bytes == 4 * 64 * 32
    assert costs["model.embed_tokens"].weight_bytes == 4 * 6 * 32
    assert costs["model.layers.1.mlp.down_proj"].ops == 2 * 6 * 96 * 32
    assert len(costs) == 2 * 7 + 2


def test_hooks_are_gone_afterwards(tiny_cnn):
    x = torch.ones(1, 1, 16, 16)
    assert layer_costs(tiny_cnn, x) == layer_costs(tiny_cnn, x)
    with pytest.raises(RuntimeError):
        layer_costs(tiny_cnn, torch.ones(1, 7, 16, 16))
    assert all(not module._forward_hooks for module in tiny_cnn.modules())


def test_limit_of_a_bandwidth_bound_model():
    costs = [LayerCost("a", 4_000_000, 500, 1000, "fp32"), LayerCost("b", 6_000_000, 0, 1000, "fp32")]
    limit, bound = limit_ms(costs, TOY)
    assert bound == "bandwidth"
    assert limit == pytest.approx(10.0 + 500 / 20e9 * 1e3)  # weights from memory, activations from the cache
    assert limit_ms(costs, TOY, threads=1)[0] == pytest.approx(10.0 + 500 / 10e9 * 1e3)


def test_limit_of_a_compute_bound_model():
    assert limit_ms([LayerCost("a", 100, 0, 4_000_000, "fp32")], TOY) == (pytest.approx(1.0), "compute")
    assert limit_ms([LayerCost("a", 100, 0, 4_000_000, "int8")], TOY)[0] == pytest.approx(0.25)
    assert limit_ms([], TOY)[0] == 0


def test_distance():
    small = distance([LayerCost("a", 900, 0, 0, "fp32")], TOY, 1.0)
    large = distance([LayerCost("a", 10_000_000, 0, 0, "fp32")], TOY, 40.0)
    assert small.level == "L2"
    assert (large.level, large.bound, large.limit_ms) == ("memory", "bandwidth", pytest.approx(10.0))
    assert large.share_reached == pytest.approx(0.25)
    with pytest.raises(UserError, match="above zero"):
        distance([], TOY, 0.0)
