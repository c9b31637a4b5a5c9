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

from lilliput.errors import UserError
from lilliput.kernels import _native
from lilliput.kernels.checks import check_input, check_packed

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


def layout_sizes(rows: int, columns: int, group: int, bits: int) -> tuple[int, int]:
    """Bytes of the codes and number of grid values of the executed layout."""
    return _native.lookup_linear_sizes(rows, columns, group, bits)


def pack(stored: Tensor, scale: Tensor, zero: Tensor | None, columns: int, bits: int) -> tuple[Tensor, Tensor]:
    """Stored codes (N, bytes) and grids (N, K / group) -> the executed layout (codes, grid), see lookup_linear.hpp.

    The grid is int16, the bits of bfloat16 values, so that casts of a model leave it alone.
    """
    _check_bits(bits)
    if stored.device.type != "cpu" or scale.device.type != "cpu":
        raise UserError(f"the weights are on {stored.device}; the kernels run on the CPU, move the layer there")
    if scale.ndim != 2 or zero is None or zero.shape != scale.shape:
        raise UserError(f"the scale has the shape {tuple(scale.shape)}; scale and zero must both be (rows, groups)")
    rows, groups = scale.shape
    group = max(1, columns // max(1, groups))
    expected = (rows, -(-columns // 8) * bits)
    if stored.dtype != torch.uint8 or stored.shape != expected or groups * group != columns:
        raise UserError(f"codes are {stored.dtype} {tuple(stored.shape)}; {bits} bits need torch.uint8 {expected}")
    size, _ = layout_sizes(rows, columns, group, bits)
    codes, stored = torch.empty(size, dtype=torch.uint8), stored.contiguous()
    _native.lookup_linear_pack(stored.data_ptr(), codes.data_ptr(), rows, columns, group, bits)
    grids = torch.stack([scale, zero], -1).bfloat16()
    blocks = F.pad(grids, (0, 0, 0, 0, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
    by_block = blocks.permute(0, 2, 3, 1).contiguous().view(torch.int16)
    return codes.view(len(by_block), size // max(1, len(by_block))), by_block


def unpack(codes: Tensor, grid: Tensor, rows: int, columns: int, group: int, bits: int) -> tuple[Tensor, ...]:
    """The inverse of `pack`: stored codes, scale and zero."""
    _check_layout(codes, grid, rows, columns, group, bits)
    stored = torch.empty(rows, -(-columns // 8) * bits, dtype=torch.uint8)
    _native.lookup_linear_unpack(codes.data_ptr(), stored.data_ptr(), rows, columns, group, bits)
    blocks = grid.view(torch.bfloat16).view(-(-rows // BLOCK), columns // group, 2, BLOCK)
    grids = blocks.permute(2, 0, 3, 1).flatten(1, 2)[:, :rows]
    return stored, *(part.contiguous() for part in grids)


def lookup_linear(x: Tensor, codes: Tensor, grid: Tensor, rows: int, group: int, bits: int) -> Tensor:
    """x (M, K) float32 and the layout of `pack` -> y (M, rows), float32. Raises UserError when sizes do not fit."""
    return torch.ops.lilliput.lookup_linear(x, codes, grid, rows, group, bits)


def _lookup_linear(x: Tensor, codes: Tensor, grid: Tensor, rows: int, group: int, bits: int) -> Tensor:
    check_input(x, "lookup_linear")
    tokens, columns = x.shape
    _check_layout(codes, grid, rows, columns, group, bits)
    x = x.contiguous()
    y = torch.empty(tokens, rows)
    addresses = x.data_ptr(), codes.data_ptr(), grid.data_ptr(), y.data_ptr()
    _native.lookup_linear(*addresses, tokens, rows, columns, group, bits, torch.get_num_threads())
    return y


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise UserError(f"bits is {bits}; choose 4, 3, 2 or 1 for products by lookup")


def _check_layout(codes: Tensor, grid: Tensor, rows: int, columns: int, group: int, bits: int) -> None:
    _check_bits(bits)
    check_packed(codes, grid, layout_sizes, rows, columns, group, bits)


def _fake(x: Tensor, codes: Tensor, grid: Tensor, rows: int, group: int, bits: int) -> Tensor:
    check_input(x, "lookup_linear")
    return x.new_empty(x.shape[0], rows)


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define("lookup_linear(Tensor x, Tensor codes, Tensor grid, SymInt rows, int group, int bits) -> Tensor")
_library.impl("lookup_linear", _lookup_linear, "CPU")
torch.library.register_fake("lilliput::lookup_linear", _fake, lib=_library)
