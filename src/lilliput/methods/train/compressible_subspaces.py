"""One training, a network for every rate of compression: a line of networks, or a point, chosen from at run time.

    W(a) = (1 - a) W_0 + a W_1,   loss = E_a L(compress(W(a), a)) + closeness cos^2(W_0, W_1)

    subspace = CompressibleSubspaces(regime="structured", steps=2000).apply(model, work)
    set_alpha_(subspace, 0.3)              # from now on, without training or new statistics
    small = at(subspace, 0.0)              # an ordinary model with a quarter of the channels

Paper: LCS: Learning Compressible Subspaces for Efficient, Adaptive, Real-Time Network Compression at Inference Time
(Nunez et al., 2021, arXiv 2110.04252). Unstructured compression keeps the largest weights of each layer, at first all
of them; each step trains an end or a point between. Structured compression keeps the first channels; each step trains
both ends and two points between. Norms have no running statistics, which would be wrong at other rates: batch norms
become group norms, or with channels that go, one group per channel.

The share that is kept is `lowest` at a = 0 and grows evenly with a. That norms start from those of the model, AdamW
and groups of 8 are ours (reconstructed). A line takes twice the size of one network until a point of it is taken, and
zeros in dense weights make nothing faster; fewer channels do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.graph import Group, coupled_channels
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LABELLED, OUTPUT_SHAPE, Facts, Method, knob
from lilliput.methods.distill.logits import batches_of, check_labels, check_tokens
from lilliput.methods.train._subspace import (
    NARROW,
    SubspaceLayer,
    at,
    closeness,
    has_subspace,
    set_alpha_,
    subspace_layers,
)
from lilliput.training import Callback, State, train
from lilliput.workload import Batch, Workload, need_workload

__all__ = ["CompressibleSubspaces", "SubspaceLayer", "at", "closeness", "set_alpha_"]
UNSTRUCTURED, STRUCTURED = "unstructured", "structured"
GROUPS = 8  # of a group norm, where they divide the channels
WARM_UP = 0.8  # share of the training in which unstructured compression grows to what alpha says
Widths = dict[str, dict[str, int]]  # layer -> channels that become fewer, by side


@dataclass(frozen=True)
class CompressibleSubspaces(Method):
    """Train a line (or a point) of networks that is compressed to any rate at run time, without training again."""

    regime: str = knob(
        UNSTRUCTURED, choices=(UNSTRUCTURED, STRUCTURED), help="what goes: the smallest weights, or the last channels"
    )
    mode: str = knob("line", choices=("line", "point"), help="two sets of weights and those between, or one set")
    lowest: float = knob(0.25, low=0.01, high=0.95, help="share of weights or channels that is kept at alpha 0")
    norm: str = knob(
        "group", choices=("group", "batch"), help="batch: keep batch norms, whose statistics each rate needs anew"
    )
    ends: str = knob("alike", choices=("alike", "fresh"), help="the line's other end: the model's weights, or new ones")
    closeness: float = knob(1.0, low=0.0, high=100.0, help="weight of the squared cosine between the ends")
    steps: int = knob(1000, low=0, high=10**7, help="updates of the weights")
    seconds: float = knob(0.0, low=0.0, help="stop after this long, whatever the steps; 0 sets no limit")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    seed: int = knob(0, low=0, high=2**31 - 1, help="points of the line, new weights and order of the data")

    paper: ClassVar[str] = "compressible_subspaces"
    facts: ClassVar[Facts] = Facts(
        stage="train",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        keeps={OUTPUT_SHAPE, BLOCK_COUNT},
        data=LABELLED,
        effect="any compression at run time; a line takes twice the size until then",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Convolutions, linear layers and norms, without a head whose weight is also the embedding."""
        found = anatomy(model)
        for name, module in model.named_modules():
            if name and has_subspace(module) and not (found.tied and name == found.head):
                yield name

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        structured, widths = self.regime == STRUCTURED, Widths()
        if self.steps and workload is not None:
            check_labels(workload, model, "use steps=0")
            check_tokens(workload, model)
        if structured:
            widths = narrowed(model, need_workload(workload, self.name(), "to trace the model"), layers)
        for name in layers:
            layer = self._normed(model.get_submodule(name))
            how = {"lowest": self.lowest, "unstructured": not structured, **widths.get(name, {})}
            set_module(model, name, SubspaceLayer.of(layer, self.mode == "line", **how))
        if self.mode == "line" and self.ends == "fresh":
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                for _, layer in subspace_layers(model):
                    layer.end.reset_parameters()
        if self.steps:
            why = "with labels, to train the subspace (or use steps=0)"
            self._train_(model, need_workload(workload, self.name(), why))
        return set_alpha_(model, 1.0)

    def _normed(self, layer: nn.Module) -> nn.Module:
        """A group norm in the place of a batch norm, with its scale and shift; any other layer as it is."""
        if type(layer) is not nn.BatchNorm2d or self.norm == "batch":
            return layer
        channels = layer.num_features
        groups = channels if self.regime == STRUCTURED else math.gcd(channels, GROUPS)
        new = nn.GroupNorm(groups, channels, layer.eps)
        new.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        return new

    def _train_(self, model: nn.Module, work: Workload) -> None:
        walk = _Walk(self)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            losses = [work.loss(set_alpha_(model, alpha, walk.ease), batch) for alpha in walk.points()]
            total = torch.stack(losses).sum()
            return total + self.closeness * closeness(model) if self.mode == "line" and self.closeness else total

        train(model, batches_of(work), loss, steps=self.steps, seconds=self.seconds or None, lr=self.lr,
              clip_norm=1.0, callbacks=[walk], seed=self.seed)  # fmt: skip
        for parameter in model.parameters():
            parameter.grad = None


