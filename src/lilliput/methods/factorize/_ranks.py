"""Which rank: from a share of the parameters, and moved to where the device is fast.

The time of a layer against its rank is a staircase (vector width, tiles): two ranks on one step cost the same, so the
larger is free accuracy, and the rank just below a step is the one to take.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from lilliput.errors import UserError


def break_even_rank(n: int, k: int) -> float:
    """The rank at which two factors (n, r) and (r, k) hold as many weights as the (n, k) matrix."""
    return n * k / (n + k)


def svd_rank(n: int, k: int, ratio: float) -> int:
    """The largest rank whose two factors hold at most `ratio` of the weights of an (n, k) matrix; at least 1."""
    return min(max(1, math.floor(ratio * break_even_rank(n, k) + 1e-9)), n, k)


def tucker_ranks(out: int, inp: int, window: int, ratio: float) -> tuple[int, int]:
    """(rank_out, rank_in) of a Tucker-2 kernel with at most `ratio` of the weights, both the same share of full rank.

    With s that share: s (inp^2 + out^2) + s^2 out inp window = ratio out inp window. (reconstructed: the papers fix the
    relation of the two ranks; the equal share is one choice.)
    """
    a, b, c = out * inp * window, inp**2 + out**2, -ratio * out * inp * window
    share = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return min(max(1, math.floor(share * out + 1e-9)), out), min(max(1, math.floor(share * inp + 1e-9)), inp)


def snap_to_multiple(rank: int, multiple: int, full: int) -> int:
    """The nearest multiple of `multiple` up to `full`; ranks below half of `multiple` stay as they are."""
    if multiple <= 1 or rank < multiple / 2 or multiple > full:
        return min(rank, full)
    return min(max(1, math.floor(rank / multiple + 0.5)) * multiple, full // multiple * multiple)


def last_before_step(ranks: Sequence[int], times_ms: Sequence[float]) -> int:
    """The rank r of a rising sequence after which the time rises most: the largest one below the highest step.

    The criterion max T(r') - T(r) over neighbours r < r' is (reconstructed); pass another to `snap_to_staircase`.
    """
    if len(ranks) < 2 or len(ranks) != len(times_ms):
        raise UserError(f"a staircase needs two or more ranks with one time each, not {len(ranks)} and {len(times_ms)}")
    rises = [after - before for before, after in itertools.pairwise(times_ms)]
    return ranks[max(range(len(rises)), key=lambda i: rises[i])]


def snap_to_staircase(
    rank: int,
    full: int,
    time_ms: Callable[[int], float],
    window: int = 16,
    stride: int = 4,
    choose: Callable[[Sequence[int], Sequence[float]], int] = last_before_step,
) -> int:
    """Search rank - window .. rank + window in steps of `stride` for the best place on the measured staircase.

    Ranks that are multiples of `stride` are tried, because the steps of vector units lie there; `rank` stays when fewer
    than two fit.
    """
    low, high = max(stride, rank - window), min(full, rank + window)
    ranks = list(range(math.ceil(low / stride) * stride, high + 1, stride))
    if len(ranks) < 2:
        return rank
    return choose(ranks, [time_ms(r) for r in ranks])
