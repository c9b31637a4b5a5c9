"""How a linear layer hands its weights to the native decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DENSE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class NativeWeights(NamedTuple):
    """Weights (rows, columns) in the layout that a kernel executes; a layer gives them by `native_weights()`.

    `format` is float32, bfloat16, integer (group_linear), lookup (lookup_linear), codebook or codebooks
    (codebook_linear with one table, or with more) or seeds (seed_linear). `offset` is that of seeds' exponents.
    """

    format: str
    shape: tuple[int, int]
    codes: Tensor
    grid: Tensor | None = None
    tables: Tensor | None = None
    group: int = 0
    bits: int = 0
    offset: int = 0


def dense_weights(layer: Any) -> NativeWeights | None:
    """Those of an ordinary linear layer, or of one that stores rows of its outputs; None for others."""
    if type(layer) is nn.Linear:
        weight = layer.weight
    elif getattr(layer, "by", "") == "outputs":
        weight = layer.values
    else:
        return None
    return NativeWeights(DENSE.get(weight.dtype, ""), (weight.shape[0], weight.shape[1]), weight)


def not_dense(layer: Any) -> str:
    """Why a layer has no dense weights for the native decoder, '' when it has."""
    found = dense_weights(layer)
    if found is None:
        return f"a {type(layer).__name__}"
    w = found.codes
    usable = found.format and w.is_contiguous() and w.device.type == "cpu"
    return "" if usable else f"weights are {w.dtype} on {w.device}, or not contiguous"