class _Walk(Callback):
    """Which points each step trains, and how much of the compression is left out so far."""

    def __init__(self, settings: CompressibleSubspaces):
        self.structured = settings.regime == STRUCTURED
        self.ease = 0.0 if self.structured else 1.0
        self.generator = torch.Generator().manual_seed(settings.seed)

    def points(self) -> list[float]:
        """Both ends and two between, or one: an end as often as not."""
        drawn = torch.rand(3, generator=self.generator).tolist()
        if self.structured:
            return [0.0, 1.0, *drawn[:2]]
        return [drawn[0] if drawn[1] < 0.5 else float(drawn[2] < 0.5)]

    def on_step(self, state: State) -> None:
        self.ease = 0.0 if self.structured else max(0.0, 1 - state.done / WARM_UP)

    def memory(self) -> dict[str, Any]:
        return {"ease": self.ease, "generator": self.generator.get_state()}

    def recall(self, memory: dict[str, Any]) -> None:
        self.ease = memory["ease"]
        self.generator.set_state(memory["generator"])


def narrowed(model: nn.Module, work: Workload, layers: Mapping[str, Any]) -> Widths:
    """Which layers lose channels: those of the groups of coupled channels whose every layer is on the line.

    Raises UserError when there is none.
    """

    def forward(traced: nn.Module, batch: Batch) -> Any:
        return work.forward(traced, batch)

    found: Widths = {}
    for group in coupled_channels(model, work.example, forward):
        if group.prunable and all(m.module in layers and _narrows(model, m.module) for m in group.members):
            for name, side in _sides(model, group):
                found.setdefault(name, {})[side] = group.channels
    if not found:
        raise UserError(
            f"{type(model).__name__} has no channels that can go together; name more layers, or use regime="
            f"{UNSTRUCTURED!r}"
        )
    return found


def _narrows(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ in NARROW


def _sides(model: nn.Module, group: Group) -> list[tuple[str, str]]:
    """(layer, outputs or inputs) of a group; none when its first channels are not the first of all its layers."""
    found = []
    for member in group.members:
        layer: Any = model.get_submodule(member.module)
        unit, rest = divmod(len(member.indices), group.channels)
        order = sorted(zip(member.indices, member.channels))
        if rest or order != [(i, i // unit) for i in range(unit * group.channels)]:
            return []
        side = "inputs" if member.side == "in" else "outputs"
        whole = layer.weight.shape[1 if side == "inputs" else 0]
        if whole != unit * group.channels or (side == "outputs" and unit != 1):
            return []
        found.append((member.module, side))
    return found
