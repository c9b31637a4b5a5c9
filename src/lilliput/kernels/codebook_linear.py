"""y = x W^T with W (N, K) looked up: indices of 4, 3 or 2 bits into small tables, and a scale per group of inputs.

W_nk = tables[n][index_nk] scale_ng, with tables of signed bytes that all rows share, or that each 2^bits / 4 rows have
for themselves (16 bytes for 4 rows, what a byte shuffle reaches). Activations are rounded to 8 bits as in
`group_linear`, so that products are sums of bytes: with x = s c, |c| <= 127,

    y_n = sum_g scale_ng sum_p s_p sum_k tables[n][index_nk] c_k

A token with a NaN or an infinity gives NaN in all its outputs. The result of a token depends neither on the other
tokens nor on the number of threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native, group_linear
from lilliput.kernels.checks import check_input
from lilliput.kernels.group_linear import BLOCK, PIECE

BITS = (4, 3, 2)
TABLE = 16  # bytes of tables that 4 rows share


def reference(x: Tensor, q: Tensor, scale: Tensor, tables: Tensor, bits: int) -> Tensor:
    """x (M, K), indices q (N, K), scale (N, K / group), tables (T, 2**bits) -> y (M, N): the same, in float64."""
    shape = (scale.shape[1], q.shape[1] // max(1, scale.shape[1]))
    codes, steps = group_linear.rounded(x.float().unflatten(1, shape))
    w = torch.gather(per_row(tables, len(q), bits).double(), 1, q.long()).unflatten(1, shape)
    return torch.einsum("mgk,ngk->mn", codes.double() * steps.double(), w * scale.double().unsqueeze(-1))


def rows_per_table(bits: int) -> int:
    """Rows that share a table when not all of them do."""
    return 2**bits // 4


def per_row(tables: Tensor, rows: int, bits: int) -> Tensor:
    """Tables (1, 2**bits), or one for each `rows_per_table`, -> (rows, 2**bits)."""
    if len(tables) == 1:
        return tables.expand(rows, -1)
    return tables.repeat_interleave(rows_per_table(bits), 0)[:rows]


def layout_sizes(rows: int, columns: int, group: int, bits: int, shared: bool) -> tuple[int, int, int]:
    """Bytes of the codes, number of scales and bytes of the tables of the executed layout."""
    codes, _ = group_linear.layout_sizes(rows, columns, max(1, columns), bits)
    blocks = -(-rows // BLOCK)
    return codes, blocks * (columns // group) * BLOCK, TABLE * (1 if shared else blocks * BLOCK // 4)


def pack(stored: Tensor, scale: Tensor, tables: Tensor, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stored indices (N, bytes), scale (N, K / group), int8 tables -> the executed layout, see codebook_linear.hpp.

    The scale is int16, the bits of bfloat16 values, so that casts of a model leave it alone.
    """
    rows, blocks = len(scale), -(-len(scale) // BLOCK)
    if bits not in BITS or stored.dtype != torch.uint8 or stored.shape != (rows, -(-columns // 8) * bits):
        raise UserError(f"indices are {stored.dtype} {tuple(stored.shape)}; {rows} x {columns} at {bits} bits differ")
    if stored.device.type != "cpu":
        raise UserError(f"the indices are on {stored.device}; the kernels run on the CPU, move the layer there")
    size, _ = group_linear.layout_sizes(rows, columns, max(1, columns), bits)
    codes, stored = torch.empty(blocks, size // max(1, blocks), dtype=torch.uint8), stored.contiguous()
    _native.group_linear_pack(stored.data_ptr(), codes.data_ptr(), rows, columns, max(1, columns), bits)
    padded = F.pad(scale.bfloat16(), (0, 0, 0, -rows % BLOCK)).view(blocks, BLOCK, scale.shape[1])
    by_block = padded.transpose(1, 2).contiguous().view(torch.int16)
    return codes, by_block, _pack_tables(tables, rows, bits)


def _pack_tables(tables: Tensor, rows: int, bits: int) -> Tensor:
    """(T, 2**bits) int8 -> (1 or rows / 4, 16) int8, the rows rounded up to blocks."""
    if tables.dtype != torch.int8 or tables.ndim != 2 or tables.shape[1] != 2**bits:
        raise UserError(f"tables are {tables.dtype} {tuple(tables.shape)}; {bits} bits take int8 (tables, {2**bits})")
    if len(tables) == 1:
        return tables.repeat(1, TABLE // 2**bits)
    needed = -(-rows // rows_per_table(bits))
    if len(tables) != needed:
        raise UserError(f"there are {len(tables)} tables; {rows} rows of {bits} bits take 1 or {needed}")
    total = -(-rows // BLOCK) * BLOCK // rows_per_table(bits)
    return F.pad(tables, (0, 0, 0, total - needed)).view(-1, TABLE)


def unpack(
    codes: Tensor, scale: Tensor, tables: Tensor, rows: int, columns: int, group: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: stored indices, bfloat16 scale, tables."""
    _check_layout(codes, scale, tables, rows, columns, group, bits)
    stored = torch.empty(rows, -(-columns // 8) * bits, dtype=torch.uint8)
    _native.group_linear_unpack(codes.data_ptr(), stored.data_ptr(), rows, columns, max(1, columns), bits)
    blocks = scale.view(torch.bfloat16).view(-(-rows // BLOCK), columns // group, BLOCK)
    given = tables.view(-1, 2**bits)
    kept = given[:1] if tables.numel() == TABLE else given[: -(-rows // rows_per_table(bits))]
    return stored, blocks.transpose(1, 2).reshape(-1, columns // group)[:rows], kept


def looked_up(ids: Tensor, codes: Tensor, scale: Tensor, tables: Tensor, columns: int, group: int, bits: int) -> Tensor:
    """Rows `ids` (n,) of the weights in the layout of `pack`, (n, columns) float32, in plain torch; others are not."""
    index = _indices(codes, ids, columns, bits)
    shared = tables.numel() == TABLE
    table = torch.zeros_like(ids) if shared else ids // rows_per_table(bits)
    entries = tables.view(-1, 2**bits)[table].gather(1, index).float()
    blocks = scale.view(torch.bfloat16).view(-1, columns // group, BLOCK)
    steps = blocks[ids // BLOCK, :, ids % BLOCK].float()
    return (entries.unflatten(1, (columns // group, group)) * steps.unsqueeze(2)).flatten(1)


def _indices(codes: Tensor, ids: Tensor, columns: int, bits: int) -> Tensor:
    """The indices of rows `ids` (n,), (n, columns) int64; group_linear.hpp describes their place in the layout."""
    words = codes.view(-1, -(-columns // PIECE), bits, BLOCK, 4)[ids // BLOCK, :, :, ids % BLOCK].long()
    if bits == 4:
        quads = torch.stack([words & 15, words >> 4], 3)
    else:
        quads = (words[:, :, :2].unsqueeze(3) >> torch.arange(0, 8, 2).view(4, 1)) & 3
    quads = quads.flatten(2, 3)  # (n, pieces, 8, 4): four inputs of the row at a time
    if bits == 3:
        high = (words[:, :, 2:] >> torch.arange(8).view(8, 1)) & 1
        quads = quads | (high << 2)
    return quads.flatten(1)[:, :columns]


def codebook_linear(
    x: Tensor, codes: Tensor, scale: Tensor, tables: Tensor, rows: int, group: int, bits: int
) -> Tensor:
    """x (M, K) float32 and the layout of `pack` -> y (M, rows), float32. Raises UserError when sizes do not fit."""
    return torch.ops.lilliput.codebook_linear(x, codes, scale, tables, rows, group, bits)


def _codebook_linear(
    x: Tensor, codes: Tensor, scale: Tensor, tables: Tensor, rows: int, group: int, bits: int
) -> Tensor:
    check_input(x, "codebook_linear")
    tokens, columns = x.shape
    _check_layout(codes, scale, tables, rows, columns, group, bits)
    x = x.contiguous()
    y = torch.empty(tokens, rows)
    addresses = [tensor.data_ptr() for tensor in (x, codes, scale, tables, y)]
    shared = tables.numel() == TABLE
    _native.codebook_linear(*addresses, tokens, rows, columns, group, bits, shared, torch.get_num_threads())
    return y


def _check_layout(codes: Tensor, scale: Tensor, tables: Tensor, rows: int, columns: int, group: int, bits: int) -> None:
    parts = (codes, scale, tables)
    if bits not in BITS:
        raise UserError(f"bits is {bits}; choose one of {', '.join(map(str, BITS))}")
    if group < 1 or columns % group or (group % PIECE and group != columns) or rows < 0:
        raise UserError(
            f"group {group} does not fit {rows} x {columns}; a group is all inputs, or a multiple of {PIECE}"
            " that divides them"
        )
    if any(part.device.type != "cpu" for part in parts):
        raise UserError(f"the layout is on {codes.device}; the kernels run on the CPU, move the layer there")
    if [part.dtype for part in parts] != [torch.uint8, torch.int16, torch.int8]:
        raise UserError(f"the layout is {[str(part.dtype) for part in parts]}; it has uint8, int16 and int8")
    sizes = layout_sizes(rows, columns, group, bits, shared=tables.numel() == TABLE)
    found = tuple(part.numel() for part in parts)
    if found != sizes or not all(part.is_contiguous() for part in parts):
        raise UserError(f"{found} values are not the layout of {rows} x {columns} at {bits} bits; it has {sizes}")


def _fake(x: Tensor, codes: Tensor, scale: Tensor, tables: Tensor, rows: int, group: int, bits: int) -> Tensor:
    check_input(x, "codebook_linear")
    return x.new_empty(x.shape[0], rows)


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define(
    "codebook_linear(Tensor x, Tensor codes, Tensor scale, Tensor tables, SymInt rows, int group, int bits) -> Tensor"
)
_library.impl("codebook_linear", _codebook_linear, "CPU")
torch.library.register_fake("lilliput::codebook_linear", _fake, lib=_library)
