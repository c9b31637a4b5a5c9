"""Models of any depth from one pair of blocks: every block is the same weights plus a share of others by its place.

    theta_l = theta_A + l / L theta_B,    l = 0 .. L - 1

theta_A, theta_B and all that is not a block are learned once, in an auxiliary net of L blocks that is distilled from
the workload's model. A net of any depth L is then made by the same line and trained as usual, each block on its own.

    gene = Tleg(steps=500).learn(model, workload)
    shallow, deep = gene.expand(2), gene.expand(8)

Paper: Transformer as Linear Expansion of Learngene (Xia et al., AAAI 2024, arXiv 2312.05614). That l counts from 0,
that what is not a block starts from the parent, and the start by least squares are ours (reconstructed).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lilliput.anatomy import anatomy, needs_blocks
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.distill.logits import LEARNS, batches_of, check_student, distillation_loss, teacher_logits
from lilliput.methods.prune.depth import keep_blocks_, to_identities_
from lilliput.training import train
from lilliput.workload import Batch, Workload, need_workload

FITTED, RANDOM = "fitted", "random"


def places(depth: int) -> Tensor:
    """(depth,): the share of theta_B in each block."""
    return torch.arange(depth) / depth


def line_through(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """(L, ...) weights of the blocks -> theta_A and theta_B of the line that is nearest to them by squares; the mean
    and zero for a single block."""
    at = places(len(stacked)).to(stacked.dtype)
    off = (at - at.mean()).view(-1, *[1] * (stacked.ndim - 1))
    slope = (off * stacked).sum(0) / off.square().sum().clamp_min(1e-12)
    return stacked.mean(0) - at.mean() * slope, slope


class Learngene(nn.Module):
    """The auxiliary net: `frame`, whose blocks are made of the two sets of weights whenever it runs; it has `depth` of
    them, as many as before if 0."""

    def __init__(self, frame: nn.Module, depth: int = 0, start: str = FITTED, seed: int = 0):
        super().__init__()
        found = anatomy(frame)
        self.frame, self.block_list, self.depth = frame, found.block_list, len(found.blocks)
        self.leaves = [name for name, _ in frame.get_submodule(found.blocks[0].name).named_parameters()]
        self.learns = {n: p.requires_grad for n, p in frame.named_parameters() if n.startswith(f"{self.block_list}.")}
        self.base, self.slope = nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        for leaf in self.leaves:
            stacked = torch.stack([frame.get_parameter(f"{b.name}.{leaf}").detach() for b in found.blocks])
            base, slope = line_through(stacked) if start == FITTED else _drawn(stacked, generator)
            self.base.append(nn.Parameter(base))
            self.slope.append(nn.Parameter(slope))
        for name in self.learns:
            frame.get_parameter(name).requires_grad_(False)
        if depth:
            self._set_depth_(frame, depth)
            self.depth = depth

    def tensors(self, depth: int) -> dict[str, Tensor]:
        """The weights of `depth` blocks by their full names."""
        return {
            f"{self.block_list}.{i}.{leaf}": base + float(share) * slope
            for i, share in enumerate(places(depth))
            for leaf, base, slope in zip(self.leaves, self.base, self.slope)
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return functional_call(self.frame, self.tensors(self.depth), inputs, named)

    @torch.no_grad()
    def expand(self, depth: int) -> nn.Module:
        """A net of its own with so many blocks, every weight free. Blocks in an nn.Sequential cannot become more."""
        model = copy.deepcopy(self.frame)
        self._set_depth_(model, depth)
        for name, tensor in self.tensors(depth).items():
            model.get_parameter(name).copy_(tensor)
            model.get_parameter(name).requires_grad_(self.learns.get(name, True))
        return model.eval()

    def _set_depth_(self, model: nn.Module, depth: int) -> None:
        blocks = model.get_submodule(self.block_list)
        if isinstance(blocks, nn.ModuleList):
            keep_blocks_(model, anatomy(model), [min(i, self.depth - 1) for i in range(depth)])
        else:
            refuse_growth(model, self.depth, depth)
            to_identities_(model, [f"{self.block_list}.{i}" for i in range(depth, self.depth)])


def refuse_growth(model: nn.Module, depth: int, wanted: int) -> None:
    """Raises UserError when more blocks are wanted of a model whose list of them cannot become longer."""
    if wanted > depth:
        raise UserError(f"blocks is {wanted}, but {type(model).__name__} keeps its {depth} in an nn.Sequential, which "
                        f"does not grow; give at most {depth}")  # fmt: skip


def _drawn(stacked: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Matrices as random as those of the parent, vectors its mean; no slope."""
    base = stacked.mean(0)
    if base.ndim > 1:
        base = torch.randn(base.shape, generator=generator).to(base.dtype) * stacked.std()
    return base, torch.zeros_like(base)


@dataclass(frozen=True)
class Tleg(Method):
    """Make a shallower (or deeper) model by linear expansion of weights that were distilled from the workload's model.

    The cost is that of training the auxiliary net, once for all depths: `learn` gives it, `apply` one model of it.
    """

    blocks: int = knob(3, low=1, high=256, help="blocks of the model that comes out")
    auxiliary: int = knob(0, low=0, high=256, help="blocks of the auxiliary net; 0 has as many as the model")
    start: str = knob(FITTED, choices=(FITTED, RANDOM), help="fitted: on the model's blocks; random: matrices drawn")
    temperature: float = knob(2.0, low=0.1, high=20.0, log=True, help="softens the answers that are learned from")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    steps: int = knob(200, low=0, high=1_000_000, help="updates of the auxiliary net")
    seconds: float = knob(0.0, low=0.0, help="stop after this long, whatever the steps; 0 sets no limit")
    seed: int = knob(0, low=0, help="random weights and order of the data")

    paper: ClassVar[str] = "tleg"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, LAYER_SHAPES},
        data=UNLABELLED,
        effect="faster, smaller, smaller KV-cache when blocks are fewer",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """The name of the list of blocks, nothing where they differ from each other; UserError without blocks."""
        found = needs_blocks(model, self.name())
        kinds = {tuple((n, t.shape) for n, t in model.get_submodule(b.name).state_dict().items()) for b in found.blocks}
        if len(kinds) == 1 and all(p.is_floating_point() for p in model.parameters()) and not _buffers(model, found):
            yield found.block_list

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        (settings,) = layers.values()
        found = anatomy(model)
        if isinstance(model.get_submodule(found.block_list), nn.Sequential):
            refuse_growth(model, settings.auxiliary or len(found.blocks), settings.blocks)
        return settings._learned(model, workload).expand(settings.blocks)

    def learn(self, model: nn.Module, workload: Workload | None) -> Learngene:
        """The trained auxiliary net made of a copy of `model`, to be expanded to any depth."""
        self.resolve(model)
        return self._learned(copy.deepcopy(model), workload)

    def _learned(self, frame: nn.Module, workload: Workload | None) -> Learngene:
        work = need_workload(workload, self.name(), LEARNS)
        check_student(work, frame)
        gene = Learngene(frame, self.auxiliary, self.start, self.seed)

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            return distillation_loss(work.forward(student, batch), teacher_logits(work, batch), self.temperature)

        with evaluating(work.model):
            train(gene, batches_of(work), loss, steps=self.steps, seconds=self.seconds or None, lr=self.lr,
                  clip_norm=1.0, seed=self.seed)  # fmt: skip
        return gene


def _buffers(model: nn.Module, found: Any) -> bool:
    """Whether the blocks hold numbers that are not weights."""
    return any(list(model.get_submodule(b.name).buffers()) for b in found.blocks)
