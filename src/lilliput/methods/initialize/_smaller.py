"""Cutting a smaller model out of a larger one: which rows, columns and blocks stay, and the method that does it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import knob
from lilliput.methods.initialize._resize import WIDTH, Axis, Place, Resizing, Sizes, check_sizes, parent_sizes, resized
from lilliput.methods.prune.heads import rows_of
from lilliput.workload import Workload


@dataclass(eq=False)
class Kept:
    """Indices of the parent that stay."""

    blocks: Sequence[int]
    width: Tensor
    inside: Mapping[int, Mapping[str, Tensor]]  # of each kept block: rows of heads, rows of key-value heads, neurons

    def of(self, kind: str, block: int | None) -> Tensor:
        """What stays along a dimension of this kind."""
        return self.width if kind == WIDTH or block is None else self.inside[block][kind]


@dataclass(frozen=True)
class Smaller(Resizing):
    """Base of the methods that start a small model from parts of a large one: the sizes and the cutting."""

    width: float = knob(0.5, low=0.01, high=1.0, help="share of the residual stream's features that stay")
    heads: float = knob(0.5, low=0.01, high=1.0, help="share of the key-value heads, each with its queries, that stay")
    ffn: float = knob(0.5, low=0.01, high=1.0, help="share of a block's feed-forward neurons that stay")
    depth: float = knob(0.5, low=0.01, high=1.0, help="share of the blocks that stay")

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        settings = next(iter(layers.values()))
        before = parent_sizes(model, self.name())
        after = settings.sizes(before)
        check_sizes(model, self.name(), before, after)
        kept = settings.kept(model, workload, before, after)
        return cut(model, self.name(), before, after, kept, settings.rescales)

    def sizes(self, before: Sizes) -> Sizes:
        """The sizes of the small model: shares of the parent's, to the nearest whole number, at least 1."""
        groups = share_of(before.kv_heads, self.heads)
        return Sizes(
            width=share_of(before.width, self.width),
            heads=groups * (before.heads // before.kv_heads),
            kv_heads=groups,
            head_dim=before.head_dim,
            ffn=share_of(before.ffn, self.ffn),
            blocks=share_of(before.blocks, self.depth),
        )

    @abstractmethod
    def kept(self, model: nn.Module, workload: Workload | None, before: Sizes, after: Sizes) -> Kept:
        """What stays of the parent."""

    @property
    @abstractmethod
    def rescales(self) -> bool:
        """Whether layers that read fewer features get larger weights."""


def share_of(count: int, share: float) -> int:
    """The whole number nearest to a share of a count (of two, the larger), at least 1."""
    return max(1, int(share * count + 0.5))


def queries_of(groups: Tensor, before: Sizes) -> Tensor:
    """Indices of key-value heads -> indices of the query heads that read them."""
    return rows_of(groups, before.heads // before.kv_heads)


def cut(model: Any, method: str, before: Sizes, after: Sizes, kept: Kept, rescale: bool) -> nn.Module:
    """The model made of what is kept, with weights times sqrt(inputs before / inputs after) if `rescale`."""
    for block in kept.blocks:
        for kind, index in (WIDTH, kept.width), *kept.inside[block].items():
            if len(index) != after.total(kind):
                raise UserError(f"{method} keeps {len(index)} {kind} of {after.total(kind)}; give as many indices")

    def make(tensor: Tensor, place: Place) -> Tensor:
        for dim, axis in enumerate(place.axes):
            if axis.kinds:
                tensor = tensor.index_select(dim, _indices(axis, place.block, kept, before))
                if axis.reads and rescale:
                    tensor = tensor * factor(before, after, axis.kinds[0])
        return tensor

    head_scale = factor(before, after, WIDTH) if rescale else 1.0
    return resized(model, method, before, after, kept.blocks, make, head_scale)


def factor(before: Sizes, after: Sizes, kind: str) -> float:
    """What keeps the deviation of a sum over fewer inputs."""
    return (before.total(kind) / after.total(kind)) ** 0.5


def _indices(axis: Axis, block: int | None, kept: Kept, before: Sizes) -> Tensor:
    """Indices along a dimension, in which several kinds may stand one behind the other."""
    parts, start = [], 0
    for kind in axis.kinds:
        parts.append(kept.of(kind, block) + start)
        start += before.total(kind)
    return torch.cat(parts)
