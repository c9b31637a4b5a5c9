"""Products of signs on every instruction set: layout round trips, values, extremes, bad input, threads."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.kernels import binary_linear as kernel

LEVELS = (1.0, 0.5, 0.3)
SHAPES = [(16, 32), (1, 1), (5, 31), (33, 33), (48, 256), (100, 1000), (17, 2100), (64, 8), (0, 9), (7, 0)]


def case(rows, inputs, tokens=5, planes=1, seed=0):
    """x, signs (N, K), codes, scale, levels, shift; some inputs are exactly on a threshold."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(rows, inputs, generator=generator) < 0.5, 1.0, -1.0)
    x, shift = torch.randn(tokens, inputs, generator=generator), torch.randn(inputs, generator=generator)
    x[:, ::7] = shift[::7]
    codes = kernel.pack((signs > 0).unsqueeze(1))
    return x, signs, codes, torch.rand(rows, generator=generator) + 0.1, torch.tensor(LEVELS[:planes]), shift


# --- layout ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 10), st.integers(0, 70), st.integers(0, 2**30))
def test_the_layout_gives_the_signs_back(rows, segments, inputs, seed):
    positive = torch.rand(rows, segments, inputs, generator=torch.Generator().manual_seed(seed)) < 0.5
    codes = kernel.pack(positive)
    assert codes.numel() == kernel.layout_size(rows, segments, inputs)
    assert torch.equal(kernel.unpack(codes, rows, segments, inputs), torch.where(positive, 1.0, -1.0))


def test_a_weight_takes_one_bit():
    assert kernel.layout_size(64, 1, 512) == 64 * 512 // 8
    assert kernel.layout_size(32, 9, 64) == 32 * 9 * 64 // 8


def test_where_the_layout_puts_a_sign():
    """Row 3, segment 1, input 21 of 40: byte 5 + 2 of the row, so lane 3 of word 1, byte 3, bit 5."""
    positive = torch.zeros(16, 2, 40, dtype=torch.bool)
    positive[3, 1, 21] = True
    codes = kernel.pack(positive).view(3, 16, 4)
    assert codes[1, 3, 3] == 1 << 5
    assert codes.count_nonzero() == 1


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_products_are_those_of_the_reference(isa, shape, planes):
    for tokens in (0, 1, 2, 5, 13, 40):
        x, signs, codes, scale, levels, shift = case(*shape, tokens, planes)
        for moved in (None, shift):
            for by_mean in (False, True) if shape[1] else (False,):
                y = kernel.binary_linear(x, codes, scale, levels, moved, by_mean)
                expected = kernel.reference(x, signs, scale, levels, moved, by_mean)
                assert y.shape == (tokens, shape[0])
                torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_plane_is_the_sign_of_numpy(isa):
    """Exact integers, with zero and minus zero as +1."""
    x, signs, codes, _, _, _ = case(40, 333, 6)
    x[:, :20] = 0.0
    x[:, 20:40] = -0.0
    y = kernel.binary_linear(x, codes, torch.ones(40), torch.ones(1))
    expected = np.where(x.numpy() >= 0, 1, -1).astype(np.int64) @ signs.numpy().astype(np.int64).T
    assert np.array_equal(y.numpy(), expected)


def test_two_planes_with_halved_levels_are_two_bit_numbers(isa):
    """Levels 1 and 1/2 give -1.5, -0.5, 0.5 and 1.5."""
    x = torch.tensor([[-9.0, -1.1, -0.9, -0.1, 0.1, 0.9, 1.1, 9.0]])
    codes = kernel.pack(torch.ones(1, 1, 8, dtype=torch.bool))
    found = [kernel.binary_linear(x[:, [i] * 8], codes, torch.ones(1), torch.tensor([1.0, 0.5])) / 8 for i in range(8)]
    assert torch.cat(found).flatten().tolist() == [-1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 1.5, 1.5]


def test_all_alike_and_all_unlike_reach_the_limits(isa):
    codes = kernel.pack(torch.ones(33, 1, 5000, dtype=torch.bool))
    for value in (1.0, -1.0):
        y = kernel.binary_linear(torch.full((3, 5000), value), codes, torch.ones(33), torch.ones(1))
        assert (y == value * 5000).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_activations_are_multiplied_with_signs(isa, shape):
    for tokens in (0, 1, 3, 9, 17):
        x, signs, codes, scale, _, _ = case(*shape, tokens)
        y = kernel.binary_weight_linear(x, codes, scale)
        expected = x.double() @ signs.double().T * scale.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-6 * max(1, shape[1]))


