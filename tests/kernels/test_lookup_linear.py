"""The product by lookup on every instruction set: layout round trips, values, extremes, bad input, threads."""

from functools import partial

import pytest
import torch
from grouped import (
    activations,
    check_against_reference,
    check_alone_and_together,
    check_extremes,
    check_operator,
    check_round_trip,
    check_spoilt_tokens,
    dequantized,
    executing,
    repeated_on_threads,
    weights,
)
from grouped import laid_out as any_laid_out
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import kernels
from lilliput.errors import UserError
from lilliput.kernels import lookup_linear as kernel
from lilliput.methods.quantize._packed import PackedLinear, pack_codes

ISAS = kernels.available_isas()
BITS = (4, 3, 2, 1)
SHAPES = [  # rows, inputs, group
    (64, 64, 64),
    (1, 4, 4),
    (5, 576, 64),
    (65, 96, 32),
    (130, 256, 128),
    (17, 31, 1),
    (15, 15, 3),
    (1, 7, 7),
    (40, 24, 8),
    (31, 192, 96),
    (20, 1400, 1400),
    (3, 1400, 8),
    (0, 32, 32),
    (4, 0, 8),
]

laid_out = partial(any_laid_out, kernel, kernel.lookup_linear)


# --- layout ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 140), st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**30))
def test_the_layout_gives_the_stored_weights_back(bits, rows, group, groups, seed):
    check_round_trip(kernel, rows, group, groups, bits, seed)


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_takes_the_bytes_of_the_stored_weights(bits):
    q, scale, zero = weights(128, 96, 32, bits)
    codes, grid = kernel.pack(pack_codes(q, bits), scale, zero, 96, bits)
    assert codes.nbytes == 128 * 96 * bits // 8
    assert grid.nbytes == scale.nbytes + zero.nbytes


@pytest.mark.parametrize("bits", BITS)
def test_where_the_layout_puts_a_code(bits):
    """Row 35, input 21 of the second group: the third pair of tables, in the second of them the second input."""
    q = torch.zeros(64, 64, dtype=torch.int64)
    q[35, 32 + 21] = 2**bits - 1
    grid = torch.ones(64, 2)
    codes, _ = kernel.pack(pack_codes(q, bits), grid, grid, 64, bits)
    places = {(i, int(codes[0, i])) for i in codes[0].nonzero().flatten().tolist()}
    start = (4 + 2) * bits * 64
    pairs = {(start + 128 * pair + 2 * 35 + plane, 1 << 5) for pair in range(bits // 2) for plane in (0, 1)}
    alone = {(start + (bits - 1) * 64 + 2 * (35 - 32) + 1, 1 << 5)} if bits % 2 else set()
    assert places == pairs | alone


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_reference(isa, bits, shape):
    check_against_reference(kernel, *laid_out(*shape, bits), bits, counts=(0, 1, 2, 7, 20))


@pytest.mark.parametrize("bits", BITS)
def test_rounding_tables_costs_about_one_percent(isa, bits):
    packed, multiply = laid_out(64, 576, 64, bits)
    x = activations(16, 576)
    expected = x.double() @ dequantized(*packed, bits).T
    assert (multiply(x) - expected).norm() < 0.01 * expected.norm()


def test_whole_activations_within_the_tables_are_exact(isa):
    """Sums of four in -127 .. 127 steps of one need no rounding: the product is that of integers, to the bit."""
    for bits in BITS:
        q = torch.randint(0, 2**bits, (70, 128), generator=torch.Generator().manual_seed(bits))
        x = torch.randint(-31, 32, (5, 128), generator=torch.Generator().manual_seed(9)).float()
        x[:, [0, 64]], x[:, 1:4], x[:, 65:68] = 34.0, 31.0, 31.0  # one table of each piece reaches 127
        scale, zero = torch.full((70, 2), 2.0), torch.full((70, 2), 3.0)
        layout = kernel.pack(pack_codes(q, bits), scale, zero, 128, bits)
        expected = x.double() @ dequantized(q, scale, zero, bits).T
        assert torch.equal(kernel.lookup_linear(x, *layout, 70, 64, bits).double(), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ISAS), st.integers(1, 140), st.sampled_from([1e-38, 1e-20, 1.0, 1e20, 1e34]), st.integers(0, 999)
)
def test_tables_are_rounded_as_the_reference_says(isa, group, size, seed):
    """Two rows of 1-bit codes whose difference shows the entries themselves: bits as drawn, and none."""
    x = activations(1, group, seed) * size
    q = torch.zeros(2, group, dtype=torch.int64)
    q[0] = torch.randint(0, 2, (group,), generator=torch.Generator().manual_seed(seed))
    grid = torch.ones(2, 1), torch.zeros(2, 1)
    with executing(isa):
        y = kernel.lookup_linear(x, *kernel.pack(pack_codes(q, 1), *grid, group, 1), 2, group, 1)
    expected = kernel.reference(x, q, *grid, 1)
    assert ((y - expected).abs() <= 3e-6 * x.abs().sum()).all()


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_do_not_overflow(isa, bits):
    check_extremes(kernel, kernel.lookup_linear, 64, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 8])
