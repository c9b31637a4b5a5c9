"""What an option of a feed-forward net would damage and leave; nothing is timed for a modelled device."""

import numpy as np
import pytest
import torch
from torch import nn

from lilliput import Device, Workload
from lilliput.fitting.feedforward_space import ROUND_TO, _leaves_groups, feedforward_space
from lilliput.graph import coupled_channels
from lilliput.methods.prune.depth import removable_blocks
from lilliput.methods.quantize._qdq import Int8Conv2d
from lilliput.runtimes import find_runtime
from lilliput.zoo import nets


@pytest.fixture(scope="module")
def space():
    torch.manual_seed(0)
    batch = {"input": torch.randn(16, 1, 28, 28), "label": torch.zeros(16, dtype=torch.int64)}
    work = Workload.classifier(nets.resnet(width=16, depth=8, stem_stride=2).eval(), [batch], [batch], [batch])
    original = {"latency_ms": 1.0, "memory_bytes": 1e8}
    device = Device.load("raspberry-pi-4")
    return feedforward_space(work, ("quantize", "prune", "factorize"), original, 1, device, find_runtime("openvino"))


def channel_units(space):
    return [i for i, unit in enumerate(space.units) if unit.part == "channels"]


def kept(space, unit, option):
    return round(space.widths[unit] * space.left(unit, {unit: option}))


def test_channels_kept_are_whole_blocks_and_half_ones_where_few_are(space):
    for unit in channel_units(space):
        block = ROUND_TO if space.widths[unit] >= 2 * ROUND_TO else ROUND_TO // 2
        for option in range(1, len(space.units[unit].options)):
            left = kept(space, unit, option)
            assert left == space.widths[unit] or left % block == 0


def test_nothing_done_is_no_damage_and_more_is_never_less(space):
    for damage in space.damage:
        assert damage[0] == 0
        assert (np.diff(damage) >= 0).all()


def test_what_keeps_as_many_channels_does_the_same_damage(space):
    equal = 0
    for unit in channel_units(space):
        for a in range(len(space.units[unit].options)):
            for b in range(a):
                if kept(space, unit, a) == kept(space, unit, b):
                    assert space.damage[unit][a] == space.damage[unit][b]
                    equal += 1
    assert equal


def test_a_genome_is_tried_as_it_will_be_built(space):
    genome = space.uniform({"channels": "-50.0% channels", "bits": "int8"})
    model, damage = space.tried(genome)
    assert any(isinstance(m, Int8Conv2d) for m in model.modules())
    assert damage > space.tried((0,) * len(space.units))[1]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in space.workload.model.parameters())


def test_blocks_with_a_shortcut_can_go_and_take_their_layers_along(space):
    blocks = [unit for unit in space.units if unit.part == "block"]
    assert [unit.targets for unit in blocks] == [("blocks.0",)]  # the others change the resolution
    without = space.uniform({"block": "no block"})
    everything = space.uniform({"block": "no block", "channels": "-50.0% channels", "bits": "int8", "rank": "rank 50%"})
    inside = [i for i, u in enumerate(space.units) if all(name.startswith("blocks.0.") for name in u.targets)]
    assert inside
    assert all(space.effective(everything)[i] == 0 for i in inside)
    for genome in (without, everything):
        model = space.plan(genome).apply(space.workload)
        assert type(model.blocks[0]) is nn.Identity
        assert model(space.workload.example["input"]).shape == (1, 10)
    counts = [space.costs(genome)["latency_ms"] for genome in ((0,) * len(space.units), without)]
    assert counts[1] < counts[0]
    gone = sum(p.numel() for name, p in space.workload.model.blocks[0].named_parameters() if "conv" in name)
    assert space.costs((0,) * len(space.units))["size_bytes"] - space.costs(without)["size_bytes"] == 4 * gone
    padded = tuple(2 if i in inside else g for i, g in enumerate(without))
    assert space.predicted_damage(padded) == space.predicted_damage(without)


def test_without_a_shortcut_a_block_stays():
    torch.manual_seed(0)
    batch = {"input": torch.randn(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.int64)}
    plain = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(*plain), nn.Flatten(), nn.Linear(288, 10)).eval()
    assert removable_blocks(net) == ["1.0", "1.1"]
    work = Workload.classifier(net, [batch], [batch], [batch])
    groups = coupled_channels(net, work.example, work.forward)
    assert not any(_leaves_groups(work, name, groups) for name in removable_blocks(net))


def test_nothing_was_timed_for_a_device_that_is_not_here(space):
    assert space.timed == {}
    assert space.costs((0,) * len(space.units))["latency_ms"] > 0
