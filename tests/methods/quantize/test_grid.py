"""Uniform grids against numpy in float64: spans, codes, values, the range search, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.quantize._grid import choose_grid, dequantize, round_to_grid

BITS = (2, 3, 4, 8)
BF16 = 2.0**-8  # largest relative error of rounding to bfloat16


def weights(rows, columns, seed=0, spread=1.0, shift=0.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread + shift


def grouped(tensor, group):
    return tensor.double().numpy().reshape(tensor.shape[0], -1, group)


def reference_codes(w, scale, zero, bits):
    """Nearest of all 2**bits grid points, by looking at every one of them."""
    group = w.shape[1] // scale.shape[1]
    levels = np.arange(2**bits) - 2 ** (bits - 1)
    points = levels * scale.double().numpy()[..., None] + zero.double().numpy()[..., None]  # (N, groups, levels)
    distance = np.abs(grouped(w, group)[..., None] - points[:, :, None, :])
    return distance.argmin(-1).reshape(w.shape), distance.min(-1)


def squared_error(w, scale, zero, bits):
    """(N, groups), of rounding `w` to the grid."""
    group = w.shape[1] // scale.shape[1]
    back = dequantize(round_to_grid(w, scale, zero, bits), scale, zero, bits)
    return ((grouped(back, group) - grouped(w, group)) ** 2).sum(-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", [0, 5])
def test_codes_are_the_nearest_grid_points(bits, symmetric, search):
    w = weights(5, 48, shift=0.3)
    scale, zero = choose_grid(w, bits, 16, symmetric, search)
    assert scale.shape == zero.shape == (5, 3)
    q = round_to_grid(w, scale, zero, bits)
    _, least = reference_codes(w, scale, zero, bits)
    back = grouped(dequantize(q, scale, zero, bits), 16)
    assert q.dtype == torch.int32
    assert q.min() >= 0
    assert q.max() < 2**bits
    np.testing.assert_allclose(np.abs(back - grouped(w, 16)), least, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_without_search_spans_the_range_of_its_group(bits):
    w = weights(4, 64, shift=-2.0)
    scale, zero = choose_grid(w, bits, 32)
    span = grouped(w, 32).max(-1) - grouped(w, 32).min(-1)
    np.testing.assert_allclose(scale.numpy(), span / (2**bits - 1), rtol=BF16)
    lowest = zero.double().numpy() - 2 ** (bits - 1) * scale.double().numpy()
    np.testing.assert_allclose(lowest, grouped(w, 32).min(-1), atol=BF16 * float(zero.abs().max()))


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_half_a_step_and_what_bfloat16_loses(bits):
    w = weights(16, 128)
    scale, zero = choose_grid(w, bits, 32)
    error = np.abs(grouped(dequantize(round_to_grid(w, scale, zero, bits), scale, zero, bits), 32) - grouped(w, 32))
    reach = zero.abs() + scale * 2**bits
    assert (error <= (scale / 2 + BF16 * reach).double().numpy()[..., None]).all()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grids_have_no_zero_point_and_keep_zero_exact(bits):
    w = weights(6, 32, shift=1.0)
    w[:, ::5] = 0
    scale, zero = choose_grid(w, bits, 16, symmetric=True)
    assert not zero.any()
    largest = np.abs(grouped(w, 16)).max(-1)
    np.testing.assert_allclose(scale.numpy(), largest / (2 ** (bits - 1) - 1), rtol=BF16)
    assert not dequantize(round_to_grid(w, scale, zero, bits), scale, zero, bits)[:, ::5].any()


@pytest.mark.parametrize("bits", BITS)
def test_negating_weights_negates_what_a_symmetric_grid_makes_of_them(bits):
    w = weights(3, 32).clamp(-1.5, 1.5)
    scale, zero = choose_grid(w, bits, 32, symmetric=True)
    scale *= 1 + 2 * BF16  # so that no code is clipped on the side that has one less
    there, back = (dequantize(round_to_grid(s * w, scale, zero, bits), scale, zero, bits) for s in (1, -1))
    torch.testing.assert_close(there, -back)


@pytest.mark.parametrize("bits", BITS)
def test_the_range_search_never_raises_the_error_of_any_group(bits):
    w = weights(8, 128)
    plain = squared_error(w, *choose_grid(w, bits, 32), bits)
    found = squared_error(w, *choose_grid(w, bits, 32, search=20), bits)
    assert (found <= plain * (1 + 1e-5)).all()
    if bits < 4:
        assert found.sum() < plain.sum()


@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_finds_the_best_of_its_ranges(bits):
    w, tried = weights(6, 64), 10
    errors = []
    for shrink in np.linspace(1, 0.5, tried + 1):
        low, high = (shrink * f(grouped(w, 32), axis=-1, keepdims=True) for f in (np.min, np.max))
        step = (high - low) / (2**bits - 1)
        codes = np.clip(np.round((grouped(w, 32) - low) / step), 0, 2**bits - 1)
        errors.append(((codes * step + low - grouped(w, 32)) ** 2).sum(-1))
    found = squared_error(w, *choose_grid(w, bits, 32, search=tried), bits)
    np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=0.05)
    assert np.argmin(errors, axis=0).max() > 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0])
def test_constant_groups_come_back(bits, symmetric, value):
    w = torch.full((2, 16), value)
    scale, zero = choose_grid(w, bits, 8, symmetric, search=3)
    back = dequantize(round_to_grid(w, scale, zero, bits), scale, zero, bits)
    torch.testing.assert_close(back, w, rtol=BF16, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_magnitudes_stay_finite(scale):
    w = weights(4, 32, spread=scale)
    back = dequantize(round_to_grid(w, *choose_grid(w, 4, 32), 4), *choose_grid(w, 4, 32), 4)
    assert torch.isfinite(back).all()


def test_scale_and_zero_are_what_bfloat16_can_hold():
    for tensor in choose_grid(weights(4, 64), 4, 32, search=4):
        assert torch.equal(tensor, tensor.bfloat16().float())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 24), st.integers(0, 2**30))
def test_rounding_a_grid_point_gives_its_code(bits, rows, groups, group, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, groups * group), generator=generator, dtype=torch.int32)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randn(rows, groups, generator=generator)
    w = dequantize(q, scale, zero, bits)
    centred = q.double().numpy().reshape(rows, groups, group) - 2 ** (bits - 1)
    expected = centred * scale.double().numpy()[..., None] + zero.double().numpy()[..., None]
    np.testing.assert_allclose(w.double().numpy().reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(round_to_grid(w, scale, zero, bits), q)


def test_a_group_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="group 32 does not divide the 40 inputs"):
        choose_grid(weights(2, 40), 4, 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(bad):
    w = weights(2, 32)
    w[1, 7] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        choose_grid(w, 4, 32)
