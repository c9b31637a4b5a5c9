"""Uniform grids of weights: choose scale and zero per group of inputs, round, and go back.

Throughout, `w` is (N, K), `scale` and `zero` are (N, K / group), a code q is an integer in 0 .. 2**bits - 1 and stands
for the value (q - 2**(bits - 1)) * scale + zero. Scale and zero hold bfloat16 values: that is how they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import UserError


def choose_grid(w: Tensor, bits: int, group: int, symmetric: bool = False, search: int = 0) -> tuple[Tensor, Tensor]:
    """(N, K) -> scale, zero (N, K / group) that span each group's range.

    `symmetric` fixes zero at 0. `search` > 0 tries that many smaller ranges (down to half) and keeps, per group, the
    one with the smallest squared error.
    """
    grouped = _grouped(w, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    best_scale, best_zero = _span(low, high, bits, symmetric)
    if search:
        best_error = _error(grouped, best_scale, best_zero, bits)
        for shrink in torch.linspace(1.0, 0.5, search + 1)[1:].tolist():
            scale, zero = _span(low * shrink, high * shrink, bits, symmetric)
            error = _error(grouped, scale, zero, bits)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _span(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    levels = 2**bits - (2 if symmetric else 1)
    scale = ((high - low) / levels).clamp_min(1e-9).bfloat16().float()
    zero = torch.zeros_like(low) if symmetric else (low + scale * 2 ** (bits - 1)).bfloat16().float()
    return scale, zero


def _error(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    q = _codes(grouped, scale, zero, bits)
    return (_values(q, scale, zero, bits) - grouped).square().sum(-1)


def round_to_grid(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """(N, K) -> codes (N, K), int32: the nearest grid point of each weight."""
    group = w.shape[1] // scale.shape[1]
    return _codes(_grouped(w, group), scale, zero, bits).view(w.shape).int()


def dequantize(q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes (N, K) -> weights (N, K), float32."""
    group = q.shape[1] // scale.shape[1]
    return _values(q.view(*scale.shape, group).float(), scale.float(), zero.float(), bits).view(q.shape)


def _grouped(w: Tensor, group: int) -> Tensor:
    if w.shape[1] % group:
        raise UserError(f"group {group} does not divide the {w.shape[1]} inputs of a layer; choose a divisor")
    if not torch.isfinite(w).all():
        raise UserError("a weight is NaN or infinite; load or train the model again before quantizing it")
    return w.float().view(w.shape[0], -1, group)


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    q = torch.round((grouped - zero.unsqueeze(-1)) / scale.unsqueeze(-1)) + 2 ** (bits - 1)
    return q.clamp_(0, 2**bits - 1)


def _values(q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (q - 2 ** (bits - 1)) * scale.unsqueeze(-1) + zero.unsqueeze(-1)
