"""ECHO-LLaMA: do layers that share keys and values keep a converted model's quality, and make its training faster?"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lilliput.methods.layers.kv_heads import KvHeads
from lilliput.methods.layers.shared_kv import SharedKv
from lilliput.metrics.latency import Comparison
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import (
    Effort,
    Found,
    close,
    heal,
    language_work,
    margin,
    note_original,
    said,
)
from lilliput.papers._low_rank import interleave, middle, speedup, training_steps
from lilliput.workload import Workload

paper = Paper(
    title="ECHO-LLaMA: Efficient Caching for High-Performance LLaMA Training",
    authors="Maryam Dialameh, Rezaul Karim, Hossein Rajabzadeh, Omar Mohamed Awad, Boxing Chen, Hyock Ju Kwon, "
    "Walid Ahmed, Yang Liu",
    year=2025,
    arxiv="2505.17331",
    claim="A Llama whose upper layers share the keys and values of one layer trains faster, needs less cache, and, "
    "converted step by step, keeps or improves its quality.",
    methods=("layers.shared_kv",),
)

ORIGINAL, OURS, AT_ONCE = "original", "shared keys and values, step by step", "shared keys and values, at once"
GROUPED = "half of the key-value heads (layers.kv_heads)"
UPPER = ("model.layers.5.self_attn", "model.layers.4.self_attn", "model.layers.3.self_attn")  # in order of conversion
TOLERATED = 0.05  # nats per token (5 % of perplexity) that count as keeping the quality
ROUNDS = 8  # interleaved timings


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """llama-tiny, whose upper three layers of six attend to the third layer's keys and values: half of its cache.

    Holds when, after equally many steps of distillation, the step-by-step conversion's test loss is not more than
    TOLERATED above the original's (two standard errors included), not above that of as small a cache by fewer
    key-value heads, and a training step is faster than the original's (whole interval). `full` heals longer, on three
    seeds.
    """
    effort = Effort(steps=600, seeds=3) if full else Effort(steps=48, seeds=1)
    found: dict[str, Found] = {}
    faster = None
    for s in range(seed, seed + effort.seeds):
        work = language_work("llama-tiny", effort, s)
        model = compare(found, work, effort, s)
        faster = faster or timed(found, work, model)
    assert faster is not None
    gains = {name: margin(found, OURS, name) for name in (ORIGINAL, GROUPED, AT_ONCE)}
    return Evidence(
        setup=f"llama-tiny, 3 of 6 layers share, one more every {effort.steps // 3} steps; State of the Union "
        f"addresses, {effort.steps} steps of 8 windows of {effort.length} tokens distilled, {effort.test_windows} "
        f"test windows, {effort.seeds} seeds from {seed}; {torch.get_num_threads()} threads, CPU",
        rows=[one.row(name) for name, one in found.items()],
        holds=judge(gains[ORIGINAL], gains[GROUPED], faster.low),
        figure=f"half the cache at {-gains[ORIGINAL][0]:+.3f} ± {gains[ORIGINAL][1]:.3f} nats per token; better than "
        f"half of the heads by {said(gains[GROUPED])}, than at once by {said(gains[AT_ONCE])}; a training step "
        f"{faster.ratio:.2f}x [{faster.low:.2f}, {faster.high:.2f}] as fast",
        limits="A model of 3 million parameters, converted and not trained from scratch, healed on less than half a "
        "million tokens of distillation. The order of the layers and the span's first layer, which keeps its own "
        "projections, are ours. At this size a training step is mostly feed-forward parts and vocabulary.",
    )


def judge(over_original: tuple[float, float], over_grouped: tuple[float, float], faster_low: float) -> bool:
    """The rule of `experiment`; margins are (nats per token by which ours is better, standard error)."""
    return close(over_original, TOLERATED) and over_grouped[0] >= 0 and faster_low > 1


def compare(found: dict[str, Found], work: Workload, effort: Effort, seed: int) -> nn.Module:
    """Every contender on one seed; ours."""
    note_original(found, ORIGINAL, work)
    heal(found, AT_ONCE, SharedKv().apply(work.model, layers=UPPER), work, effort, seed)
    heal(found, GROUPED, KvHeads(heads=1).apply(work.model, work), work, effort, seed)
    part = dataclasses.replace(effort, steps=effort.steps // len(UPPER))
    model = SharedKv().apply(work.model, layers=UPPER[:1])
    before, steps = {}, len(UPPER) - 1
    for i in range(steps):
        model = SharedKv().apply(heal(before, str(i), model, work, part, seed + i), layers=[UPPER[i + 1]])
    return heal(found, OURS, model, work, part, seed + steps)


def timed(found: dict[str, Found], work: Workload, model: nn.Module) -> Comparison:
    """Milliseconds of two training steps, in turn with the original; how many times as fast ours is."""
    runs = {name: training_steps(one, work) for name, one in ((ORIGINAL, work.model), (OURS, model))}
    times = interleave(runs, ROUNDS)
    for name, taken in times.items():
        found[name].values["two_training_steps_ms"] = middle(taken)[0]
    return speedup(times, OURS, ORIGINAL)
