"""Oblivious transfer: the receiver gets the pad that it chose and not the other; the sender's view tells no choice."""

import numpy as np
import pytest

from lilliput.methods.circuits import _oblivious
from lilliput.methods.circuits._frames import SessionEnded
from lilliput.methods.circuits._oblivious import (
    BASE,
    ELEMENT_BYTES,
    EXPONENT_BITS,
    BaseReceiver,
    BaseSender,
    ExtensionReceiver,
    ExtensionSender,
    FixedBase,
    column_bytes,
    prime,
)

KEY = bytes(range(16))


def probably_prime(n):
    """Miller-Rabin with the first twelve primes as bases."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13):
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_group_is_that_of_rfc_3526():
    p = prime()
    text = f"{p:X}"
    # the beginning that all groups of the RFC share, the end of group 15, and what makes it a group for this
    assert text.startswith(
        "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
    )
    assert text.endswith("4B82D120A93AD2CAFFFFFFFFFFFFFFFF")
    assert p.bit_length() == 8 * ELEMENT_BYTES == 3072
    assert probably_prime(p)
    assert probably_prime((p - 1) // 2)
    assert pow(_oblivious.GENERATOR, (p - 1) // 2, p) == 1


@pytest.mark.parametrize("exponent", [0, 1, 15, 16, 12345678901234567890, 2**EXPONENT_BITS - 1])
def test_powers_from_a_table(exponent):
    assert FixedBase(7).power(exponent) == pow(7, exponent, prime())


@pytest.fixture(scope="module")
def base():
    """A finished set of base transfers."""
    sender = BaseSender()
    receiver = BaseReceiver(sender.message)
    return sender.seeds(receiver.message), receiver


def test_base_transfers_give_the_chosen_seed_and_not_the_other(base):
    pairs, receiver = base
    assert len(pairs) == len(receiver.seeds) == BASE
    assert 20 < receiver.choices.sum() < 108
    for pair, choice, seed in zip(pairs, receiver.choices.tolist(), receiver.seeds):
        assert seed == pair[choice]
        assert seed != pair[1 - choice]
    assert len({seed for pair in pairs for seed in pair}) == 2 * BASE


@pytest.mark.parametrize("value", [0, 1, prime() - 1, prime(), 2**3072 - 1])
def test_what_is_no_element_ends_the_session(value, base):
    bad = value.to_bytes(ELEMENT_BYTES, "little")
    with pytest.raises(SessionEnded, match="no element"):
        BaseReceiver(bad)
    sender = BaseSender()
    with pytest.raises(SessionEnded, match="no element"):
        sender.seeds(bad * BASE)


def extension(base, tweak=0):
    pairs, receiver = base
    return ExtensionSender(KEY, receiver.choices, receiver.seeds, tweak), ExtensionReceiver(KEY, pairs, tweak)


@pytest.mark.parametrize(("transfers", "pads"), [(1, 1), (8, 1), (13, 3), (1000, 1), (200, 7)])
def test_extended_transfers_give_the_chosen_pads(base, transfers, pads):
    sender, receiver = extension(base)
    rng = np.random.default_rng(transfers)
    seen = set()
    for _ in range(2):  # what is used once is not used again
        choices = rng.integers(0, 2, transfers)
        message, chosen = receiver.choose(choices, pads)
        assert len(message) == column_bytes(transfers)
        both = np.stack(sender.pads(message, transfers, pads))
        assert both.shape == (2, transfers, pads, 16)
        rows = np.arange(transfers)
        assert np.array_equal(chosen, both[choices, rows])
        assert not (chosen == both[1 - choices, rows]).all(-1).any()
        seen |= {pad.tobytes() for pad in both.reshape(-1, 16)}
    assert len(seen) == 2 * 2 * transfers * pads


def test_the_message_hides_the_choices(base):
    """Columns of equal choices look as random as any: about half of their bits are ones, whatever was chosen."""
    for choices in (np.zeros(4096), np.ones(4096)):
        message, _ = extension(base)[1].choose(choices)
        columns = np.unpackbits(np.frombuffer(message, np.uint8).reshape(BASE, -1), axis=1)
        assert abs(columns.mean() - 0.5) < 0.01
        assert len({c.tobytes() for c in columns}) == BASE


def test_a_changed_message_gives_other_pads(base):
    sender, receiver = extension(base)
    message, chosen = receiver.choose(np.ones(64))
    changed = bytearray(message)
    for column in range(BASE):
        changed[column * 8] ^= 1  # the first transfer's row
    pads = sender.pads(changed, 64)[1]
    assert not np.array_equal(pads[0], chosen[0])
    assert np.array_equal(pads[1:], chosen[1:])
