"""Linear layers and embeddings whose weights stay packed: 8, 4, 3 or 2 bits on disk and in memory.

8 bits (one scale per row) and 4 bits (scale and zero per group) run on torch's packed CPU operators with bfloat16
activations; 3 and 2 bits are dequantised for each product, so they are "size only".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.methods.quantize._grid import dequantize

INT4_GROUPS = (32, 64, 128, 256)  # what the packed 4-bit operator takes


CHUNK_ROWS = 256  # rows converted at a time, so that the temporaries stay small; a multiple of the operator's blocks


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Codes (N, K) in 0 .. 2**bits - 1 -> (N, ceil(K / 8) * bits) bytes: 8 codes fill `bits` bytes, first lowest."""
    return torch.cat([_pack(rows, bits) for rows in q.split(CHUNK_ROWS)])


def _pack(q: Tensor, bits: int) -> Tensor:
    padded = F.pad(q.long(), (0, -q.shape[1] % 8)).unflatten(1, (math.ceil(q.shape[1] / 8), 8))
    words = (padded << (torch.arange(8) * bits)).sum(-1, keepdim=True)
    return ((words >> (torch.arange(bits) * 8)) & 255).to(torch.uint8).flatten(1)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: (N, bytes) -> codes (N, columns), int32."""
    return torch.cat([_unpack(rows, bits, columns) for rows in packed.split(CHUNK_ROWS)])


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    words = (packed.unflatten(1, (packed.shape[1] // bits, bits)).long() << (torch.arange(bits) * 8)).sum(
        -1, keepdim=True
    )
    codes = (words >> (torch.arange(8) * bits)) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].int()


class _Packed(nn.Module):
    """Packed codes with their grid; the buffers are the same whatever executes them."""

    compute_dtype = "bf16"
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, rows: int, columns: int, bits: int, group: int):
        super().__init__()
        if bits not in (2, 3, 4, 8):
            raise UserError(f"bits is {bits}; choose 2, 3, 4 or 8")
        if group < 1 or columns % group:
            raise UserError(f"group {group} does not divide the {columns} inputs of the layer")
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        width = columns if bits == 8 else math.ceil(columns / 8) * bits
        dtype = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(rows, width, dtype=dtype))
        self.register_buffer("scale", torch.zeros(rows, columns // group, dtype=torch.bfloat16))
        if bits != 8:
            self.register_buffer("zero", torch.zeros(rows, columns // group, dtype=torch.bfloat16))

    def set_codes_(self, q: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Take codes (rows, columns) and their grid; 8 bits needs a grid without zero points."""
        self.codes = (q - 128).to(torch.int8) if self.bits == 8 else pack_codes(q, self.bits)
        self.scale = scale.bfloat16()
        if self.bits != 8:
            assert zero is not None
            self.zero = zero.bfloat16()
        elif zero is not None and zero.any():
            raise UserError("8-bit codes are symmetric; choose the grid with symmetric=True")

    def _dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if zero is None:
            return (codes.float().view(*scale.shape, self.group) * scale.float().unsqueeze(-1)).view(codes.shape)
        return dequantize(unpack_codes(codes, self.bits, self.columns), scale, zero, self.bits)

    def dequantized(self) -> Tensor:
        """The weights these codes stand for, (rows, columns), float32."""
        return self._dequantize(self.codes, self.scale, None if self.bits == 8 else self.zero)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, in the form they have on disk."""
        return {name: getattr(self, name) for name in ("codes", "scale", "zero") if hasattr(self, name)}

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take in memory and on disk."""
        per_row = self.columns if self.bits == 8 else math.ceil(self.columns / 8) * self.bits
        grids = 1 if self.bits == 8 else 2
        return self.rows * (per_row + grids * 2 * (self.columns // self.group))


class PackedLinear(_Packed):
    """y = x W^T + b with W (out_features, in_features) packed.

    At the first product 4-bit codes take the layout of torch's operator for this machine; what is saved is always the
    portable layout above. Codes that are `shared` with an embedding stay as they are, beside that layout.
    """

    bias: Tensor | None
    _int4: Tensor | None
    _grid: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, group: int, bias: bool = False, shared: bool = False
    ):
        super().__init__(out_features, in_features, bits, group)
        self.in_features, self.out_features, self.shared = in_features, out_features, shared
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("_int4", None, persistent=False)  # codes and grid in the layout of this machine
        self.register_buffer("_grid", None, persistent=False)

    @classmethod
    def from_codes(
        cls, q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, bias: Tensor | None = None
    ) -> PackedLinear:
        """A layer of codes (N, K), scale and zero (N, K / group) and bias (N,)."""
        layer = cls(q.shape[1], q.shape[0], bits, group, bias is not None)
        layer.set_codes_(q, scale, zero)
        if bias is not None:
            layer.bias = bias.detach().float().clone()
        return layer

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group": self.group,
            "bias": self.bias is not None,
            "shared": self.shared,
        }

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"

    @property
    def fast(self) -> bool:
        """Whether a packed operator executes this format (else: size only).

        torch's operators read past the end of shapes that are no multiple of 16.
        """
        if self.out_features % 16 or self.in_features % 16:
            return False
        if self.bits == 8:
            return self.group == self.in_features
        return self.bits == 4 and self.group in INT4_GROUPS

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        if not self.fast:
            y = F.linear(rows, self.dequantized().to(x.dtype))
        elif rows.requires_grad and torch.is_grad_enabled():
            y = _Differentiable.apply(rows, self)
        else:
            y = self.packed_product(rows)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def packed_product(self, rows: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features) by torch's packed operator, without the bias."""
        x = rows.bfloat16().contiguous()
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale.view(-1)).to(rows.dtype)
        if self._int4 is None:
            self._lay_out_for_this_machine()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._int4, self.group, self._grid).to(rows.dtype)

    def _lay_out_for_this_machine(self) -> None:
        """Make what the operator reads; the buffers then show that memory, so that it is counted and copied once."""
        chunks = [unpack_codes(rows, 4, self.in_features) for rows in self.codes.split(CHUNK_ROWS)]
        self._int4 = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1) for q in chunks])
        self._grid = torch.stack([self.scale.T, self.zero.T], -1).contiguous()
        if not self.shared:
            self.codes = self._int4
            self.scale, self.zero = (t.T for t in self._grid.unbind(-1))

    def set_codes_(self, q: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        self._int4 = self._grid = None
        super().set_codes_(q, scale, zero)

    def tensors(self) -> dict[str, Tensor]:
        if self._int4 is None or self.shared:
            return super().tensors()
        chunks = self._int4.split(CHUNK_ROWS)
        codes = torch.cat([pack_codes(_int4_codes(rows, len(rows), self.in_features), 4) for rows in chunks])
        return {"codes": codes, "scale": self.scale.contiguous(), "zero": self.zero.contiguous()}

    def dequantized(self) -> Tensor:
        tensors = self.tensors()
        return self._dequantize(tensors["codes"], tensors["scale"], tensors.get("zero"))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.tensors().items()})

    def _load_from_state_dict(self, *args):
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor)
        self._int4 = self._grid = None
        super()._load_from_state_dict(*args)


