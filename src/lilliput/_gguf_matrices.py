"""Matrices as GGUF tensors: a packed layer's own codes in blocks of 32, anything else in the smallest fitting type.

8 bits become Q8_0 (w = q d), 4 bits and fewer Q4_1 (w = q d + m), or Q4_0 (w = (q - 8) d) when the grid has no zero
points; d and m are float16. So the file holds the weights that were measured, not weights that were rounded twice.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.errors import missing_extra
from lilliput.methods.quantize._packed import PackedEmbedding, PackedLinear, unpack_codes

BLOCK = 32  # weights that share a scale in the types below
SMALLEST_FIRST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ACCEPTABLE_ERROR = 0.01  # relative, of a matrix that is rounded anew


def gguf_package() -> Any:
    """The package, imported late. Raises UserError when it is not installed."""
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf


# --- blocks ----------------------------------------------------------------------------------------------------


def q8_0_blocks(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (N, K) in -128 .. 127 and a scale per block (N, K / 32) -> bytes (N, K / 32 * 34)."""
    blocks = codes.astype(np.int8).reshape(*d.shape, BLOCK)
    return np.concatenate((_half(d), blocks.view(np.uint8)), -1).reshape(len(codes), -1)


def q4_blocks(codes: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
    """Codes (N, K) in 0 .. 15, a scale and for Q4_1 a minimum per block (N, K / 32) -> bytes (N, K / 32 * 18 or 20).

    A byte holds weight j of a block in its low half and weight j + 16 in its high half.
    """
    halves = codes.astype(np.uint8).reshape(*d.shape, 2, BLOCK // 2)
    nibbles = halves[..., 0, :] | (halves[..., 1, :] << 4)
    grids = [_half(d)] if m is None else [_half(d), _half(m)]
    return np.concatenate((*grids, nibbles), -1).reshape(len(codes), -1)


def _half(values: np.ndarray) -> np.ndarray:
    """(N, B) -> the two bytes of each as float16, (N, B, 2)."""
    with np.errstate(over="ignore"):
        return values.astype("<f2")[..., None].view(np.uint8)


def _packed_blocks(layer: PackedLinear | PackedEmbedding) -> tuple[str, np.ndarray]:
    """The layer's own codes in GGUF blocks; its group must be a multiple of 32."""
    stored = {key: tensor.float().numpy() for key, tensor in layer.tensors().items() if key != "codes"}
    d = stored["scale"].repeat(layer.group // BLOCK, 1)
    codes = layer.tensors()["codes"]
    if layer.bits == 8:
        return "Q8_0", q8_0_blocks(codes.numpy(), d)
    middle = 2 ** (layer.bits - 1)
    q = unpack_codes(codes, layer.bits, layer.columns).numpy()
    if not stored["zero"].any():
        return "Q4_0", q4_blocks(q + 8 - middle, d)
    return "Q4_1", q4_blocks(q, d, stored["zero"].repeat(layer.group // BLOCK, 1) - middle * d)


# --- layers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def dense(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear layer, an embedding, a packed one, or low-rank factors, float32."""
    if isinstance(layer, nn.Sequential):
        return reduce(lambda product, matrix: matrix @ product, map(dense, layer))
    if type(layer) in (nn.Linear, nn.Embedding):
        return layer.weight.detach().float()  # type: ignore[union-attr, operator]
    return layer.dequantized()  # type: ignore[operator]


def is_matrix(layer: nn.Module) -> bool:
    """Whether `dense` says all that the layer does but for its bias."""
    if type(layer) is nn.Sequential and len(layer):
        return all(map(is_matrix, layer)) and all(getattr(f, "bias", None) is None for f in list(layer)[:-1])
    return type(layer) in (nn.Linear, nn.Embedding) or hasattr(layer, "dequantized")


def describe(layer: nn.Module) -> str:
    """How a layer holds its matrix: '4-bit', 'low-rank' or 'float'."""
    if isinstance(layer, nn.Sequential):
        return "low-rank"
    bits = getattr(layer, "bits", None)
    return f"{bits}-bit" if bits else "float"


def encode(layer: nn.Module, matrices: str = "F16") -> tuple[str, np.ndarray]:
    """The layer's matrix as (type, rows of bytes or floats): the smallest type whose error is acceptable.

    The codes of a packed layer are kept; where they do not fit, and for low-rank factors merged, the types of the gguf
    package are tried from small to large, and `matrices` is the last. A float matrix gets `matrices` at once.
    """
    gguf, weight = gguf_package(), dense(layer).numpy()
    own = isinstance(layer, PackedLinear | PackedEmbedding) and layer.group % BLOCK == 0
    if own:
        kind, data = _packed_blocks(layer)  # type: ignore[arg-type]
        if relative_error(decode(data, kind), weight) <= ACCEPTABLE_ERROR:
            return kind, data
    if describe(layer) != "float" and weight.shape[1] % BLOCK == 0:
        for kind in SMALLEST_FIRST:
            data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
            if relative_error(decode(data, kind), weight) <= ACCEPTABLE_ERROR:
                return kind, data
    with np.errstate(over="ignore"):  # what does not fit is found when the file is read back
        return matrices, gguf.quantize(weight, gguf.GGMLQuantizationType[matrices])


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """The float32 values of a tensor of a GGUF type."""
    gguf = gguf_package()
    return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference; infinite for NaN or another shape."""
    if ours.shape != reference.shape or not np.isfinite(ours).all():
        return float("inf")
    size = float(np.linalg.norm(reference.ravel().astype(np.float64)))
    return float(np.linalg.norm((ours - reference).ravel().astype(np.float64))) / max(size, 1e-12)
