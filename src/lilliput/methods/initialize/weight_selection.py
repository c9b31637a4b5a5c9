"""Weight selection: a small model begins with evenly spaced elements of a larger one's tensors and its first blocks.

Paper: Initializing Models with Larger Ones (Xu et al., 2024, arXiv 2311.18823). A dimension of n elements that is to
have m keeps the elements floor(i n / m), i = 0 .. m - 1; the same ones everywhere, so what belongs together stays
together. The paper selects elements whatever the head that they are in, which breaks the pairs of rotary positions:
here whole heads are selected (ours), with `unit="elements"` for the paper's way. Its output layer is a new one, for
another data set; here it is selected too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.method import FLOAT_WEIGHTS, NONE, OUTPUT_SHAPE, Facts, knob
from lilliput.methods.initialize._resize import FFN, HEADS, KV, Sizes
from lilliput.methods.initialize._smaller import Kept, Smaller, queries_of
from lilliput.methods.prune.heads import rows_of
from lilliput.workload import Workload


@dataclass(frozen=True)
class WeightSelection(Smaller):
    """Start a small transformer from evenly spaced elements of a larger one, to train it from there.

    Its answers are poor until it is trained.
    """

    pick: str = knob("uniform", choices=("uniform", "consecutive"), help="evenly spaced elements, or the first ones")
    blocks: str = knob("first", choices=("first", "uniform"), help="the first blocks, or evenly spaced ones")
    unit: str = knob("heads", choices=("heads", "elements"), help="whole heads, or elements whatever their head")

    paper: ClassVar[str] = "weight_selection"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE},
        data=NONE,
        effect="faster, smaller; poor until it is trained",
    )

    @property
    def rescales(self) -> bool:
        return False

    def kept(self, model: nn.Module, workload: Workload | None, before: Sizes, after: Sizes) -> Kept:
        chosen = spaced if self.pick == "uniform" else first
        if self.unit == "heads":
            groups = chosen(before.kv_heads, after.kv_heads)
            rows = {HEADS: rows_of(queries_of(groups, before), before.head_dim), KV: rows_of(groups, before.head_dim)}
        else:
            rows = {kind: chosen(before.total(kind), after.total(kind)) for kind in (HEADS, KV)}
        rows[FFN] = chosen(before.ffn, after.ffn)
        blocks = (spaced if self.blocks == "uniform" else first)(before.blocks, after.blocks).tolist()
        return Kept(blocks, chosen(before.width, after.width), dict.fromkeys(blocks, rows))


def spaced(count: int, keep: int) -> Tensor:
    """(keep,) ascending indices below `count`, evenly spaced from 0."""
    return torch.arange(keep) * count // keep


def first(count: int, keep: int) -> Tensor:
    """(keep,) indices of the first ones."""
    return torch.arange(keep)