class _Differentiable(torch.autograd.Function):
    """The packed product with a gradient for its input, which torch's operators lack."""

    @staticmethod
    def forward(ctx, rows: Tensor, layer: PackedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return layer.packed_product(rows)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope @ ctx.layer.dequantized().to(slope.dtype), None


def _int4_codes(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Codes (rows, columns) out of torch's 4-bit layout, whatever its order on this machine.

    The layout permutes nibbles, so packing the digits of each weight's index shows where every weight went.
    """
    index = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    origin = torch.zeros(2, packed.numel(), dtype=torch.int64)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 4):
        digit = torch.ops.aten._convert_weight_to_int4pack_for_cpu((index >> shift) & 15, 1).flatten().long()
        origin += torch.stack([digit & 15, digit >> 4]) << shift
    codes = torch.empty(rows * columns, dtype=torch.int32)
    flat = packed.flatten()
    codes[origin[0]] = (flat & 15).int()
    codes[origin[1]] = (flat >> 4).int()
    return codes.view(rows, columns)


class PackedEmbedding(_Packed):
    """Rows of a packed table (num_embeddings, embedding_dim), dequantised as they are looked up, times `factor`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, group: int, factor: float = 1.0):
        super().__init__(num_embeddings, embedding_dim, bits, group)
        self.num_embeddings, self.embedding_dim, self.factor = num_embeddings, embedding_dim, factor

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "bits": self.bits,
            "group": self.group,
            "factor": self.factor,
        }

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        zero = None if self.bits == 8 else self.zero[flat]
        rows = self._dequantize(self.codes[flat], self.scale[flat], zero)
        return rows.view(*ids.shape, self.embedding_dim) * self.factor


def quantizable(model: nn.Module) -> list[str]:
    """Names of plain linear layers (the head included) whose weights can be packed, in the order of the model."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name]


Codes = tuple[Tensor, Tensor, Tensor | None, int, int]  # q, scale, zero, bits, group


def replace_linears_(model: nn.Module, layers: Mapping[str, Any], codes_of: Callable[[str, nn.Linear, Any], Codes]):
    """Swap each named linear layer for a packed one made by `codes_of(name, linear, settings)`; returns the model.

    A head tied to the embedding shares its codes with a packed embedding.
    """
    plan = anatomy(model)
    for name, settings in layers.items():
        linear = model.get_submodule(name)
        try:
            q, scale, zero, bits, group = codes_of(name, linear, settings)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
        packed = PackedLinear.from_codes(q, scale, zero, bits, group, linear.bias)
        if name == plan.head and plan.tied:
            _share_with_embedding_(model, plan.embedding, packed)
        set_module(model, name, packed)
    return model


def _share_with_embedding_(model: nn.Module, name: str, head: PackedLinear) -> None:
    old = model.get_submodule(name)
    factor = float(getattr(old, "embed_scale", 1.0))
    table = PackedEmbedding(head.rows, head.columns, head.bits, head.group, factor)
    head.shared = True
    for key, tensor in head.tensors().items():
        setattr(table, key, tensor)
    set_module(model, name, table)
    if hasattr(model, "config"):
        model.config.tie_word_embeddings = False
