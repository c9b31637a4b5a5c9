"""The space of a feed-forward net: whole blocks, channels per coupled group, ranks and 8 bits per layer, all joint.

Latency is linear in what a genome leaves (operations and layers by precision and by being factored), with coefficients
learnt from genomes that are really built and timed on the serving runtime: the uniform ones, random ones, and later the
candidates. On a modelled device it is that device's roofline.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from lilliput.anatomy import anatomy, convolutions, linears
from lilliput.cache import folder, write_atomically
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.fitting.judge import Judge
from lilliput.fitting.predict import nonnegative_fit
from lilliput.fitting.quick import quick_model, quick_products, reestimate_norms_
from lilliput.fitting.recover import all_cores, parts_around_recovery
from lilliput.fitting.sensitivity import fingerprint, read_known
from lilliput.fitting.space import Genome, Option, Space, Unit
from lilliput.graph import Group, coupled_channels, kept_count
from lilliput.measuring import compare_copies
from lilliput.method import Method
from lilliput.methods.factorize.tucker import Tucker
from lilliput.methods.prune.channels import Channels
from lilliput.methods.prune.depth import Depth, removable_blocks, to_identities_
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.metrics import roofline
from lilliput.plan import Plan, Step
from lilliput.runtimes import Runtime
from lilliput.workload import Batch, Workload

CHANNELS = (0.125, 0.25, 0.375, 0.5)
RANKS = (0.75, 0.5, 0.35)
ROUND_TO = 16  # channels kept are a multiple of this, the block that 8-bit convolutions work in; of half where few are
UNIFORM = {
    "int8 everywhere": {"bits": "int8"},
    **{f"-{r:.1%} channels, int8": {"channels": f"-{r:.1%} channels", "bits": "int8"} for r in CHANNELS},
    "rank 50%, int8": {"rank": "rank 50%", "bits": "int8"},
}
FEATURES = (
    "fixed",
    "float operations",
    "int8 operations",
    "operations of factors",
    "activations",
    "float layers",
    "int8 layers",
    "changes",
)  # of the latency model
BITS = (1.0, 1.0, 0.0, 1.0, 0.5)  # share of the layers in 8 bits, in turn: mostly all, as in good settings
NORM_BATCHES = 1  # of calibration data for the statistics of batch norms
TYPICAL = 0.25  # share of the channels of other units that are gone while a unit's are judged
HARMLESS = 0.01  # nats of int8 in all layers together
PROBES = 16  # genomes that teach the latency


@dataclass
class _Layer:
    """One convolution or linear layer: cost of the original and the units that decide over it (-1 for none)."""

    name: str
    ops: float
    weights: int
    activations: float  # bytes read and written
    int8_unit: int
    rank_unit: int
    out_unit: int
    in_unit: int


@dataclass
class FeedforwardSpace(Space):
    """A search space over convolutional nets, vision transformers and encoders."""

    layers: list[_Layer] = field(default_factory=list)
    widths: dict[int, int] = field(default_factory=dict)  # channel unit -> channels
    coefficients: np.ndarray = field(default_factory=lambda: np.zeros(len(FEATURES)))
    fixed_bytes: float = 0.0
    device: Device | None = None  # set when latency is modelled
    workload: Workload | None = None
    judge: Judge | None = None  # on a little calibration data
    threads: int = 1

    def dropped(self, genome: Genome) -> list[str]:
        """Names of the blocks that go as a whole."""
        return [u.targets[0] for u, choice in zip(self.units, genome) if choice and u.part == "block"]

    def effective(self, genome: Genome) -> Genome:
        """The genome without choices for layers that all are in blocks that go."""
        gone = self.dropped(genome)
        if not gone:
            return genome
        return tuple(0 if _inside(unit.targets, gone) else choice for unit, choice in zip(self.units, genome))

    def plan(self, genome: Genome) -> Plan:
        """As for any space; layers in blocks that go are named by no later step."""
        gone, steps = self.dropped(genome), super().plan(self.effective(genome)).steps
        if not gone:
            return Plan(steps)
        return Plan(
            [
                Step(s.method, {name: own for name, own in (s.layers or {}).items() if not _inside([name], gone)})
                for s in steps
            ]
        )

    def predicted_damage(self, genome: Genome) -> dict[str, float]:
        return super().predicted_damage(self.effective(genome))

    def left(self, unit: int, genome: Genome | Mapping[int, int]) -> float:
        """Share of a unit's channels that stay."""
        method = self.units[unit].options[genome[unit]].method if unit >= 0 else None
        if not isinstance(method, Channels):
            return 1.0
        return kept_count(self.widths[unit], method.ratio, method.round_to) / self.widths[unit]

    def rows(self, genome: Genome) -> list[tuple[bool, float, float, int, float]]:
        """(int8?, operations, weights, how many layers, bytes of activations) of what becomes of each layer."""
        found, gone = [], self.dropped(genome)
        for layer in self.layers:
            if gone and _inside([layer.name], gone):
                continue
            outputs, inputs = self.left(layer.out_unit, genome), self.left(layer.in_unit, genome)
            share, moved = outputs * inputs, layer.activations * (outputs + inputs) / 2
            rank = self.units[layer.rank_unit].options[genome[layer.rank_unit]].method if layer.rank_unit >= 0 else None
            parts = 1
            if isinstance(rank, Tucker):
                share, parts = share * rank.ratio, 3
                moved *= 1 + 2 * rank.ratio**0.5  # the ranks are about the root of the kept share
            int8 = layer.int8_unit >= 0 and genome[layer.int8_unit] != 0
            found.append((int8, layer.ops * share, layer.weights * share, parts, moved))
        return found

    def features(self, genome: Genome) -> np.ndarray:
        """One number for each of `FEATURES`; operations are counted in 1e9, changes between float and int8 layers."""
        rows = self.rows(genome)
        changes = sum(a[0] is not b[0] for a, b in pairwise(rows))
        kinds = (lambda r: r[3] == 1 and not r[0]), (lambda r: r[3] == 1 and r[0]), (lambda r: r[3] > 1)
        ops = [sum(r[1] for r in rows if is_kind(r)) / 1e9 for is_kind in kinds]
        layers = [sum(r[3] for r in rows if r[0] is int8) for int8 in (False, True)]
        return np.array([1.0, *ops, sum(r[4] for r in rows) / 1e6, *layers, changes])

    def tried(self, genome: Genome) -> tuple[nn.Module, float]:
        assert self.workload
        assert self.judge
        light = dataclasses.replace(self.workload, calibration=self.workload.calibration[:1])
        plan = self.plan(genome)
        model = quick_model(plan, light, self._norm_batches())
        with quick_products(model, not parts_around_recovery(plan)[1]):  # 8-bit products need all digits
            return model, max(0.0, self.judge.judge(model).damage)

    def judge_norms(self) -> float:
        """Damage of new statistics alone."""
        assert self.workload
        assert self.judge
        model = copy.deepcopy(self.workload.model)
        reestimate_norms_(model, self.workload, self._norm_batches())
        with quick_products(model):
            return max(0.0, self.judge.judge(model).damage)

    def key(self, unit: int, option: int) -> str:
        """What an option does to a unit; two that keep as many channels do the same."""
        method = self.units[unit].options[option].method
        if self.units[unit].part == "block":
            return f"{self.units[unit].name}, others {TYPICAL:.1%} less: {'gone' if option else 'there'}"
        if self.units[unit].part != "channels":
            return f"{self.units[unit].name}, new norms: {method!r}"
        left = round(self.widths[unit] * self.left(unit, {unit: option}))
        return f"{self.units[unit].name}, others {TYPICAL:.1%} less: {left} left"

    def _norm_batches(self) -> list[Batch]:
        assert self.workload
        return list(self.workload.calibration[-NORM_BATCHES:])

    def learn(self, measured: Sequence[tuple[Genome, Mapping[str, float]]]) -> None:
        times = {genome: costs["latency_ms"] for genome, costs in measured if "latency_ms" in costs}
        if self.device is None and times:
            ms = np.array(list(times.values()))
            design = np.stack([self.features(genome) for genome in times])
            self.coefficients = nonnegative_fit(design / ms[:, None], np.ones(len(ms)))

    def cost_parts(self, genome: Genome) -> dict[str, dict[str, float]]:
        rows = self.rows(genome)
        weights = sum(w * (1 if int8 else 4) for int8, _, w, *_ in rows)
        ms: dict[str, float]
        if self.device is None:
            ms = dict(zip(FEATURES, (self.features(genome) * self.coefficients).tolist()))
        else:
            layers = [(w * (1 if int8 else 4), ops, "int8" if int8 else "fp32") for int8, ops, w, *_ in rows]
            ms = {"all": self.device.predict_latency(layers, self.threads)}
        return {
            "latency_ms": ms,
            "memory_bytes": {"weights": weights, "fixed": self.fixed_bytes},
            "size_bytes": {"weights": weights},
        }


