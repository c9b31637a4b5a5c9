"""How products are folded, and the order in which a circuit reads its weights."""

from itertools import pairwise

import pytest
import torch
from circuit_nets import build

from lilliput.errors import UserError
from lilliput.methods.circuits._fold import Folded, as_vector, divisors, fold
from lilliput.methods.circuits._net import Product
from lilliput.methods.circuits._words import joined, signed_bits
from lilliput.methods.circuits.streaming import Streaming


def product(weights, shape, padding=0):
    return Product(shape, weights, torch.arange(4), (), 1, padding, None)


def test_weights_stand_in_the_order_of_the_loops():
    torch.manual_seed(0)
    weights = torch.randint(-3, 4, (6, 4, 2, 3))
    folded = Folded(product(weights, (4, 5, 5)), lanes=2, units=3)
    words = iter(folded.weight_words)
    for group in range(2):
        for ky in range(2):
            for kx in range(3):
                for c in range(2):
                    word = next(words)
                    for unit in range(3):
                        for lane in range(2):
                            place = (unit * 2 + lane) * folded.weight_bits
                            code = word >> place & (1 << folded.weight_bits) - 1
                            assert folded.weight_book[code] == weights[group * 3 + unit, c * 2 + lane, ky, kx]
    assert next(words, None) is None
    assert folded.cycles == 4 * 3 * 2 * 2 * 3 * 2  # windows, groups, words of a window


def test_a_window_over_all_becomes_a_vector_in_the_order_of_the_stream():
    weights = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    whole = as_vector(product(weights, (3, 2, 2)))
    assert whole.shape == (12, 1, 1)
    assert whole.weights[1, :, 0, 0].tolist() == [
        int(weights[1, c, y, x]) for y in (0, 1) for x in (0, 1) for c in range(3)
    ]
    padded = product(weights, (3, 2, 2), padding=1)
    assert as_vector(padded) is padded


def test_the_fewest_units_that_keep_the_cycles():
    net = Streaming().emit(*build("mlp-1")[:2]).net
    for cycles in (24, 40, 100, 1000):
        folded = fold(net, cycles, lanes=8)
        assert all(f.cycles <= cycles for f in folded)
        for before, f in pairwise(folded):
            assert f.lanes == before.units
        for f in folded:
            fewer = [n for n in divisors(len(f.product.weights)) if n < f.units]
            assert not fewer or Folded(f.product, f.lanes, fewer[-1]).cycles > cycles


def test_a_design_within_a_latency_is_the_slowest_that_keeps_it():
    design = Streaming(cycles=10**6).emit(*build("mlp-1")[:2])
    assert design.within(None) is design
    assert design.within(10**6) is design
    quick = design.within(120)
    assert quick.expected_latency <= 120 < design.expected_latency
    assert quick.net is design.net
    with pytest.raises(UserError, match=r"at least; the latency allows 5"):
        design.within(5)


def test_words():
    assert joined([1, -1, 2], 4) == 0x2F1
    assert [signed_bits(n) for n in (0, 1, -1, 127, -128, 128)] == [1, 2, 1, 8, 8, 9]
