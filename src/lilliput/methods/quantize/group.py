"""Group-wise rounding of weights to 4, 3 or 2 bits.   w ~ (q - 2^(b-1)) s + z,  one s and z per group of inputs

All of them run on our packed kernels, which read the weights as they are stored: the integer product, or sums of
activations looked up in tables (T-MAC, arXiv 2407.00088). For one token the lookup is the faster one at 3 and 2 bits,
for 4 bits only beyond the L2 cache; for many tokens on AVX-512 the integer product is.
Measured: results/kernels.csv, results/lookup.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Self

from torch import nn

from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, PACKED_WEIGHTS, Facts, Method, knob
from lilliput.methods.quantize._grid import choose_grid, round_to_grid
from lilliput.methods.quantize._packed import quantizable, replace_linears_
from lilliput.workload import Workload


@dataclass(frozen=True)
class Group(Method):
    """Round each group of weights to its own grid; the range is the group's, or shrunk where that lowers the error."""

    bits: int = knob(4, choices=(4, 3, 2), per_layer=True, help="bits per weight")
    group: int = knob(64, choices=(32, 64, 128), per_layer=True, help="weights that share a scale and a zero")
    search: int = knob(10, low=0, high=40, help="smaller ranges tried per group; 0 keeps the group's own")
    product: str = knob("integer", choices=("integer", "lookup"), per_layer=True, help="how products are executed")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from groupable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        return replace_linears_(model, layers, _codes)


def groupable(model: nn.Module) -> Iterator[str]:
    """Names of the layers that can be packed and whose inputs fill whole bytes at every number of bits."""
    for name in quantizable(model):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and layer.in_features % 8 == 0:
            yield name


def fitting_group(group: int, columns: int) -> int:
    """The largest group, at most the wished one, that divides the inputs of a layer."""
    return gcd(group, columns)


def _codes(name: str, linear: nn.Linear, settings: Group):
    group = fitting_group(settings.group, linear.in_features)
    scale, zero = choose_grid(linear.weight.detach(), settings.bits, group, search=settings.search)
    return round_to_grid(linear.weight.detach(), scale, zero, settings.bits), scale, zero, settings.bits, group
