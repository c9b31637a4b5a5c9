"""Weights from learned tables: k-means per layer with a scale per group.   w_nk ~ table[index_nk] s_ng

The table of 2^bits signed bytes is fitted to the layer, where a uniform grid (`quantize.group`) has equal steps; a
group needs a scale but no zero, half the overhead. Weights that meet large inputs count more. The kernel looks up the
table by byte shuffles. After SqueezeLLM (Kim et al., 2023) and any4 (Elhoushi & Johnson, 2025), without the outlier
matrix of the first. A head tied to the embedding shares one copy of its indices with it.

One token on one thread takes, against `quantize.group` with 4 bits, 0.81 to 0.94 of the time at 4 bits from a cache and
1.27 from memory, at 3 bits 1.04 to 1.19 and 1.23, at 2 bits 0.87 to 0.94 and 0.83. Lookups of `quantize.group` take no
longer than tables of 3 and 2 bits in a cache, and two thirds of the time from memory: those are for size.
Measured: results/codebook.csv, results/lookup.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Self

from torch import Tensor, nn

from lilliput.kernels.codebook_linear import PIECE
from lilliput.method import (
    BLOCK_COUNT,
    FLOAT_WEIGHTS,
    LAYER_SHAPES,
    OUTPUT_SHAPE,
    PACKED_WEIGHTS,
    UNLABELLED,
    Facts,
    Method,
    knob,
)
from lilliput.methods.quantize._codebook import CodebookLinear, fit_codebook
from lilliput.methods.quantize._kernel_linear import replace_
from lilliput.methods.quantize._packed import quantizable
from lilliput.methods.quantize._walk import some_batches
from lilliput.moments import input_squares
from lilliput.workload import Workload, need_workload


@dataclass(frozen=True)
class Codebook(Method):
    """Replace each weight by the nearest entry of a small table that k-means fits to the layer, times a scale."""

    bits: int = knob(4, choices=(4, 3, 2), per_layer=True, help="bits per weight; a table has 2**bits entries")
    group: int = knob(64, choices=(32, 64, 128), per_layer=True, help="weights that share a scale")
    table: str = knob("layer", choices=("layer", "rows"), help="one table per layer, or per 2**bits / 4 rows")
    weighting: bool = knob(True, choices=(False, True), help="weigh errors by the mean square of the layer's inputs")
    rounds: int = knob(10, low=0, high=100, help="of nearest entries, scales and tables in turn after k-means")
    samples: int = knob(4096, low=1, high=10**7, log=True, help="calibration tokens (text) or inputs to look at")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from quantizable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        importance: dict[str, Tensor] = {}
        if any(settings.weighting for settings in layers.values()):
            why = "to look at the inputs of every layer (weighting=False needs none)"
            workload = need_workload(workload, self.name(), why)
            importance = input_squares(model, workload, list(layers), some_batches(workload, self.samples))

        def make(name: str, linear: nn.Linear, s: Codebook) -> CodebookLinear:
            group = whole_pieces(s.group, linear.in_features)
            weights = importance[name] if s.weighting else None
            codes = fit_codebook(linear.weight, s.bits, group, s.table == "layer", weights, s.rounds)
            return CodebookLinear.from_codes(*codes, s.bits, linear.bias)

        return replace_(model, layers, make)


def whole_pieces(group: int, columns: int) -> int:
    """The largest group, at most the wished one, that divides the inputs into whole pieces; else all inputs."""
    found = gcd(group, columns)
    return columns if found % PIECE else found
