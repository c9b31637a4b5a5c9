"""Feed-forward parts that read only the neurons that fired.

    a_j = max(0, g_j - shift),   h_j = a_j (u_j x + b_j),   y = c + sum over a_j != 0 of h_j d_j

The pre-activations g of the gate come from any product; the rows u_j of up and d_j of down (stored transposed: the
weights of a neuron stand together) are read for the neurons with a_j != 0 alone. Without up (a plain feed-forward part)
h_j is a_j. `sparse_linear` is the same without the rectifier: a product that reads only the rows of inputs that are not
zero.

A NaN among g counts as fired and gives NaN. What a silent neuron's weights hold never reaches the output. The result of
a token depends neither on the other tokens nor on the number of threads; sums are float32, one neuron after another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native, isa

CHUNK = 32  # columns that int8 and int4 rows are filled up to
NativeRows = tuple[int, int, int, int, int, int]  # format, addresses of values and grid, rows, columns, group
NativePart = tuple[NativeRows, int, NativeRows, int, bool, float]
NO_ROWS: NativeRows = (0, 0, 0, 0, 0, 1)
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # of values; uint8 holds two codes


class Rows(NamedTuple):
    """A matrix (rows, columns) whose rows are read one by one.

    `values` is float32 or bfloat16 (rows, columns), or codes of `pack_rows`, which have a `grid` in bfloat16: 8 bits
    (rows, 1, 1), the scale of a row; 4 bits (rows, groups, 2), scale and zero of each group of a row.
    """

    values: Tensor
    grid: Tensor | None
    columns: int

    def dense(self) -> Tensor:
        """The weights that stand here, (rows, columns), float32."""
        if self.grid is None:
            return self.values.float()
        grouped = unpack_rows(self.values, self.columns).float().unflatten(1, (self.grid.shape[1], -1))
        w = grouped * self.grid[..., :1].float()
        return (w if self.grid.shape[2] == 1 else w + self.grid[..., 1:].float()).flatten(1)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, columns) -> bytes (rows, ...): 8 bits as int8, 4 bits (-8 .. 7) two in a uint8.

    Rows are filled up to whole chunks of 32 columns, see sparse_ffn.hpp.
    """
    padded = F.pad(codes, (0, -codes.shape[1] % CHUNK))
    if bits == 8:
        return padded.to(torch.int8).contiguous()
    low, high = (padded + 8).to(torch.uint8).unflatten(1, (-1, 2, CHUNK // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack_rows(values: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_rows`: signed codes (rows, columns), int8."""
    if values.dtype == torch.uint8:
        halves = values.unflatten(1, (values.shape[1] * 2 // CHUNK, 1, CHUNK // 2))
        values = torch.cat([halves & 15, halves >> 4], 2).flatten(1).to(torch.int8) - 8
    return values[:, :columns]


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    shift: float,
    up: Rows | None,
    up_bias: Tensor | None,
    down: Rows,
    down_bias: Tensor | None = None,
) -> Tensor:
    """x (M, d), pre-activations gate (M, n), up (n, d), down (n, N) -> y (M, N), all float32. Raises UserError."""
    rows = (None, None) if up is None else (up.values, up.grid)
    below = down.values, down.grid, down.columns
    return torch.ops.lilliput.sparse_ffn(x, gate, True, shift, *rows, up_bias, *below, down_bias)


def sparse_linear(x: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times rows (K, N) -> (M, N), reading the rows of inputs that are not 0. Raises UserError."""
    return torch.ops.lilliput.sparse_ffn(x, x, False, 0.0, None, None, None, *rows, bias)


def reference(
    x: Tensor,
    gate: Tensor,
    shift: float,
    up: Rows | None,
    up_bias: Tensor | None,
    down: Rows,
    down_bias: Tensor | None = None,
    rectified: bool = True,
) -> Tensor:
    """The same in plain torch on all neurons."""
    hidden = F.relu(gate - shift) if rectified else gate
    if up is not None:
        hidden = hidden * F.linear(x, up.dense().to(x.dtype), up_bias)
    return F.linear(hidden, down.dense().to(x.dtype).T, down_bias)


def _sparse_ffn(
    x: Tensor,
    gate: Tensor,
    rectified: bool,
    shift: float,
    up: Tensor | None,
    up_grid: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_grid: Tensor | None,
    outputs: int,
    down_bias: Tensor | None,
) -> Tensor:
    _check_inputs(x, gate)
    x, gate = x.contiguous(), gate.contiguous()
    y, sizes = torch.empty(len(x), outputs), (x.shape[1], gate.shape[1], outputs)
    part = native_part(sizes, shift, (up, up_grid), up_bias, (down, down_grid), down_bias, rectified)
    _native.sparse_ffn(x.data_ptr(), gate.data_ptr(), part, y.data_ptr(), len(x), torch.get_num_threads())
    return y


def native_part(
    sizes: tuple[int, int, int],
    shift: float,
    up: tuple[Tensor | None, Tensor | None],
    up_bias: Tensor | None,
    down: tuple[Tensor, Tensor | None],
    down_bias: Tensor | None,
    rectified: bool = True,
) -> NativePart:
    """What the native side takes for `sizes` (inputs, neurons, outputs). Raises UserError when something does not fit.

    It holds addresses: the caller keeps the tensors.
    """
    inputs, neurons, outputs = sizes
    above = NO_ROWS if up[0] is None else _matrix(up[0], up[1], neurons, inputs, "up")
    below = _matrix(*down, neurons, outputs, "down")
    return above, _bias(up_bias, neurons, "up"), below, _bias(down_bias, outputs, "down"), rectified, shift


def _check_inputs(x: Tensor, gate: Tensor) -> None:
    for name, tensor in (("x", x), ("the gate", gate)):
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or tensor.device.type not in ("cpu", "meta"):
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise UserError(f"{name} is {found}; sparse_ffn takes (tokens, features) in float32 on the CPU")
    if len(x) != len(gate):
        raise UserError(f"x has {len(x)} tokens and the gate {len(gate)}; give the same tokens")


def _matrix(values: Tensor, grid: Tensor | None, rows: int, columns: int, name: str) -> NativeRows:
    """What the native side takes: format, addresses of values and grid, sizes. Raises UserError."""
    kind = FORMATS.get(values.dtype)
    if kind is None or values.device.type != "cpu" or not values.is_contiguous():
        found = f"{values.dtype} on {values.device}"
        raise UserError(f"the rows of {name} are {found}; they must be contiguous float32, bfloat16, int8 or uint8")
    padded = -(-columns // CHUNK) * CHUNK
    width = {0: columns, 1: columns, 2: padded, 3: padded // 2}[kind]
    if values.shape != (rows, width) or columns < 1 or not rows < 2**31:
        needed = f"{rows} rows of {columns} columns take {(rows, width)}"
        raise UserError(f"the rows of {name} have the shape {tuple(values.shape)}; {needed}")
    if kind < 2:
        return kind, values.data_ptr(), 0, rows, columns, columns
    return kind, values.data_ptr(), *_grid(grid, rows, columns, kind - 1, name)


def _grid(grid: Tensor | None, rows: int, columns: int, values: int, name: str) -> tuple[int, int, int, int]:
    """Address of the grid, rows, columns and group."""
    if grid is None or grid.ndim != 3 or grid.dtype != torch.bfloat16 or not grid.is_contiguous():
        found = "missing" if grid is None else f"{grid.dtype} {tuple(grid.shape)}"
        raise UserError(f"the grid of {name} is {found}; codes need a contiguous (rows, groups, {values}) in bfloat16")
    groups = max(1, grid.shape[1])
    group = columns // groups
    fits = groups * group == columns and (groups == 1 or (values == 2 and group % CHUNK == 0))
    if grid.shape != (rows, groups, values) or not fits:
        needed = f"({rows}, groups, {values}): one group, or with 4 bits groups of a multiple of {CHUNK} columns"
        raise UserError(f"the grid of {name} is {tuple(grid.shape)}; {columns} columns take {needed}")
    return grid.data_ptr(), rows, columns, group


def _bias(bias: Tensor | None, size: int, name: str) -> int:
    if bias is None:
        return 0
    if bias.dtype != torch.float32 or bias.shape != (size,) or not bias.is_contiguous():
        raise UserError(f"the bias of {name} is {bias.dtype} {tuple(bias.shape)}; it must be ({size},) in float32")
    return bias.data_ptr()


def _fake(x, gate, rectified, shift, up, up_grid, up_bias, down, down_grid, outputs, down_bias) -> Tensor:
    _check_inputs(x, gate)
    return x.new_empty(x.shape[0], outputs)


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define(
    "sparse_ffn(Tensor x, Tensor gate, bool rectified, float shift, Tensor? up, Tensor? up_grid, Tensor? up_bias, "
    "Tensor down, Tensor? down_grid, SymInt outputs, Tensor? down_bias) -> Tensor"
)
_library.impl("sparse_ffn", _sparse_ffn, "CPU")
torch.library.register_fake("lilliput::sparse_ffn", _fake, lib=_library)
isa()  # a wrong LILLIPUT_ISA is said at once