def feedforward_space(
    workload: Workload,
    families: Sequence[str],
    original: Mapping[str, float],
    threads: int,
    device: Device,
    runtime: Runtime,
    progress: Callable[[str], None] = lambda text: None,
) -> FeedforwardSpace:
    """Units, measured damage of each option alone, and a latency model taught by `PROBES` timed genomes."""
    space = FeedforwardSpace([], rivals=UNIFORM)
    space.threads, space.workload = threads, workload
    space.judge = Judge(dataclasses.replace(workload, calibration=workload.calibration[:1]), "calibration")
    groups = _add_prune_units(space, workload) if "prune" in families else {}
    _add_layer_units(space, workload, families, groups)
    if not space.units:
        raise UserError(f"the families {', '.join(families)} change nothing in this model; name others")
    progress("judging options")
    with all_cores():
        space.damage = _damages(workload, space, progress)
    if device.measured:
        space.timed = _probed(space, workload, runtime, threads, original["latency_ms"], progress)
        space.learn(list(space.timed.items()))
    else:
        space.device = device
    space.fixed_bytes = original["memory_bytes"] - space.costs((0,) * len(space.units))["size_bytes"]
    return space


def _inside(names: Sequence[str], blocks: Sequence[str]) -> bool:
    """Whether all the modules are within one of the blocks each."""
    return all(any(name.startswith(f"{block}.") for block in blocks) for name in names)


