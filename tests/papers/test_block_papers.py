"""Parts of the experiments on blocks of networks, and their rules on made-up results that must and must not hold."""

import pytest
import torch

from lilliput.metrics.latency import Comparison
from lilliput.papers import flowhn, separable_attention
from lilliput.papers._healed import Effort as HealingEffort
from lilliput.papers._low_rank import Effort
from lilliput.papers.separable_attention import COARSE, CONTENDERS, CONVERTED, HEADS, SEPARABLE, TOKENS, Found


def speed(low):
    return Comparison(low + 0.1, low, low + 0.2, (1.0, 1.0), 10)


@pytest.mark.parametrize(
    ("lows", "powers", "points", "holds"),
    [
        ((1.5, 3.0), (1.0, 1.9), (-0.5, 0.1), True),
        ((0.9, 3.0), (1.0, 1.9), (-0.5, 0.1), False),
        ((1.5, 3.0), (1.9, 1.0), (-0.5, 0.1), False),
        ((1.5, 3.0), (1.0, 1.9), (-0.5, 0.3), False),
        ((1.5, 3.0), (1.0, 1.9), (2.0, 0.1), True),
    ],
)
def test_the_rule_of_separable_attention(lows, powers, points, holds):
    assert separable_attention.judge([speed(low) for low in lows], powers, points) is holds


def test_the_power_of_the_tokens_is_found():
    times = {n: {HEADS: [1e-6 * n * n] * 5, SEPARABLE: [1e-4 * n] * 5} for n in TOKENS}
    assert separable_attention.power(times, HEADS) == pytest.approx(2)
    assert separable_attention.power(times, SEPARABLE) == pytest.approx(1)
    found = {name: Found([80.0, 81.0, 82.0]) for name in CONTENDERS}
    nets_ms = {name: [1.0, 1.1, 1.2] for name in CONTENDERS}
    seen = separable_attention.evidence(found, times, nets_ms, 1.0, Effort(1, 1, 5, 3), 0, 0.0)
    assert seen.holds
    assert seen.row(f"layer, {HEADS}").values["ms_at_1024_tokens"] == pytest.approx(1.048576)


def test_every_contender_trains_and_is_timed(monkeypatch):
    effort = Effort(steps=20, test_pictures=50, rounds=3, seeds=1, batch_size=8)
    found = {name: Found() for name in CONTENDERS}
    separable_attention.compare(found, 0, 0.2, effort)
    kinds = {name: type(one.network.blocks[0].attn).__name__ for name, one in found.items()}
    assert kinds[HEADS] == kinds[COARSE] == "Attention"
    assert kinds[SEPARABLE] == kinds[CONVERTED] == "SeparableSelfAttention"
    assert found[HEADS].network.pos.shape[1] == 197
    assert found[COARSE].network.pos.shape[1] == 50
    times = separable_attention.network_times({name: one.network for name, one in found.items()}, 3, 0)
    assert all(len(taken) == 3 for taken in times.values())
    assert set(separable_attention.layer_times(64, 3, 0)) == {HEADS, SEPARABLE}
    assert torch.get_num_threads() >= 1


# --- FlowHN ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rival", "sequential_ms", "holds"), [(5.0, 2.0, True), (4.0, 2.0, False), (3.9, 2.0, False), (5.0, 0.9, False)]
)
def test_the_rule_of_flowhn(rival, sequential_ms, holds):
    noise = torch.linspace(-0.1, 0.1, 20)
    found = {name: flowhn.Found([5.0 + noise.flip(0)] * 2, [10, 20]) for name in flowhn.BLOCKS}
    found |= {flowhn.OURS: flowhn.Found([4.0 + noise] * 2, [10, 20])}
    found |= {flowhn.ALL_ATTENTION: flowhn.Found([rival + noise.flip(0)] * 2, [10, 20])}
    times = dict.fromkeys(flowhn.BLOCKS, [2.0] * 5) | {flowhn.OURS: [1.0] * 5, flowhn.SEQUENTIAL: [sequential_ms] * 5}
    seen = flowhn.evidence(found, times, 1.0, HealingEffort(0, 2), 0, 0.0)
    assert seen.holds is holds
    assert seen.row(flowhn.OURS).values["tokens_trained"] == 15


def test_contenders_have_about_as_many_weights():
    counts = {name: sum(p.numel() for p in flowhn.network(name, 8).blocks.parameters()) for name in flowhn.BLOCKS}
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_every_contender_of_flowhn_trains_and_is_timed(llama_work, monkeypatch):
    monkeypatch.setattr(flowhn, "DIM", 32)
    monkeypatch.setattr(flowhn, "LENGTH", 24)
    found = {name: flowhn.Found() for name in flowhn.BLOCKS}
    flowhn.compare(found, llama_work, 0.1, 0)
    assert all(len(one.losses[0]) == 8 and one.tokens[0] > 0 for one in found.values())
    times = flowhn.timed(found, 3, 0)
    assert set(times) == set(flowhn.BLOCKS)
    assert {"pass_ms_branches_in_one_thread", "pass_ms_branches_in_two_threads"} <= set(found[flowhn.OURS].values)
    blocks = found[flowhn.PARALLEL].network.blocks
    assert all(isinstance(block, flowhn.BothBlock) for block in blocks)
