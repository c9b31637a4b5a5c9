"""Activations that are exactly zero: the shifted ReLU, a norm with a ReLU behind it, and where a model has them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Mlp, in_out
from lilliput.errors import UserError

RMS, LAYER = "rms", "layer"


class ShiftedReLU(nn.Module):
    """max(0, x - shift); the shift is a buffer, so that it is saved with the weights."""

    shift: Tensor

    def __init__(self, shift: float = 0.0):
        super().__init__()
        if not math.isfinite(shift):
            raise UserError(f"the shift of a ReLU is {shift}; give a finite number")
        self.register_buffer("shift", torch.tensor(float(shift)))

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor; the shift itself travels with the tensors."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - self.shift)


class RectifiedNorm(nn.Module):
    """A norm over the last dimension, then max(0, y): x / rms(x) (offset + weight), or a layer norm."""

    bias: nn.Parameter | None

    def __init__(self, width: int, eps: float, kind: str = RMS, offset: float = 0.0, bias: bool = False):
        super().__init__()
        if kind not in (RMS, LAYER):
            raise UserError(f"the kind of a norm is {kind!r}; choose {RMS!r} or {LAYER!r}")
        self.width, self.eps, self.kind, self.offset = width, eps, kind, offset
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    @classmethod
    def from_norm(cls, norm: Any) -> RectifiedNorm:
        """Takes over the parameters of an RMS norm of transformers or an nn.LayerNorm. Raises UserError for others."""
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        layer, rms = isinstance(norm, nn.LayerNorm), "RMSNorm" in type(norm).__name__
        if not (layer or rms) or eps is None or getattr(norm, "weight", None) is None:
            raise UserError(
                f"stage 2 knows RMS norms and layer norms with a weight, not {type(norm).__name__}; use stage=1"
            )
        offset = 1.0 if rms and type(norm).__name__.startswith("Gemma") else 0.0
        made = cls(norm.weight.numel(), eps, LAYER if layer else RMS, offset, getattr(norm, "bias", None) is not None)
        made.weight = norm.weight
        if made.bias is not None:
            made.bias = norm.bias
        return made

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"width": self.width, "eps": self.eps, "kind": self.kind, "offset": self.offset}
        return sizes | {"bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == LAYER:
            return F.relu(F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps))
        weight = self.weight + self.offset if self.offset else self.weight
        return F.relu(F.rms_norm(x.float(), (self.width,), weight.float(), self.eps).to(x.dtype))


def activation_name(model: nn.Module, mlp: Mlp) -> str | None:
    """Full name of the module between a feed-forward part's layers, None when it is not one module without weights."""
    owner = model.get_submodule(mlp.name)
    found = [
        f"{mlp.name}.{name}"
        for name, child in owner.named_children()
        if not in_out(child)
        and not isinstance(child, nn.Dropout | nn.Identity)
        and not list(child.children())
        and not list(child.parameters())
        and "norm" not in type(child).__name__.lower()
    ]
    return found[0] if len(found) == 1 else None


def rectifier_shift(activation: nn.Module | None) -> float | None:
    """b of an activation max(0, x - b), None when it is another one."""
    if isinstance(activation, ShiftedReLU):
        return float(activation.shift)
    return 0.0 if type(activation) is nn.ReLU else None