def _add_prune_units(space: FeedforwardSpace, workload: Workload) -> dict[tuple[str, str], int]:
    """One unit per block that can go and per prunable group; returns (module, side) -> unit of channels."""
    groups = coupled_channels(workload.model, workload.example, workload.forward)
    blocks = [name for name in removable_blocks(workload.model) if _leaves_groups(workload, name, groups)]
    blocks = blocks[1:] if anatomy(workload.model).blocks else blocks  # a transformer keeps one
    gone = Option("no block", Depth(blocks=len(blocks)))
    space.units += [Unit(f"{name} block", (name,), (Option("the block"), gone), None, "block") for name in blocks]
    return _add_channel_units(space, workload, groups)


def _leaves_groups(workload: Workload, block: str, groups: Sequence[Group]) -> bool:
    """Whether the net without the block has the same groups of channels, but for the block's own: then a shortcut goes
    around it, and channels can be cut with and without it alike."""
    smaller = to_identities_(copy.deepcopy(workload.model), [block])
    left = coupled_channels(smaller, workload.example, workload.forward)
    outside = [frozenset(side for side in group.layers if not _inside([side[0]], [block])) for group in groups]
    return {frozenset(group.layers) for group in left} == {sides for sides in outside if sides}


def _add_channel_units(
    space: FeedforwardSpace, workload: Workload, groups: Sequence[Group]
) -> dict[tuple[str, str], int]:
    can = set(Channels().targets(workload.model))
    sides: dict[tuple[str, str], int] = {}
    for group in groups:
        targets = tuple(name for name in group.producers() if name in can)
        unit = ROUND_TO if group.channels >= 2 * ROUND_TO else ROUND_TO // 2
        if not (group.prunable and targets and group.channels >= 2 * unit):
            continue
        choices = [Option(f"-{r:.1%} channels", Channels(ratio=r, round_to=unit)) for r in CHANNELS]
        space.units.append(
            Unit(f"{group.name} channels", targets, (Option("all channels"), *choices), None, "channels")
        )
        space.widths[len(space.units) - 1] = group.channels
        sides |= dict.fromkeys(group.layers, len(space.units) - 1)
    return sides


