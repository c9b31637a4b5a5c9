"""Low-rank factors of matrices and convolution kernels. Pure maths: tensors in, tensors out.

Letters: a matrix is (N, K) = outputs x inputs; a kernel is (S, C, kh, kw) = outputs x inputs x window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import UserError

Factors = tuple[Tensor, Tensor, Tensor]  # first (r1, C), core (r2, r1, kh, kw), last (S, r2)


def truncate(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(N, K) -> u (N, rank), v (rank, K): the nearest matrix u @ v of that rank (Eckart and Young, 1936).

    The singular values are shared evenly by both factors, so that neither trains or quantizes badly.
    """
    _check(w, rank, min(w.shape))
    left, values, right = torch.linalg.svd(w.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(w.dtype), (root.unsqueeze(1) * right[:rank]).to(w.dtype)


def truncate_whitened(w: Tensor, rank: int, second_moment: Tensor, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """(N, K), second_moment X X^T (K, K) -> u (N, rank), v (rank, K) that minimise ||(w - u v) X||_F.

    With X X^T = L L^T the problem is the plain one for w L; its solution keeps the left singular vectors U of w L, so
    u v = U U^T w and L needs no inverse. `damping` adds that share of the mean of the diagonal to it.
    """
    _check(w, rank, min(w.shape))
    left = torch.linalg.svd(w.double() @ cholesky_factor(second_moment, damping), full_matrices=False).U[:, :rank]
    v = left.T @ w.double()
    root = v.norm(dim=1).sqrt().clamp_min(1e-12)
    return (left * root).to(w.dtype), (v / root.unsqueeze(1)).to(w.dtype)


def cholesky_factor(second_moment: Tensor, damping: float = 1e-4) -> Tensor:
    """(K, K) positive semi-definite -> lower L with L L^T = second_moment + damping * mean(diagonal) * I, float64."""
    m = second_moment.double()
    if not torch.isfinite(m).all():
        raise UserError("the calibration activations hold NaN or infinity; check the model and the calibration data")
    mean = m.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(len(m), dtype=m.dtype)
    while True:  # a moment of few samples can need more than was asked for
        factor, failed = torch.linalg.cholesky_ex(m + damping * mean * eye)
        if not failed:
            return factor
        damping = max(10 * damping, 1e-10)


def tucker2(w: Tensor, rank_out: int, rank_in: int, sweeps: int = 3) -> Factors:
    """(S, C, kh, kw) -> first (rank_in, C), core (rank_out, rank_in, kh, kw), last (S, rank_out).

    Starts from the higher-order SVD and improves both orthonormal factors in `sweeps` rounds of higher-order
    orthogonal iteration (De Lathauwer et al., 2000).
    """
    _check(w, rank_out, w.shape[0])
    _check(w, rank_in, w.shape[1])
    return _hooi(w.double(), _leading(_unfold_out(w.double()), rank_out), rank_in, sweeps, w.dtype)


def _hooi(w: Tensor, last: Tensor, rank_in: int, sweeps: int, dtype: torch.dtype) -> Factors:
    rank_out = last.shape[1]
    first = _leading(_unfold_in(w), rank_in).T
    for _ in range(sweeps):
        last = _leading(_unfold_out(torch.einsum("schw,rc->srhw", w, first)), rank_out)
        first = _leading(_unfold_in(torch.einsum("schw,sr->rchw", w, last)), rank_in).T
    core = torch.einsum("schw,so,ic->oihw", w, last, first)
    return first.to(dtype), core.to(dtype), last.to(dtype)


def block_term(w: Tensor, rank_out: int, rank_in: int, blocks: int, sweeps: int = 3) -> Factors:
    """(S, C, kh, kw) -> the factors of a sum of `blocks` Tucker terms, stacked as a grouped core.

    Returns first (rank_in, C), core (rank_out, rank_in / blocks, kh, kw), last (S, rank_out): block b reads the b-th
    part of `first` and feeds the b-th part of `last`. Each block is refitted in turn to what the others leave over.
    `blocks=1` is `tucker2`.
    """
    if blocks == 1:
        return tucker2(w, rank_out, rank_in, sweeps)
    if rank_out % blocks or rank_in % blocks:
        raise UserError(f"{blocks} branches do not divide the ranks {rank_out} and {rank_in}; choose multiples of it")
    _check(w, rank_out // blocks, w.shape[0])
    _check(w, rank_in // blocks, w.shape[1])
    rest, parts = w.double(), []
    for _ in range(blocks):
        parts.append(tucker2(rest, rank_out // blocks, rank_in // blocks, sweeps))
        rest = rest - compose_kernel(*parts[-1])
    for _ in range(sweeps):
        for b, part in enumerate(parts):
            rest = rest + compose_kernel(*part)
            parts[b] = _hooi(rest, part[2], rank_in // blocks, 1, rest.dtype)
            rest = rest - compose_kernel(*parts[b])
    first, core, last = (torch.cat([p[i] for p in parts], dim=1 if i == 2 else 0).to(w.dtype) for i in range(3))
    return first, core, last


def compose_kernel(first: Tensor, core: Tensor, last: Tensor) -> Tensor:
    """first (r1, C), core (r2, r1 / blocks, kh, kw), last (S, r2) -> the kernel (S, C, kh, kw) they stand for."""
    blocks = first.shape[0] // core.shape[1]
    terms = zip(first.chunk(blocks), core.chunk(blocks), last.chunk(blocks, dim=1))
    return torch.stack([torch.einsum("so,oihw,ic->schw", e, g, f) for f, g, e in terms]).sum(0)


def _unfold_out(w: Tensor) -> Tensor:
    return w.flatten(1)


def _unfold_in(w: Tensor) -> Tensor:
    return w.transpose(0, 1).flatten(1)


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """(n, m) -> (n, rank): the leading left singular vectors, from the eigenvectors of the Gram matrix.

    Their signs are free; a sum that is not negative makes results equal everywhere, and keeps positive inputs positive,
    which matters once a merged layer has its activation behind a factor.
    """
    vectors = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors.flip(1)[:, :rank]
    return torch.where(vectors.sum(0) < 0, -vectors, vectors)


def _check(w: Tensor, rank: int, full: int) -> None:
    if not 1 <= rank <= full:
        raise UserError(f"rank {rank} is impossible for a weight of shape {tuple(w.shape)}; give 1 to {full}")
    if not torch.isfinite(w).all():
        raise UserError("a weight is NaN or infinite; load or train the model again before decomposing it")
