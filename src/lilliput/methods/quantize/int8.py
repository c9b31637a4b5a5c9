"""Per-channel 8-bit weights by rounding.   w_n ~ q_n s_n,  q in -127 .. 127, one s per output channel

Runs on our packed kernel with activations rounded to 8 bits: faster and smaller where weights decide, as in decoding.
Measured: results/kernels.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, PACKED_WEIGHTS, Facts, Method, knob
from lilliput.methods.quantize._grid import choose_grid, round_to_grid
from lilliput.methods.quantize._packed import quantizable, replace_linears_
from lilliput.workload import Workload


@dataclass(frozen=True)
class Int8(Method):
    """Round each output channel to 255 levels of its own range."""

    search: int = knob(0, low=0, high=40, help="smaller ranges tried per channel; 0 keeps the channel's own")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from quantizable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        return replace_linears_(model, layers, _codes)


def _codes(name: str, linear: nn.Linear, settings: Int8):
    w = linear.weight.detach()
    scale, zero = choose_grid(w, 8, linear.in_features, symmetric=True, search=settings.search)
    return round_to_grid(w, scale, zero, 8), scale, zero, 8, linear.in_features
