"""From intervals to verdicts: harm is a loss beyond chance of at least what is tolerated."""

from __future__ import annotations

from collections.abc import Iterable

from lilliput.method import HARM, NO_HARM, UNSURE, Change
from lilliput.metrics.intervals import Interval, share_interval


def verdict_of(harm: Interval, tolerance: float, floor: float = 0.0) -> str:
    """The verdict on an interval of harm (positive is worse).

    Harm is found when the interval lies above `floor` and its value reaches `tolerance`; none is found when the whole
    interval stays below `tolerance`; else there are too few examples to tell.
    """
    if harm.low > floor and harm.value >= tolerance:
        return HARM
    return NO_HARM if harm.high < tolerance else UNSURE


def change_of(
    name: str,
    before: float,
    after: float,
    interval: Interval,
    n: int,
    tolerance: float,
    higher_is_better: bool = True,
    fewest: int = 1,
) -> Change:
    """A change with its verdict; `interval` is that of after - before. Below `fewest` examples nothing is told."""
    harm = Interval(-interval.value, -interval.high, -interval.low) if higher_is_better else interval
    verdict = verdict_of(harm, tolerance) if n >= fewest else UNSURE
    return Change(name, before, after, interval.low, interval.high, n, verdict)


def share_change(name: str, count: int, total: int, tolerance: float, level: float, fewest: int = 1) -> Change:
    """A share of samples that were changed: harm when all of its interval lies above `tolerance`. Without a sample it
    is not judged."""
    if total == 0:
        return Change(name, 0.0, 0.0, 0.0, 1.0, 0)
    share = share_interval(count, total, level)
    verdict = verdict_of(share, tolerance, floor=tolerance) if total >= fewest else UNSURE
    return Change(name, 0.0, share.value, share.low, share.high, total, verdict)


def overall(changes: Iterable[Change]) -> str:
    """The verdict on all: harm when one was harmed, none when that can be said of each."""
    verdicts = {c.verdict for c in changes if c.verdict}
    if HARM in verdicts:
        return HARM
    return NO_HARM if verdicts == {NO_HARM} else UNSURE


def told(changes: Iterable[Change], what: str) -> str:
    """The verdicts in one sentence that names what was harmed and counts what could not be told."""
    judged = [c for c in changes if c.verdict]
    harmed, unsure = ([c for c in judged if c.verdict == v] for v in (HARM, UNSURE))
    parts = [f"{len(judged)} {what}{'' if harmed or unsure else ', all within what is tolerated'}"]
    if harmed:
        worst = ", ".join(f"{c.name} {c.before:.3g} -> {c.after:.3g} [{c.low:+.3g}, {c.high:+.3g}]" for c in harmed[:3])
        parts.append(f"{len(harmed)} harmed: {worst}{', ...' if len(harmed) > 3 else ''}")
    if unsure:
        names = ", ".join(f"{c.name} ({c.n} examples)" for c in unsure[:3])
        parts.append(f"{len(unsure)} cannot be told: {names}{', ...' if len(unsure) > 3 else ''}")
    return "; ".join(parts) + "."
