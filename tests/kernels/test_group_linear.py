"""The packed product on every instruction set: layout round trips, values, extremes, bad input, threads and forks."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import kernels
from lilliput.errors import UserError
from lilliput.kernels import group_linear as kernel
from lilliput.methods.quantize._packed import PackedLinear, pack_codes

ISAS = kernels.available_isas()
BITS = (8, 4, 3, 2)
SHAPES = [  # rows, inputs, group
    (16, 32, 32),
    (1, 4, 4),
    (5, 576, 64),
    (33, 96, 32),
    (48, 256, 128),
    (17, 31, 1),
    (15, 15, 3),
    (1, 7, 7),
    (40, 24, 8),
    (31, 96, 48),
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
    """Random codes (N, K), scale and zero (N, K / group); 8 bits have no zero."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = (torch.rand(rows, columns // group, generator=generator) + 0.1).bfloat16()
    zero = None if bits == 8 else torch.randn(rows, columns // group, generator=generator).bfloat16()
    return q, scale, zero


def stored(q, bits):
    return (q - 128).to(torch.int8) if bits == 8 else pack_codes(q, bits)


def laid_out(rows, columns, group, bits, seed=0):
    """The codes and grids, and a function of x that multiplies with their layout."""
    q, scale, zero = weights(rows, columns, group, bits, seed)
    layout = kernel.pack(stored(q, bits), scale, zero, columns, bits)
    return (q, scale, zero), lambda x: kernel.group_linear(x, *layout, rows, group, bits)


def activations(tokens, columns, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


# --- layout ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 40), st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**30))
def test_the_layout_gives_the_stored_weights_back(bits, rows, group, groups, seed):
    columns = group * groups
    q, scale, zero = weights(rows, columns, group, bits, seed)
    given_back = kernel.unpack(*kernel.pack(stored(q, bits), scale, zero, columns, bits), rows, columns, group, bits)
    expected = [part for part in (stored(q, bits), scale, zero) if part is not None]
    if not groups:  # a width of nothing leaves the group unknown
        expected = [part.reshape(rows, 0) for part in expected]
    assert [part.dtype for part in given_back] == [part.dtype for part in expected]
    assert all(torch.equal(a, b) for a, b in zip(given_back, expected))


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_takes_the_bytes_of_the_stored_weights(bits):
    q, scale, zero = weights(48, 96, 32, bits)
    codes, grid = kernel.pack(stored(q, bits), scale, zero, 96, bits)
    assert codes.nbytes == stored(q, bits).nbytes == 48 * 96 * bits // 8
    assert grid.nbytes == scale.nbytes + (0 if zero is None else zero.nbytes)


@pytest.mark.parametrize("bits", BITS)
def test_where_the_layout_puts_a_code(bits):
    """Row 3, input 21 of the second chunk: lane 3, quad 5, byte 1."""
    q = torch.zeros(16, 64, dtype=torch.int64)
    q[3, 32 + 21] = 2**bits - 1
    scale, zero = torch.ones(16, 1), None if bits == 8 else torch.zeros(16, 1)
    codes, _ = kernel.pack(stored(q, bits), scale, zero, 64, bits)
    vectors = codes.view(2, bits, 16, 4)
    assert vectors[0].count_nonzero() == 0
    lane = vectors[1, :, 3, 1].tolist()
    assert (
        lane
        == {
            8: [0, 0, 0, 0, 0, 255, 0, 0],
            4: [0, 0, 15 << 4, 0],
            3: [0, 3 << 2, 1 << 5],
            2: [0, 3 << 2],
        }[bits]
    )


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_reference(isa, bits, shape):
    rows, columns, group = shape
    packed, multiply = laid_out(rows, columns, group, bits)
    for tokens in (0, 1, 2, 7, 40):
        x = activations(tokens, columns)
        y, expected = multiply(x), kernel.reference(x, *packed, bits)
        assert y.shape == (tokens, rows)
        assert ((y - expected).abs() <= 2e-6 * (x.abs().sum(-1, keepdim=True) * 2**bits + 1)).all()


@pytest.mark.parametrize("bits", BITS)
def test_rounding_activations_costs_less_than_one_percent(isa, bits):
    (q, scale, zero), multiply = laid_out(64, 576, 64, bits)
    w = (q - 2 ** (bits - 1)).double() * scale.double().repeat_interleave(64, 1)
    w = w if zero is None else w + zero.double().repeat_interleave(64, 1)
    x = activations(16, 576)
    expected = x.double() @ w.T
    assert (multiply(x) - expected).norm() < 0.01 * expected.norm()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ISAS), st.integers(1, 70), st.sampled_from([1e-38, 1e-20, 1.0, 1e20, 1e34]), st.integers(0, 999))
