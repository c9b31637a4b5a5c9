"""A binary network as a circuit that knows its shape alone: weights and thresholds are flips that the garbler fills in.

XNOR with a weight is a flip and free. A neuron counts where inputs and weights agree and compares with its threshold; a
max-pool of signs is an OR; the classes' scores are compared in the circuit. A first layer of whole numbers is computed
before, by oblivious conditional addition, and enters as two shares that the circuit adds.

Paper: Riazi, Samragh, Chen, Laine, Lauter & Koushanfar, "XONN", 2019 (arXiv 1902.07342).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lilliput.methods.circuits._circuit import ZERO, Builder, Circuit, Wires
from lilliput.methods.circuits._shapes import LayerShape, Shape


@dataclass(frozen=True, eq=False)
class SecretLayer:
    """What the server alone knows of a layer.

    weights (filters, taps) bool, true for +1. Of a hidden layer: thresholds (filters, places) int64, the sum of signs
    or of whole numbers from which on the output is +1, or -1 where `flips` (filters,) is true. Of the last layer:
    offsets (classes,) int64 to add to the count of agreements and ranks (classes,) that decide between equal ones.
    """

    weights: np.ndarray
    thresholds: np.ndarray | None = None
    flips: np.ndarray | None = None
    offsets: np.ndarray | None = None
    ranks: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Slot:
    """Where some of the garbler's bits are: their role in a layer, their indices, a threshold's places and count."""

    role: str
    layer: int
    at: np.ndarray
    places: np.ndarray | None = None
    count: int = 0


class BinaryCircuit:
    """The circuit of a shape, and which of its bits mean what."""

    def __init__(self, shape: Shape):
        self.shape, self.slots = shape, []
        first = shape.layers[0]
        shared = first.filters * first.picture[0] * first.picture[1] * shape.share_bits if shape.bits else 0
        self._build = Builder(shared or shape.inputs)
        wires = self._build.inputs
        for index, layer in enumerate(shape.layers[:-1]):
            hidden = self._first(wires, layer) if index == 0 and shape.bits else self._hidden(wires, index, layer)
            wires = self._pool(hidden, index, layer)
        outputs = self._classes(wires, len(shape.layers) - 1)
        self.circuit: Circuit = self._build.done(np.array(outputs, np.int32))
        del self._build

    def _slot(self, role: str, layer: int, *shape: int, places: np.ndarray | None = None, count: int = 0) -> np.ndarray:
        at = self._build.secret(*shape)
        self.slots.append(Slot(role, layer, at, places, count))
        return at

    def _first(self, wires: Wires, layer: LayerShape) -> Wires:
        """Whether sum - threshold is not negative, (filters, places): the top bit of both parties' shares added."""
        bits, places = self.shape.share_bits, layer.picture[0] * layer.picture[1]
        ours = wires.reshape(bits, layer.filters, places)
        theirs = self._build.flip(ZERO, self._slot("share", 0, bits, layer.filters, places))
        carry: Any = ZERO
        for a, b in zip(ours[:-1], theirs[:-1]):
            carry = self._build.carry(a, b, carry)
        top = self._build.xor(self._build.xor(ours[-1], theirs[-1]), carry)
        return self._build.inverse(top)

    def _hidden(self, wires: Wires, index: int, layer: LayerShape) -> Wires:
        """Whether each neuron reaches its threshold, (filters, places)."""
        weights = self._slot("weights", index, layer.filters, layer.taps)
        places = layer.places()
        found = np.zeros((layer.filters, len(places)), np.int32)
        kinds, kind_of = np.unique(places >= 0, axis=0, return_inverse=True)
        for kind, valid in enumerate(kinds):
            here = np.flatnonzero(kind_of.reshape(-1) == kind)
            number = self._agreements(wires[places[here][:, valid]], weights[:, valid])
            width = (int(valid.sum()) + 1).bit_length()  # a threshold may be one more than the count
            number = [*number, *[np.asarray(ZERO)] * (width - len(number))]
            slot = self._slot("thresholds", index, width, layer.filters, len(here), places=here, count=int(valid.sum()))
            found[:, here] = self._build.at_least(number, list(self._build.flip(ZERO, slot)))
        return found

    def _agreements(self, inputs: Wires, weights: np.ndarray) -> list[Wires]:
        """How many of the inputs (places, taps) are what the weights (filters, taps) are: numbers (filters, places)."""
        return self._build.count(list(self._build.flip(inputs.T[:, None], weights.T[..., None])))

    def _pool(self, reached: Wires, index: int, layer: LayerShape) -> Wires:
        """Signs (channels * height * width,) after pooling; a neuron with a negative factor is flipped."""
        flips = self._slot("flips", index, layer.filters)[:, None]
        windows = layer.windows()
        if layer.pool_first:
            return self._build.flip(self._build.any(list(reached[:, windows].swapaxes(0, 1))), flips).reshape(-1)
        return self._build.any(list(self._build.flip(reached, flips)[:, windows].swapaxes(0, 1))).reshape(-1)

    def _classes(self, wires: Wires, index: int) -> list[Wires]:
        """The bits of the class with the highest score."""
        layer = self.shape.layers[index]
        weights = self._slot("weights", index, layer.filters, layer.taps)
        number = [bit[:, 0] for bit in self._agreements(wires[None], weights)]
        width = (2 * layer.taps + 1).bit_length()
        number += [np.full(layer.filters, ZERO)] * (width - len(number))
        offsets = self._build.flip(ZERO, self._slot("offsets", index, width, layer.filters))
        total = self._build.add(number, list(offsets))[:-1]
        ranks = self._build.flip(ZERO, self._slot("ranks", index, (layer.filters - 1).bit_length(), layer.filters))
        return self._build.arg_max([[bit[k] for bit in [*ranks, *total]] for k in range(layer.filters)])

    # --- what the parties put in -----------------------------------------------------------------------------------

    def garbler_bits(self, secrets: list[SecretLayer], share: np.ndarray | None = None) -> np.ndarray:
        """The garbler's bits, uint8 (bits,), for its network and its share (filters, places) of the first product."""
        bits = np.zeros(self.circuit.gates.bits, np.uint8)
        for slot in self.slots:
            if slot.role == "share":
                values = share
            elif slot.role == "thresholds":
                sums = secrets[slot.layer].thresholds[:, slot.places]  # type: ignore[index]
                # a sum of n signs is 2 agreements - n; the comparison takes the bits inverted
                values = ~np.clip(-(-(sums + slot.count) // 2), 0, slot.count + 1)
            else:
                values = getattr(secrets[slot.layer], slot.role)
            assert values is not None
            if slot.role == "weights":
                bits[slot.at] = ~values  # agreement with +1 is the sign itself
            else:
                bits[slot.at] = values if slot.role == "flips" else planes(values, len(slot.at))
        return bits

    def answer(self, bits: np.ndarray) -> np.ndarray:
        """The class of outputs (..., bits)."""
        return bits.astype(np.int64) @ (1 << np.arange(bits.shape[-1]))


def planes(values: np.ndarray, bits: int) -> np.ndarray:
    """The lowest bits of whole numbers, (bits, *shape), uint8, the lowest first."""
    steps = np.arange(bits).reshape(-1, *[1] * values.ndim)
    return (values >> steps & 1).astype(np.uint8)


def plain(shape: Shape, secrets: list[SecretLayer], x: np.ndarray) -> np.ndarray:
    """The classes (B,) of inputs (B, values), whole numbers or bits (true for +1), computed in the open."""
    values = x.astype(np.int64) if shape.bits else np.where(x, 1, -1)
    for layer, secret in zip(shape.layers[:-1], secrets):
        reached, flips, windows = _sums(layer, secret, values) >= secret.thresholds, secret.flips, layer.windows()
        if layer.pool_first:
            signs = reached[:, :, windows].any(2) ^ flips[:, None]  # type: ignore[index]
        else:
            signs = (reached ^ flips[:, None])[:, :, windows].any(2)  # type: ignore[index]
        values = np.where(signs.reshape(len(x), -1), 1, -1)
    last, secret = shape.layers[-1], secrets[-1]
    agreements = (_sums(last, secret, values)[..., 0] + last.taps) // 2
    return ((agreements + secret.offsets) * last.filters + secret.ranks).argmax(-1)


def _sums(layer: LayerShape, secret: SecretLayer, values: np.ndarray) -> np.ndarray:
    """What the weights make of values (B, values): (B, filters, places)."""
    places = layer.places()
    under = np.where(places >= 0, values[:, places], 0)
    return np.einsum("bpt,ft->bfp", under, np.where(secret.weights, 1, -1))
