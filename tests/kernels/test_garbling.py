"""AES against FIPS 197, pads and garbled gates against numpy, every kind of gate by its truth table."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.kernels import garbling
from lilliput.kernels.garbling import AND, FLIP, NOT, XOR, Gates

KEY = bytes(range(16))
# plain text, key, cipher text: FIPS 197, appendices B and C.1; SP 800-38A, F.1.1 (two blocks)
VECTORS = [
    ("3243f6a8885a308d313198a2e0370734", "2b7e151628aed2a6abf7158809cf4f3c", "3925841d02dc09fbdc118597196a0b32"),
    ("00112233445566778899aabbccddeeff", "000102030405060708090a0b0c0d0e0f", "69c4e0d86a7b0430d8cdb78070b4c55a"),
    ("6bc1bee22e409f96e93d7e117393172a", "2b7e151628aed2a6abf7158809cf4f3c", "3ad77bb40d7a3660a89ecaf32466ef97"),
    ("ae2d8a571e03ac9c9eb76fac45af8e51", "2b7e151628aed2a6abf7158809cf4f3c", "f5d3d58503b9699de785895a96fdbaaf"),
]


def array(text):
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(1, 16)


def blocks(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def odd(seed):
    delta = blocks(1, seed)[0]
    delta[0] |= 1
    return delta


@pytest.mark.parametrize(("text", "key", "cipher"), VECTORS)
def test_aes_gives_the_published_blocks(isa, text, key, cipher):
    for function in (garbling.encrypt, garbling.reference_encrypt):
        assert function(bytes.fromhex(key), array(text)).tobytes().hex() == cipher


def test_the_scalar_set_uses_no_instructions_for_aes(isa):
    assert not (isa == "scalar" and garbling.hardware_cipher())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 33])
def test_any_number_of_blocks(isa, count):
    x = blocks(count)
    assert np.array_equal(garbling.encrypt(KEY, x), garbling.reference_encrypt(KEY, x))
    for tweak in (0, 5, 2**61 + 3):
        assert np.array_equal(garbling.hashes(KEY, x, tweak), garbling.reference_hashes(KEY, x, tweak))


def test_a_pad_is_two_calls_of_aes():
    x = blocks(1)
    hidden = garbling.encrypt(KEY, x)
    tweak = np.frombuffer((77).to_bytes(16, "little"), np.uint8)
    assert np.array_equal(garbling.hashes(KEY, x, 77), garbling.encrypt(KEY, hidden ^ tweak) ^ hidden)
    assert not np.array_equal(garbling.hashes(KEY, x, 77), garbling.hashes(KEY, x, 78))


def one_gate(kind):
    numbers = (np.array([v], t) for v, t in ((kind, np.uint8), (0, np.int32), (1 if kind <= AND else 0, np.int32)))
    return Gates(2, 1, *numbers)


@pytest.mark.parametrize("kind", [XOR, AND, NOT, FLIP])
@pytest.mark.parametrize("seed", range(8))
def test_every_kind_of_gate_by_its_truth_table(isa, kind, seed):
    for secret in (0, 1):
        gates, delta = one_gate(kind), odd(seed)
        labels = np.concatenate([blocks(2, seed + 100), np.zeros((1, 16), np.uint8)])
        tables = garbling.garble(KEY, gates, 0, 1, np.array([secret], np.uint8), delta, labels, 4)
        assert tables.shape == (kind == AND, 32)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            seen = np.stack([labels[0] ^ a * delta, labels[1] ^ b * delta, labels[2] * 0])
            garbling.evaluate(KEY, gates, 0, 1, seen, 4, tables)
            true = {XOR: a ^ b, AND: a & b, NOT: 1 - a, FLIP: a ^ secret}[kind]
            assert np.array_equal(seen[2], labels[2] ^ true * delta)


def random_gates(count, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, count).astype(np.uint8)
    left = rng.integers(0, 5 + np.arange(count)).astype(np.int32)
    right = np.where(kinds <= AND, rng.integers(0, 5 + np.arange(count)), rng.integers(0, 3, count)).astype(np.int32)
    return Gates(5, 3, kinds, left, right)


@pytest.mark.parametrize("seed", range(3))
def test_garbling_and_evaluating_are_those_of_numpy(isa, seed):
    gates, delta = random_gates(60, seed), odd(seed)
    bits = np.array([1, 0, 1], np.uint8)
    labels = np.zeros((gates.wires, 16), np.uint8)
    labels[:5] = blocks(5, seed)
    expected = labels.copy()
    tables = garbling.reference_garble(KEY, gates, bits, delta, expected, 1000)
    # in two runs, as it is streamed
    halves = [garbling.garble(KEY, gates, *part, bits, delta, labels, 1000) for part in ((0, 23), (23, 60))]
    assert np.array_equal(np.concatenate(halves), tables)
    assert np.array_equal(labels, expected)
    seen, numpy_seen = labels.copy(), labels.copy()
    seen[:5] ^= np.array([[0], [1], [1], [0], [1]], np.uint8) * delta
    numpy_seen[:5] = seen[:5]
    for part, half in zip(((0, 23), (23, 60)), halves):
        garbling.evaluate(KEY, gates, *part, seen, 1000, half)
    garbling.reference_evaluate(KEY, gates, numpy_seen, 1000, tables)
    assert np.array_equal(seen, numpy_seen)
    assert all(d.tobytes() in (bytes(16), delta.tobytes()) for d in seen ^ labels)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_the_evaluator_sees_of_a_flip_does_not_depend_on_the_bit(seed):
    gates = Gates(2, 1, np.array([FLIP, AND], np.uint8), np.array([0, 2], np.int32), np.array([0, 1], np.int32))
    for secret in (0, 1):
        labels = np.zeros((4, 16), np.uint8)
        labels[:2] = blocks(2, seed)
        active = labels[:2].copy()
        tables = garbling.garble(KEY, gates, 0, 2, np.array([secret], np.uint8), odd(seed + 1), labels, 0)
        seen = np.concatenate([active, np.zeros((2, 16), np.uint8)])
        garbling.evaluate(KEY, gates, 0, 2, seen, 0, tables)
        assert np.array_equal(seen[2], active[0])


def test_no_table_repeats_and_none_shows_delta():
    count = 2000
    ands = Gates(2, 0, np.full(count, AND, np.uint8), np.zeros(count, np.int32), np.ones(count, np.int32))
    labels, delta = np.zeros((count + 2, 16), np.uint8), odd(3)
    labels[:2] = blocks(2, 9)
    tables = garbling.garble(KEY, ands, 0, count, np.zeros(0, np.uint8), delta, labels, 0)
    rows = {row.tobytes() for row in tables.reshape(-1, 16)}
    assert len(rows) == 2 * count
    assert delta.tobytes() not in rows
    ones = np.unpackbits(tables).mean()
    assert abs(ones - 0.5) < 0.005


def test_hashing_is_not_what_a_weaker_cipher_gives():
    made = garbling.hashes(hashlib.sha256(b"key").digest()[:16], np.zeros((4096, 16), np.uint8), 0)
    assert len({row.tobytes() for row in made}) == 4096
    assert abs(np.unpackbits(made).mean() - 0.5) < 0.005


@pytest.mark.parametrize(
    ("kinds", "left", "right"),
    [([4], [0], [0]), ([XOR], [2], [0]), ([XOR], [0], [2]), ([AND], [-1], [0]), ([FLIP], [0], [1]), ([NOT], [0], [-1])],
)
def test_gates_that_read_what_is_not_there_are_refused(kinds, left, right):
    with pytest.raises(UserError, match="gate 0"):
        Gates(2, 1, np.array(kinds, np.uint8), np.array(left, np.int32), np.array(right, np.int32))


def test_wrong_arrays_are_refused():
    gates, labels, delta = one_gate(AND), np.zeros((3, 16), np.uint8), odd(0)
    bit, table = np.zeros(1, np.uint8), np.zeros((1, 32), np.uint8)
    wrong = [
        lambda: Gates(2, 1, np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros(1, np.int32)),
        lambda: garbling.encrypt(b"short", labels),
        lambda: garbling.encrypt(KEY, labels[:, :8]),
        lambda: garbling.garble(KEY, gates, 0, 2, bit, delta, labels, 0),
        lambda: garbling.garble(KEY, gates, 0, 1, bit, delta * 0, labels, 0),
        lambda: garbling.garble(KEY, gates, 0, 1, bit[:0], delta, labels, 0),
        lambda: garbling.garble(KEY, gates, 0, 1, bit, delta, labels[:2], 0),
        lambda: garbling.evaluate(KEY, gates, 0, 1, labels, 0, table[:0]),
    ]
    for call in wrong:
        with pytest.raises(UserError):
            call()