def test_activations_are_rounded_as_the_reference_says(isa, group, size, seed):
    """With an identity as weights the product shows the rounded activations themselves."""
    x = activations(1, group, seed) * size
    q = (127 * torch.eye(group) + 128).long()
    scale = torch.full((group, 1), 2.0**-7, dtype=torch.bfloat16)
    before = kernels.isa()
    kernels.set_isa(isa)
    y = kernel.group_linear(x, *kernel.pack(stored(q, 8), scale, None, group, 8), group, group, 8)
    kernels.set_isa(before)
    codes, steps = kernel.rounded(x.unsqueeze(1))
    torch.testing.assert_close(y, (codes * steps * (127 / 128)).squeeze(1), rtol=1e-5, atol=0)


def test_extreme_codes_do_not_overflow(isa):
    """All codes and activations at their limits, signs alike and mixed."""
    for bits in BITS:
        for code in (0, 2**bits - 1):
            q = torch.full((16, 4096), code)
            scale, zero = torch.ones(16, 1), None if bits == 8 else torch.zeros(16, 1)
            layout = kernel.pack(stored(q, bits), scale, zero, 4096, bits)
            for x in (torch.ones(1, 4096), -torch.ones(1, 4096)):
                y = kernel.group_linear(x, *layout, 16, 4096, bits)
                assert torch.allclose(y, x.sum() * (code - 2 ** (bits - 1)) * torch.ones(16), rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 8])
