"""What layers of other codes share: the product by a kernel, and their place in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.methods.quantize._packed import by_kernel, quantizable


class KernelLinear(nn.Module):
    """y = x W^T + b by a kernel; the output has the type of the input.

    A subclass gives `multiply` for float32 rows (M, in_features) and `dequantized` weights (out_features, in_features).
    """

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

    def set_bias_(self, bias: Tensor | None) -> None:
        """A float32 copy of a bias (out_features,), or none."""
        self.bias = None if bias is None else bias.detach().float().clone()

    def forward(self, x: Tensor) -> Tensor:
        return by_kernel(self, x)


def untied(model: nn.Module) -> Iterator[str]:
    """Names of the plain linear layers but a head that shares its weights with the embedding."""
    plan = anatomy(model)
    yield from (name for name in quantizable(model) if not (plan.tied and name == plan.head))


def replace_(model: nn.Module, layers: Mapping[str, Any], make: Callable[[str, Any, Any], nn.Module]) -> nn.Module:
    """Swap each named layer for `make(name, layer, settings)`; an error names the layer."""
    for name, settings in layers.items():
        try:
            set_module(model, name, make(name, model.get_submodule(name), settings))
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
    return model
