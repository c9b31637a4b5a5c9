"""Linear layers and embeddings whose weights stay packed: 8, 4, 3, 2 or 1 bits on disk and in memory.

Products run on one of two kernels that read the weights packed: `lilliput.kernels.group_linear` rounds activations to
8 bits per token and 32 inputs, `lilliput.kernels.lookup_linear` looks up their sums in tables of 8 bits.
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
from lilliput.kernels import group_linear as integer
from lilliput.kernels import lookup_linear as lookup
from lilliput.kernels.native_weights import NativeWeights
from lilliput.methods.quantize._grid import dequantize

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = {  # how a product is executed -> to its layout and back, the kernel, the bits it takes, the layout's sizes
    "integer": (integer.pack, integer.unpack, integer.group_linear, (8, 4, 3, 2), integer.layout_sizes),
    "lookup": (lookup.pack, lookup.unpack, lookup.lookup_linear, lookup.BITS, lookup.layout_sizes),
}
CHUNK_ROWS = 256  # rows converted at a time, so that the temporaries stay small


def check_float(dtype: str) -> None:
    """Raises UserError for a type that no embedding gives."""
    if dtype not in FLOATS:
        raise UserError(f"an embedding gives {dtype!r}; choose one of {', '.join(FLOATS)}")


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

    compute_dtype = "int8"
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, rows: int, columns: int, bits: int, group: int):
        super().__init__()
        if bits not in (1, 2, 3, 4, 8):
            raise UserError(f"bits is {bits}; choose 1, 2, 3, 4 or 8")
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
        return {
            name: getattr(self, name) for name in ("codes", "scale", "zero") if getattr(self, name, None) is not None
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take in memory and on disk."""
        per_row = self.columns if self.bits == 8 else math.ceil(self.columns / 8) * self.bits
        grids = 1 if self.bits == 8 else 2
        return self.rows * (per_row + grids * 2 * (self.columns // self.group))


class PackedLinear(_Packed):
    """y = x W^T + b with W (out_features, in_features) packed; the output has the type of the input.

    The first product moves the weights into the layout that the kernel executes: the buffers `codes`, `scale` and
    `zero` are None from then on. What is saved, and what `tensors` gives, is always the portable layout above. Codes
    that are `shared` with an embedding stay as they are, beside that layout. For torch.export, run the layer before.
    `product` chooses the kernel, "integer" or "lookup"; what is stored is the same.
    """

    bias: Tensor | None
    _codes: Tensor | None
    _grid: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        bias: bool = False,
        shared: bool = False,
        product: str = "integer",
    ):
        super().__init__(out_features, in_features, bits, group)
        if product not in PRODUCTS:
            raise UserError(f"product is {product!r}; choose one of {', '.join(PRODUCTS)}")
        if bits not in PRODUCTS[product][3]:
            raise UserError(f"the {product} product takes {PRODUCTS[product][3]} bits, not {bits}; choose another one")
        self.in_features, self.out_features, self.shared, self.product = in_features, out_features, shared, product
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("_codes", None, persistent=False)  # in the executed layout
        self.register_buffer("_grid", None, persistent=False)

    @classmethod
    def from_codes(
        cls,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group: int,
        bias: Tensor | None = None,
        product: str = "integer",
    ) -> PackedLinear:
        """A layer of codes (N, K), scale and zero (N, K / group) and bias (N,)."""
        layer = cls(q.shape[1], q.shape[0], bits, group, bias is not None, product=product)
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
            "product": self.product,
        }

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"

    def forward(self, x: Tensor) -> Tensor:
        return by_kernel(self, x)

    def multiply(self, rows: Tensor) -> Tensor:
        """(M, in_features) float32 -> (M, out_features) by the kernel, without the bias."""
        return PRODUCTS[self.product][2](rows, *self.layout(), self.out_features, self.group, self.bits)

    def layout(self) -> tuple[Tensor, Tensor]:
        """Codes and grid as the kernel executes them, made when first asked for."""
        if self._codes is None or self._grid is None:
            self._lay_out_()
        assert self._codes is not None
        assert self._grid is not None
        return self._codes, self._grid

    def native_weights(self) -> NativeWeights:
        """For the native decoder."""
        codes, grid = self.layout()
        shape = self.out_features, self.in_features
        return NativeWeights(self.product, shape, codes, grid, group=self.group, bits=self.bits)

    @property
    def executed_bytes(self) -> int:
        """Bytes of the layout that the kernel executes; codes that are shared with an embedding lie beside it."""
        codes, grid = PRODUCTS[self.product][4](self.out_features, self.in_features, self.group, self.bits)
        return codes + 2 * grid

    def embedding(self, factor: float, dtype: str) -> PackedEmbedding:
        """An embedding that shares this layer's codes from now on."""
        table = PackedEmbedding(self.rows, self.columns, self.bits, self.group, factor, dtype)
        self.shared = True
        for key, tensor in self.tensors().items():
            setattr(table, key, tensor)
        return table

    def _lay_out_(self) -> None:
        stored = super().tensors()
        grids = stored["scale"], stored.get("zero")
        pack = PRODUCTS[self.product][0]
        self._codes, self._grid = pack(stored["codes"], *grids, self.in_features, self.bits)
        if not self.shared:
            for name in stored:
                setattr(self, name, None)

    def set_codes_(self, q: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        self._codes = self._grid = None
        super().set_codes_(q, scale, zero)

    def tensors(self) -> dict[str, Tensor]:
        if self._codes is None or self._grid is None or self.shared:
            return super().tensors()
        shape = (self.out_features, self.in_features, self.group, self.bits)
        unpack = PRODUCTS[self.product][1]
        return dict(zip(("codes", "scale", "zero"), unpack(self._codes, self._grid, *shape)))

    def dequantized(self) -> Tensor:
        tensors = self.tensors()
        return self._dequantize(tensors["codes"], tensors["scale"], tensors.get("zero"))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.tensors().items()})

    def _load_from_state_dict(self, *args):
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor)
        self._codes = self._grid = None
        super()._load_from_state_dict(*args)


