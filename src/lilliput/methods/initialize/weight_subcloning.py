"""Weight subcloning: a small model begins as the most important neurons, heads and blocks of a trained larger one.

Paper: Weight Subcloning: Direct Initialization of Transformers using Larger Pretrained Ones (Samragh et al., 2023,
arXiv 2312.09299). What a neuron is worth is the mean of |activation| over the calibration data.

    W'[i, j] = s W[out(i), in(j)],   s = sqrt(inputs before / inputs after)
    blocks: a run in the middle goes, the one whose blocks change the residual stream least

All blocks share the features of the residual stream, so one order holds for all: features by the mean of their ranks in
front of each block and behind the last one (reconstructed, as is the root in s). Attention goes by key-value heads with
their queries, ranked by mean |head output|. The factor s of a tied output layer goes into the norm before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.anatomy import Anatomy, anatomy
from lilliput.method import FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, knob
from lilliput.methods.initialize._resize import FFN, HEADS, KV, Sizes
from lilliput.methods.initialize._smaller import Kept, Smaller, queries_of
from lilliput.methods.prune._surgery import average_inputs, select
from lilliput.methods.prune.depth import block_influences
from lilliput.methods.prune.heads import rows_of
from lilliput.workload import Workload, need_workload


@dataclass(frozen=True)
class WeightSubcloning(Smaller):
    """Start a small transformer from the most important parts of a larger one, to train it from there.

    Its answers are poor until it is trained.
    """

    scale: str = knob("root", choices=("root", "none"), help="root: weights times sqrt(inputs before / after)")

    paper: ClassVar[str] = "weight_subcloning"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE},
        data=UNLABELLED,
        effect="faster, smaller; poor until it is trained",
    )

    @property
    def rescales(self) -> bool:
        return self.scale == "root"

    def kept(self, model: nn.Module, workload: Workload | None, before: Sizes, after: Sizes) -> Kept:
        work = need_workload(workload, self.name(), "to see which neurons matter")
        found = importance(model, work)
        blocks = list(range(before.blocks))
        if after.blocks < before.blocks:
            influence = block_influences(model, work)
            blocks = without_middle([influence[b.name] for b in anatomy(model).blocks], after.blocks)
        inside = {}
        for block in blocks:
            groups = select(found.groups[block], after.kv_heads)
            queries = rows_of(queries_of(groups, before), before.head_dim)
            neurons = select(found.neurons[block], after.ffn)
            inside[block] = {HEADS: queries, KV: rows_of(groups, before.head_dim), FFN: neurons}
        return Kept(blocks, select(found.features, after.width), inside)


@dataclass(eq=False)
class Importance:
    """What the parts of a model are worth on the calibration data; larger is more."""

    features: Tensor  # (width,): mean rank, 0 is the lowest
    groups: Sequence[Tensor]  # of each block (key-value heads,): mean |output| of their query heads
    neurons: Sequence[Tensor]  # of each block (neurons,): mean |activation|


def importance(model: nn.Module, work: Workload) -> Importance:
    """Scores of features, heads and neurons from one pass over the calibration data."""
    found = anatomy(model)
    size = average_inputs(model, work, _watched(found), lambda name, layer, x: x.abs().flatten(0, -2).mean(0))
    streams = [size[b.name] for b in found.blocks] + ([size[found.final_norm]] if found.final_norm else [])
    heads = [size[a.o].view(a.kv_heads, -1).mean(1) for b in found.blocks if (a := b.attention)]
    return Importance(mean_ranks(streams), heads, [size[b.mlp.down] for b in found.blocks if b.mlp])


def _watched(found: Anatomy) -> list[str]:
    parts = [(b.name, b.attention.o, b.mlp.down) for b in found.blocks if b.attention and b.mlp]
    return [name for names in parts for name in names] + ([found.final_norm] if found.final_norm else [])


def mean_ranks(scores: Sequence[Tensor]) -> Tensor:
    """Several (n,) scores of the same things -> (n,) mean of their ranks, 0 for the lowest."""
    return torch.stack([score.argsort(stable=True).argsort() for score in scores]).double().mean(0)


def without_middle(influences: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` blocks that stay when the run of least summed influence goes. The first and, if two or more
    stay, the last block stay."""
    count = len(influences)
    gone = count - keep
    starts = range(1, max(2, count - gone))
    start = min(starts, key=lambda s: sum(influences[s : s + gone]))
    return [i for i in range(count) if not start <= i < start + gone]
