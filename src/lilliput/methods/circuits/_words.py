"""Numbers as the bits of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Circuit = Value = Any  # of Amaranth, whose annotations do not tell what its modules and values can do


def joined(numbers: Sequence[int], width: int) -> int:
    """Numbers, perhaps negative, as one word of `width` bits each; the first one in the lowest bits."""
    mask = (1 << width) - 1
    return sum((int(n) & mask) << (i * width) for i, n in enumerate(numbers))


def signed_bits(number: int) -> int:
    """Of a number in two's complement."""
    return (number if number >= 0 else -number - 1).bit_length() + 1
