"""The pure maths of low rank against numpy, scipy and known structure."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from lilliput.errors import UserError
from lilliput.methods.factorize._decompose import (
    block_term,
    cholesky_factor,
    compose_kernel,
    truncate,
    truncate_whitened,
    tucker2,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.data())
def test_truncation_error_is_the_tail_of_the_singular_values(n, k, data):
    rank = data.draw(st.integers(1, min(n, k)))
    w = randn(n, k, seed=n * 100 + k)
    u, v = truncate(w, rank)
    tail = np.linalg.svd(w.numpy(), compute_uv=False)[rank:]
    assert u.shape == (n, rank)
    assert v.shape == (rank, k)
    assert float((w - u @ v).norm()) == pytest.approx(np.sqrt((tail**2).sum()), abs=1e-9)


def test_factors_share_the_singular_values_evenly():
    u, v = truncate(randn(20, 8), 5)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


def whitened_reference(w, rank, moment):
    """Rank-r minimiser of ||(w - a) X|| by the symmetric square root, w = (w S)_r S^-1."""
    s = linalg.sqrtm(moment.numpy()).real
    left, values, right = np.linalg.svd(w.numpy() @ s, full_matrices=False)
    return left[:, :rank] @ np.diag(values[:rank]) @ right[:rank] @ np.linalg.inv(s)


def test_whitened_truncation_equals_the_square_root_solution():
    w, x = randn(9, 7), randn(7, 50, seed=1) * torch.arange(1, 8).unsqueeze(1)
    u, v = truncate_whitened(w, 3, x @ x.T, damping=0.0)
    np.testing.assert_allclose((u @ v).numpy(), whitened_reference(w, 3, x @ x.T), atol=1e-8)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_whitened_beats_plain_on_the_data_and_loses_on_the_weights(rank):
    w, x = randn(16, 10), randn(10, 40, seed=2) * torch.logspace(0, 2, 10).unsqueeze(1)
    plain, white = [a @ b for a, b in (truncate(w, rank), truncate_whitened(w, rank, x @ x.T, 1e-8))]
    assert ((w - white) @ x).norm() < 0.9 * ((w - plain) @ x).norm()
    assert (w - white).norm() > (w - plain).norm()


def test_full_rank_is_exact_even_with_a_singular_moment():
    w, x = randn(6, 12), randn(12, 3, seed=3)
    for u, v in (truncate(w, 6), truncate_whitened(w, 6, x @ x.T)):
        torch.testing.assert_close(u @ v, w)


def test_rank_of_the_data_is_enough_on_the_data():
    w, x = randn(8, 12), randn(12, 3, seed=4)
    u, v = truncate_whitened(w, 3, x @ x.T, damping=1e-10)
    assert ((w - u @ v) @ x).norm() < 1e-3 * (w @ x).norm()


def test_the_cholesky_factor_adds_damping_only_as_asked_or_needed():
    x = randn(5, 30)
    moment = x @ x.T
    factor = cholesky_factor(moment, 0.1)
    expected = moment + 0.1 * moment.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, expected)
    assert torch.isfinite(cholesky_factor(torch.zeros(4, 4), 0.0)).all()


def tensor_of_rank(out, inp, rank_out, rank_in, window=3, seed=0):
    factors = randn(rank_in, inp, seed=seed), randn(rank_out, rank_in, window, window, seed=seed + 1)
    return compose_kernel(*factors, randn(out, rank_out, seed=seed + 2))


def test_tucker_recovers_a_kernel_of_that_rank_and_full_rank_is_exact():
    for ranks in ((4, 3), (10, 8)):
        w = tensor_of_rank(10, 8, *ranks)
        torch.testing.assert_close(compose_kernel(*tucker2(w, *ranks)), w)


def test_composition_is_the_sum_over_both_factors():
    first, core, last = randn(2, 4), randn(3, 2, 3, 3, seed=1), randn(5, 3, seed=2)
    w = compose_kernel(first, core, last)
    value = sum(last[4, o] * core[o, i, 1, 2] * first[i, 3] for o in range(3) for i in range(2))
    assert float(w[4, 3, 1, 2]) == pytest.approx(float(value))


def test_sweeps_never_hurt_and_help_here():
    w = randn(12, 12, 3, 3)
    errors = [float((w - compose_kernel(*tucker2(w, 3, 3, sweeps))).norm()) for sweeps in (0, 1, 2, 5)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_tucker_error_lies_between_its_bounds():
    """At least the worse of the two unfoldings' tails, at most the sum of both (De Lathauwer)."""
    w = randn(10, 8, 3, 3)
    tails = [
        np.linalg.svd(m.numpy(), compute_uv=False)[r:]
        for m, r in ((w.flatten(1), 5), (w.transpose(0, 1).flatten(1), 3))
    ]
    squared = [float((tail**2).sum()) for tail in tails]
    error = float((w - compose_kernel(*tucker2(w, 5, 3, 0))).square().sum())
    assert max(squared) - 1e-9 <= error <= sum(squared) + 1e-9


