"""Which neuron of one net answers to which of another: optimal transport with equal weights on the neurons.

A coupling T (n, m) says how much of neuron i goes to neuron j; its rows sum to 1 / n, its columns to 1 / m.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lilliput.errors import UserError, missing_extra

LARGEST = 4096  # neurons of an exact assignment: 8 bytes for each of so many squared
TOLERANCE = 1e-6  # of a row's sum, relative


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, k) and (m, k) features of neurons -> (n, m) squared distances, float64."""
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def exact(cost: Tensor) -> Tensor:
    """The coupling of the least total cost (n, m), a permutation over n where n is m.

    Neurons are split into as many equal parts as make the numbers the same. Raises UserError where those are too many,
    and without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise missing_extra("scipy", "fuse") from None
    n, m = cost.shape
    parts = math.lcm(n, m)
    if parts > LARGEST:
        raise UserError(
            f"{n} and {m} neurons have {parts} as their least common multiple, above {LARGEST}; use solver='sinkhorn'"
        )
    split = cost.repeat_interleave(parts // n, 0).repeat_interleave(parts // m, 1)
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(split.numpy()))
    coupling = torch.zeros(n, m, dtype=torch.float64)
    share = torch.full((parts,), 1 / parts, dtype=torch.float64)
    return coupling.index_put_((rows // (parts // n), columns // (parts // m)), share, accumulate=True)


def sinkhorn(cost: Tensor, epsilon: float, rounds: int = 5000) -> Tensor:
    """The coupling (n, m) of the least cost minus epsilon times its entropy; epsilon is a share of the mean cost.

    Columns sum exactly, rows to TOLERANCE or as near as so many rounds come.
    """
    n, m = cost.shape
    scaled = -cost.double() / max(epsilon * float(cost.mean()), 1e-300)
    column = torch.zeros(m, dtype=torch.float64)
    row = torch.zeros(n, dtype=torch.float64)
    for _ in range(rounds):
        row = -math.log(n) - (scaled + column).logsumexp(1)
        column = -math.log(m) - (scaled + row[:, None]).logsumexp(0)
        sums = ((scaled + column).logsumexp(1) + row).exp()
        if bool((n * sums - 1).abs().max() < TOLERANCE):
            break
    return (scaled + row[:, None] + column).exp()
