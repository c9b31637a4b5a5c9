"""How much of a product runs at once: `lanes` inputs and `units` channels a cycle, the rest in turn.

The channels that a stage gives in one cycle are the inputs that the next takes in one, so a choice of units decides the
next stage's lanes. Each stage gets the fewest units with which a frame takes no more than the cycles that are asked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch

from lilliput.errors import UserError
from lilliput.methods.circuits._net import IntegerNet, Pool, Product
from lilliput.methods.circuits._words import joined

WORDS_OF_LATENCY = 4  # pipeline registers between a word that is read and the output


@dataclass(frozen=True, eq=False)
class Folded:
    """A product and how much of it runs in one cycle."""

    product: Product
    lanes: int  # codes of one word in, divides the channels
    units: int  # channels of one word out, divides the channels

    @property
    def words(self) -> tuple[int, int, int]:
        """Words of a frame: of a place, places of a row, rows."""
        channels, height, width = self.product.shape
        return channels // self.lanes, width, height

    @property
    def window(self) -> tuple[int, int, int]:
        """Words of a window: of a tap, taps of a row, rows."""
        *_, height, width = self.product.weights.shape
        return self.words[0], width, height

    @property
    def groups(self) -> int:
        """Groups of channels that are summed in turn."""
        return len(self.product.weights) // self.units

    @property
    def places(self) -> tuple[int, int]:
        """Windows of a row, rows of windows."""
        _, height, width = self.product.out
        return width, height

    @property
    def cycles(self) -> int:
        """Of one frame, when nothing waits."""
        (a, b, c), (x, y) = self.window, self.places
        return a * b * c * self.groups * x * y

    @property
    def weight_book(self) -> list[int]:
        """The weights that occur, ascending."""
        return [-1, 1] if self.product.signs else self.product.weights.unique().tolist()

    @property
    def weight_bits(self) -> int:
        """Of one weight in the table."""
        return max(1, (len(self.weight_book) - 1).bit_length())

    @property
    def weight_width(self) -> int:
        """Bits of a word of weights: those of one unit side by side, unit after unit."""
        return self.units * self.lanes * self.weight_bits

    @cached_property
    def weight_words(self) -> list[int]:
        """The table of weights in the order in which it is read: group, row and column of the window, channels."""
        w = self.product.weights
        codes = torch.bucketize(w, torch.tensor(self.weight_book))
        grouped = codes.unflatten(0, (self.groups, self.units)).unflatten(2, (self.words[0], self.lanes))
        ordered = grouped.permute(0, 4, 5, 2, 1, 3).flatten(4).flatten(0, 3)  # (words, units lanes)
        return [joined(row, self.weight_bits) for row in ordered.tolist()]

    @property
    def sum_bits(self) -> int:
        """Of a sum, and of a threshold just above all sums."""
        return (self.product.bound + 1).bit_length() + 1

    @property
    def out_bits(self) -> int:
        """Of what one unit gives."""
        return self.sum_bits if self.product.encoder is None else self.product.encoder.bits


def as_vector(product: Product) -> Product:
    """A product whose window covers its whole input, as one place with as many channels; others stay."""
    if not product.whole:
        return product
    n, c, h, w = product.weights.shape
    weights = product.weights.permute(0, 2, 3, 1).reshape(n, c * h * w, 1, 1)  # in the order of the stream
    return dataclasses.replace(product, shape=(c * h * w, 1, 1), weights=weights, stride=1)


def fold(net: IntegerNet, cycles: int, lanes: int) -> list[Folded]:
    """The products with the fewest units that take at most `cycles` a frame; the first gets up to `lanes` inputs.

    Raises UserError when a stage cannot be as fast with these lanes, with what it needs.
    """
    found: list[Folded] = []
    products = [as_vector(p) for p in net.products]
    width = max(n for n in divisors(products[0].shape[0]) if n <= lanes)
    for product in products:
        outputs = len(product.weights)
        options = (Folded(product, width, units) for units in divisors(outputs))
        chosen = next((f for f in options if f.cycles <= cycles), None)
        if chosen is None:
            least = Folded(product, width, outputs).cycles
            raise UserError(
                f"{cycles} cycles a frame are out of reach: a product of {outputs} channels takes {least} with all of "
                f"them at once and {width} inputs a cycle; allow more cycles, or give more lanes"
            )
        found.append(chosen)
        width = chosen.units
    return found


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def expected_latency(net: IntegerNet, folded: list[Folded]) -> int:
    """Cycles from the first word of a frame to its last score, when the circuit was idle; the simulation decides."""
    arriving = folded[0].words[0] * folded[0].words[1] * folded[0].words[2]
    pools = sum(isinstance(stage, Pool) for stage in net.stages)
    return arriving + sum(f.cycles + WORDS_OF_LATENCY for f in folded) + 2 * pools + net.classes