def test_tucker_factors_are_orthonormal():
    first, _, last = tucker2(randn(10, 8, 3, 3), 5, 3)
    torch.testing.assert_close(first @ first.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(last.T @ last, torch.eye(5, dtype=torch.float64))


def test_many_sweeps_end_where_each_factor_is_best_for_the_other():
    w = randn(12, 10, 3, 3)
    first, _, last = tucker2(w, 4, 3, sweeps=200)
    for factor, projected in (
        (first.T, torch.einsum("schw,so->cohw", w, last).flatten(1)),
        (last, torch.einsum("schw,ic->sihw", w, first).flatten(1)),
    ):
        best = torch.linalg.svd(projected).U[:, : factor.shape[1]]
        torch.testing.assert_close(factor @ factor.T, best @ best.T, atol=1e-5, rtol=0)


def test_signs_are_settled():
    first, _, last = tucker2(randn(10, 8, 3, 3), 5, 3)
    assert (first.sum(1) >= 0).all()
    assert (last.sum(0) >= 0).all()


def test_one_block_is_tucker():
    w = randn(8, 8, 3, 3)
    for ours, plain in zip(block_term(w, 4, 4, 1), tucker2(w, 4, 4), strict=True):
        assert torch.equal(ours, plain)


def test_blocks_beat_cutting_the_core_of_tucker_and_improve_with_sweeps():
    w = randn(12, 12, 3, 3)
    first, core, last = tucker2(w, 8, 8)
    halves = torch.cat([core[:4, :4], core[4:, 4:]])
    cut = (w - compose_kernel(first, halves, last)).norm()
    errors = [float((w - compose_kernel(*block_term(w, 8, 8, 2, s))).norm()) for s in (1, 4)]
    assert errors[1] <= errors[0] < cut
    assert errors[1] >= float((w - compose_kernel(first, core, last)).norm())


def test_blocks_have_the_shape_of_a_grouped_core():
    first, core, last = block_term(randn(12, 8, 3, 3), 8, 4, 2, 1)
    assert (first.shape, core.shape, last.shape) == ((4, 8), (8, 2, 3, 3), (12, 8))


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(UserError, match=f"rank {rank}.*give 1 to 4"):
        truncate(randn(4, 6), rank)
    with pytest.raises(UserError, match=f"rank {rank}"):
        tucker2(randn(4, 4, 3, 3), 2, rank)


def test_blocks_that_do_not_divide_and_bad_numbers_are_refused():
    with pytest.raises(UserError, match="3 branches do not divide the ranks 4 and 4"):
        block_term(randn(8, 8, 3, 3), 4, 4, 3)
    with pytest.raises(UserError, match="NaN"):
        truncate(torch.full((3, 3), float("nan")), 1)
    with pytest.raises(UserError, match="calibration"):
        truncate_whitened(randn(3, 3), 1, torch.full((3, 3), float("nan")))
