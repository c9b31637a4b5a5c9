"""Rounding to 4, 3 or 2 bits column by column, each error pushed onto the columns still to come (GPTQ).

Paper: Frantar, Ashkboos, Hoefler & Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022.   w_rest -= (w_k - q_k) / U_kk * U_k,rest   with   (X^T X)^-1 = U^T U

Here a row for which plain rounding has the smaller error keeps plain rounding, so the layer's error on the calibration
inputs is never above rounding's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import (
    BLOCK_COUNT,
    FLOAT_WEIGHTS,
    LAYER_SHAPES,
    OUTPUT_SHAPE,
    PACKED_WEIGHTS,
    UNLABELLED,
    Facts,
    Method,
    knob,
)
from lilliput.methods.quantize._grid import choose_grid, dequantize, round_to_grid
from lilliput.methods.quantize._packed import replace_linears_
from lilliput.methods.quantize._walk import BlockWalk, names_in, some_batches, walkable_blocks
from lilliput.methods.quantize.group import fitting_group, groupable
from lilliput.moments import Moments, collecting, input_moments
from lilliput.workload import Batch, Workload, need_workload

Grid = tuple[Tensor, Tensor]
LAZY = 128  # columns whose updates of the later columns are gathered into one product


def gptq(
    w: Tensor,
    hessian: Tensor,
    bits: int,
    group: int,
    damping: float = 0.01,
    act_order: bool = False,
    search: int = 0,
    grid: Grid | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K) and their scale and zero (N, K / group) for weights w (N, K) and a Hessian X^T X / n (K, K).

    `act_order` takes the columns with the largest inputs first, on the grid of the original weights. With bits 8 the
    grid is symmetric. A given `grid` is kept. Columns whose input is always zero are rounded. The error d H d^T of
    every row is at most that of rounding to the grid of the original weights.
    """
    w = w.detach().float()
    plain = grid or choose_grid(w, bits, group, symmetric=bits == 8, search=search)
    rounded = round_to_grid(w, *plain, bits)
    if act_order or grid is not None:
        fixed: Grid | None = plain
        order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(w.shape[1])
    else:
        fixed, order = None, torch.arange(w.shape[1])
    factor = inverse_factor(hessian[order][:, order], damping)
    q, scale, zero = _sweep(w, factor, order, bits, group, fixed, search)
    worse = _row_errors(w, q, (scale, zero), bits, hessian) > _row_errors(w, rounded, plain, bits, hessian)
    keep = worse.unsqueeze(1)
    return torch.where(keep, rounded, q), torch.where(keep, plain[0], scale), torch.where(keep, plain[1], zero)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U (K, K) float32 with (H + damping * mean(diag H) * I)^-1 = U^T U.

    An input that never fires gets the mean diagonal, so that its column is free of the others.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    mean = diagonal.mean().clamp_min(1e-30)
    diagonal += torch.where(diagonal > 0, damping * mean, mean)
    for _ in range(8):
        # H reversed = L L^T gives H = R R^T with R upper triangular, and U = R^-1: one factorisation, one solve
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not failed:
            eye = torch.eye(len(h), dtype=h.dtype)
            return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float().contiguous()
        diagonal += max(damping, 1e-3) * mean
    raise UserError(
        f"the second moments of a layer of {len(h)} inputs are not positive; raise damping or give more data"
    )


def _sweep(
    w: Tensor, factor: Tensor, order: Tensor, bits: int, group: int, fixed: Grid | None, search: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop on the transposed weights (contiguous columns)."""
    columns = w[:, order].T.contiguous()  # (K, N)
    q = torch.zeros(columns.shape)
    scale, zero = (t.T.clone() for t in fixed) if fixed else torch.zeros(2, len(columns) // group, len(w))
    half, top = 2 ** (bits - 1), 2**bits - 1
    place = order.tolist()
    for start in range(0, len(columns), LAZY):
        end = min(start + LAZY, len(columns))
        block = factor[start:end, start:end]
        errors = torch.zeros(end - start, columns.shape[1])
        for i, k in enumerate(range(start, end)):
            g = place[k] // group
            if fixed is None and k % group == 0:
                members = columns[k : k + group].T.contiguous()
                scale[g], zero[g] = (t[:, 0] for t in choose_grid(members, bits, group, bits == 8, search))
            q[k] = ((columns[k] - zero[g]) / scale[g]).round_().add_(half).clamp_(0, top)
            errors[i] = (columns[k] - (q[k] - half) * scale[g] - zero[g]) / block[i, i]
            columns[k + 1 : end].addr_(block[i, i + 1 :], errors[i], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    return q[back].T.contiguous().int(), scale.T.contiguous(), zero.T.contiguous()


def _row_errors(w: Tensor, q: Tensor, grid: Grid, bits: int, hessian: Tensor) -> Tensor:
    difference = dequantize(q, *grid, bits) - w
    return ((difference @ hessian) * difference).sum(1)


@dataclass(frozen=True)
class Gptq(Method):
    """GPTQ on every linear layer: errors of a column are made good by the columns after it, block by block."""

    bits: int = knob(4, choices=(8, 4, 3, 2), per_layer=True, help="bits per weight")
    group: int = knob(64, choices=(32, 64, 128), per_layer=True, help="weights that share a scale and a zero")
    damping: float = knob(
        0.01, low=1e-4, high=1.0, log=True, help="added to the Hessian, as a share of its mean diagonal"
    )
    act_order: bool = knob(False, choices=(False, True), help="columns with the largest inputs first")
    search: int = knob(10, low=0, high=40, help="smaller ranges tried per group; 0 keeps the group's own")
    samples: int = knob(4096, low=1, high=10**7, log=True, help="calibration tokens (text) or inputs to look at")
    product: str = knob(
        "integer", choices=("integer", "lookup"), per_layer=True, help="how products are executed; lookup up to 4 bits"
    )
    facts: ClassVar = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from groupable(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        workload = need_workload(workload, self.name(), "to look at the inputs of every layer")
        batches, left = some_batches(workload, self.samples), list(layers)
        with evaluating(model):
            walk = BlockWalk(model, workload, batches, walkable_blocks(model, workload))
            for index, block in enumerate(walk.blocks):
                names = names_in(block, left)
                if names:
                    _quantize_block_(walk, index, {name: layers[name] for name in names})
                left = [name for name in left if name not in names]
                if not left:
                    break
                walk.advance_(index)
            _quantize_rest_(model, workload, batches, {name: layers[name] for name in left})
        return model


def _quantize_block_(walk: BlockWalk, index: int, layers: Mapping[str, Gptq]) -> None:
    with collecting(walk.model, list(layers)) as moments:
        for batch in walk.batches:
            walk.run(index, batch)
    _replace_(walk.model, layers, moments)


def _quantize_rest_(model: nn.Module, workload: Workload, batches: Sequence[Batch], layers: Mapping[str, Gptq]) -> None:
    """Layers outside the blocks, from one pass over the model as it is by now."""
    if layers:
        _replace_(model, layers, input_moments(model, workload, list(layers), batches))


def _replace_(model: nn.Module, layers: Mapping[str, Gptq], moments: Mapping[str, Moments]) -> None:
    def codes(name: str, linear: nn.Linear, s: Gptq):
        group = linear.in_features if s.bits == 8 else fitting_group(s.group, linear.in_features)
        hessian = moments[name].gram[0]
        q, scale, zero = gptq(linear.weight, hessian, s.bits, group, s.damping, s.act_order, s.search)
        return q, scale, zero, s.bits, group

    replace_linears_(model, layers, codes)
