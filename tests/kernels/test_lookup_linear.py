"""The product by lookup on every instruction set: layout round trips, values, extremes, bad input, threads."""

import pytest
import torch
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


@pytest.fixture(params=ISAS)
def isa(request):
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def weights(rows, columns, group, bits, seed=0):
    """Random codes (N, K), scale and zero (N, K / group)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = (torch.rand(rows, columns // group, generator=generator) + 0.1).bfloat16()
    return q, scale, torch.randn(rows, columns // group, generator=generator).bfloat16()


def laid_out(rows, columns, group, bits, seed=0):
    """The codes and grids, and a function of x that multiplies with their layout."""
    q, scale, zero = weights(rows, columns, group, bits, seed)
    layout = kernel.pack(pack_codes(q, bits), scale, zero, columns, bits)
    return (q, scale, zero), lambda x: kernel.lookup_linear(x, *layout, rows, group, bits)


def dequantized(q, scale, zero, bits):
    group = q.shape[1] // scale.shape[1]
    scale, zero = (grid.double().repeat_interleave(group, 1) for grid in (scale, zero))
    return (q - 2 ** (bits - 1)) * scale + zero


def activations(tokens, columns, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


# --- layout ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 140), st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**30))
def test_the_layout_gives_the_stored_weights_back(bits, rows, group, groups, seed):
    columns = group * groups
    q, scale, zero = weights(rows, columns, group, bits, seed)
    layout = kernel.pack(pack_codes(q, bits), scale, zero, columns, bits)
    given_back = kernel.unpack(*layout, rows, columns, group, bits)
    expected = [pack_codes(q, bits), scale, zero]
    if not groups:  # a width of nothing leaves the group unknown
        expected = [part.reshape(rows, 0) for part in expected]
    assert [part.dtype for part in given_back] == [part.dtype for part in expected]
    assert all(torch.equal(a, b) for a, b in zip(given_back, expected))


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
    rows, columns, group = shape
    packed, multiply = laid_out(rows, columns, group, bits)
    for tokens in (0, 1, 2, 7, 20):
        x = activations(tokens, columns)
        y, expected = multiply(x), kernel.reference(x, *packed, bits)
        assert y.shape == (tokens, rows)
        assert ((y - expected).abs() <= 2e-6 * (x.abs().sum(-1, keepdim=True) * 2**bits + 1)).all()


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
    before = kernels.isa()
    kernels.set_isa(isa)
    y = kernel.lookup_linear(x, *kernel.pack(pack_codes(q, 1), *grid, group, 1), 2, group, 1)
    kernels.set_isa(before)
    expected = kernel.reference(x, q, *grid, 1)
    assert ((y - expected).abs() <= 3e-6 * x.abs().sum()).all()


def test_extreme_codes_do_not_overflow(isa):
    """All codes and activations at their limits, signs alike and mixed."""
    for bits in BITS:
        for code in (0, 2**bits - 1):
            q = torch.full((64, 4096), code)
            layout = kernel.pack(pack_codes(q, bits), torch.ones(64, 1), torch.zeros(64, 1), 4096, bits)
            for x in (torch.ones(1, 4096), -torch.ones(1, 4096)):
                y = kernel.lookup_linear(x, *layout, 64, 4096, bits)
                assert torch.allclose(y, x.sum() * (code - 2 ** (bits - 1)) * torch.ones(64), rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 8])
def test_a_token_with_nan_or_infinity_gives_nan_and_spoils_no_other(isa, bits, group):
    packed, multiply = laid_out(70, 64, group, bits)
    x = activations(4, 64)
    expected = multiply(x)
    for bad in (float("nan"), float("inf"), -float("inf"), 3e38):
        spoilt = x.clone()
        spoilt[2, 36:38] = bad
        y = multiply(spoilt)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
        assert kernel.reference(spoilt, *packed, bits)[2].isnan().all()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_give_exact_zeros(isa, bits):
    _, multiply = laid_out(20, 64, 32, bits)
    assert torch.equal(multiply(torch.zeros(3, 64)), torch.zeros(3, 20))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(200, 96, 32), (140, 48, 8)], ids=str)
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, bits, shape):
    """The same bits alone, in batches and on 1, 2 and 3 threads."""
    _, multiply = laid_out(*shape, bits)
    x = activations(40, shape[1])
    expected = torch.cat([multiply(row) for row in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in (1, 2, 3, 4, 5, 9, 40):
            assert torch.equal(multiply(x[:tokens]), expected[:tokens])
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_and_many_tokens_are_shared_by_threads(isa, bits):
    packed, multiply = laid_out(2000, 256, 64, bits)
    x = activations(3, 256)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found += [multiply(x) for _ in range(10)]
    many = multiply(x.repeat(200, 1))  # more than go through the weights together
    torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in (*found, *many.split(3)))
    expected = x.double() @ dequantized(*packed, bits).T
    assert (found[0] - expected).norm() < 0.01 * expected.norm()


def test_every_instruction_set_gives_nearly_the_same():
    _, multiply = laid_out(100, 320, 64, 3)
    before, found = kernels.isa(), []
    for name in ISAS:
        kernels.set_isa(name)
        found.append(multiply(activations(5, 320)))
    kernels.set_isa(before)
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
    x, model = activations(3, 64), torch.nn.Sequential(packed)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
        longer = activations(7, 64)
        assert torch.equal(program.module()(longer), packed(longer))
    torch.library.opcheck(
        torch.ops.lilliput.lookup_linear, (x, packed._codes, packed._grid, 48, 32, 2), test_utils="test_faketensor"
    )
