"""Layers of whole numbers as circuits: what a network that is not binary costs in the engine of `secret_inputs`."""

from __future__ import annotations

import secrets
from time import perf_counter

import numpy as np

from lilliput.kernels.garbling import evaluate
from lilliput.methods.circuits._circuit import ZERO, Builder, Circuit, Number, Wires
from lilliput.methods.circuits._parties import CHUNK_ANDS, Garbling, random_labels

BITS, MAGNITUDE = 8, 7  # of activations; of weights without their sign


def dense(inputs: int, neurons: int) -> Circuit:
    """relu(W x) for activations of 8 bits and secret weights of a sign and 7 bits, cut down to 8 bits again.

    The garbler adds what two's complement needs for negative weights to its bias, so signs are flips and free.
    """
    build = Builder(inputs * BITS)
    x = [bit[:, None] for bit in build.inputs.reshape(BITS, inputs)]
    magnitude, sign = build.secret(MAGNITUDE, inputs, neurons), build.secret(inputs, neurons)
    product = _product(build, x, [build.flip(ZERO, m) for m in magnitude])
    total = _total(build, [*(build.flip(bit, sign) for bit in product), build.flip(ZERO, sign)])
    positive = build.inverse(total[-1])
    return build.done(np.stack([build.conjunction(bit, positive) for bit in total[-1 - BITS : -1]]))


def known_products(inputs: int, neurons: int) -> int:
    """How many ANDs of `dense` have a factor that the garbler knows: half a table would do for these."""
    return inputs * neurons * BITS * MAGNITUDE


def signed_sum(inputs: int, neurons: int) -> Circuit:
    """sum_k w_k x_k >= 0 for inputs of 8 bits and secret weights +1 and -1: no conditional addition before."""
    build = Builder(inputs * BITS)
    sign = build.secret(inputs, neurons)
    x = [build.flip(bit[:, None], sign) for bit in build.inputs.reshape(BITS, inputs)]
    return build.done(build.inverse(_total(build, [*x, build.flip(ZERO, sign)])[-1]))


def _product(build: Builder, x: Number, w: Number) -> Number:
    """x w by partial products: an AND for each pair of bits, and one for each bit that is added."""
    total = [build.conjunction(bit, w[0]) for bit in x]
    for shift, factor in enumerate(w[1:], 1):
        above = total[shift:]
        above += [np.full_like(above[0], ZERO)] * (len(x) - len(above))
        total = total[:shift] + build.add(above, [build.conjunction(bit, factor) for bit in x])
    return total


def _total(build: Builder, numbers: list[Wires]) -> Number:
    """The sum over the first axis of numbers in two's complement, by a tree; each level is a bit wider."""
    while len(numbers[0]) > 1:
        half = len(numbers[0]) // 2
        first, second, rest = (
            [bit[part] for bit in numbers] for part in (slice(half), slice(half, 2 * half), slice(2 * half, None))
        )
        summed = build.add([*first, first[-1]], [*second, second[-1]])[:-1]
        numbers = [np.concatenate([s, r]) for s, r in zip(summed, [*rest, rest[-1]])]
    return [bit[0] for bit in numbers]


def seconds(circuit: Circuit, bits: np.ndarray | None = None) -> float:
    """Garbling and evaluating once, one after the other in one thread, nothing sent."""
    key, gates = secrets.token_bytes(16), circuit.gates
    bits = np.frombuffer(secrets.token_bytes(gates.bits), np.uint8) & 1 if bits is None else bits
    labels = np.empty((gates.wires, 16), np.uint8)
    labels[: gates.inputs] = random_labels(gates.inputs)
    start, done = perf_counter(), 0
    garbling = Garbling(key, circuit, bits, 0)
    for (first, last), tables in zip(circuit.chunks(CHUNK_ANDS), garbling.tables()):
        evaluate(key, gates, first, last, labels, 0, tables)
        done = last
    assert done == len(gates.kinds)
    return perf_counter() - start
