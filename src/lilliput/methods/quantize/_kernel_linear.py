"""What layers of other codes share: the product by a kernel, and their place in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.methods.quantize._packed import CHUNK_ROWS, FLOATS, by_kernel, check_float, embed_from_


class KernelEmbedding(nn.Module):
    """Rows of a head's packed weights, made as they are looked up, times `factor`; the buffers are the head's.

    They come in `dtype`: that of the table it stands for, "float32", "bfloat16" or "float16". A subclass gives `rows`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, factor: float, dtype: str):
        super().__init__()
        check_float(dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.factor, self.dtype = factor, dtype

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return sizes | {"factor": self.factor, "dtype": self.dtype}

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take in memory and on disk; the head's are the same ones."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def rows(self, ids: Tensor) -> Tensor:
        """Rows (n, embedding_dim) of the weights, float32, for ids (n,) inside the vocabulary."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """The weights, (num_embeddings, embedding_dim), float32."""
        return torch.cat([self.rows(ids) for ids in torch.arange(self.num_embeddings).split(CHUNK_ROWS)])

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        if not torch.compiler.is_compiling():
            self._check(flat)
        rows = self.rows(flat).view(*ids.shape, self.embedding_dim)
        return (rows * self.factor).to(FLOATS[self.dtype])

    def _check(self, ids: Tensor) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError(f"ids {int(ids.min())} .. {int(ids.max())} for an embedding of {self.num_embeddings}")


class KernelLinear(nn.Module):
    """y = x W^T + b by a kernel; the output has the type of the input.

    A subclass gives `multiply` for float32 rows (M, in_features), `dequantized` weights (out_features, in_features)
    and the class of embeddings that have the same buffers.
    """

    embedding_class: ClassVar[type[KernelEmbedding]]
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise UserError(f"a layer of {in_features} inputs and {out_features} outputs cannot be packed")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def multiply(self, rows: Tensor) -> Tensor:
        """(M, in_features) float32 -> (M, out_features) by the kernel, without the bias."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """The weights, (out_features, in_features), float32."""
        raise NotImplementedError

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor; a subclass adds its own."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def embedding(self, factor: float, dtype: str) -> KernelEmbedding:
        """An embedding of these weights in the same memory."""
        own = {k: v for k, v in self.rebuild_config().items() if k not in KernelLinear.rebuild_config(self)}
        table = self.embedding_class(self.out_features, self.in_features, **own, factor=factor, dtype=dtype)
        for name, _ in list(table.named_buffers()):
            setattr(table, name, getattr(self, name))
        return table

    @property
    def executed_bytes(self) -> int:
        """Bytes of the layout that the kernel executes: what is stored."""
        return self.weight_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take in memory and on disk."""
        return sum(buffer.nbytes for buffer in self.buffers()) - (0 if self.bias is None else self.bias.nbytes)

    def set_bias_(self, bias: Tensor | None) -> None:
        """A float32 copy of a bias (out_features,), or none."""
        self.bias = None if bias is None else bias.detach().float().clone()

    def forward(self, x: Tensor) -> Tensor:
        return by_kernel(self, x)


def replace_(model: nn.Module, layers: Mapping[str, Any], make: Callable[[str, Any, Any], nn.Module]) -> nn.Module:
    """Swap each named layer for `make(name, layer, settings)`; an error names the layer.

    A head tied to the embedding gets an embedding of its new weights beside it.
    """
    plan = anatomy(model)
    for name, settings in layers.items():
        try:
            made = make(name, model.get_submodule(name), settings)
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
        if name == plan.head and plan.tied:
            embed_from_(model, str(plan.embedding), made)
        set_module(model, name, made)
    return model
