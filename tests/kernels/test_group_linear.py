"""The packed product on every instruction set: layout round trips, values, extremes, bad input, threads and forks."""

import os
import subprocess
import sys
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
    stored,
    weights,
)
from grouped import laid_out as any_laid_out
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import kernels
from lilliput.errors import UserError
from lilliput.kernels import group_linear as kernel
from lilliput.methods.quantize._packed import PackedLinear

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

laid_out = partial(any_laid_out, kernel, kernel.group_linear)


# --- layout ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 40), st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**30))
def test_the_layout_gives_the_stored_weights_back(bits, rows, group, groups, seed):
    check_round_trip(kernel, rows, group, groups, bits, seed)


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
    check_against_reference(kernel, *laid_out(*shape, bits), bits, counts=(0, 1, 2, 7, 40))


@pytest.mark.parametrize("bits", BITS)
def test_rounding_activations_costs_less_than_one_percent(isa, bits):
    packed, multiply = laid_out(64, 576, 64, bits)
    x = activations(16, 576)
    expected = x.double() @ dequantized(*packed, bits).T
    assert (multiply(x) - expected).norm() < 0.01 * expected.norm()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ISAS), st.integers(1, 70), st.sampled_from([1e-38, 1e-20, 1.0, 1e20, 1e34]), st.integers(0, 999))
def test_activations_are_rounded_as_the_reference_says(isa, group, size, seed):
    """With an identity as weights the product shows the rounded activations themselves."""
    x = activations(1, group, seed) * size
    q = (127 * torch.eye(group) + 128).long()
    scale = torch.full((group, 1), 2.0**-7, dtype=torch.bfloat16)
    with executing(isa):
        y = kernel.group_linear(x, *kernel.pack(stored(q, 8), scale, None, group, 8), group, group, 8)
    codes, steps = kernel.rounded(x.unsqueeze(1))
    torch.testing.assert_close(y, (codes * steps * (127 / 128)).squeeze(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_do_not_overflow(isa, bits):
    check_extremes(kernel, kernel.group_linear, 16, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 8])
def test_a_token_with_nan_or_infinity_gives_nan_and_spoils_no_other(isa, bits, group):
    packed, multiply = laid_out(40, 64, 64 if bits == 8 else group, bits)
    check_spoilt_tokens(kernel, packed, multiply, bits, 37, (float("nan"), float("inf"), -float("inf")))


@pytest.mark.parametrize("bits", BITS)
def test_zeros_give_exact_zeros(isa, bits):
    _, multiply = laid_out(20, 64, 32, bits)
    assert torch.equal(multiply(torch.zeros(3, 64)), torch.zeros(3, 20))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(70, 96, 32), (40, 48, 8)], ids=str)
def test_a_token_is_answered_alike_whatever_is_beside_it(isa, bits, shape):
    """The same bits alone, in small batches, in large ones that spread the codes out, and on 1, 2 and 3 threads."""
    _, multiply = laid_out(*shape, bits)
    check_alone_and_together(multiply, activations(70, shape[1]), (1, 2, 3, 4, 5, 9, 33, 70))


@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_are_shared_by_threads(isa, bits):
    packed, multiply = laid_out(2000, 256, 64, bits)
    x = activations(3, 256)
    found = repeated_on_threads(lambda: multiply(x), 20)
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
size = kernel.layout_sizes(4096, 256, 32, 4)
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
    packed.set_codes_(*weights(48, 64, 32, 4))
    check_operator(packed, torch.ops.lilliput.group_linear, 32, 4)
