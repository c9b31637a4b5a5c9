"""Oblivious transfer: the receiver gets one of two pads by its choice bit; the sender has both and learns no choice.

128 base transfers (Chou & Orlandi, "The Simplest Protocol for Oblivious Transfer", 2015) in the group of squares modulo
the 3072-bit prime of RFC 3526, then any number by symmetric ciphers alone (Ishai, Kilian, Nissim & Petrank, "Extending
Oblivious Transfers Efficiently", 2003). Both are for parties that keep to the protocol.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from functools import cache

import numpy as np

from lilliput.kernels.garbling import LABEL_BYTES, hashes
from lilliput.methods.circuits._frames import SessionEnded

BASE = 128  # base transfers: the bits of security of the extension
GROUP_BITS, ELEMENT_BYTES = 3072, 384
EXPONENT_BITS = 256  # twice the bits of security, enough in a group of the order of a large prime
GENERATOR = 2
WINDOW = 4  # bits of an exponent that a table answers at once


@cache
def prime() -> int:
    """2^3072 - 2^3008 - 1 + 2^64 (floor(2^2942 pi) + 1690314), group 15 of RFC 3526; (p - 1) / 2 is prime, too."""
    return 2**GROUP_BITS - 2 ** (GROUP_BITS - 64) - 1 + 2**64 * (_scaled_pi(GROUP_BITS - 130) + 1690314)


def _scaled_pi(bits: int) -> int:
    """floor(2^bits pi), by Machin's 16 atan(1/5) - 4 atan(1/239)."""
    guard = 64

    def arctan_of_inverse(n: int) -> int:
        power = total = (1 << (bits + guard)) // n
        for k in range(3, math.ceil(2 * (bits + guard) / math.log2(n * n)) + 5, 2):
            power //= -n * n
            total += power // k
        return total

    return (16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)) >> guard


class FixedBase:
    """Powers of one element, from a table: a product for each WINDOW bits of the exponent."""

    def __init__(self, element: int):
        self.rows = []
        for _ in range(0, EXPONENT_BITS, WINDOW):
            row = [1]
            for _ in range(2**WINDOW - 1):
                row.append(row[-1] * element % prime())
            self.rows.append(row)
            element = row[-1] * element % prime()

    def power(self, exponent: int) -> int:
        """element ** exponent for 0 <= exponent < 2**EXPONENT_BITS."""
        result = 1
        for row in self.rows:
            result = result * row[exponent % 2**WINDOW] % prime()
            exponent >>= WINDOW
        return result


@cache
def _generator() -> FixedBase:
    return FixedBase(GENERATOR)


def _element(data: bytes | bytearray) -> int:
    value = int.from_bytes(data, "little")
    if not 1 < value < prime() - 1:
        raise SessionEnded("the other party sent a number that is no element of the group")
    return value


def _seed(index: int, transcript: bytes, shared: int) -> bytes:
    secret = shared.to_bytes(ELEMENT_BYTES, "little")
    return hashlib.sha256(b"lilliput base transfer" + index.to_bytes(4, "little") + transcript + secret).digest()


class BaseSender:
    """Gets two random seeds for each of BASE transfers."""

    def __init__(self):
        self._secret = secrets.randbits(EXPONENT_BITS)
        self._point = _generator().power(self._secret)
        self.message = self._point.to_bytes(ELEMENT_BYTES, "little")

    def seeds(self, reply: bytes | bytearray) -> list[tuple[bytes, bytes]]:
        """Both seeds of each transfer from the receiver's BASE elements. Raises SessionEnded."""
        other = pow(pow(self._point, self._secret, prime()), -1, prime())
        found = []
        for i in range(BASE):
            element = bytes(reply[i * ELEMENT_BYTES : (i + 1) * ELEMENT_BYTES])
            shared = pow(_element(element), self._secret, prime())
            transcript = self.message + element
            found.append((_seed(i, transcript, shared), _seed(i, transcript, shared * other % prime())))
        return found