def test_not_a_number_and_infinity(isa):
    """NaN is not >= 0 and so counts as -1; K and real activations carry it on; other tokens stay as they are."""
    x, signs, codes, scale, levels, _ = case(20, 64, 3, planes=2)
    expected = kernel.binary_linear(x, codes, scale, levels)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 30] = bad
        y = kernel.binary_linear(x, codes, scale, levels)
        torch.testing.assert_close(y.double(), kernel.reference(x, signs, scale, levels), rtol=1e-5, atol=1e-5)
        assert torch.equal(y[[0, 2]], expected[[0, 2]])
        assert not kernel.binary_linear(x, codes, scale, levels, None, True)[1].isfinite().any()
        assert not kernel.binary_weight_linear(x, codes, scale)[1].isfinite().any()


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, planes):
    x, _, codes, scale, levels, shift = case(700, 300, 40, planes)

    def both(part):
        signs = kernel.binary_linear(part, codes, scale, levels, shift, True)
        return torch.cat([signs, kernel.binary_weight_linear(part, codes, scale)], 1)

    expected = torch.cat([both(row) for row in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in (1, 2, 3, 7, 12, 25, 40):
            assert torch.equal(both(x[:tokens]), expected[:tokens])
    torch.set_num_threads(before)


def test_many_tokens_go_in_parts(isa):
    """More tokens than are packed together."""
    x, signs, codes, scale, levels, _ = case(20, 4096, 700)
    y = kernel.binary_linear(x, codes, scale, levels)
    torch.testing.assert_close(y.double(), kernel.reference(x, signs, scale, levels), rtol=1e-5, atol=1e-5)


def test_inputs_may_be_strided(isa):
    x, _, codes, scale, levels, shift = case(20, 64, 6)
    strided = x.T.contiguous().T
    expected = kernel.binary_linear(x, codes, scale, levels, shift)
    assert torch.equal(kernel.binary_linear(strided, codes, scale, levels, shift), expected)
    wide = torch.stack([scale, -scale], 1)[:, 0]
    assert torch.equal(kernel.binary_linear(x, codes, wide, levels, shift), expected)


# --- bad input -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    x, _, codes, scale, levels, shift = case(16, 64)

    def refused(match, *arguments):
        with pytest.raises(UserError, match=match):
            kernel.binary_linear(*arguments)

    refused("float64", x.double(), codes, scale, levels)
    refused("shape", x[0], codes, scale, levels)
    refused("not the layout of 16 x 1 x 32", x[:, :32], codes, scale, levels)
    refused("not the layout of 17", x, codes, torch.ones(17), levels)
    refused("layout is contiguous uint8", x, codes.view(torch.int8), scale, levels)
    refused("layout is contiguous uint8", x, codes.view(2, -1).T, scale, levels)
    refused("not the layout", x, codes[:, 1:].contiguous(), scale, levels)
    refused("scale", x, codes, scale.double(), levels)
    refused("scale", x, codes, scale.view(4, 4), levels)
    refused("0 levels", x, codes, scale, levels[:0])
    refused("4 levels", x, codes, scale, torch.ones(4))
    refused("levels", x, codes, scale, levels.double())
    refused("shift", x, codes, scale, levels, shift[1:])
    refused("strided", x, codes, scale, levels, torch.stack([shift, shift], 1)[:, 0])
    with pytest.raises(UserError, match="not the layout"):
        kernel.binary_weight_linear(x, codes[:0], scale)
    with pytest.raises(UserError, match="out of range"):
        kernel.unpack(codes, 1 << 62, 1, 64)
    with pytest.raises(UserError, match="too long"):
        kernel.unpack(codes, 16, 1 << 29, 1 << 29)
    with pytest.raises(UserError, match="give bool"):
        kernel.pack(torch.ones(2, 1, 3))


# --- torch -----------------------------------------------------------------------------------------------------


def test_the_operators_compile_and_export():
    x, _, codes, scale, levels, shift = case(48, 64)

    class Product(torch.nn.Module):
        def forward(self, x):
            y = kernel.binary_linear(x, codes, scale, levels, shift, True)
            return y + kernel.binary_weight_linear(x, codes, scale)

    model = Product()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert torch.equal(program.module()(x.repeat(2, 1)), model(x.repeat(2, 1)))
    arguments = (x, codes, scale, levels, shift, True)
    torch.library.opcheck(torch.ops.lilliput.binary_linear, arguments, test_utils="test_faketensor")
