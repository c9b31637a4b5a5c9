"""Weights from seeds on every instruction set: the register, the search, products, bytes, extremes, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.kernels import _native
from lilliput.kernels import seed_linear as kernel

BITS = (4, 3)


def random_codes(rows, columns, bits, seed=0):
    """Any bytes are codes, but for the seed 0, which is no state."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 256, (kernel.code_bytes(rows, columns, bits),), generator=generator)
    return codes.to(torch.uint8)


def activations(tokens, columns, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def register(seed, count):
    """The next states by the rule of the paper's figure, one bit at a time in numpy."""
    bits = [(seed >> i) & 1 for i in range(16)]
    found = []
    for _ in range(count):
        bits = [*bits[1:], bits[0] ^ bits[1] ^ bits[3] ^ bits[12]]
        found.append(sum(bit << i for i, bit in enumerate(bits)))
    return np.array(found)


def test_the_register_passes_through_all_states():
    order, places = kernel.states()
    assert len(set(order.tolist())) == 2**16 - 1
    assert torch.equal(order[places[1:]], torch.arange(1, 2**16))
    assert torch.equal(order[1:60], torch.from_numpy(register(1, 59)))


@pytest.mark.parametrize("bits", BITS)
def test_a_basis_is_the_states_after_its_seed(bits):
    inputs, terms = kernel.SHAPES[bits]
    for seed in (1, 12345, 65535):
        expected = (register(seed, inputs * terms) - 2**15) / (2**15 - 1)
        found = kernel.basis(torch.tensor(seed), bits)
        np.testing.assert_allclose(found.numpy(), expected.reshape(inputs, terms), rtol=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(16, 48), (1, 5), (33, 96), (17, 31), (0, 8), (3, 0), (40, 200)], ids=str)
