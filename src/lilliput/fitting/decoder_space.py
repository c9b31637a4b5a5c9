"""The space of a decoder: formats per projection group, FFN neurons per block, ranks of the FFN, whole blocks.

Costs are sums over the linear layers that a genome leaves: milliseconds from the latency table, bytes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from lilliput.anatomy import Anatomy, Block, anatomy
from lilliput.device import Device
from lilliput.fitting.decoder_formats import FLOAT, FORMATS, held_bytes, stored_bytes
from lilliput.fitting.latency_table import ModelledTable, latency_table
from lilliput.fitting.sensitivity import option_damages
from lilliput.fitting.space import Genome, Option, Space, Unit
from lilliput.graph import kept_count
from lilliput.method import Method
from lilliput.methods.factorize._ranks import snap_to_multiple, svd_rank
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.prune.depth import Depth
from lilliput.methods.prune.neurons import Neurons
from lilliput.plan import Plan, Step
from lilliput.workload import Workload

NEURONS = (0.0, 0.125, 0.25, 0.375, 0.5)
RANKS = (0.75, 0.5)
SNAP = 16  # ranks are multiples of it: the second factor's inputs fill whole bytes in any format
KEEP, DROP = "keep", "drop"
UNIFORM = ("int8", "int4 g32", "-25.0% neurons", "rank 75%")


@dataclass
class _Layer:
    """One linear layer: its shape and the units that decide over it (indices, -1 for none)."""

    shape: tuple[int, int]
    format_unit: int
    neurons_unit: int = -1
    neurons_axis: int = 0  # 0: its rows are the neurons, 1: its columns are
    rank_unit: int = -1
    drop_unit: int = -1
    tied: bool = False  # a head whose weights the embedding shares


class LayerCost(NamedTuple):
    """What a layer adds: milliseconds of a token, bytes in memory and on disk, and the format whose parts they are."""

    ms: float
    held_bytes: float
    stored_bytes: float
    label: str


@dataclass
class DecoderSpace(Space):
    """A search space over a Llama-type decoder."""

    layers: list[_Layer] = field(default_factory=list)
    table: Any = None  # LatencyTable or ModelledTable: .ms(format, shape)
    overhead_ms: float = 0.0  # of a token, outside linear layers, per block
    fixed_bytes: float = 0.0  # memory that no choice changes
    cache_bytes: float = 0.0  # of a block's keys and values, where a context is measured
    blocks: tuple[str, ...] = ()
    block_list: str = ""
    scale_ms: float = 1.0
    _known: dict[tuple, LayerCost] = field(default_factory=dict)

    def kept(self, layer: _Layer, genome: Genome) -> tuple[int, int] | None:
        """Shape of a layer after pruning, None when its block is gone."""
        if layer.drop_unit >= 0 and genome[layer.drop_unit]:
            return None
        n, k = layer.shape
        if layer.neurons_unit >= 0 and genome[layer.neurons_unit]:
            method = self.units[layer.neurons_unit].options[genome[layer.neurons_unit]].method
            assert isinstance(method, Neurons)
            count = kept_count(n if layer.neurons_axis == 0 else k, method.ratio, method.round_to)
            n, k = (count, k) if layer.neurons_axis == 0 else (n, count)
        return n, k

    def products(self, index: int, genome: Genome) -> list[tuple[str, tuple[int, int]]]:
        """(format, shape) of every matrix product a layer does for a token."""
        layer = self.layers[index]
        shape = self.kept(layer, genome)
        if shape is None:
            return []
        label = self.units[layer.format_unit].options[genome[layer.format_unit]].label
        method = None
        if layer.rank_unit >= 0:
            method = self.units[layer.rank_unit].options[genome[layer.rank_unit]].method
        if method is None:
            return [(label, shape)]
        assert isinstance(method, LowRank)
        rank = snap_to_multiple(svd_rank(*shape, method.rank), method.snap, min(shape))
        return [(label, (rank, shape[1])), (label, (shape[0], rank))]

    def layer_cost(self, index: int, genome: Genome) -> LayerCost:
        """What one layer costs."""
        layer = self.layers[index]
        units = (layer.format_unit, layer.neurons_unit, layer.rank_unit, layer.drop_unit)
        key = (index, *(genome[u] if u >= 0 else 0 for u in units))
        if key not in self._known:
            products = self.products(index, genome)
            self._known[key] = LayerCost(
                sum(self.table.ms(label, shape) for label, shape in products) * self.scale_ms,
                float(sum(held_bytes(label, shape, layer.tied) for label, shape in products)),
                float(sum(stored_bytes(label, shape) for label, shape in products)),
                products[0][0] if products else FLOAT,
            )
        return self._known[key]

    def cost_parts(self, genome: Genome) -> dict[str, dict[str, float]]:
        """Time and bytes by format, and what no format changes."""
        dropped = sum(genome[u] != 0 for u in self._drop_units())
        ms = {"overhead": self.overhead_ms * (len(self.blocks) - dropped)}
        held: dict[str, float] = {}
        stored: dict[str, float] = {}
        for index in range(len(self.layers)):
            cost = self.layer_cost(index, genome)
            for parts, value in ((ms, cost.ms), (held, cost.held_bytes), (stored, cost.stored_bytes)):
                parts[cost.label] = parts.get(cost.label, 0.0) + value
        held["fixed"] = self.fixed_bytes
        if self.cache_bytes:
            held["cache"] = self.cache_bytes * (len(self.blocks) - dropped)
        return {"token_ms": ms, "memory_bytes": held, "size_bytes": stored}

    def layer_ms(self, genome: Genome, factors: Mapping[str, float]) -> dict[str, float]:
        """Milliseconds of a token in each block and in the head, corrected by `factors` of the parts of token_ms."""
        gone = {self.units[u].block for u in self._drop_units() if genome[u]}
        overhead_ms = self.overhead_ms * factors.get("overhead", 1.0)
        found = {name: 0.0 if i in gone else overhead_ms for i, name in enumerate(self.blocks)}
        for index, layer in enumerate(self.layers):
            unit = self.units[layer.format_unit]
            name = unit.name if unit.block is None else self.blocks[unit.block]
            cost = self.layer_cost(index, genome)
            found[name] = found.get(name, 0.0) + cost.ms * factors.get(cost.label, 1.0)
        return found

    def _drop_units(self) -> set[int]:
        return {layer.drop_unit for layer in self.layers if layer.drop_unit >= 0}

    def plan(self, genome: Genome) -> Plan:
        """As for any space, with later steps' names moved to where the blocks are after some were dropped.

        Factorizing keeps a layer's name as the prefix of its factors, so quantization finds them.
        """
        dropped = [
            self.blocks.index(unit.targets[0])
            for unit, choice in zip(self.units, genome)
            if choice and isinstance(unit.options[choice].method, Depth)
        ]
        steps = super().plan(genome).steps
        if not dropped:
            return Plan(steps)
        depth = [s for s in steps if isinstance(s.method, Depth)]
        rest = [Step(s.method, self._renamed(s.layers or {}, dropped)) for s in steps if s not in depth]
        return Plan([*depth, *[s for s in rest if s.layers]])

    def _renamed(self, layers, dropped: Sequence[int]) -> dict:
        names = {}
        for name, settings in layers.items():
            if not name.startswith(self.block_list + "."):
                names[name] = settings
                continue
            index, _, rest = name.removeprefix(self.block_list + ".").partition(".")
            if int(index) not in dropped:
                moved = int(index) - sum(d < int(index) for d in dropped)
                names[f"{self.block_list}.{moved}.{rest}"] = settings
        return names


def decoder_space(
    workload: Workload,
    families: Sequence[str],
    token_ms: float,
    memory_bytes: float,
    threads: int,
    device: Device,
    progress: Callable[[str], None] = lambda text: None,
    cache_bytes: float = 0.0,
) -> DecoderSpace:
    """Units, damages and costs of a decoder whose original needs `token_ms` and `memory_bytes`, of these `cache_bytes`
    for the keys and values of a context."""
    model = workload.model
    parts = anatomy(model)
    formats = FORMATS if "quantize" in families else {FLOAT: None}
    space = DecoderSpace(
        [],
        rivals={f"{x} everywhere": {"*": x} for x in UNIFORM},
        blocks=tuple(b.name for b in parts.blocks),
        block_list=parts.block_list,
        cache_bytes=cache_bytes / len(parts.blocks),
    )
    for block in parts.blocks:
        _add_block(space, model, block, formats, families)
    _add_head(space, model, parts, formats)
    progress("timing layers")
    shapes = {layer.shape for layer in space.layers}
    modelled = ModelledTable(device, threads, held_bytes)
    space.table = latency_table(formats, shapes, threads) if device.measured else modelled
    progress("judging options")
    space.damage = _damages(workload, space, progress)
    _calibrate(space, token_ms, memory_bytes)
    return space


def _add_block(space: DecoderSpace, model: nn.Module, block: Block, formats: dict, families: Sequence[str]) -> None:
    attention, mlp = block.attention, block.mlp
    assert attention is not None
    assert mlp is not None
    options = tuple(Option(label, method) for label, method in formats.items())
    drop = neurons = -1
    if "prune" in families:
        drop = _add(space, block, "block", (block.name,), (Option(KEEP), Option(DROP, Depth(blocks=1))))
        choices = (Option("all neurons"), *(Option(f"-{r:.1%} neurons", Neurons(ratio=r)) for r in NEURONS[1:]))
        neurons = _add(space, block, "neurons", (mlp.name,), choices)
    ranks = (Option("full rank"), *(Option(f"rank {r:.0%}", LowRank(rank=r, snap=SNAP)) for r in RANKS))
    groups = {
        "qkv": (attention.q, attention.k, attention.v),
        "o": (attention.o,),
        "ffn in": mlp.into,
        "ffn out": (mlp.down,),
    }
    for part, names in groups.items():
        in_ffn = part.startswith("ffn")
        rank = _add(space, block, f"{part} rank", names, ranks) if in_ffn and "factorize" in families else -1
        unit = _add(space, block, part, names, options)
        for name in names:
            linear = model.get_submodule(name)
            shape = (int(linear.out_features), int(linear.in_features))  # type: ignore[arg-type]
            space.layers.append(
                _Layer(shape, unit, neurons if in_ffn else -1, 0 if part == "ffn in" else 1, rank, drop)
            )


def _add_head(space: DecoderSpace, model: nn.Module, parts: Anatomy, formats: dict) -> None:
    if parts.head is None:
        return
    linear = model.get_submodule(parts.head)
    options = tuple(Option(label, method) for label, method in formats.items())
    space.units.append(Unit(parts.head, (parts.head,), options, None, "head"))
    shape = (int(linear.out_features), int(linear.in_features))  # type: ignore[arg-type]
    space.layers.append(_Layer(shape, len(space.units) - 1, tied=parts.tied))


def _add(space: DecoderSpace, block: Block, part: str, targets: tuple[str, ...], options: tuple[Option, ...]) -> int:
    space.units.append(Unit(f"{block.name} {part}", targets, options, block.index, part))
    return len(space.units) - 1


def _damages(workload: Workload, space: DecoderSpace, progress) -> list[np.ndarray]:
    wanted: dict[str, list[Method]] = {}
    for unit in space.units:
        for target in unit.targets:
            wanted.setdefault(target, []).extend(o.method for o in unit.options if o.method)
    table = option_damages(workload, wanted, progress)
    return [
        np.array([sum(table[t, o.method] for t in u.targets) if o.method else 0.0 for o in u.options])
        for u in space.units
    ]


def _calibrate(space: DecoderSpace, token_ms: float, memory_bytes: float) -> None:
    """Overhead per block and fixed memory, so that the unchanged model is predicted as measured."""
    none = (0,) * len(space.units)
    predicted = space.costs(none)
    rest = token_ms - predicted["token_ms"]
    if rest < 0:  # the table's layers were slower than in the model
        space.scale_ms = 0.9 * token_ms / predicted["token_ms"]
        space._known.clear()
        rest = 0.1 * token_ms
    space.overhead_ms = rest / max(1, len(space.blocks))
    space.fixed_bytes = memory_bytes - predicted["memory_bytes"]
