"""Parts of circuits against Python's own numbers, and how many ANDs they take."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.circuits import _circuit
from lilliput.methods.circuits._binary_circuit import planes
from lilliput.methods.circuits._circuit import Builder

FEW = settings(max_examples=25, deadline=None)


def numbers(build, *widths):
    """The inputs cut into numbers."""
    ends = np.cumsum([0, *widths])
    return [list(build.inputs[a:b]) for a, b in itertools.pairwise(ends)]


def value(bits):
    return int(bits @ (1 << np.arange(len(bits))))


def run(circuit, *given, bits=()):
    """The outputs of one input, given as (value, width)."""
    inputs = np.concatenate([planes(np.array(v), width) for v, width in given])
    return circuit.run(inputs[None].astype(bool), np.array(bits, np.uint8))[0]


@pytest.mark.parametrize("a", [0, 1])
@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("c", [0, 1])
def test_small_parts_by_their_truth_tables(a, b, c):
    build = Builder(3)
    x, y, z = build.inputs
    total, carry = build.full_adder(x, y, z)
    secret = build.secret(1)[0]
    parts = [
        (build.xor(x, y), a ^ b),
        (build.conjunction(x, y), a & b),
        (build.disjunction(x, y), a | b),
        (build.inverse(x), 1 - a),
        (build.flip(x, secret), 1 - a),
        (total, (a + b + c) & 1),
        (carry, (a + b + c) >> 1),
        (build.carry(x, y, z), (a + b + c) >> 1),
        (build.any([x, y, z]), a | b | c),
        (build.choose(x, [y], [z])[0], b if a else c),
    ]
    circuit = build.done(np.array([wire for wire, _ in parts]))
    found = run(circuit, (a, 1), (b, 1), (c, 1), bits=[1])
    assert found.tolist() == [bool(true) for _, true in parts]


@FEW
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2**n - 1))))
def test_counting(case):
    n, word = case
    build = Builder(n)
    circuit = build.done(np.array(build.count(list(build.inputs))))
    assert value(run(circuit, (word, n))) == word.bit_count()
    assert circuit.gates.ands == n - n.bit_count()
    assert len(circuit.outputs) == n.bit_length()


@FEW
@given(st.integers(1, 12), st.data())
def test_adding_and_comparing(width, data):
    a, b = (data.draw(st.integers(0, 2**width - 1)) for _ in range(2))
    build = Builder(2 * width)
    x, y = numbers(build, width, width)
    total = build.add(x, y)
    ands = width
    reached = build.at_least(x, [build.inverse(bit) for bit in y])
    circuit = build.done(np.array([*total, reached]))
    found = run(circuit, (a, width), (b, width))
    assert value(found[:-1]) == a + b
    assert found[-1] == (a >= b)
    assert circuit.gates.ands == 2 * ands


@FEW
@given(st.integers(1, 10), st.data())
def test_a_threshold_that_only_the_garbler_knows(width, data):
    a, threshold = (data.draw(st.integers(0, 2**width - 1)) for _ in range(2))
    build = Builder(width)
    inverted = build.flip(_circuit.ZERO, build.secret(width))
    circuit = build.done(build.at_least(list(build.inputs), list(inverted)))
    assert run(circuit, (a, width), bits=planes(np.array(~threshold), width)).tolist() == [a >= threshold]


@FEW
@given(st.integers(1, 6), st.lists(st.integers(0, 63), min_size=2, max_size=9))
def test_the_largest_is_found_and_the_first_of_equal_ones(width, values):
    values = [v % 2**width for v in values]
    build = Builder(width * len(values))
    circuit = build.done(np.array(build.arg_max(numbers(build, *[width] * len(values)))))
    assert value(run(circuit, *((v, width) for v in values))) == int(np.argmax(values))


def test_lanes_are_independent():
    build = Builder(12)
    lanes = build.inputs.reshape(3, 4)
    circuit = build.done(np.stack(build.count(list(lanes))))
    x = np.random.default_rng(0).integers(0, 2, (5, 12)).astype(bool)
    counts = circuit.run(x, np.zeros(0)).reshape(5, 2, 4)
    assert np.array_equal(counts[:, 0] + 2 * counts[:, 1], x.reshape(5, 3, 4).sum(1))


@pytest.mark.parametrize("ands", [1, 2, 7, 1000])
def test_chunks_are_all_gates_with_few_ands_each(ands):
    build = Builder(50)
    gates = build.done(np.array(build.count(list(build.inputs))))
    chunks = gates.chunks(ands)
    assert [first for first, _ in chunks] == [0, *(last for _, last in chunks[:-1])]
    assert chunks[-1][1] == len(gates.gates.kinds)
    before = gates.gates.ands_before
    assert all(before[last] - before[first] <= ands for first, last in chunks)


def test_a_circuit_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(_circuit, "MOST_WIRES", 100)
    with pytest.raises(UserError, match="smaller network"):
        Builder(90).xor(np.arange(20), np.arange(20))
