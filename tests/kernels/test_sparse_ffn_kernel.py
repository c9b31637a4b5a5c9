"""sparse_ffn against numpy in float64 on every instruction set, its packing, its independence, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.kernels import sparse_ffn as kernel
from lilliput.kernels.sparse_ffn import Rows

FORMATS = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows(count, columns, format, group=0):
    """Random rows and what they stand for, by numpy alone."""
    random = np.random.default_rng(count * 1000 + columns)
    if format == "float32":
        w = torch.from_numpy(random.standard_normal((count, columns)).astype(np.float32))
        return Rows(w, None, columns), w.numpy().astype(np.float64)
    if format == "bfloat16":
        w = torch.from_numpy(random.standard_normal((count, columns)).astype(np.float32)).bfloat16()
        return Rows(w, None, columns), w.float().numpy().astype(np.float64)
    bits = 8 if format == "int8" else 4
    group = columns if bits == 8 else group or columns
    codes = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (count, columns))
    grid = torch.from_numpy(random.uniform(0.01, 0.1, (count, columns // group, 1 if bits == 8 else 2))).bfloat16()
    steps = np.repeat(grid.float().numpy().astype(np.float64), group, axis=1)
    w = codes * steps[..., 0] + (0 if bits == 8 else steps[..., 1])
    return Rows(kernel.pack_rows(torch.from_numpy(codes), bits), grid, columns), w


def inputs(tokens, features, neurons, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    return x, torch.randn(tokens, neurons, generator=generator) - 0.8


def expected(x, gate, shift, up, up_bias, down, down_bias):
    hidden = np.maximum(gate.double().numpy() - np.float32(shift), 0)
    if up is not None:
        hidden = hidden * (x.double().numpy() @ up.T + up_bias.double().numpy())
    return hidden @ down + down_bias.double().numpy(), np.abs(hidden) @ np.abs(down) + 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("features", "neurons", "outputs", "group"),
    [(1, 1, 1, 0), (7, 5, 31, 0), (64, 40, 96, 32), (100, 77, 65, 0), (576, 200, 576, 64), (128, 0, 33, 0)],
)
def test_values(isa, format, features, neurons, outputs, group):
    (up, up_w), (down, down_w) = rows(neurons, features, format, group), rows(neurons, outputs, format, group)
    up_bias, down_bias = torch.randn(neurons), torch.randn(outputs)
    for tokens in (0, 1, 2, 40):
        x, gate = inputs(tokens, features, neurons)
        for given_up, plain in ((up, up_w), (None, None)):
            y = kernel.sparse_ffn(x, gate, 0.25, given_up, up_bias if given_up else None, down, down_bias)
            want, reach = expected(x, gate, 0.25, plain, up_bias, down_w, down_bias)
            assert y.shape == (tokens, outputs)
            assert np.all(np.abs(y.numpy() - want) <= 1e-5 * reach)
            same = kernel.reference(x, gate, 0.25, given_up, up_bias if given_up else None, down, down_bias)
            assert np.all(np.abs(same.numpy() - want) <= 1e-5 * reach)


@pytest.mark.parametrize("format", FORMATS)
def test_sparse_linear_takes_inputs_of_both_signs(isa, format):
    w, dense = rows(90, 70, format)
    x = torch.randn(3, 90) * (torch.rand(3, 90) < 0.3)
    y = kernel.sparse_linear(x, w, torch.ones(70))
    assert np.allclose(y.numpy(), x.double().numpy() @ dense + 1, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_depends_on_neither_threads_nor_other_tokens(isa, threads, format):
    (up, _), (down, _) = rows(300, 576, format), rows(300, 576, format)
    x, gate = inputs(37, 576, 300)
    threads(1)
    whole = kernel.sparse_ffn(x, gate, 0.0, up, None, down)
    for count in (2, 3):
        threads(count)
        assert torch.equal(kernel.sparse_ffn(x, gate, 0.0, up, None, down), whole)
    for t in (0, 5, 36):
        assert torch.equal(kernel.sparse_ffn(x[t : t + 1], gate[t : t + 1], 0.0, up, None, down)[0], whole[t])


def test_silent_neurons_are_not_read(isa):
    """Their weights may hold anything: NaN would reach the output if they took part."""
    up, down = torch.randn(50, 64), torch.randn(50, 64)
    x, gate = inputs(2, 64, 50)
    clean = kernel.sparse_ffn(x, gate, 0.1, Rows(up, None, 64), None, Rows(down, None, 64))
    silent = (gate <= 0.1).all(0)
    assert silent.any()
    up[silent], down[silent] = torch.nan, torch.inf
    assert torch.equal(kernel.sparse_ffn(x, gate, 0.1, Rows(up, None, 64), None, Rows(down, None, 64)), clean)


def test_nothing_fires_and_everything_fires(isa):
    w, dense = rows(33, 40, "float32")
    bias = torch.randn(40)
    x, gate = torch.randn(2, 40), torch.full((2, 33), -1.0)
    assert torch.equal(kernel.sparse_ffn(x, gate, 0.0, w, None, w, bias), bias.expand(2, 40))
    assert torch.equal(kernel.sparse_ffn(x, torch.zeros(2, 33), 0.0, w, None, w, bias), bias.expand(2, 40))
    y = kernel.sparse_ffn(x, -gate, 0.0, None, None, w)
    assert np.allclose(y.numpy(), dense.sum(0), atol=1e-4)


def test_nan_and_infinity_are_not_silent(isa):
    w, _ = rows(33, 40, "float32")
    x, gate = torch.randn(3, 40), -torch.ones(3, 33)
    gate[0, 5], gate[1, 5] = torch.nan, torch.inf
    y = kernel.sparse_ffn(x, gate, 0.0, w, None, w)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert not y[2].any()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from((8, 4)), st.integers(0, 9), st.integers(1, 200), st.integers(0, 2**31))
def test_packing_gives_the_codes_back(bits, count, columns, seed):
    low = 2 ** (bits - 1)
    codes = torch.randint(-low, low, (count, columns), generator=torch.Generator().manual_seed(seed))
    packed = kernel.pack_rows(codes, bits)
    assert packed.shape == (count, -(-columns // 32) * 32 * bits // 8)
    assert torch.equal(kernel.unpack_rows(packed, columns).long(), codes)


def test_it_compiles_and_exports():
    (up, _), (down, _) = rows(40, 64, "int4", 32), rows(40, 64, "int8")

    class Part(torch.nn.Module):
        def forward(self, x, gate):
            return kernel.sparse_ffn(x, gate, 0.1, up, None, down)

    x, gate = inputs(3, 64, 40)
    exported = torch.export.export(Part(), (x, gate)).module()
    assert torch.equal(exported(x, gate), Part()(x, gate))
    args = (x, gate, True, 0.1, up.values, up.grid, None, *down, None)
    torch.library.opcheck(torch.ops.lilliput.sparse_ffn.default, args)


def test_views_are_taken(isa):
    w, _ = rows(40, 64, "float32")
    x, gate = torch.randn(64, 3).T, torch.randn(80, 3).T[:, ::2]
    y = kernel.sparse_ffn(x, gate, 0.0, w, None, w)
    assert torch.equal(y, kernel.sparse_ffn(x.contiguous(), gate.contiguous(), 0.0, w, None, w))


GOOD = {"x": torch.ones(2, 64), "gate": torch.ones(2, 8)}
INT4 = Rows(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2, 2).bfloat16(), 64)
F32 = Rows(torch.zeros(8, 64), None, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, "float64"),
        ({"x": torch.ones(64)}, r"\(64,\)"),
        ({"x": torch.ones(3, 64)}, "3 tokens and the gate 2"),
        ({"gate": torch.ones(2, 9)}, r"\(9, 64\)"),
        ({"up": F32._replace(values=torch.zeros(8, 63))}, r"\(8, 63\)"),
        ({"up": F32._replace(values=torch.zeros(8, 64, dtype=torch.float16))}, "float16"),
        ({"up": F32._replace(values=torch.zeros(64, 8).T)}, "contiguous"),
        ({"down": INT4._replace(grid=None)}, "missing"),
        ({"down": INT4._replace(grid=torch.ones(8, 2, 2))}, "float32"),
        ({"down": INT4._replace(grid=torch.ones(8, 4, 2).bfloat16())}, "multiple of 32"),
        ({"down": INT4._replace(grid=torch.ones(7, 2, 2).bfloat16())}, r"\(7, 2, 2\)"),
        ({"down": INT4._replace(values=torch.zeros(8, 31, dtype=torch.uint8))}, r"\(8, 31\)"),
        ({"down": INT4._replace(columns=0)}, "0 columns"),
        ({"up_bias": torch.ones(7)}, r"\(7,\)"),
        ({"up_bias": torch.ones(8).bfloat16()}, "bfloat16"),
        ({"down_bias": torch.ones(8)}, r"\(8,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    call = GOOD | {"up": F32, "up_bias": None, "down": INT4, "down_bias": None} | change
    with pytest.raises(UserError, match=message):
        kernel.sparse_ffn(call["x"], call["gate"], 0.0, call["up"], call["up_bias"], call["down"], call["down_bias"])
