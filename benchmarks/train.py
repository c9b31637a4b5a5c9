"""Trainings at equal seconds: every method that trains with less against a plain training with a tuned rate.

    python benchmarks/train.py                    # writes results/train.csv and docs/train.svg; fifteen minutes
    python benchmarks/train.py --only text        # tasks and methods whose names hold this
    python benchmarks/train.py --seeds 5          # goes on: what the file has is not run again

Three small networks learn from scratch for the same seconds of the clock, in which everything counts that a method
needs: looks at all samples, passes of a teacher, the training of a small model that a larger one begins with. Methods
that are `given` a larger trained model do not pay for that model. Each has the learning rate with the best validation
score after a shorter training with other data; then the test score is taken on every seed after parts of the time, with
the rate on its way down, so that the whole time alone compares methods. `samples` are pictures or windows learned from.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from _chart import Line, Panel, chart
from _training_cases import CASES, PLAIN, Case, Setting, Task
from tables import write_rows

from lilliput._probe import torch_threads
from lilliput.cache import write_atomically
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.metrics.latency import wait_until_quiet
from lilliput.papers._equal_seconds import TUNING_SEED

RATES = (1e-3, 3e-3, 1e-2)
TUNING = 0.4  # share of the seconds in which a rate is tried
WARM_UP_S = 1.0  # of a plain training of each task before anything counts
LOOKS = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "all": 1.0}  # of the time
COLUMNS = (
    "task", "method", "given", "of_the_time", "seed", "score", "unit", "seconds", "samples", "steps", "rate", "weights",
    "busy_cores",
)  # fmt: skip
Row = dict[str, Any]


class Clock:
    """Seconds of work; what is measured in between does not count."""

    def __init__(self):
        self.start, self.left_out = perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return perf_counter() - self.start - self.left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        begin = perf_counter()
        yield
        self.left_out += perf_counter() - begin


def race(case: Case, seed: int, rate: float, seconds: float, looks: Mapping[str, float], split: str) -> list[Row]:
    """A training of so many seconds; a row for each look, but none for those before its first step."""
    task = case.task
    samples, work = task.samples(seed)
    clock = Clock()
    training = case.begin(Setting(task, samples, work, seed, rate, seconds))
    began, rows = clock.seconds, []
    for when, share in looks.items():
        while clock.seconds < share * seconds:
            training.advance((clock.seconds - began) / (seconds - began))
        if training.steps or share == 1:
            row = {"seconds": round(clock.seconds, 2), "samples": training.samples, "steps": training.steps}
            with clock.stopped():
                model = training.result()
                weights = sum(p.numel() for p in model.parameters())
                score = round(task.score(model, split, work), 4)
            rows.append({"of_the_time": when, "score": score, **row, "weights": weights})
    return rows


def tuned_rate(case: Case, seconds: float) -> float:
    """The rate with the best validation score; one at which a training breaks down is out."""

    def score(rate: float) -> float:
        try:
            found = race(case, TUNING_SEED, rate, TUNING * seconds, {"all": 1.0}, "validation")[-1]["score"]
        except UserError:
            return -math.inf
        return (found if case.task.higher_is_better else -found) if math.isfinite(found) else -math.inf

    return max(RATES, key=score)


# --- rows ------------------------------------------------------------------------------------------------------------


def known_rows(path: Path, facts: Row) -> list[Row]:
    """What an earlier run wrote. Ends the program when that was run in another way."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for key, value in facts.items():
        if rows and rows[0].get(key) != str(value):
            raise SystemExit(f"{path} was made with {key}={rows[0].get(key)}, not {value}; move it away first")
    return [{key: row[key] for key in COLUMNS} for row in rows]


def of_case(rows: list[Row], case: Case) -> list[Row]:
    return [row for row in rows if (row["task"], row["method"]) == (case.task.name, case.method)]


def run_all(cases: list[Case], seeds: int, seconds: float, path: Path, facts: Row) -> list[Row]:
    """Every case on every seed that the file lacks; it is written anew after each."""
    rows = known_rows(path, facts)
    warm: set[str] = set()
    for case in cases:
        missing = [s for s in range(seeds) if str(s) not in {str(row["seed"]) for row in of_case(rows, case)}]
        if not missing:
            continue
        if case.task.name not in warm:
            race(next(c for c in CASES if c.task is case.task), TUNING_SEED, RATES[0], WARM_UP_S, {"all": 1.0}, "test")
            warm.add(case.task.name)
        known = of_case(rows, case)
        rate = float(known[0]["rate"]) if known else tuned_rate(case, seconds)
        for seed in missing:
            rows += rows_of(case, seed, rate, seconds)
            write_rows(path, rows, **facts)
            print(
                *(f"{key}={rows[-1][key]}" for key in ("task", "method", "seed", "score", "unit", "rate")), flush=True
            )
    return rows


def rows_of(case: Case, seed: int, rate: float, seconds: float) -> list[Row]:
    """One case on one seed."""
    busy = f"{wait_until_quiet():.1f}"
    whose = {"task": case.task.name, "method": case.method, "given": case.given, "seed": seed}
    whose |= {"unit": case.task.unit, "rate": rate, "busy_cores": busy}
    found = [whose | row for row in race(case, seed, rate, seconds, LOOKS, "test")]
    return [{key: row[key] for key in COLUMNS} for row in found]


# --- picture ---------------------------------------------------------------------------------------------------------


def picture(rows: list[Row]) -> str:
    """Score against seconds and against samples, a row of panels for each task."""
    tasks = {case.task.name: case.task for case in CASES if of_case(rows, case)}.values()
    axes = {"seconds": "seconds, everything included", "samples": "samples learned from"}
    return chart([panel(rows, task, axis, words) for task in tasks for axis, words in axes.items()], len(axes))


def panel(rows: list[Row], task: Task, axis: str, words: str) -> Panel:
    lines = []
    for case in (c for c in CASES if c.task is task and of_case(rows, c)):
        own = of_case(rows, case)
        points = [point([r for r in own if r["of_the_time"] == when], axis) for when in LOOKS]
        kept = [p for p in points if p is not None]
        lines.append(Line(case.method, kept, strong=case.method == PLAIN, dashed=case.given != "nothing"))
    return Panel(f"{task.name}: {task.unit}", words, lines, task.higher_is_better)


def point(rows: list[Row], axis: str) -> tuple[float, float, float] | None:
    """Mean of the axis, mean score and its standard deviation over seeds; None without rows."""
    scores = [float(row["score"]) for row in rows]
    spread = stdev(scores) if len(scores) > 1 else 0.0
    return (fmean(float(row[axis]) for row in rows), fmean(scores), spread) if rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the names of tasks and methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a training")
    parser.add_argument("--threads", type=int, default=Device.here().cores)
    parser.add_argument("--out", type=Path, default=Path("results") / "train.csv")
    parser.add_argument("--picture", type=Path, default=Path("docs") / "train.svg")
    o = parser.parse_args()
    cases = [case for case in CASES if o.only in f"{case.task.name}/{case.method}"]
    if not cases:
        names = ", ".join(f"{case.task.name}/{case.method}" for case in CASES)
        raise SystemExit(f"no case has {o.only!r} in its name; there are: {names}")
    with torch_threads(o.threads):
        rows = run_all(cases, o.seeds, o.seconds, o.out, {"limit_s": o.seconds, "threads": torch.get_num_threads()})
    write_atomically(o.picture, picture(rows))


if __name__ == "__main__":
    main()
