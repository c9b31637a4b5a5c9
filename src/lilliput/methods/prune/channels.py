"""Channels: remove channels of convolutions and linear layers together with everything coupled to them.

Papers: Pruning Filters for Efficient ConvNets (Li et al., 2017, arXiv 1608.08710) for l1 and l2; Network Slimming
(Liu et al., 2017, arXiv 1708.06519) for bn; groups as in DepGraph (Fang et al., 2023, arXiv 2301.12900).

    l1, l2:      score_c = sum over the group's producers of ||W[c]||_1 or ||W[c]||_2^2, each divided by its mean
    bn:          score_c = sum over the group's batch norms of |gamma_c|
    activation:  score_c = sum over the group's readers of E[x_c^2] * ||W[:, c]||^2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy, convolutions, linear_parts, linears
from lilliput.errors import UserError
from lilliput.graph import Group, Member, coupled_channels, kept_count, remove_channels_
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.prune._surgery import average_inputs, select
from lilliput.workload import Workload, need_workload

NORMS = nn.BatchNorm1d | nn.BatchNorm2d


def filter_scores(weight: Tensor, power: int) -> Tensor:
    """(channels, ...) -> (channels,) sum of |w|^power of each filter, over the mean so that layers add up."""
    scores = weight.float().abs().pow(power).flatten(1).sum(1)
    return scores / scores.mean().clamp(min=1e-12)


def reader_scores(weight: Tensor, second_moment: Tensor) -> Tensor:
    """(out, in, ...) and (in,) E[x^2] -> (in,): second moment of each input times the squared norm of its weights."""
    return second_moment * weight.float().square().transpose(0, 1).flatten(1).sum(1)


@dataclass(frozen=True)
class Channels(Method):
    """Remove whole channels. Coupled layers take the mean of the ratios asked for those of them that are named."""

    ratio: float = knob(0.3, low=0.0, high=0.95, per_layer=True, help="share of a layer's output channels to remove")
    importance: str = knob("l2", choices=("l1", "l2", "bn", "activation"), help="what a channel is worth")
    round_to: int = knob(1, low=1, high=256, help="kept channels are a multiple of this, and at least this many")

    facts: ClassVar[Facts] = Facts(
        stage="prune",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Convolutions and linear layers outside transformer blocks, without the head."""
        found = anatomy(model)
        free = set(convolutions(model)) | set(linears(model))
        head = linear_parts(model.get_submodule(found.head)) if found.head else []
        free -= {name for name in free if model.get_submodule(name) in head[-1:]}
        if found.blocks:  # one convolution there is the patch embedding, whose channels are the residual stream
            free = set(convolutions(model)) if len(convolutions(model)) > 1 else set()
        yield from (name for name, _ in model.named_modules() if name in free)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        why = "to trace the model and look at calibration data (or use prune.magnitude, which needs none)"
        data = need_workload(workload, self.name(), why)

        def forward(traced: nn.Module, batch: Any) -> Any:
            return data.forward(traced, batch)

        groups = [g for g in coupled_channels(model, data.example, forward) if set(g.producers()) & set(layers)]
        if not any(g.prunable for g in groups):
            raise UserError(f"none of {list(layers)[:6]} has channels that can be cut: they reach the model's output")
        remove: dict[str, list[int]] = {}
        for group in (g for g in groups if g.prunable):
            ratio, settings = _settings(group, layers)
            kept = select(
                _scores(model, data, group, settings.importance), kept_count(group.channels, ratio, settings.round_to)
            )
            remove[group.name] = sorted(set(range(group.channels)) - set(kept.tolist()))
        return remove_channels_(model, data.example, remove, forward)


def _settings(group: Group, layers: Mapping[str, Channels]) -> tuple[float, Channels]:
    named = [layers[name] for name in group.producers() if name in layers]
    return sum(s.ratio for s in named) / len(named), named[0]


def _scores(model: nn.Module, workload: Workload, group: Group, importance: str) -> Tensor:
    """(channels,) summed over the group's members; a group without batch norm is scored by l1 when bn is asked for."""
    layers = [(m, _layer(model, m.module)) for m in group.members]
    norms = [(m, layer) for m, layer in layers if isinstance(layer, NORMS) and layer.affine]
    total = torch.zeros(group.channels)
    if importance == "bn" and norms:
        for member, layer in norms:
            _add_(total, member, layer.weight.detach().abs())
    elif importance == "activation":
        readers = {m.module: m for m in group.members if m.side == "in"}
        moments = average_inputs(model, workload, readers, _second_moment)
        for name, member in readers.items():
            _add_(total, member, reader_scores(_layer(model, name).weight.detach(), moments[name]))
    else:
        producers = [(m, w) for m, w in layers if m.side == "out" and isinstance(w, nn.Linear | nn.Conv1d | nn.Conv2d)]
        for member, layer in producers:
            _add_(total, member, filter_scores(layer.weight.detach(), 2 if importance == "l2" else 1))
    return total


def _second_moment(_: str, layer: nn.Module, x: Tensor) -> Tensor:
    channel = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - (3 if isinstance(layer, nn.Conv2d) else 2)
    return x.movedim(channel, 0).flatten(1).square().mean(1)


def _layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _add_(total: Tensor, member: Member, values: Tensor) -> None:
    total.index_add_(0, torch.tensor(member.channels), values.float()[torch.tensor(member.indices)])