def by_kernel(layer: Any, x: Tensor) -> Tensor:
    """y = x W^T + b, (..., in_features) -> (..., out_features) in the type of x, with a gradient for x.

    The layer has `multiply` for float32 rows, `dequantized` weights for the gradient, and a `bias` or None.
    """
    if not x.is_floating_point():
        raise UserError(f"the input of a packed layer is {x.dtype}; give float32 or bfloat16")
    rows = x.reshape(math.prod(x.shape[:-1]), layer.in_features)
    if rows.requires_grad and torch.is_grad_enabled():
        y = _Differentiable.apply(rows, layer)
    else:
        y = layer.multiply(rows.float()).to(rows.dtype)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)
    return y.view(*x.shape[:-1], layer.out_features)


class _Differentiable(torch.autograd.Function):
    """The kernel's product with the gradient of the dequantised one for its input."""

    @staticmethod
    def forward(ctx, rows: Tensor, layer: Any) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return layer.multiply(rows.float()).to(rows.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope @ ctx.layer.dequantized().to(slope.dtype), None


class PackedEmbedding(_Packed):
    """Rows of a packed table (num_embeddings, embedding_dim), dequantised as they are looked up, times `factor`.

    They come in `dtype`: that of the table it stands for, "float32", "bfloat16" or "float16".
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int,
        factor: float = 1.0,
        dtype: str = "float32",
    ):
        super().__init__(num_embeddings, embedding_dim, bits, group)
        check_float(dtype)
        self.num_embeddings, self.embedding_dim, self.factor = num_embeddings, embedding_dim, factor
        self.dtype = dtype

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "bits": self.bits,
            "group": self.group,
            "factor": self.factor,
            "dtype": self.dtype,
        }

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        zero = None if self.bits == 8 else self.zero[flat]
        rows = self._dequantize(self.codes[flat], self.scale[flat], zero)
        return (rows.view(*ids.shape, self.embedding_dim) * self.factor).to(FLOATS[self.dtype])


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
            product = getattr(settings, "product", "integer")
            packed = PackedLinear.from_codes(q, scale, zero, bits, group, linear.bias, product)
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
        if name == plan.head and plan.tied:
            embed_from_(model, plan.embedding, packed)
        set_module(model, name, packed)
    return model


def embed_from_(model: nn.Module, name: str, head: Any) -> None:
    """Put an embedding that shares the codes of `head`, by its `embedding(factor, dtype)`, where `name` points.

    It gives what the old one gave: rows in that type, times its factor.
    """
    old: Any = model.get_submodule(name)
    factor = float(getattr(old, "embed_scale", 1.0))
    set_module(model, name, head.embedding(factor, str(old.weight.dtype).removeprefix("torch.")))
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
