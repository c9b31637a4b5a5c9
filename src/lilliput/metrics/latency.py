"""How long something takes, how sure that is, and whether a difference between two things is real.

Times are medians with the spread beside them; comparisons run interleaved (ABAB) in one process, since machines
drift, and a gain counts only when the confidence interval of the paired ratio excludes 1.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
import torch

from lilliput._probe import QUIET, busy_cores
from lilliput.errors import UserError

SAMPLE_MS = 2.0  # shorter runs are repeated within one sample of `compare`, so that the clock's steps do not count


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: median, 90th percentile and interquartile range over `runs`."""

    median_ms: float
    p90_ms: float
    iqr_ms: float
    runs: int
    threads: int


@dataclass(frozen=True)
class Comparison:
    """`ratio` is how many times faster b is than a, with its 95 % interval; `gain` when all of that is above 1."""

    ratio: float
    low: float
    high: float
    medians_ms: tuple[float, float]
    rounds: int

    @property
    def gain(self) -> bool:
        return self.low > 1

    @property
    def loss(self) -> bool:
        return self.high < 1

    def __str__(self) -> str:
        verdict = "faster" if self.gain else "slower" if self.loss else "no gain"
        return f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}] ({verdict})"


@dataclass(frozen=True)
class Generation:
    """Milliseconds to the first token, and for each later one, with interquartile ranges."""

    first_token_ms: float
    token_ms: float
    first_token_iqr_ms: float
    token_iqr_ms: float
    tokens: int  # of one generation
    repeats: int
    threads: int


def measure(run: Callable[[], Any], *, min_runs: int = 20, min_seconds: float = 1.0, warmup: int = 3) -> Latency:
    """Time `run` until both `min_runs` and `min_seconds` are reached, after `warmup` runs that do not count."""
    if min_runs < 1 or warmup < 0:
        raise UserError(f"min_runs is {min_runs} and warmup {warmup}; give at least 1 and 0")
    for _ in range(warmup):
        run()
    times: list[float] = []
    with _no_garbage_collection():
        end = perf_counter() + min_seconds
        while len(times) < min_runs or perf_counter() < end:
            times.append(_time_ms(run))
    return summarize(times)


def summarize(times_ms: Sequence[float]) -> Latency:
    """Milliseconds of single runs -> their median and spread."""
    q25, median, q75, p90 = np.percentile(times_ms, [25, 50, 75, 90]).tolist()
    return Latency(median, p90, q75 - q25, len(times_ms), torch.get_num_threads())


def compare(
    a: Callable[[], Any],
    b: Callable[[], Any],
    rounds: int = 30,
    warmup: int = 3,
    seed: int = 0,
    min_seconds: float = 0.0,
) -> Comparison:
    """Whether `b` is faster than `a`: both are run in turn `rounds` times, and for at least `min_seconds`; each round
    gives one ratio."""
    if rounds < 5:
        raise UserError(f"rounds is {rounds}; give at least 5, fewer show no spread")
    repeats = [_repeats(run, warmup) for run in (a, b)]
    times: list[tuple[float, float]] = []
    with _no_garbage_collection():
        end = perf_counter() + min_seconds
        while len(times) < rounds or perf_counter() < end:
            times.append((_time_ms(a, repeats[0]), _time_ms(b, repeats[1])))
    return paired_ratio([t[0] for t in times], [t[1] for t in times], seed=seed)


def compare_streams(a: Iterator, b: Iterator, block: int = 4, rounds: int = 6, seed: int = 0) -> Comparison:
    """Whether `b` yields faster than `a`: `block` items of each in turn, `rounds` times.

    Raises UserError when one of them ends before.
    """
    times: list[list[float]] = []
    with _no_garbage_collection():
        for _ in range(rounds):
            times.append([_time_ms(lambda items=items: _take(items, block)) for items in (a, b)])
    return paired_ratio([t[0] for t in times], [t[1] for t in times], seed=seed)


def _take(items: Iterator, count: int) -> None:
    found = len(list(islice(items, count)))
    if found < count:
        raise UserError(f"what was to be timed ended {count - found} items early; let it go on for longer")


def paired_ratio(a_ms: Sequence[float], b_ms: Sequence[float], draws: int = 2000, seed: int = 0) -> Comparison:
    """The median of a / b over rounds and the central 95 % of its bootstrap distribution."""
    ratios = np.asarray(a_ms, dtype=float) / np.asarray(b_ms, dtype=float)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(draws, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    medians = (float(np.median(a_ms)), float(np.median(b_ms)))
    return Comparison(float(np.median(ratios)), float(low), float(high), medians, len(ratios))


def measure_generation(step_iter: Callable[[], Iterator], tokens: int = 32, repeats: int = 5) -> Generation:
    """Time a language model that generates: `step_iter()` starts afresh, each `next` yields one more token.

    Everything up to the first token belongs to it. One short generation warms up. Raises UserError when a generation
    ends before its second token.
    """
    if tokens < 2 or repeats < 1:
        raise UserError(f"tokens is {tokens} and repeats {repeats}; give at least 2 and 1")
    _token_times(step_iter, 2)
    with _no_garbage_collection():
        times = [_token_times(step_iter, tokens) for _ in range(repeats)]
    first, later = summarize([t[0] for t in times]), summarize([ms for t in times for ms in t[1:]])
    shortest = min(map(len, times))
    return Generation(first.median_ms, later.median_ms, first.iqr_ms, later.iqr_ms, shortest, repeats, first.threads)


def wait_until_quiet(limit: float = QUIET, seconds: float = 20) -> float:
    """Wait until other processes keep fewer than `limit` cores busy, at most `seconds`; return what was seen last.

    A result above `limit` means that the machine stayed busy: the caller says so beside its figures.
    """
    end = perf_counter() + seconds
    load = busy_cores()
    while load > limit and perf_counter() < end:
        time.sleep(0.5)
        load = busy_cores()
    return load


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _time_ms(run: Callable[[], Any], repeats: int = 1) -> float:
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) * 1e3 / repeats


def _repeats(run: Callable[[], Any], warmup: int) -> int:
    """How many runs make a sample long enough, from the fastest of the warm-up runs."""
    fastest = min(_time_ms(run) for _ in range(max(1, warmup)))
    return max(1, round(SAMPLE_MS / max(fastest, 1e-4)))


def _token_times(step_iter: Callable[[], Iterator], tokens: int) -> list[float]:
    start = perf_counter()
    steps, times = step_iter(), []
    for _ in range(tokens):
        try:
            next(steps)
        except StopIteration:
            break
        now = perf_counter()
        times.append((now - start) * 1e3)
        start = now
    if len(times) < 2:
        raise UserError(f"the generation ended after {len(times)} tokens; give a prompt that yields at least 2")
    return times