def test_a_token_with_nan_or_infinity_gives_nan_and_spoils_no_other(isa, bits, group):
    (q, scale, zero), multiply = laid_out(40, 64, 64 if bits == 8 else group, bits)
    x = activations(4, 64)
    expected = multiply(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[2, 37] = bad
        y = multiply(spoilt)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
        assert kernel.reference(spoilt, q, scale, zero, bits)[2].isnan().all()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_give_exact_zeros(isa, bits):
    _, multiply = laid_out(20, 64, 32, bits)
    assert torch.equal(multiply(torch.zeros(3, 64)), torch.zeros(3, 20))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(70, 96, 32), (40, 48, 8)], ids=str)
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, bits, shape):
    """The same bits alone, in small batches, in large ones that spread the codes out, and on 1, 2 and 3 threads."""
    _, multiply = laid_out(*shape, bits)
    x = activations(70, shape[1])
    expected = torch.cat([multiply(row) for row in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in (1, 2, 3, 4, 5, 9, 33, 70):
            assert torch.equal(multiply(x[:tokens]), expected[:tokens])
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_are_shared_by_threads(isa, bits):
    packed, multiply = laid_out(2000, 256, 64, bits)
    x = activations(3, 256)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found += [multiply(x) for _ in range(20)]
    torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
    expected = kernel.reference(x, *packed, bits)
    assert (found[0] - expected).norm() < 1e-5 * expected.norm()


def test_inputs_may_be_strided(isa):
    _, multiply = laid_out(16, 32, 32, 4)
    x = activations(32, 5).T
    assert torch.equal(multiply(x), multiply(x.contiguous()))


# --- bad input -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    q, scale, zero = weights(16, 64, 32, 4)
    codes, grid = kernel.pack(stored(q, 4), scale, zero, 64, 4)
    x = activations(2, 64)

    def refused(match, *arguments):
        with pytest.raises(UserError, match=match):
            kernel.group_linear(*arguments)

    refused("float64", x.double(), codes, grid, 16, 32, 4)
    refused("shape", x[0], codes, grid, 16, 32, 4)
    refused("not the layout of 16 x 32", x[:, :32], codes, grid, 16, 32, 4)
    refused("not the layout", x, codes, grid, 1 << 40, 32, 4)
    refused("not the layout", x, codes, grid, 1 << 62, 32, 4)
    refused("not the layout", x, codes[:, 1:], grid, 16, 32, 4)
    refused("not the layout", x, codes, grid[1:], 16, 32, 4)
    refused("not the layout", x, codes.view(2, -1).T, grid, 16, 32, 4)
    refused("not the layout", x, codes, grid, 16, 32, 2)
    refused("uint8 and int16", x, codes.view(torch.int8), grid, 16, 32, 4)
    refused("uint8 and int16", x, codes, grid.view(torch.bfloat16), 16, 32, 4)
    refused("bits is 5", x, codes, grid, 16, 32, 5)
    for group in (0, -32, 48):
        refused("does not divide", x, codes, grid, 16, group, 4)
    refused("rows", x, codes, grid, -16, 32, 4)


def test_stored_weights_that_do_not_fit_are_refused():
    q, scale, zero = weights(16, 64, 32, 4)
    for arguments in [
        (stored(q, 4)[:, 1:], scale, zero, 64, 4),
        (stored(q, 4)[1:], scale, zero, 64, 4),
        (stored(q, 4).int(), scale, zero, 64, 4),
        (stored(q, 4), scale, zero, 63, 4),
        (stored(q, 4), scale, zero[:, :1], 64, 4),
        (stored(q, 4), scale, None, 64, 4),
        (stored(q, 4), scale[0], zero[0], 64, 4),
        (stored(q, 4).to("meta"), scale, zero, 64, 4),
        (stored(q, 4)[:, :0], scale, zero, 0, 4),
    ]:
        with pytest.raises(UserError):
            kernel.pack(*arguments)


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(UserError, match="'neon'; this machine can run: scalar"):
        kernels.set_isa("neon")


# --- processes -------------------------------------------------------------------------------------------------


def python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_the_environment_chooses_the_instruction_set():
    code = "from lilliput import kernels; print(kernels.isa())"
    for name in ISAS:
        assert python(code, LILLIPUT_ISA=name).stdout.split() == [name]
    assert "LILLIPUT_ISA: the instruction set is 'mmx'" in python(code, LILLIPUT_ISA="mmx").stderr


FORKS = """
import os, threading, torch
from lilliput.kernels import group_linear as kernel
torch.set_num_threads(3)
size = kernel._native.group_linear_sizes(4096, 256, 32, 4)
codes = torch.arange(size[0], dtype=torch.int64).to(torch.uint8)
grid = torch.full((size[1],), 0x3C00, dtype=torch.int16)
x = torch.ones(2, 256)
multiply = lambda: kernel.group_linear(x, codes, grid, 4096, 32, 4)
expected = multiply()
child = os.fork()
right = all(torch.equal(multiply(), expected) for _ in range(50))
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
found = []
threads = [threading.Thread(target=lambda: found.extend(multiply() for _ in range(50))) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
assert len(found) == 150 and all(torch.equal(y, expected) for y in found)
print("right")
"""


def test_forked_children_and_several_callers_get_right_answers():
    done = python(FORKS)
    assert done.stdout.split() == ["right"], done.stderr


# --- torch -----------------------------------------------------------------------------------------------------


def test_the_operator_compiles_and_exports():
    packed = PackedLinear(64, 48, 4, 32, bias=True)
    q, scale, zero = weights(48, 64, 32, 4)
    packed.set_codes_(q, scale, zero)
    x, model = activations(3, 64), torch.nn.Sequential(packed)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
        assert torch.equal(program.module()(x), expected)
        longer = activations(7, 64)
        assert torch.equal(program.module()(longer), packed(longer))
    torch.library.opcheck(
        torch.ops.lilliput.group_linear, (x, packed._codes, packed._grid, 48, 32, 4), test_utils="test_faketensor"
    )
