"""The formats that a fit may give a decoder's linear layers, and what each takes on disk and in memory.

The packed ones by falling bits per weight: int8 8, int4 g32 5, int4 g64 4.5, table4 4.25, int3 g32 4, table3 3.25,
int2 g32 3. Tables (`quantize.codebook`) take no zero per group and lose less than grids of as many bits. They read a
tied head and its embedding from one copy of the codes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lilliput.method import Method
from lilliput.methods.quantize._codebook import CodebookLinear
from lilliput.methods.quantize._packed import PackedLinear
from lilliput.methods.quantize.codebook import Codebook, whole_pieces
from lilliput.methods.quantize.group import Group, fitting_group
from lilliput.methods.quantize.int8 import Int8

FLOAT = "float32"
FORMATS: dict[str, Method | None] = {
    FLOAT: None,
    "int8": Int8(),
    "int4 g32": Group(bits=4, group=32),
    "int4 g64": Group(bits=4, group=64),
    "table4 g64": Codebook(bits=4, group=64),
    "int3 g32": Group(bits=3, group=32, product="lookup"),  # faster than the integer product token by token
    "table3 g64": Codebook(bits=3, group=64),
    "int2 g32": Group(bits=2, group=32, product="lookup"),
}


def stored_bytes(label: str, shape: tuple[int, int]) -> int:
    """Bytes on disk of the weights (out, in) of one layer in a format."""
    return 4 * shape[0] * shape[1] if FORMATS[label] is None else _empty(label, shape).weight_bytes


def held_bytes(label: str, shape: tuple[int, int], tied: bool = False) -> int:
    """Bytes in memory once the layer has run; those of a `tied` head with what its embedding holds beside it."""
    if FORMATS[label] is None:
        return stored_bytes(label, shape)
    layer = _empty(label, shape)
    beside = layer.weight_bytes if tied and isinstance(layer, PackedLinear) else 0
    return layer.executed_bytes + beside


@cache
def _empty(label: str, shape: tuple[int, int]) -> Any:
    """A layer of that format and shape without memory."""
    (n, k), method = shape, FORMATS[label]
    with torch.device("meta"):
        if isinstance(method, Codebook):
            return CodebookLinear(k, n, method.bits, whole_pieces(method.group, k), method.table == "layer")
        if isinstance(method, Group):
            return PackedLinear(k, n, method.bits, fitting_group(method.group, k), product=method.product)
        assert isinstance(method, Int8)
        return PackedLinear(k, n, 8, k)
