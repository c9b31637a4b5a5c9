"""Building circuits of XOR, AND, NOT and secret flips, many lanes at a time: an operand is an array of wires.

A number is a list of such arrays, the lowest bit first. The ANDs of each part are the fewest that are known for it: one
for a full adder (Boyar & Peralta), one for a bit of a comparison, one for a bit of a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lilliput.errors import UserError
from lilliput.kernels.garbling import AND, FLIP, NOT, XOR, Gates

Wires: TypeAlias = np.ndarray  # int32, one wire per lane
Number: TypeAlias = list[np.ndarray]
MOST_WIRES = 2**26  # a gigabyte of labels
ZERO = np.int32(0)  # a wire that is false


@dataclass(frozen=True, eq=False)
class Circuit:
    """Gates and the wires (outputs,) that are its answer; wire 0 is false, wires 1 .. are the evaluator's inputs."""

    gates: Gates
    outputs: np.ndarray

    @property
    def inputs(self) -> int:
        """Bits that the evaluator puts in."""
        return self.gates.inputs - 1

    def chunks(self, ands: int) -> list[tuple[int, int]]:
        """Runs of gates (first, last) with at most so many ANDs each; together they are all gates."""
        before, count = self.gates.ands_before, len(self.gates.kinds)
        ends = [int(np.searchsorted(before, limit, "right")) - 1 for limit in range(ands, self.gates.ands, ands)]
        cuts = sorted({0, *ends, count})
        return list(itertools.pairwise(cuts))

    def run(self, inputs: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """What the circuit computes, without any secrecy: inputs (B, inputs) and bits (bits,) -> (B, outputs), bool."""
        values = np.zeros((self.gates.wires, len(inputs)), bool)
        values[1 : self.gates.inputs] = inputs.T
        kinds, left, right = (x.tolist() for x in (self.gates.kinds, self.gates.left, self.gates.right))
        for out, (kind, a, b) in enumerate(zip(kinds, left, right), self.gates.inputs):
            if kind == AND:
                values[out] = values[a] & values[b]
            elif kind == XOR:
                values[out] = values[a] ^ values[b]
            else:
                values[out] = values[a] ^ (True if kind == NOT else bool(bits[b]))
        return values[self.outputs].T


class Builder:
    """Collects gates; every method takes and gives wires in arrays that broadcast."""

    def __init__(self, inputs: int):
        self.inputs = np.arange(1, inputs + 1, dtype=np.int32)
        self.wires, self.bits = inputs + 1, 0
        self._parts: list[tuple[int, np.ndarray, np.ndarray]] = []

    def done(self, outputs: Wires) -> Circuit:
        """The circuit with these wires as its answer."""
        kinds = [np.full(left.size, kind, np.uint8) for kind, left, _ in self._parts]
        left, right = ([part[side].ravel() for part in self._parts] for side in (1, 2))
        arrays = [
            np.concatenate([np.zeros(0, x), *p], dtype=x)
            for p, x in zip((kinds, left, right), (np.uint8, np.int32, np.int32))
        ]
        return Circuit(Gates(len(self.inputs) + 1, self.bits, *arrays), np.asarray(outputs, np.int32).ravel())

    def secret(self, *shape: int) -> np.ndarray:
        """Indices of new bits that the garbler alone knows."""
        count = int(np.prod(shape))
        self.bits += count
        return np.arange(self.bits - count, self.bits, dtype=np.int32).reshape(shape)

    def xor(self, a: Wires, b: Wires) -> Wires:
        """a ^ b."""
        return self._gates(XOR, a, b)

    def conjunction(self, a: Wires, b: Wires) -> Wires:
        """a & b: the only kind that costs a table."""
        return self._gates(AND, a, b)

    def inverse(self, a: Wires) -> Wires:
        """Not a."""
        return self._gates(NOT, a, ZERO)

    def flip(self, a: Wires, secret: np.ndarray) -> Wires:
        """a ^ bit, for indices that `secret` gave; nobody but the garbler can tell what became of a."""
        return self._gates(FLIP, a, secret)

    def _gates(self, kind: int, a: Wires, b: np.ndarray) -> Wires:
        a, b = np.broadcast_arrays(np.asarray(a, np.int32), np.asarray(b, np.int32))
        if self.wires + a.size > MOST_WIRES:
            raise UserError(f"the circuit has more than {MOST_WIRES} wires; use a smaller network")
        self._parts.append((kind, a, b))
        out = np.arange(self.wires, self.wires + a.size, dtype=np.int32).reshape(a.shape)
        self.wires += a.size
        return out

    # --- arithmetic ------------------------------------------------------------------------------------------------

    def disjunction(self, a: Wires, b: Wires) -> Wires:
        """a | b, with one AND."""
        return self.xor(self.xor(a, b), self.conjunction(a, b))

    def any(self, wires: Sequence[Wires]) -> Wires:
        """Whether one of them is true."""
        found = wires[0]
        for wire in wires[1:]:
            found = self.disjunction(found, wire)
        return found

    def full_adder(self, a: Wires, b: Wires, c: Wires) -> tuple[Wires, Wires]:
        """Sum and carry of three bits, with one AND."""
        x, y = self.xor(a, c), self.xor(b, c)
        return self.xor(x, b), self.xor(self.conjunction(x, y), c)

    def count(self, bits: Sequence[Wires]) -> Number:
        """How many of n bits are true, with n - popcount(n) ANDs."""
        column, number = list(bits), []
        while column:
            carries = []
            while len(column) > 1:
                first, second = column.pop(0), column.pop(0)
                if column:
                    total, carry = self.full_adder(first, second, column.pop(0))
                else:
                    total, carry = self.xor(first, second), self.conjunction(first, second)
                column.append(total)
                carries.append(carry)
            number.append(column[0])
            column = carries
        return number

    def add(self, a: Number, b: Number, carry: Wires = ZERO) -> Number:
        """a + b + carry for numbers of the same length, with an AND per bit; one bit longer."""
        total = []
        for x, y in zip(a, b, strict=True):
            bit, carry = self.full_adder(x, y, carry)
            total.append(bit)
        return [*total, carry]

    def at_least(self, a: Number, b_inverse: Number) -> Wires:
        """a >= b, given the bits of b inverted, with an AND per bit: the carry of a - b."""
        carry = self.inverse(ZERO)
        for x, y in zip(a, b_inverse, strict=True):
            carry = self.carry(x, y, carry)
        return carry

    def carry(self, a: Wires, b: Wires, c: Wires) -> Wires:
        """Whether two of three bits are true, with one AND."""
        return self.xor(self.conjunction(self.xor(a, c), self.xor(b, c)), c)

    def choose(self, condition: Wires, yes: Number, no: Number) -> Number:
        """`yes` where the condition is true, else `no`, with an AND per bit."""
        return [self.xor(n, self.conjunction(condition, self.xor(y, n))) for y, n in zip(yes, no, strict=True)]

    def constant(self, value: int, bits: int) -> Number:
        """A number that everybody knows."""
        one = self.inverse(ZERO)
        return [one if value >> i & 1 else np.asarray(ZERO) for i in range(bits)]

    def arg_max(self, numbers: Sequence[Number]) -> Number:
        """The index of the largest number, of the first of equal ones."""
        width = (len(numbers) - 1).bit_length()
        best, index = numbers[0], self.constant(0, width)
        for k, number in enumerate(numbers[1:], 1):
            stays = self.at_least(best, [self.inverse(bit) for bit in number])
            best = self.choose(stays, best, number)
            index = self.choose(stays, index, self.constant(k, width))
        return index
