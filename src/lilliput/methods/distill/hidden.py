"""Learn from the original model's inner states as well.   L = L_logits + w mean_l d(P_l s_l, t_j(l))

Papers: Romero et al., FitNets, 2014 (arXiv 1412.6550), for the regression of hidden states through a projection P;
Jiao et al., TinyBERT, 2019 (arXiv 1909.10351), for matching blocks at equal relative depth and the logits beside it.
d is the squared distance as a share of the teacher's square (so that deep, large states do not rule), or 1 - cosine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, in_out
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import knob
from lilliput.methods.distill.logits import (
    LEARNS,
    Logits,
    hard_loss,
    only,
    teacher_logits,
    trainable_modules,
)
from lilliput.workload import Batch, Workload, need_workload

States = dict[str, Tensor]


@dataclass(frozen=True)
class Hidden(Logits):
    """Train a compressed model to give the original's states after its blocks, and the original's distribution.

    Where widths differ a linear map from the student's to the teacher's is learned beside the student and thrown away.
    Blocks whose states differ in more than width (fewer tokens, smaller pictures) are left out.
    """

    weight: float = knob(1.0, low=0.0, high=1000.0, help="weight of the states beside the logits")
    distance: str = knob("squared", choices=("squared", "cosine"), help="how far two states are apart")

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Every module that can learn. Raises UserError for a model without blocks whose states could be matched."""
        blocks_of(model)
        yield from trainable_modules(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        work = need_workload(workload, self.name(), LEARNS)
        pairs = depth_pairs(blocks_of(model), blocks_of(work.model))
        self.check(work, model)
        with only(model, layers), evaluating(work.model):
            learner, soft_loss = _Learner(model, self._projections(model, work, pairs)), self.soft_loss()
            with captured(model, list(pairs)) as ours, captured(work.model, list(pairs.values())) as theirs:

                def loss_fn(_: nn.Module, batch: Batch) -> Tensor:
                    taught = teacher_logits(work, batch)
                    logits = work.forward(model, batch)
                    loss = soft_loss(logits, taught)
                    if self.hard:
                        loss = (1 - self.hard) * loss + self.hard * hard_loss(work, logits, batch)
                    return loss + self.weight * learner.distance(ours, theirs, pairs, DISTANCES[self.distance])

                self.fit(learner, work, loss_fn)
        return model

    def _projections(self, model: nn.Module, work: Workload, pairs: dict[str, str]) -> nn.ModuleDict:
        """One map for each pair of blocks that can be compared; the others leave `pairs`."""
        ours, theirs = _probe(model, work, list(pairs)), _probe(work.model, work, list(pairs.values()))
        maps, left_out = nn.ModuleDict(), []
        for name, other in list(pairs.items()):
            s, t = ours[name], theirs[other]
            if s.shape[:-1] != t.shape[:-1]:
                left_out.append(f"{name} {tuple(s.shape)} against {other} {tuple(t.shape)}")
                del pairs[name]
            else:
                same = s.shape == t.shape
                maps[_key(name)] = nn.Identity() if same else _linear(s.shape[-1], t.shape[-1], self.seed)
        if not pairs:
            raise UserError(
                f"no block of the student gives states like the teacher's ({left_out[0]}); use distill.logits"
            )
        return maps


class _Learner(nn.Module):
    """The student and the maps that are trained with it."""

    def __init__(self, student: nn.Module, maps: nn.ModuleDict):
        super().__init__()
        self.student, self.maps = student, maps

    def distance(self, ours: States, theirs: States, pairs: dict[str, str], measure) -> Tensor:
        terms = [measure(self.maps[_key(s)](ours[s]), theirs[t]) for s, t in pairs.items()]
        return torch.stack(terms).mean()


def squared_distance(s: Tensor, t: Tensor) -> Tensor:
    """mean((s - t)^2) / mean(t^2)."""
    s, t = s.float(), t.float()
    return (s - t).square().mean() / t.square().mean().clamp_min(1e-12)


def cosine_distance(s: Tensor, t: Tensor) -> Tensor:
    """Mean over all leading dimensions of 1 - cos(s, t) along the last."""
    return (1 - torch.cosine_similarity(s.float(), t.float(), dim=-1)).mean()


DISTANCES = {"squared": squared_distance, "cosine": cosine_distance}


def depth_pairs(student: list[str], teacher: list[str]) -> dict[str, str]:
    """Student block -> the teacher block that ends at the same share of the depth; the last match each other."""
    ends = [max(round((i + 1) * len(teacher) / len(student)), 1) - 1 for i in range(len(student))]
    return {name: teacher[end] for name, end in zip(student, ends)}


def blocks_of(model: nn.Module) -> list[str]:
    """Transformer blocks, or else the members of the longest list of modules. Raises UserError when there is none.

    The factors of one layer are no list of blocks.
    """
    found = [block.name for block in anatomy(model).blocks]
    if found:
        return found
    every = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList) and len(m) > 1)
    lists = [(n, m) for n, m in every if not all(in_out(part) or hasattr(part, "in_channels") for part in m)]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of blocks whose states could be matched; use distill.logits"
        )
    name, longest = max(lists, key=lambda pair: len(pair[1]))
    return [f"{name}.{child}" if name else child for child, _ in longest.named_children()]


@contextmanager
def captured(model: nn.Module, names: list[str]) -> Iterator[States]:
    """A dictionary that each forward pass fills with the outputs of the named modules, width last."""
    states: States = {}

    def keep(name: str):
        def hook(module, inputs, output):
            states[name] = _width_last(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    with attached(handles):
        yield states


@torch.no_grad()
def _probe(model: nn.Module, work: Workload, names: list[str]) -> States:
    with evaluating(model), captured(model, names) as states:
        work.forward(model, work.example)
    return states


def _width_last(state: Tensor) -> Tensor:
    return state.movedim(1, -1) if state.ndim == 4 else state


def _linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
        linear.bias.zero_()
    return linear


def _key(name: str) -> str:
    return name.replace(".", "/")
