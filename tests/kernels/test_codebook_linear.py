"""The looked-up product on every instruction set: layout round trips, values, extremes, bad input, threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.kernels import codebook_linear as kernel
from lilliput.methods.quantize._packed import pack_codes

BITS = (4, 3, 2)
SHAPES = [  # rows, inputs, group
    (16, 32, 32),
    (1, 4, 4),
    (5, 576, 64),
    (33, 96, 32),
    (17, 31, 31),
    (20, 1400, 1400),
    (40, 192, 96),
    (0, 32, 32),
    (4, 0, 32),
]


def weights(rows, columns, group, bits, shared, seed=0):
    """Random indices (N, K), scale (N, K / group) and tables (1 or one for each few rows, 2**bits)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = torch.randn(rows, columns // group, generator=generator).bfloat16()
    count = 1 if shared else -(-rows // kernel.rows_per_table(bits))
    return q, scale, torch.randint(-127, 128, (count, 2**bits), generator=generator).to(torch.int8)


def laid_out(rows, columns, group, bits, shared, seed=0):
    """The weights, and a function of x that multiplies with their layout."""
    q, scale, tables = weights(rows, columns, group, bits, shared, seed)
    layout = kernel.pack(pack_codes(q, bits), scale, tables, columns, bits)
    return (q, scale, tables), lambda x: kernel.codebook_linear(x, *layout, rows, group, bits)


def activations(tokens, columns, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 2**30))
def test_the_layout_gives_the_stored_weights_back(bits, rows, groups, shared, seed):
    q, scale, tables = weights(rows, 32 * groups, 32, bits, shared, seed)
    layout = kernel.pack(pack_codes(q, bits), scale, tables, 32 * groups, bits)
    given_back = kernel.unpack(*layout, rows, 32 * groups, 32, bits)
    assert all(torch.equal(a, b) for a, b in zip(given_back, (pack_codes(q, bits), scale, tables)))


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_takes_the_bytes_of_what_is_stored(bits):
    q, scale, tables = weights(48, 96, 32, bits, shared=False)
    codes, scales, packed_tables = kernel.pack(pack_codes(q, bits), scale, tables, 96, bits)
    assert codes.nbytes == 48 * 96 * bits // 8
    assert scales.nbytes == scale.nbytes
    assert packed_tables.nbytes == tables.nbytes == 4 * 48


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_reference(isa, bits, shared, shape):
    rows, columns, group = shape
    packed, multiply = laid_out(rows, columns, group, bits, shared)
    for tokens in (0, 1, 2, 7, 40):
        x = activations(tokens, columns)
        y, expected = multiply(x), kernel.reference(x, *packed, bits)
        assert y.shape == (tokens, rows)
        assert ((y - expected).abs() <= 1e-6 * (x.abs().sum(-1, keepdim=True) * 512 + 1)).all()


def test_extreme_entries_do_not_overflow(isa):
    for value in (-128, -127, 127):
        tables = torch.full((1, 16), value, dtype=torch.int8)
        layout = kernel.pack(pack_codes(torch.zeros(16, 4096), 4), torch.ones(16, 1), tables, 4096, 4)
        for x in (torch.ones(1, 4096), -torch.ones(1, 4096)):
            y = kernel.codebook_linear(x, *layout, 16, 4096, 4)
            assert torch.allclose(y, x.sum() * value * torch.ones(16), rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_a_token_with_nan_or_infinity_gives_nan_and_spoils_no_other(isa, bits):
    _, multiply = laid_out(40, 64, 32, bits, shared=True)
    x = activations(4, 64)
    expected = multiply(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[2, 37] = bad
        y = multiply(spoilt)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("bits", BITS)
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, bits):
    """The same bits alone, in small batches, in panels, and on 1, 2 and 3 threads; a large matrix is shared."""
    _, multiply = laid_out(700, 96, 32, bits, shared=False)
    x = activations(70, 96)
    expected = torch.cat([multiply(row) for row in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in (1, 2, 3, 4, 5, 9, 33, 70):
            assert torch.equal(multiply(x[:tokens]), expected[:tokens])
    torch.set_num_threads(before)


def test_inputs_may_be_strided(isa):
    _, multiply = laid_out(16, 32, 32, 4, shared=True)
    x = activations(32, 5).T
    assert torch.equal(multiply(x), multiply(x.contiguous()))


def test_what_does_not_fit_is_refused():
    q, scale, tables = weights(16, 64, 32, 4, shared=True)
    layout = kernel.pack(pack_codes(q, 4), scale, tables, 64, 4)
    x = activations(2, 64)

    def refused(match, x, codes, scale, tables, rows=16, group=32, bits=4):
        with pytest.raises(UserError, match=match):
            kernel.codebook_linear(x, codes, scale, tables, rows, group, bits)

    codes, scales, packed_tables = layout
    refused("float64", x.double(), *layout)
    refused("shape", x[0], *layout)
    refused("not the layout", x[:, :32], *layout)
    refused("not the layout", x, *layout, rows=1 << 40)
    refused("not the layout", x, codes[:, 1:], scales, packed_tables)
    refused("not the layout", x, codes, scales[:, 1:], packed_tables)
    refused("not the layout", x, codes, scales, packed_tables[:, :8])
    refused("uint8, int16 and int8", x, codes.view(torch.int8), scales, packed_tables)
    refused("bits is 8", x, *layout, bits=8)
    for group in (0, -32, 48, 16):
        refused("does not fit", x, *layout, group=group)
    with pytest.raises(UserError, match="int8"):
        kernel.pack(pack_codes(q, 4), scale, tables.float(), 64, 4)
    with pytest.raises(UserError, match="3 tables"):
        kernel.pack(pack_codes(q, 4), scale, tables.repeat(3, 1), 64, 4)
    with pytest.raises(UserError):
        kernel.pack(pack_codes(q, 4)[:, 1:], scale, tables, 64, 4)


def test_the_operator_passes_torchs_checks():
    q, scale, tables = weights(16, 64, 32, 4, shared=True)
    layout = kernel.pack(pack_codes(q, 4), scale, tables, 64, 4)
    arguments = (activations(3, 64), *layout, 16, 32, 4)
    torch.library.opcheck(torch.ops.lilliput.codebook_linear, arguments, test_utils="test_faketensor")