class BaseReceiver:
    """Gets the seed of its choice for each of BASE transfers; `choices` (BASE,) uint8 are drawn at random."""

    def __init__(self, message: bytes | bytearray):
        point = FixedBase(_element(message))
        self.choices = np.frombuffer(secrets.token_bytes(BASE), np.uint8) & 1
        self.seeds, elements = [], []
        for i, choice in enumerate(self.choices.tolist()):
            exponent = secrets.randbits(EXPONENT_BITS)
            element = _generator().power(exponent) * (1, _element(message))[choice] % prime()
            elements.append(element.to_bytes(ELEMENT_BYTES, "little"))
            self.seeds.append(_seed(i, bytes(message) + elements[-1], point.power(exponent)))
        self.message = b"".join(elements)


def column_bytes(transfers: int) -> int:
    """Size of the extension's message for so many transfers."""
    return BASE * (-(-transfers // 8))


class ExtensionReceiver:
    """Any number of transfers by choice, after BASE transfers in which this party was the sender."""

    def __init__(self, key: bytes, seeds: list[tuple[bytes, bytes]], tweak: int):
        self._key, self._seeds, self._tweak, self._calls = key, seeds, tweak, 0

    def choose(self, choices: np.ndarray, pads: int = 1) -> tuple[bytes, np.ndarray]:
        """(message for the sender, the chosen pads uint8 (transfers, pads, 16)) for choices (transfers,) of 0 and 1."""
        count = -(-len(choices) // 8)
        packed = np.packbits(choices.astype(np.uint8), bitorder="little")
        zero, one = (_stream([pair[side] for pair in self._seeds], self._calls, count) for side in (0, 1))
        rows = _rows(zero, len(choices))
        self._calls += 1
        found = _pads(self._key, rows, pads, self._tweak)
        self._tweak += len(choices) * pads
        return (zero ^ one ^ packed).tobytes(), found


class ExtensionSender:
    """The other side: this party was the receiver of the BASE transfers."""

    def __init__(self, key: bytes, choices: np.ndarray, seeds: list[bytes], tweak: int):
        self._key, self._choices, self._seeds, self._tweak, self._calls = key, choices, seeds, tweak, 0
        self._delta = np.packbits(choices, bitorder="little")

    def pads(self, message: bytes | bytearray, transfers: int, pads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The pads for choice 0 and for choice 1, uint8 (transfers, pads, 16) each, from the receiver's message."""
        columns = np.frombuffer(message, np.uint8).reshape(BASE, -1)
        own = _stream(self._seeds, self._calls, columns.shape[1]) ^ columns * self._choices[:, None]
        rows = _rows(own, transfers)
        self._calls += 1
        found = tuple(_pads(self._key, r, pads, self._tweak) for r in (rows, rows ^ self._delta))
        self._tweak += transfers * pads
        return found  # type: ignore[return-value]


def _stream(seeds: list[bytes], call: int, count: int) -> np.ndarray:
    """`count` pseudo-random bytes from each seed, (BASE, count), new ones at each call."""
    number = call.to_bytes(8, "little")
    made = b"".join(hashlib.shake_128(seed + number).digest(count) for seed in seeds)
    return np.frombuffer(made, np.uint8).reshape(len(seeds), count)


def _rows(columns: np.ndarray, transfers: int) -> np.ndarray:
    """Bit i of every column as 16 bytes: (BASE, bytes) -> (transfers, 16)."""
    bits = np.unpackbits(columns, axis=1, count=transfers, bitorder="little")
    return np.packbits(np.ascontiguousarray(bits.T), axis=1, bitorder="little")


def _pads(key: bytes, rows: np.ndarray, pads: int, tweak: int) -> np.ndarray:
    repeated = np.ascontiguousarray(np.repeat(rows, pads, 0))
    return hashes(key, repeated, tweak).reshape(len(rows), pads, LABEL_BYTES)
