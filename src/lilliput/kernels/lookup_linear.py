"""y = x W^T with W (N, K) packed in 4, 3, 2 or 1 bits, by looking up sums of activations in tables.

W_nk = (q_nk - 2^(b-1)) scale_ng + zero_ng, the stored format of `group_linear`; this is another way to execute it.
With the bits of a code as signs, 2 (q - 2^(b-1)) = sum_i 2^i sign_i - 1. So 4 inputs of a group have one table T of the
16 sums of their activations with either sign, for all rows, and 4 bits of a plane of a row are an index into it:

    y_n = sum_g scale_ng (1/2 sum_t step_t sum_i 2^i T_t[index_int] - 1/2 sum_k x_k)  +  zero_ng sum_k x_k

A table's entries are rounded to 8 bits, one step for the (up to 16) tables of 64 inputs of a group; their sums are
exact, and the time falls with the bits. The last sums take the activations as they were. The rounding moves the output
by less than 1 %, relative to the float64 product with the same weights, on independent values and on real inputs of
SmolLM2-135M (papers.t_mac): about as much as that of `group_linear`.

A token gives NaN in all its outputs when it holds NaN or infinity, or a sum of four neighbours beyond float32. The
result of a token depends neither on the other tokens nor on the number of threads.

Paper: Wei et al., "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge", arXiv 2407.00088.
Measured: results/lookup.csv.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.kernels.grouped import GroupedProduct

BITS = (4, 3, 2, 1)
BLOCK = 64  # rows that stand side by side in the executed layout
INPUTS = 4  # of a table
PIECE = 16  # tables that share a step
TINY = 1e-30  # sums below it count as zero beside the rounding


def reference(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x (M, K), codes q (N, K), scale and zero (N, K / group) -> y (M, N): the same tables, summed in float64."""
    shape = (scale.shape[1], q.shape[1] // max(1, scale.shape[1]))
    x = x.float().unflatten(1, shape)
    entries, steps = tables(x)
    q = F.pad(q.unflatten(1, shape), (0, -shape[1] % INPUTS)).unflatten(-1, (-1, INPUTS))
    found = torch.zeros(len(x), len(q), shape[0], dtype=torch.float64)
    for plane in range(bits):
        index = ((q >> plane & 1) << torch.arange(INPUTS)).sum(-1)  # (N, groups, tables)
        chosen = (
            entries.unsqueeze(1)
            .expand(-1, len(q), -1, -1, -1)
            .gather(-1, index.expand(len(x), *index.shape)[..., None])
        )
        found += 2**plane * (chosen.squeeze(-1) * steps.double().unsqueeze(1)).sum(-1)
    inputs = x.double().sum(-1)
    return ((found - inputs.unsqueeze(1)) / 2 * scale.double()).sum(-1) + inputs @ zero.double().T


def tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (M, groups, group) -> entries (M, groups, tables, 16) in -127 .. 127 and the step of each table.

    Entry e is the sum of four activations, each with a minus where e has a 0 bit, in steps.
    """
    fours = F.pad(x, (0, -x.shape[-1] % INPUTS)).unflatten(-1, (-1, INPUTS))
    signs = (torch.arange(2**INPUTS).unsqueeze(-1) >> torch.arange(INPUTS) & 1) * 2.0 - 1
    parts = (fours.unsqueeze(-2) * signs).unbind(-1)
    sums = parts[0] + parts[1] + parts[2] + parts[3]
    count = sums.shape[-2]
    pieces = F.pad(sums, (0, 0, 0, -count % PIECE)).unflatten(-2, (-1, PIECE))
    largest = pieces.abs().amax((-1, -2), keepdim=True)
    finite = largest.isfinite()
    used = finite & (largest > TINY)
    entries = torch.where(used, (pieces * torch.where(used, largest.new_tensor(127.0) / largest, 0.0)).round(), 0.0)
    steps = torch.where(used, largest / 127, torch.where(finite, 0.0, torch.nan)).squeeze(-1).expand(entries.shape[:-1])
    return entries.flatten(-3, -2)[..., :count, :], steps.flatten(-2)[..., :count]


_product = GroupedProduct("lookup_linear", BITS, BLOCK)
layout_sizes, pack, unpack = _product.layout_sizes, _product.pack, _product.unpack


def lookup_linear(x: Tensor, codes: Tensor, grid: Tensor, rows: int, group: int, bits: int) -> Tensor:
    """x (M, K) float32 and the layout of `pack` -> y (M, rows), float32. Raises UserError when sizes do not fit."""
    return torch.ops.lilliput.lookup_linear(x, codes, grid, rows, group, bits)
