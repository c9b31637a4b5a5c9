"""Accelerating low-rank networks by restructuring: ranks, freezing, merging and branching, alone and together."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from lilliput.edits import set_module
from lilliput.methods.distill.logits import distillation_loss
from lilliput.methods.factorize._clock import Clock, openvino_inference
from lilliput.methods.factorize._factors import (
    branches_for,
    compose_layer,
    factor_layer,
    factored_layers,
    is_pointwise,
    ranks_for,
)
from lilliput.methods.factorize._freezing import SequentialFreezing
from lilliput.methods.factorize.merged import Merged
from lilliput.methods.factorize.targeted import snap_ranks
from lilliput.methods.factorize.tucker import Tucker
from lilliput.methods.prune.channels import Channels
from lilliput.metrics.latency import measure, wait_until_quiet
from lilliput.moments import input_shapes
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import said
from lilliput.papers._low_rank import (
    Contender,
    Effort,
    about_as_accurate,
    depth,
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
    title="Accelerating the Low-Rank Decomposed Models",
    authors="Habib Hajimolahoseini, Walid Ahmed, Austin Wen, Yang Liu",
    year=2024,
    arxiv="2407.20266",
    claim="Low-rank networks gain speed by restructuring instead of smaller ranks: ranks at the device's steps, frozen "
    "outer factors, 1x1 layers merged into their neighbours, cores in branches; large cuts with a small accuracy loss.",
    methods=("factorize.tucker", "factorize.merged", "factorize.targeted"),
)

NET, RATIO, BRANCHES = "bottleneck-resnet-small", 0.6, 4
SWITCHES = ("ranks", "freezing", "merging", "branching")
LRD, ALL, PRUNED = "LRD", "all four", "pruned to equal latency"


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """The 3x3 convolutions of a bottleneck network by Tucker, with each switch alone and with all four.

    Holds when all four together serve faster than plain LRD and than the undecomposed network (95 % intervals above
    1), and are not 3 points less accurate than plain LRD after equal fine-tuning.
    """
    effort = Effort(500, 10_000, 60, 3) if full else Effort(60, 1000, 30, 1)
    busy = wait_until_quiet()
    model = nets.load(NET)
    work = pictures_work(model, seed, effort)
    switched: dict[str, tuple[str, ...]] = {LRD: (), **{s: (s,) for s in SWITCHES}, ALL: SWITCHES}
    networks = {"dense": model, **{name: build(model, work, switches) for name, switches in switched.items()}}
    networks[PRUNED] = prune_to(model, work, networks[ALL])
    served_ms = interleave({n: served(m, work) for n, m in networks.items()}, effort.rounds)
    steps = {n: training_steps(m, work, lambda n=n: callbacks_of(switched.get(n, ()))) for n, m in networks.items()}
    steps_ms = interleave(steps, max(5, effort.rounds // 6))
    found = {n: _tuned(m, switched.get(n, ()), seed, effort) for n, m in networks.items()}
    if full:
        found["progressive to half the ratio, distilled"] = _progressive_row(model, seed, effort)
        found["LRD at half the ratio"] = _tuned(build(model, work, (), RATIO / 2), (), seed, effort)
    for name in networks:
        latency_ms, spread = middle(served_ms[name])
        found[name].values |= {"latency_ms": latency_ms, "images_per_s": 1000 * effort.served_batch / latency_ms}
        found[name].spread["latency_ms"] = spread
        found[name].values["training_step_ms"] = middle(steps_ms[name])[0] / 2
    return _evidence(found, served_ms, effort, seed, busy)


def build(model: nn.Module, work: Workload, switches: Iterable[str], ratio: float = RATIO) -> nn.Module:
    """A copy whose 3x3 bottleneck convolutions are Tucker factors, restructured by the switches."""
    model, switches = copy.deepcopy(model), set(switches)
    names = [n for n in Tucker().targets(model) if n.endswith("conv2")]
    shapes = input_shapes(model, work, names, work.example)
    clock = Clock(openvino_inference)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        ranks = ranks_for(layer, ratio)
        if "ranks" in switches:
            ranks = snap_ranks(layer, ranks, shapes[name], clock, rounds=5)
        branches = branches_for(layer, BRANCHES) if "branching" in switches else 1
        ranks = tuple(max(1, r // branches) * branches for r in ranks)
        set_module(model, name, factor_layer(layer, ranks, branches))
    return Merged(norms="move").apply(model, work) if "merging" in switches else model


def callbacks_of(switches: Iterable[str]) -> list[Callback]:
    """Freezing throughout, when that switch is on."""
    return [SequentialFreezing(around_cores)] if "freezing" in switches else []


def around_cores(model: nn.Module) -> list[list[str]]:
    """Every 1x1 weight beside a core: the outer factors, or, after merging, the layers they were multiplied into."""
    outer = [f"{name}.{i}.weight" for name in factored_layers(model) for i in (0, 2)]
    blocks = [n.removesuffix(".conv2") for n, m in model.named_modules() if n.endswith(".conv2") and is_merged(m)]
    return [outer + [f"{block}.{conv}.weight" for block in blocks for conv in ("conv1", "conv3")]]


def is_merged(module: nn.Module) -> bool:
    """Whether only the core is left of a Tucker layer."""
    children = list(module.children())
    if type(module) is not nn.Sequential or len(children) != 3 or is_pointwise(children[1]):
        return False
    return isinstance(children[0], nn.Identity) and isinstance(children[2], nn.Identity)


def prune_to(model: nn.Module, work: Workload, rival: nn.Module) -> nn.Module:
    """The least channel-pruned network that serves as fast as `rival`, by steps of a twentieth."""
    limit_ms = measure(served(rival, work)).median_ms
    pruned = model
    for percent in range(5, 95, 5):
        pruned = Channels(ratio=percent / 100).apply(model, work)
        if measure(served(pruned, work), min_seconds=0.3).median_ms <= limit_ms:
            break
    return pruned


def _tuned(network: nn.Module, switches: Iterable[str], seed: int, effort: Effort) -> Contender:
    right = []
    for s in range(seed, seed + effort.seeds):
        copied, work = copy.deepcopy(network), pictures_work(network, s, effort)
        fine_tune_(copied, work, s, steps=effort.steps, callbacks=callbacks_of(switches))
        right.append(work.values(copied, "test"))
    return Contender(right, {"depth": depth(network), "weights": weights(network)}, {})


def _progressive_row(model: nn.Module, seed: int, effort: Effort) -> Contender:
    right, network = [], model
    for s in range(seed, seed + effort.seeds):
        work = pictures_work(model, s, effort)
        network = progressive(model, work, (RATIO, 0.75 * RATIO, RATIO / 2), s, effort.steps)
        right.append(work.values(network, "test"))
    return Contender(right, {"depth": depth(network), "weights": weights(network)}, {})


def progressive(model: nn.Module, work: Workload, ratios: tuple[float, ...], seed: int, steps: int) -> nn.Module:
    """Decompose in stages of falling ratio, each taught by the stage before it; `steps` of training in all."""
    teacher, student = model, build(model, work, (), ratios[0])
    for stage, ratio in enumerate(ratios):
        if stage:
            student = tighten(teacher, ratio)

        def loss(network: nn.Module, batch, teacher=teacher) -> torch.Tensor:
            with torch.no_grad():
                taught = work.forward(teacher.eval(), batch)
            logits = work.forward(network, batch)
            hard = nn.functional.cross_entropy(logits, batch["label"])
            return 0.5 * hard + 0.5 * distillation_loss(logits, taught, 2.0)

        fine_tune_(student, work, seed + stage, steps=steps // len(ratios), loss=loss)
        teacher = student
    return student


def tighten(model: nn.Module, ratio: float) -> nn.Module:
    """A copy whose factored layers are composed and decomposed again at a smaller ratio."""
    model = copy.deepcopy(model)
    for name, factors in factored_layers(model).items():
        layer = compose_layer(factors)
        set_module(model, name, factor_layer(layer, ranks_for(layer, ratio)))
    return model


def _evidence(found: dict[str, Contender], served_ms, effort: Effort, seed: int, busy: float) -> Evidence:
    over_lrd, over_dense = speedup(served_ms, ALL, LRD), speedup(served_ms, ALL, "dense")
    over = {name: said(difference(found[ALL], found[name]), 2) for name in (LRD, PRUNED)}
    return Evidence(
        setup=setup(f"{NET}, 3x3 layers at ratio {RATIO}, {BRANCHES} branches", effort, seed, busy),
        rows=[contender.row(name) for name, contender in found.items()],
        holds=bool(over_lrd.gain and over_dense.gain and about_as_accurate(found[ALL], found[LRD])),
        figure=f"all four: {over_lrd} over LRD, {over_dense} over dense, {over[LRD]} points against LRD, "
        f"{over[PRUNED]} against channel pruning of equal latency",
        limits="Only the 3x3 layers of a small network are decomposed, and fine-tuning is short; the side that norms "
        "move to and the staircase criterion are reconstructions.",
    )