def _add_layer_units(space: FeedforwardSpace, workload: Workload, families: Sequence[str], groups) -> None:
    model = workload.model
    costs = {c.name: c for c in roofline.layer_costs(model, *_inputs(workload))}
    can_rank, can_int8 = set(_targets(Tucker(), model, families)), set(_targets(Int8Static(), model, families))
    for name in [n for n, _ in model.named_modules() if n in {*convolutions(model), *linears(model)} and n in costs]:
        rank = int8 = -1
        if name in can_rank:
            options = (Option("full rank"), *(Option(f"rank {r:.0%}", Tucker(ratio=r, snap=ROUND_TO)) for r in RANKS))
            space.units.append(Unit(f"{name} rank", (name,), options, None, "rank"))
            rank = len(space.units) - 1
        if name in can_int8:
            options = (Option("float32"), Option("int8", Int8Static()))
            space.units.append(Unit(f"{name} bits", (name,), options, None, "bits"))
            int8 = len(space.units) - 1
        count = model.get_submodule(name).weight.numel()  # type: ignore[union-attr]
        out_unit, in_unit = groups.get((name, "out"), -1), groups.get((name, "in"), -1)
        if out_unit == in_unit:  # depthwise: one width, counted once
            in_unit = -1
        cost = costs[name]
        space.layers.append(
            _Layer(name, float(cost.ops), count, float(cost.activation_bytes), int8, rank, out_unit, in_unit)
        )


def _targets(method: Method, model: nn.Module, families: Sequence[str]) -> list[str]:
    return list(method.targets(model)) if method.facts.stage in families else []


def _inputs(workload: Workload) -> list[torch.Tensor]:
    return [v[:1] for k, v in workload.example.items() if k != "label"]


def _damages(workload: Workload, space: FeedforwardSpace, progress: Callable[[str], None]) -> list[np.ndarray]:
    """Each option judged on the calibration data, channels and blocks among others that are cut by `TYPICAL`: alone
    they seem harmless that together are not. Kept in the cache by the model's hash."""
    path = folder("sensitivity") / f"{fingerprint(workload.model, workload.calibration[:1])}.json"
    known = read_known(path)
    none, typical = (0,) * len(space.units), space.uniform({"channels": f"-{TYPICAL:.1%} channels"})
    alone, each_int8 = space.judge_norms(), _harmless_int8(space, known)
    found = []
    for index, unit in enumerate(space.units):
        if unit.part == "bits" and each_int8 is not None:
            found.append(np.array([0.0, each_int8]))
            continue
        progress(f"judging {unit.name}")
        structural = unit.part in ("channels", "block")
        damages = []
        for option in range(0 if structural else 1, len(unit.options)):
            key = space.key(index, option)
            if key not in known:
                context = typical if structural else none
                known[key] = space.tried(tuple(option if i == index else c for i, c in enumerate(context)))[1]
            damages.append(known[key])
        floor = damages.pop(0) if structural else alone * (unit.part == "rank")
        found.append(np.maximum.accumulate([0.0, *(damage - floor for damage in damages)]))
    write_atomically(path, json.dumps(known).encode())
    return found


def _harmless_int8(space: FeedforwardSpace, known: dict[str, float]) -> float | None:
    """Each layer's share of the damage of int8 everywhere, when that is too little to judge layers one by one."""
    genome = space.uniform({"bits": "int8"})
    if not any(genome):
        return None
    if "int8 everywhere" not in known:
        known["int8 everywhere"] = space.tried(genome)[1]
    together = known["int8 everywhere"]
    return together / sum(genome) if together < HARMLESS else None


def _probed(
    space: FeedforwardSpace, workload: Workload, runtime: Runtime, threads: int, original_ms: float, progress
) -> dict[Genome, dict[str, float]]:
    """Latency and quickly judged damage of the uniform settings and of random genomes."""
    light = dataclasses.replace(workload, calibration=workload.calibration[:1])
    generator = np.random.default_rng(0)
    genomes = [(0,) * len(space.units), *(space.uniform(wanted) for wanted in space.rivals.values())]
    while len(genomes) < PROBES:
        density = generator.uniform(0.1, 0.9, 3)
        share = {
            "channels": density[0],
            "rank": density[1] / 3,
            "block": density[2] / 3,
            "bits": BITS[len(genomes) % len(BITS)],
        }
        take = [generator.random() < share[u.part] for u in space.units]
        genomes.append(tuple(int(generator.integers(1, len(u.options))) if t else 0 for u, t in zip(space.units, take)))
    times, reference = {}, runtime.prepare(workload.model, light, threads)
    for number, genome in enumerate(dict.fromkeys(genomes)):
        progress(f"timing setting {number + 1} of {len(genomes)}")
        with all_cores():
            model, damage = space.tried(genome)
        session = runtime.prepare(model, light, threads)
        latency_ms = original_ms / compare_copies(light, reference, session).ratio
        times[genome] = {"latency_ms": latency_ms, "damage": damage}
    return times