def test_a_token_with_nan_or_infinity_gives_nan_and_spoils_no_other(isa, bits, group):
    values = float("nan"), float("inf"), -float("inf"), 3e38
    check_spoilt_tokens(kernel, *laid_out(70, 64, group, bits), bits, slice(36, 38), values)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_give_exact_zeros(isa, bits):
    _, multiply = laid_out(20, 64, 32, bits)
    assert torch.equal(multiply(torch.zeros(3, 64)), torch.zeros(3, 20))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(200, 96, 32), (140, 48, 8)], ids=str)
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, bits, shape):
    """The same bits alone, in batches and on 1, 2 and 3 threads."""
    _, multiply = laid_out(*shape, bits)
    check_alone_and_together(multiply, activations(40, shape[1]), (1, 2, 3, 4, 5, 9, 40))


@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_and_many_tokens_are_shared_by_threads(isa, bits):
    packed, multiply = laid_out(2000, 256, 64, bits)
    x = activations(3, 256)
    found = repeated_on_threads(lambda: multiply(x), 10)
    many = repeated_on_threads(lambda: multiply(x.repeat(200, 1)), 1)  # more than go through the weights together
    found += [part for y in many for part in y.split(3)]
    assert all(torch.equal(y, found[0]) for y in found)
    expected = x.double() @ dequantized(*packed, bits).T
    assert (found[0] - expected).norm() < 0.01 * expected.norm()


def test_every_instruction_set_gives_nearly_the_same():
    _, multiply = laid_out(100, 320, 64, 3)
    found = []
    for name in ISAS:
        with executing(name):
            found.append(multiply(activations(5, 320)))
    for y in found:
        torch.testing.assert_close(y, found[0], rtol=1e-5, atol=1e-4)


def test_inputs_may_be_strided(isa):
    _, multiply = laid_out(16, 32, 32, 4)
    x = activations(32, 5).T
    assert torch.equal(multiply(x), multiply(x.contiguous()))


# --- bad input -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    q, scale, zero = weights(64, 64, 32, 4)
    codes, grid = kernel.pack(pack_codes(q, 4), scale, zero, 64, 4)
    x = activations(2, 64)

    def refused(match, *arguments):
        with pytest.raises(UserError, match=match):
            kernel.lookup_linear(*arguments)

    refused("float64", x.double(), codes, grid, 64, 32, 4)
    refused("shape", x[0], codes, grid, 64, 32, 4)
    refused("not the layout of 64 x 32", x[:, :32], codes, grid, 64, 32, 4)
    refused("not the layout", x, codes, grid, 1 << 40, 32, 4)
    refused("not the layout", x, codes, grid, 1 << 62, 32, 4)
    refused("not the layout", x, codes[:, 1:], grid, 64, 32, 4)
    refused("not the layout", x, codes, grid[..., 1:], 64, 32, 4)
    refused("not the layout", x, codes.view(2, -1).T, grid, 64, 32, 4)
    refused("not the layout", x, codes, grid, 64, 32, 2)
    refused("uint8 and int16", x, codes.view(torch.int8), grid, 64, 32, 4)
    refused("uint8 and int16", x, codes, grid.view(torch.bfloat16), 64, 32, 4)
    for bits in (0, 5, 8, -1):
        refused(f"bits is {bits}", x, codes, grid, 64, 32, bits)
    for group in (0, -32, 48):
        refused("does not divide", x, codes, grid, 64, group, 4)
    refused("rows", x, codes, grid, -64, 32, 4)


def test_stored_weights_that_do_not_fit_are_refused():
    q, scale, zero = weights(16, 64, 32, 4)
    stored = pack_codes(q, 4)
    for arguments in [
        (stored[:, 1:], scale, zero, 64, 4),
        (stored[1:], scale, zero, 64, 4),
        (stored.int(), scale, zero, 64, 4),
        (stored, scale, zero, 63, 4),
        (stored, scale, zero[:, :1], 64, 4),
        (stored[:, :0], scale, zero, 0, 4),
        (stored, scale, None, 64, 4),
        (stored, scale[0], zero[0], 64, 4),
        (stored, scale, zero, 64, 8),
        (stored.to("meta"), scale, zero, 64, 4),
    ]:
        with pytest.raises(UserError):
            kernel.pack(*arguments)


# --- torch -----------------------------------------------------------------------------------------------------


def test_the_operator_compiles_and_exports():
    packed = PackedLinear(64, 48, 2, 32, bias=True, product="lookup")
    packed.set_codes_(*weights(48, 64, 32, 2))
    check_operator(packed, torch.ops.lilliput.lookup_linear, 32, 2)
