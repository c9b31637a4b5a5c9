"""Weights regenerated from seeds of a shift register, without data.   w ~ 2^e U(seed) t, a block of 8 or 12 weights

Paper: Shafipour, Harrison, Horton, Marker, Bedayat, Mehta, Rastegari, Najibi & Naderiparizi, "SeedLM: Compressing LLM
Weights into Seeds of Pseudo-Random Generators", 2024. A block is stored as the 16-bit seed, out of all 65535, whose
random basis U holds it best, a few 4-bit numbers t and a 4-bit exponent. The kernel makes the bases again at each
product, which costs 5 to 20 times as long as 4-bit codes here: a gain in speed needs hardware made for it.

Measured: results/codebook.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.kernels import seed_linear as kernel
from lilliput.kernels.native_weights import NativeWeights
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, PACKED_WEIGHTS, Facts, Method, knob
from lilliput.methods.quantize._kernel_linear import KernelEmbedding, KernelLinear, replace_
from lilliput.methods.quantize._packed import quantizable
from lilliput.workload import Workload


def check_layout(bits: int, offset: int) -> None:
    """Raises UserError for bits or an offset of the exponents that the kernel does not take."""
    if bits not in kernel.SHAPES:
        raise UserError(f"bits is {bits}; choose one of {', '.join(map(str, kernel.SHAPES))}")
    if not kernel.OFFSETS[0] <= offset <= kernel.OFFSETS[1]:
        raise UserError(f"the offset of the exponents is {offset}; give one within {kernel.OFFSETS}")


class SeedEmbedding(KernelEmbedding):
    """An embedding that makes its rows from the seeds of a head."""

    codes: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        offset: int,
        factor: float = 1.0,
        dtype: str = "float32",
    ):
        super().__init__(num_embeddings, embedding_dim, factor, dtype)
        check_layout(bits, offset)
        self.bits, self.offset = bits, offset
        size = kernel.code_bytes(num_embeddings, embedding_dim, bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return super().rebuild_config() | {"bits": self.bits, "offset": self.offset}

    def rows(self, ids: Tensor) -> Tensor:
        return kernel.looked_up(ids, self.codes, self.embedding_dim, self.bits, self.offset)

    def dequantized(self) -> Tensor:
        """The weights to the bit as the head multiplies with them."""
        return kernel.dequantized(self.codes, self.num_embeddings, self.embedding_dim, self.bits, self.offset)


class SeedLinear(KernelLinear):
    """y = x W^T + b with W regenerated from seeds: exactly 4 or 3 bits per weight where blocks and 16 rows fit.

    `offset` is what the 4-bit exponents of the layer count from.
    """

    compute_dtype = "fp32"
    embedding_class = SeedEmbedding
    codes: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, offset: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        check_layout(bits, offset)
        self.bits, self.offset = bits, offset
        size = kernel.code_bytes(out_features, in_features, bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))

    @classmethod
    def from_weight(cls, w: Tensor, bias: Tensor | None, bits: int, candidates: int, pick: bool) -> SeedLinear:
        """The layer closest to weights (out_features, in_features) that a search over all seeds finds."""
        codes, offset = kernel.encode(w, bits, candidates, pick)
        layer = cls(w.shape[1], w.shape[0], bits, offset, bias is not None)
        layer.codes = codes
        layer.set_bias_(bias)
        return layer

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return super().rebuild_config() | {"bits": self.bits, "offset": self.offset}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"

    def multiply(self, rows: Tensor) -> Tensor:
        return kernel.seed_linear(rows, self.codes, self.out_features, self.bits, self.offset)

    def native_weights(self) -> NativeWeights:
        """For the native decoder."""
        shape = self.out_features, self.in_features
        return NativeWeights("seeds", shape, self.codes, bits=self.bits, offset=self.offset)

    def dequantized(self) -> Tensor:
        return kernel.dequantized(self.codes, self.out_features, self.in_features, self.bits, self.offset)


@dataclass(frozen=True)
class Seeds(Method):
    """Store each block of 8 (4 bits) or 12 (3 bits) weights as a seed whose pseudo-random basis comes closest to it."""

    bits: int = knob(4, choices=(4, 3), per_layer=True, help="bits per weight, all counted")
    candidates: int = knob(16, low=1, high=64, help="seeds per block, of the highest energy, that are tried in full")
    pick: bool = knob(True, choices=(False, True), help="search both neighbours of each number instead of rounding it")
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        effect="size only",
    )
    paper: ClassVar[str] = "seedlm"

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from quantizable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        return replace_(
            model,
            layers,
            lambda name, linear, s: SeedLinear.from_weight(linear.weight, linear.bias, s.bits, s.candidates, s.pick),
        )
