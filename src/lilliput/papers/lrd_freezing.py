"""Sequential freezing and rank quantization: a low-rank network trained faster without smaller ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from lilliput.edits import set_module
from lilliput.methods.factorize._factors import factor_layer, ranks_for, shape_like
from lilliput.methods.factorize._freezing import SequentialFreezing
from lilliput.methods.factorize.targeted import Targeted
from lilliput.metrics.latency import wait_until_quiet
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._healed import said
from lilliput.papers._low_rank import (
    Contender,
    Effort,
    about_as_accurate,
    difference,
    fine_tune_,
    interleave,
    middle,
    pictures_work,
    served,
    setup,
    speedup,
    training_steps,
    weights,
)
from lilliput.training import Callback
from lilliput.workload import Workload
from lilliput.zoo import nets

paper = Paper(
    title="Training Acceleration of Low-Rank Decomposed Networks using Sequential Freezing and Rank Quantization",
    authors="Habib Hajimolahoseini, Walid Ahmed, Yang Liu",
    year=2023,
    arxiv="2309.03824",
    claim="Moving ranks to the device's steps and training one factor at a time speeds up decomposed networks without "
    "small ranks: up to 60 % more training and 37 % more inference throughput, accuracy close to the original's.",
    methods=("factorize.targeted", "factorize.tucker", "factorize.low_rank"),
)

RATIO = 0.6  # moderate ranks: the case the paper is about
Callbacks = Callable[[], list[Callback]]


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Dense, LRD, LRD with snapped ranks, with freezing, with both; at equal steps and at equal seconds.

    Holds when, on every network tried, both together train faster than plain LRD (95 % interval of the paired ratio of
    step times above 1) and are not 3 points less accurate than it after equally many steps.
    """
    effort = Effort(400, 10_000, 40, 3) if full else Effort(60, 1000, 7, 1)
    busy = wait_until_quiet()
    rows, verdicts, figures = [], [], []
    tried = ("resnet-small", "vit-small") if full else ("resnet-small",)
    for net in tried:
        found, steps_ms = _measure(net, seed, effort)
        rows += [contender.row(f"{net}: {name}") for name, contender in found.items()]
        ratio, points = speedup(steps_ms, "both", "LRD"), difference(found["both"], found["LRD"])
        verdicts.append(ratio.gain and about_as_accurate(found["both"], found["LRD"]))
        dense = speedup(steps_ms, "both", "dense")
        figures.append(f"{net}: both train {ratio} over LRD, {dense} over dense, {said(points, 2)} points vs LRD")
    return Evidence(
        setup=setup(f"{' and '.join(tried)}, ratio {RATIO}, training in torch float32", effort, seed, busy),
        rows=rows + staircase(effort),
        holds=all(verdicts),
        figure="; ".join(figures),
        limits="Short fine-tuning of trained weights; freezing works by turns of a quarter of the run, not of an "
        "epoch. The criterion for a step of the staircase is a reconstruction.",
    )


def _measure(net: str, seed: int, effort: Effort) -> tuple[dict[str, Contender], dict[str, list[float]]]:
    model = nets.load(net)
    work = pictures_work(model, seed, effort)
    lrd, snapped = decompose(model, work, snap=False), decompose(model, work, snap=True)
    networks = {"dense": model, "LRD": lrd, "+snap": snapped, "+freeze": lrd, "both": snapped}
    frozen = {"+freeze", "both"}

    def turns(period: int) -> Callbacks:
        return lambda: [SequentialFreezing(period=period)]

    runs = {n: training_steps(m, work, turns(1) if n in frozen else list) for n, m in networks.items()}
    steps_ms = interleave(runs, max(5, effort.rounds))
    served_ms = interleave({n: served(m, work) for n, m in networks.items() if n not in frozen}, max(10, effort.rounds))
    found = {}
    budget_s = effort.steps * middle(steps_ms["dense"])[0] / 2000
    for name, network in networks.items():
        callbacks = turns(max(1, effort.steps // 4)) if name in frozen else list
        found[name] = _tuned(network, callbacks, seed, effort, budget_s)
        found[name].values["training_step_ms"] = middle(steps_ms[name])[0] / 2
        found[name].spread["training_step_ms"] = middle(steps_ms[name])[1] / 2
        same_net = {"+freeze": "LRD", "both": "+snap"}.get(name, name)
        found[name].values["latency_ms"], found[name].spread["latency_ms"] = middle(served_ms[same_net])
    return found, steps_ms


def decompose(model: nn.Module, work: Workload, snap: bool) -> nn.Module:
    """Every layer that has a decomposition, at RATIO; with `snap` each rank is moved by the time of a training step."""
    model = copy.deepcopy(model)
    method = Targeted(ratio=RATIO, phase="train", snap=snap, margin=0.0, rounds=3)
    for row in method.choose(model, work, time_ms=None if snap else lambda module, shape: 1.0):
        layer = model.get_submodule(row.layer)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        set_module(model, row.layer, factor_layer(layer, row.ranks))
    return model


def _tuned(network: nn.Module, callbacks: Callbacks, seed: int, effort: Effort, budget_s: float) -> Contender:
    """Accuracy after equally many steps, and after as many seconds as the dense network needs for them."""
    right, timed = [], []
    for s in range(seed, seed + effort.seeds):
        work = pictures_work(network, s, effort)
        for results, steps, seconds in ((right, effort.steps, None), (timed, None, budget_s)):
            copied = copy.deepcopy(network)
            fine_tune_(copied, work, s, steps=steps, seconds=seconds, callbacks=callbacks())
            results.append(work.values(copied, "test"))
    at_equal_time = sum(float(r.mean()) for r in timed) / len(timed)
    return Contender(right, {"accuracy_at_equal_seconds_percent": at_equal_time, "weights": weights(network)}, {})


def staircase(effort: Effort, width: int = 96) -> list[Row]:
    """Milliseconds of a training step of one factored layer against its rank, on this machine."""
    layer = nn.Conv2d(width, width, 3, padding=1)
    clock = Targeted(phase="train").clock()
    shape = (effort.batch_size, width, 7, 7)
    top = ranks_for(layer, 1.0)[0]
    candidates = {rank: shape_like(layer, (rank, rank)) for rank in range(8, top + 1, 4)}
    times = interleave({str(r): lambda m=m: clock(m, shape) for r, m in candidates.items()}, max(5, effort.rounds // 4))
    rows = []
    for rank, milliseconds in times.items():
        median, spread = middle(milliseconds)
        rows.append(Row(f"rank {rank}", {"layer_training_ms": median}, {"layer_training_ms": spread}))
    return rows
