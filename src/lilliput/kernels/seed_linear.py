"""y = x W^T with W (N, K) regenerated from seeds of a shift register (SeedLM): 4 or 3 bits per weight.

A block of C inputs of a row is 2^e U(seed) t: U (C, P) are the C P states of a 16-bit register after the seed, mapped
to -1 .. 1, and t are P signed numbers of 4 bits. 16 bits of seed, 4 of e and 4 P of t make 4 bits per weight with C = 8
and P = 3, and 3 bits with C = 12 and P = 4. seed_linear.hpp describes the register and the layout of the codes.

Activations are not rounded: products are in float32, and a token's result depends neither on the other tokens nor on
the number of threads.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import _native
from lilliput.kernels.checks import check_input

BAND = 16  # rows that stand side by side
SHAPES = {4: (8, 3), 3: (12, 4)}  # bits -> inputs C and terms P of a block
OFFSETS = (-126, 90)  # of the exponents: their powers of two and the weights stay float32 numbers
STATES = 2**16 - 1


def code_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of the codes of a matrix, its last blocks and rows filled up."""
    return _native.seed_linear_bytes(rows, columns, bits)


@cache
def states() -> tuple[Tensor, Tensor]:
    """The register's states in their order from state 1, and each state's place there (0 for no state), int64."""
    order, state = [], 1
    for _ in range(STATES):
        order.append(state)
        bit = (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 1
        state = state >> 1 | bit << 15
    places = torch.zeros(STATES + 1, dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(STATES)
    return torch.tensor(order), places


def basis(seeds: Tensor, bits: int) -> Tensor:
    """Seeds (...) -> U (..., C, P), float64."""
    (inputs, terms), (order, places) = SHAPES[bits], states()
    after = (places[seeds.long()].unsqueeze(-1) + 1 + torch.arange(inputs * terms)) % STATES
    return ((order[after].double() - 2**15) / (2**15 - 1)).unflatten(-1, (inputs, terms))


def read(codes: Tensor, rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The layout -> seeds (N, blocks), t (N, blocks, P) and e (N, blocks), int64."""
    _, terms = SHAPES[bits]
    blocks = -(-columns // SHAPES[bits][0])
    units = codes.view(-(-rows // BAND), blocks, 4 * BAND + (0 if bits == 4 else BAND // 2)).long()
    words = (units[..., : 4 * BAND].unflatten(-1, (BAND, 4)) << torch.tensor([0, 8, 16, 24])).sum(-1)
    t = (words.unsqueeze(-1) >> (16 + 4 * torch.arange(terms))) & 15
    halves = units[..., 4 * BAND :]
    e = words >> 28 if bits == 4 else torch.cat([halves & 15, halves >> 4], -1)
    parts = (words & 0xFFFF, t - 16 * (t > 7), e)
    seeds, t, e = (part.transpose(1, 2).flatten(0, 1)[:rows] for part in parts)
    return seeds, t, e


def reference(codes: Tensor, rows: int, columns: int, bits: int, offset: int) -> Tensor:
    """The weights (N, K) that the codes stand for, float64. Seed 0, which is no state, counts as the first."""
    return _weights(*read(codes, rows, columns, bits), bits, offset)[:, :columns]


def _weights(seeds: Tensor, t: Tensor, e: Tensor, bits: int, offset: int) -> Tensor:
    """Seeds (N, blocks), t (N, blocks, P), e (N, blocks) -> the inputs of all blocks (N, blocks C), float64."""
    blocks = torch.einsum("nbcp,nbp->nbc", basis(seeds, bits), t.double())
    return (blocks * torch.exp2((e + offset).double()).unsqueeze(-1)).flatten(1)


def looked_up(ids: Tensor, codes: Tensor, columns: int, bits: int, offset: int) -> Tensor:
    """Rows `ids` (n,) of the weights, (n, columns) float32, in plain torch; no others are made."""
    bands = codes.view(-1, code_bytes(BAND, columns, bits))[ids // BAND]
    rows = torch.arange(len(ids)) * BAND + ids % BAND
    seeds, t, e = (part[rows] for part in read(bands, BAND * len(ids), columns, bits))
    return _weights(seeds, t, e, bits, offset)[:, :columns].float()


def dequantized(codes: Tensor, rows: int, columns: int, bits: int, offset: int) -> Tensor:
    """The weights (N, K) as the kernel makes them, float32."""
    eye = torch.eye(columns)
    return seed_linear(eye, codes, rows, bits, offset).T.contiguous()


def encode(w: Tensor, bits: int, candidates: int = 16, pick: bool = True) -> tuple[Tensor, int]:
    """Weights (N, K) -> codes and the offset of their exponents, by a search over all seeds for every block.

    The `candidates` seeds that can hold most of a block's energy are tried; t is rounded to the nearest numbers, or,
    with `pick`, each to that neighbour which makes the block's error least. About 5 seconds per million weights and
    core.
    """
    if bits not in SHAPES:
        raise UserError(f"bits is {bits}; seeds are made for 4 or 3")
    if not 1 <= candidates <= 64:
        raise UserError(f"candidates is {candidates}; give a number from 1 to 64")
    if w.ndim != 2 or not torch.isfinite(w).all():
        raise UserError("the weights are not a matrix of finite numbers; load or train the model again")
    w = w.detach().float().contiguous()
    rows, columns = w.shape
    shift, offset = _exponents(float(w.abs().max()) if w.numel() else 0.0)
    w = torch.ldexp(w, torch.tensor(-shift))  # near 1, where squares neither vanish nor overflow
    codes = torch.empty(code_bytes(rows, columns, bits), dtype=torch.uint8)
    threads = torch.get_num_threads()
    _native.seed_encode(w.data_ptr(), codes.data_ptr(), rows, columns, bits, offset, candidates, pick, threads)
    return codes, offset + shift


def _exponents(largest: float) -> tuple[int, int]:
    """The power of two that weights are divided by for the search, and the offset of the exponents after that.

    The highest exponent lets t hold twice the largest weight.
    """
    if largest >= 2.0 ** OFFSETS[1]:
        raise UserError(f"the largest weight is {largest:.3g}, too large for the exponents; divide the layer's weights")
    shift = max(math.frexp(largest)[1], OFFSETS[0] + 20)
    near_one = math.ldexp(largest, -shift)
    return shift, max(math.ceil(math.log2(2 * near_one / 7)) - 15, -20) if near_one > 0 else -20


def seed_linear(x: Tensor, codes: Tensor, rows: int, bits: int, offset: int) -> Tensor:
    """x (M, K) float32 and the codes of `encode` -> y (M, rows), float32. Raises UserError when sizes do not fit."""
    return torch.ops.lilliput.seed_linear(x, codes, rows, bits, offset)


def _seed_linear(x: Tensor, codes: Tensor, rows: int, bits: int, offset: int) -> Tensor:
    check_input(x, "seed_linear")
    tokens, columns = x.shape
    _check_layout(codes, rows, columns, bits, offset)
    x = x.contiguous()
    y = torch.empty(tokens, rows)
    addresses = x.data_ptr(), codes.data_ptr(), y.data_ptr()
    _native.seed_linear(*addresses, tokens, rows, columns, bits, offset, torch.get_num_threads(), True)
    return y


def _check_layout(codes: Tensor, rows: int, columns: int, bits: int, offset: int) -> None:
    if bits not in SHAPES:
        raise UserError(f"bits is {bits}; seeds are made for 4 or 3")
    if not OFFSETS[0] <= offset <= OFFSETS[1]:
        raise UserError(f"the offset of the exponents is {offset}; it lies in {OFFSETS[0]} .. {OFFSETS[1]}")
    if codes.device.type != "cpu" or codes.dtype != torch.uint8:
        raise UserError(f"the codes are {codes.dtype} on {codes.device}; the kernels take uint8 on the CPU")
    size = code_bytes(rows, columns, bits) if rows >= 0 else -1
    if codes.numel() != size or not codes.is_contiguous():
        raise UserError(f"{codes.numel()} bytes are not the codes of {rows} x {columns} at {bits} bits: {size} bytes")


def _fake(x: Tensor, codes: Tensor, rows: int, bits: int, offset: int) -> Tensor:
    check_input(x, "seed_linear")
    return x.new_empty(x.shape[0], rows)


_library = torch.library.Library("lilliput", "FRAGMENT")
_library.define("seed_linear(Tensor x, Tensor codes, SymInt rows, int bits, int offset) -> Tensor")
_library.impl("seed_linear", _seed_linear, "CPU")
torch.library.register_fake("lilliput::seed_linear", _fake, lib=_library)