def test_products_are_those_of_the_reference(isa, bits, shape):
    codes = random_codes(*shape, bits)
    w = kernel.reference(codes, *shape, bits, -10)
    for tokens in (0, 1, 2, 3, 7, 20):
        x = activations(tokens, shape[1])
        y = kernel.seed_linear(x, codes, shape[0], bits, -10)
        assert y.shape == (tokens, shape[0])
        assert ((y - x.double() @ w.T).abs() <= 2e-6 * (x.double().abs() @ w.abs().T + 1e-3)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_table_of_states_gives_the_same_bits(isa, bits):
    codes, x = random_codes(33, 100, bits), activations(5, 100)
    for tokens in (1, 5):
        found = []
        for table in (False, True):
            y = torch.empty(tokens, 33)
            _native.seed_linear(x.data_ptr(), codes.data_ptr(), y.data_ptr(), tokens, 33, 100, bits, -9, 1, table)
            found.append(y)
        assert torch.equal(*found)


@pytest.mark.parametrize("bits", BITS)
def test_dequantised_weights_are_those_of_the_reference(isa, bits):
    codes = random_codes(20, 50, bits)
    expected = kernel.reference(codes, 20, 50, bits, -12)
    torch.testing.assert_close(kernel.dequantized(codes, 20, 50, bits, -12).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", BITS)
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, bits):
    codes, x = random_codes(300, 96, bits), activations(20, 96)
    expected = torch.cat([kernel.seed_linear(row, codes, 300, bits, -10) for row in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in (1, 2, 3, 8, 20):
            assert torch.equal(kernel.seed_linear(x[:tokens], codes, 300, bits, -10), expected[:tokens])
    torch.set_num_threads(before)


# --- the search ------------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 65535), st.integers(0, 15), st.sampled_from(BITS))
def test_what_a_seed_makes_is_found_again(seed, exponent, bits):
    """A block that is 2^e U t comes back exactly, and a matrix of exactly 4 or 3 bits per weight is stored."""
    inputs, terms = kernel.SHAPES[bits]
    t = torch.tensor([7.0, -5.0, 3.0, -8.0])[:terms]
    block = (kernel.basis(torch.tensor(seed), bits) @ t.double() * 2.0 ** (exponent - 20)).float()
    codes, offset = kernel.encode(block.repeat(16).view(16, inputs), bits)
    found = kernel.reference(codes, 16, inputs, bits, offset)
    assert (found - block).abs().max() < 1e-6 * block.abs().max()
    assert codes.numel() * 8 == bits * 16 * inputs


@pytest.mark.parametrize("bits", BITS)
def test_the_search_is_as_good_as_trying_every_seed(isa, bits):
    """Against least squares and rounding of all 65535 seeds in numpy, for a few blocks."""
    inputs, _ = kernel.SHAPES[bits]
    w = torch.randn(1, 2 * inputs, generator=torch.Generator().manual_seed(3))
    codes, offset = kernel.encode(w, bits, candidates=16, pick=False)
    error = (kernel.reference(codes, 1, 2 * inputs, bits, offset) - w).view(2, inputs).square().sum(1)
    u = kernel.basis(torch.arange(1, 65536), bits).numpy()
    for block, found in zip(w.view(2, inputs).double().numpy(), error.tolist()):
        t = np.linalg.solve(u.transpose(0, 2, 1) @ u, (u.transpose(0, 2, 1) @ block)[..., None])[..., 0]
        power = 2.0 ** np.ceil(np.log2(np.abs(t).max(1, keepdims=True) / 7))
        tried = []
        for step in (power, power / 2):
            rounded = np.clip(np.round(t / step), -8, 7) * step
            tried.append(((np.einsum("scp,sp->sc", u, rounded) - block) ** 2).sum(1))
        assert found <= 1.02 * np.minimum(*tried).min() + 1e-12


@pytest.mark.parametrize("bits", BITS)
def test_the_error_on_gaussian_weights_is_the_expected_one(bits):
    """Relative squared error of 0.0146 and 0.0499, what the full search in numpy gave; picked neighbours are better."""
    w = torch.randn(32, 240, generator=torch.Generator().manual_seed(0))
    errors = []
    for pick in (False, True):
        codes, offset = kernel.encode(w, bits, pick=pick)
        errors.append(float((kernel.dequantized(codes, 32, 240, bits, offset) - w).square().mean() / w.square().mean()))
    assert errors[0] == pytest.approx({4: 0.0146, 3: 0.0499}[bits], rel=0.15)
    assert errors[1] < errors[0]


def test_the_search_does_not_depend_on_threads():
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(kernel.encode(w, 4, candidates=4)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(codes, found[0]) for codes in found)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e26])
def test_weights_of_any_size(size):
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * size
    codes, offset = kernel.encode(w, 4)
    found = kernel.dequantized(codes, 4, 16, 4, offset)
    assert (found.double() - w.double()).norm() <= (0.2 if size > 1e-36 else 1.0) * w.double().norm()


# --- bad input -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    codes, x = random_codes(16, 48, 4), activations(2, 48)

    def refused(match, *arguments):
        with pytest.raises(UserError, match=match):
            kernel.seed_linear(*arguments)

    refused("float64", x.double(), codes, 16, 4, 0)
    refused("shape", x[0], codes, 16, 4, 0)
    refused("are not the codes", x[:, :40], codes, 16, 4, 0)
    refused("are not the codes", x, codes, 1 << 40, 4, 0)
    refused("are not the codes", x, codes, -16, 4, 0)
    refused("are not the codes", x, codes[1:], 16, 4, 0)
    refused("are not the codes", x, codes, 16, 3, 0)
    refused("uint8", x, codes.view(torch.int8), 16, 4, 0)
    refused("bits is 2", x, codes, 16, 2, 0)
    for offset in (-127, 91):
        refused("offset", x, codes, 16, 4, offset)
    for bad in (torch.tensor([[float("nan")]]), torch.tensor([[float("inf")]]), torch.ones(3)):
        with pytest.raises(UserError, match="finite"):
            kernel.encode(bad, 4)
    with pytest.raises(UserError, match="too large"):
        kernel.encode(torch.full((1, 8), 1e30), 4)
    with pytest.raises(UserError, match="candidates is 0"):
        kernel.encode(torch.ones(1, 8), 4, candidates=0)
    with pytest.raises(UserError, match="bits is 8"):
        kernel.encode(torch.ones(1, 8), 8)


def test_the_operator_passes_torchs_checks():
    arguments = (activations(3, 48), random_codes(16, 48, 4), 16, 4, -3)
    torch.library.opcheck(torch.ops.lilliput.seed_linear, arguments, test_utils="test_faketensor")
