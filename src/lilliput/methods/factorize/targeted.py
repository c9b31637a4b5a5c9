"""Decompose a layer only where that was measured to be faster at its real shape.

Paper: Ahmed et al., Speeding up ResNet Architecture with Layers Targeted Low Rank Decomposition, arXiv 2309.12412.
Rule: keep the factors of a layer when the median of t(factors) / t(layer) is below 1 - margin.
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lilliput.edits import set_module
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.factorize._clock import RUNNERS, Clock, Shape, TimeMs, median_ratio, paired_ms, torch_training
from lilliput.methods.factorize._factors import (
    Layer,
    factor_layer,
    is_plain_conv,
    is_plain_linear,
    is_pointwise,
    own_names,
    ranks_for,
    shape_like,
)
from lilliput.methods.factorize._ranks import snap_to_staircase
from lilliput.moments import input_shapes
from lilliput.workload import Workload, need_workload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """One row of the latency table: a layer, the ranks proposed for it, both times, and whether the factors stay."""

    layer: str
    input_shape: Shape
    ranks: tuple[int, ...]
    before_ms: float
    after_ms: float
    kept: bool

    @property
    def chosen_ms(self) -> float:
        """The time of what the network will hold."""
        return self.after_ms if self.kept else self.before_ms


@dataclass(frozen=True)
class Targeted(Method):
    """Low rank for the linear layers and convolutions that gain from it on this machine; the others stay as they are.

    `phase` says which speed decides: one forward in `runtime`, or forward and backward in torch at the training batch.
    """

    ratio: float = knob(0.5, low=0.02, high=1.0, per_layer=True, help="kept share of a decomposed layer's weights")
    margin: float = knob(0.05, low=0.0, high=0.9, help="share of its time a layer must gain to be decomposed")
    phase: str = knob("infer", choices=("infer", "train"), help="speed of the forward, or of forward and backward")
    runtime: str = knob("openvino", choices=tuple(RUNNERS), help="what serves the model (phase 'infer')")
    snap: bool = knob(False, choices=(False, True), help="move ranks to just below a measured step of the latency")
    rounds: int = knob(7, low=1, high=1000, help="interleaved readings per layer")

    facts: ClassVar[Facts] = Facts(
        stage="factorize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller",
    )
    paper: ClassVar[str] = "targeted_lrd"

    def targets(self, model: nn.Module) -> Iterator[str]:
        for name in own_names(model):
            if name and can_factor(model.get_submodule(name)):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Targeted]) -> nn.Module:
        choices = self.choose(model, workload, layers)
        kept = sum(choice.kept for choice in choices)
        log.info("factorize.targeted keeps %d of %d decompositions", kept, len(choices))
        return decompose_(model, choices)

    def choose(
        self,
        model: nn.Module,
        workload: Workload | None,
        layers: Mapping[str, Targeted] | None = None,
        time_ms: TimeMs | None = None,
    ) -> list[Choice]:
        """The latency table: one row per layer, equal layers at equal shapes measured once. `model` stays unchanged."""
        workload = need_workload(workload, "factorize.targeted", "to know the shapes that layers run at")
        layers = dict(layers) if layers is not None else self.resolve(model)
        clock = time_ms or self.clock()
        shapes = input_shapes(model, workload, layers, self._batch(workload))
        measured: dict[tuple, Choice] = {}
        rows = []
        for name, settings in layers.items():
            if name not in shapes:
                continue
            layer = _layer(model, name)
            key = repr(layer), shapes[name], settings
            if key not in measured:
                measured[key] = settings.measure(name, layer, shapes[name], clock)
            row = measured[key]
            rows.append(Choice(name, row.input_shape, row.ranks, row.before_ms, row.after_ms, row.kept))
        return rows

    def clock(self) -> Clock:
        """The clock of this phase and runtime."""
        return Clock(torch_training if self.phase == "train" else RUNNERS[self.runtime])

    def measure(self, name: str, layer: Layer, shape: Shape, time_ms: TimeMs) -> Choice:
        """Both times of one layer and the decision; factors of the right shape stand in for the real ones."""
        ranks = ranks_for(layer, self.ratio)
        if self.snap:
            ranks = snap_ranks(layer, ranks, shape, time_ms, int(self.rounds))
        pairs = paired_ms(time_ms, copy.deepcopy(layer), shape_like(layer, ranks), shape, int(self.rounds))
        before, after = (statistics.median(times) for times in zip(*pairs))
        return Choice(name, shape, ranks, before, after, median_ratio(pairs) < 1 - self.margin)

    def _batch(self, workload: Workload):
        if self.phase == "infer":
            return workload.example
        return next(iter(workload.training if workload.training is not None else workload.calibration))


def snap_ranks(layer: Layer, ranks: tuple[int, ...], shape: Shape, time_ms: TimeMs, rounds: int) -> tuple[int, ...]:
    """Ranks near the given ones, in their proportion, just below the highest measured step of the staircase."""
    full = layer.weight.shape[:2] if len(ranks) == 2 else (min(layer.weight.shape[:2]),)

    def at(rank: int) -> tuple[int, ...]:
        return tuple(min(max(1, round(r * rank / ranks[0])), most) for r, most in zip(ranks, full))

    candidates: dict[int, nn.Sequential] = {}

    def time_of(rank: int) -> float:
        module = candidates.setdefault(rank, shape_like(layer, at(rank)))
        return statistics.median(time_ms(module, shape) for _ in range(rounds))

    return at(snap_to_staircase(ranks[0], full[0], time_of))


def can_factor(layer: nn.Module) -> bool:
    """Whether SVD or Tucker-2 applies to a layer."""
    return is_plain_linear(layer) or is_plain_conv(layer)


def decompose_(model: nn.Module, choices: list[Choice]) -> nn.Module:
    """Put the factors of every kept choice into the model, from its trained weights."""
    for choice in choices:
        if choice.kept:
            set_module(model, choice.layer, factor_layer(_layer(model, choice.layer), choice.ranks))
    return model


def multiplications(layer: Layer, shape: Shape, ranks: tuple[int, ...] | None = None) -> int:
    """Multiply-adds of one call at an input shape, plain or at these ranks: what a FLOP-guided choice goes by."""
    if isinstance(layer, nn.Linear):
        rows = 1
        for size in shape[:-1]:
            rows *= size
        weights = layer.weight.numel() if ranks is None else ranks[0] * sum(layer.weight.shape)
        return rows * weights
    places_in, places_out = shape[0] * shape[2] * shape[3], shape[0] * _outputs(layer, shape)
    out, inp = layer.weight.shape[:2]
    if ranks is None:
        return places_out * layer.weight.numel()
    if is_pointwise(layer):
        return places_out * ranks[0] * (inp + out)
    core = ranks[0] * ranks[1] * layer.weight[0, 0].numel()
    return places_in * ranks[1] * inp + places_out * (core + ranks[0] * out)


def _outputs(layer: nn.Conv2d, shape: Shape) -> int:
    """Output positions of one picture."""
    with torch.device("meta"):
        probe = nn.Conv2d(1, 1, layer.kernel_size, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        return probe(torch.empty(1, 1, *shape[2:])).numel()


def _layer(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer
