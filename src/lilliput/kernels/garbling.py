"""Garbled circuits with half-gates and free XOR, and AES-128 under them.

A wire has two labels of 16 bytes, W0 for false and W0 ^ delta for true; the lowest bit of delta is 1. An AND costs a
table of 32 bytes; XOR, NOT and a flip by a bit that only the garbler knows cost nothing. Labels become pads by

    H(x, i) = p(p(x) ^ i) ^ p(x),   p AES-128 with one key for a session

AES runs on the machine's instructions unless the instruction set is "scalar" or the machine has none; that form reads a
table at secret places, which another program on the same machine could tell by the cache.

Papers: Zahur, Rosulek & Evans, "Two Halves Make a Whole", 2015; Kolesnikov & Schneider, "Improved Garbled Circuit: Free
XOR Gates", 2008; Guo, Katz, Wang & Yu, "Efficient and Secure Multiparty Computation from Fixed-Key Block Ciphers", 2020
(H is its TMMO, which stays random under the correlation that free XOR needs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lilliput.errors import UserError
from lilliput.kernels import _native, isa

LABEL_BYTES, TABLE_BYTES = 16, 32
XOR, AND, NOT, FLIP = range(4)


@dataclass(frozen=True, eq=False)
class Gates:
    """Gates in the order in which they run; gate g writes wire `inputs + g` and reads wires written before.

    kinds (G,) uint8; left (G,) int32, a wire; right (G,) int32, a wire of XOR and AND, of FLIP the index of one of
    `bits` bits that the garbler alone knows. Raises UserError for gates that read what is not there.
    """

    inputs: int
    bits: int
    kinds: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def __post_init__(self):
        for name, kind in (("kinds", np.uint8), ("left", np.int32), ("right", np.int32)):
            array = getattr(self, name)
            if (
                array.dtype != kind
                or array.shape != self.kinds.shape
                or array.ndim != 1
                or not array.flags.c_contiguous
            ):
                raise UserError(f"{name} of the gates are {array.dtype} {array.shape}; give contiguous {kind.__name__}")
            array.flags.writeable = False  # what was checked stays so
        before = np.arange(self.inputs, self.wires)
        two = self.kinds <= AND
        fits = (self.left >= 0) & (self.left < before) & (self.right >= 0) & (self.kinds <= FLIP)
        fits &= np.where(two, self.right < before, (self.kinds == NOT) | (self.right < self.bits))
        if self.inputs < 1 or not fits.all():
            raise UserError(f"gate {int(np.argmin(fits)) if len(fits) else 0} reads a wire or a bit that is not there")

    @property
    def wires(self) -> int:
        """Inputs and outputs of gates."""
        return self.inputs + len(self.kinds)

    @cached_property
    def ands_before(self) -> np.ndarray:
        """(G + 1,): how many of the first g gates are ANDs."""
        return np.concatenate([[0], np.cumsum(self.kinds == AND)])

    @property
    def ands(self) -> int:
        """How many gates have a table."""
        return int(self.ands_before[-1])


def hardware_cipher() -> bool:
    """Whether the AES instructions of the machine are in use."""
    return _native.garbling_hardware_cipher()


def encrypt(key: bytes, blocks: np.ndarray) -> np.ndarray:
    """AES-128 of each block, uint8 (n, 16). Raises UserError."""
    out = _blocks_like(key, blocks)
    _native.garbling_encrypt(_address(_key(key)), _address(blocks), _address(out), len(blocks))
    return out


def hashes(key: bytes, blocks: np.ndarray, tweak: int) -> np.ndarray:
    """H of block b, uint8 (n, 16), with tweak + b. Raises UserError."""
    out = _blocks_like(key, blocks)
    _native.garbling_hash(_address(_key(key)), _address(blocks), _address(out), len(blocks), tweak)
    return out


def garble(
    key: bytes, gates: Gates, first: int, last: int, bits: np.ndarray, delta: np.ndarray, labels: np.ndarray, tweak: int
) -> np.ndarray:
    """Tables of the gates first .. last-1, uint8 (ANDs, 32); fills in `labels` (wires, 16), each for false.

    `bits` (bits,) uint8 are 0 or 1; AND number k of all gates uses the tweaks tweak + 2 k and the next. Raises
    UserError.
    """
    _check_run(gates, first, last, labels)
    if delta.shape != (LABEL_BYTES,) or not delta[0] & 1:
        raise UserError(f"delta is {delta.shape}; give 16 bytes whose lowest bit is 1")
    if bits.dtype != np.uint8 or bits.shape != (gates.bits,) or not bits.flags.c_contiguous:
        raise UserError(f"the garbler's bits are {bits.dtype} {bits.shape}; give uint8 ({gates.bits},)")
    before, after = gates.ands_before[first], gates.ands_before[last]
    tables, tweak, delta = np.empty((after - before, TABLE_BYTES), np.uint8), tweak + 2 * int(before), delta.copy()
    where = _address(bits), _address(delta), _address(labels), tweak, _address(tables)
    _native.garbling_garble(_address(_key(key)), _native_gates(gates), first, last, *where)
    return tables


def evaluate(
    key: bytes, gates: Gates, first: int, last: int, labels: np.ndarray, tweak: int, tables: np.ndarray
) -> None:
    """Fill in `labels` (wires, 16) of the gates first .. last-1 from their tables (ANDs, 32). Raises UserError."""
    _check_run(gates, first, last, labels)
    before, after = gates.ands_before[first], gates.ands_before[last]
    if tables.dtype != np.uint8 or tables.shape != (after - before, TABLE_BYTES) or not tables.flags.c_contiguous:
        raise UserError(
            f"tables are {tables.dtype} {tables.shape}; {after - before} ANDs have as many rows of 32 bytes"
        )
    where = _address(labels), tweak + 2 * int(before), _address(tables)
    _native.garbling_evaluate(_address(_key(key)), _native_gates(gates), first, last, *where)


def _key(key: bytes) -> np.ndarray:
    if len(key) != LABEL_BYTES:
        raise UserError(f"the key has {len(key)} bytes; AES-128 takes 16")
    return np.frombuffer(key, np.uint8)


def _blocks_like(key: bytes, blocks: np.ndarray) -> np.ndarray:
    _key(key)
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != LABEL_BYTES or not blocks.flags.c_contiguous:
        raise UserError(f"blocks are {blocks.dtype} {blocks.shape}; give contiguous uint8 (n, 16)")
    return np.empty_like(blocks)


def _check_run(gates: Gates, first: int, last: int, labels: np.ndarray) -> None:
    if not 0 <= first <= last <= len(gates.kinds):
        raise UserError(f"gates {first} to {last} are not among {len(gates.kinds)}")
    if labels.dtype != np.uint8 or labels.shape != (gates.wires, LABEL_BYTES) or not labels.flags.c_contiguous:
        raise UserError(f"labels are {labels.dtype} {labels.shape}; give contiguous uint8 ({gates.wires}, 16)")


def _native_gates(gates: Gates) -> tuple[int, int, int, int]:
    return _address(gates.kinds), _address(gates.left), _address(gates.right), gates.inputs


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


# --- the same in numpy ---------------------------------------------------------------------------------------------


def _substitution_box() -> np.ndarray:
    """AES's box from logarithms to the base 3 in its field."""
    powers = [1]
    for _ in range(254):
        last = powers[-1]
        powers.append(last ^ (last << 1) ^ (0x11B if last & 0x80 else 0))
    box = np.zeros(256, np.uint8)
    for i, power in enumerate(powers):
        inverse = powers[-i % 255]
        turns = [(inverse << t | inverse >> (8 - t)) & 255 for t in range(5)]
        box[power] = 0x63 ^ turns[0] ^ turns[1] ^ turns[2] ^ turns[3] ^ turns[4]
    box[0] = 0x63
    return box


_BOX = _substitution_box()
_SHIFTED = np.array([(i + i % 4 * 4) % 16 for i in range(16)])


def reference_encrypt(key: bytes, blocks: np.ndarray) -> np.ndarray:
    """AES-128 of each block in numpy, as FIPS 197 writes it down."""
    rounds = _round_keys(key)
    state = blocks ^ rounds[0]
    for number, round_key in enumerate(rounds[1:], 1):
        state = _BOX[state][:, _SHIFTED]
        if number < 10:
            columns = state.reshape(-1, 4, 4)
            doubled = (columns << 1) ^ (columns >> 7) * np.uint8(0x1B)
            tripled = np.roll(doubled ^ columns, -1, 2)
            state = (doubled ^ tripled ^ np.roll(columns, -2, 2) ^ np.roll(columns, -3, 2)).reshape(-1, 16)
        state = state ^ round_key
    return state


def _round_keys(key: bytes) -> np.ndarray:
    words = [np.frombuffer(key, np.uint8)[i : i + 4] for i in range(0, 16, 4)]
    constant = 1
    for i in range(4, 44):
        word = words[-1]
        if i % 4 == 0:
            word = _BOX[np.roll(word, -1)] ^ np.array([constant, 0, 0, 0], np.uint8)
            constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
        words.append(words[-4] ^ word)
    return np.concatenate(words).reshape(11, 16)


def reference_hashes(key: bytes, blocks: np.ndarray, tweak: int) -> np.ndarray:
    """H of block b with tweak + b, in numpy."""
    tweaks = np.zeros((len(blocks), 2), np.int64)
    tweaks[:, 0] = tweak + np.arange(len(blocks))
    hidden = reference_encrypt(key, blocks)
    return reference_encrypt(key, hidden ^ tweaks.view(np.uint8)) ^ hidden


def reference_garble(
    key: bytes, gates: Gates, bits: np.ndarray, delta: np.ndarray, labels: np.ndarray, tweak: int
) -> np.ndarray:
    """`garble` of all gates, gate by gate, as the paper's figure 2 has it."""
    tables = []
    for out, (kind, left, right) in enumerate(zip(gates.kinds, gates.left, gates.right), gates.inputs):
        a = labels[left]
        if kind == AND:
            b = labels[right]
            j = tweak + 2 * len(tables)
            h_a, h_a1 = (reference_hashes(key, x[None], j)[0] for x in (a, a ^ delta))
            h_b, h_b1 = (reference_hashes(key, x[None], j + 1)[0] for x in (b, b ^ delta))
            garbler, evaluator = h_a ^ h_a1 ^ (b[0] & 1) * delta, h_b ^ h_b1 ^ a
            labels[out] = h_a ^ (a[0] & 1) * garbler ^ h_b ^ (b[0] & 1) * (evaluator ^ a)
            tables.append(np.concatenate([garbler, evaluator]))
        elif kind == XOR:
            labels[out] = a ^ labels[right]
        else:
            labels[out] = a ^ delta * (1 if kind == NOT else bits[right])
    return np.array(tables, np.uint8).reshape(-1, TABLE_BYTES)


def reference_evaluate(key: bytes, gates: Gates, labels: np.ndarray, tweak: int, tables: np.ndarray) -> None:
    """`evaluate` of all gates, gate by gate."""
    used = 0
    for out, (kind, left, right) in enumerate(zip(gates.kinds, gates.left, gates.right), gates.inputs):
        a = labels[left]
        labels[out] = a
        if kind == XOR:
            labels[out] = a ^ labels[right]
        elif kind == AND:
            b, (garbler, evaluator) = labels[right], tables[used].reshape(2, LABEL_BYTES)
            h_a = reference_hashes(key, a[None], tweak + 2 * used)[0]
            h_b = reference_hashes(key, b[None], tweak + 2 * used + 1)[0]
            labels[out] = h_a ^ (a[0] & 1) * garbler ^ h_b ^ (b[0] & 1) * (evaluator ^ a)
            used += 1


isa()  # a wrong LILLIPUT_ISA is said at once
