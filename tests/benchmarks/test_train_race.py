"""The race of trainings: what counts as time, what is run again, and the picture; no training but a stub's."""

import importlib
import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("train")
    monkeypatch.setattr(module, "wait_until_quiet", lambda: 0.0)
    return module


@pytest.fixture
def chart(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_chart")


class Ticking:
    """A clock that stands still but for what is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def ticking(train, monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(train, "perf_counter", clock)
    return clock


class Stub:
    """A training whose steps take 1/8 s and whose first step may wait for something else."""

    def __init__(self, clock, rate):
        self.clock, self.rate, self.steps, self.samples, self.shares = clock, rate, 0, 0, []

    def advance(self, done):
        self.clock.now += 0.125
        self.steps, self.samples = self.steps + 1, self.samples + 8
        self.shares.append(done)

    def result(self):
        return SimpleNamespace(parameters=lambda: [], rate=self.rate)


def case_of(train, clock, name="plain", before_s=0.0, best=3e-3, made=None):
    def score(model, split, work):
        clock.now += 5.0  # measuring takes long and must not count
        return -abs(math.log(model.rate / best))

    def begin(setting):
        clock.now += before_s
        stub = Stub(clock, setting.rate)
        if made is not None:
            made.append((setting, stub))
        return stub

    task = SimpleNamespace(
        name="stub task", unit="points", higher_is_better=True, score=score, samples=lambda seed: ((), None)
    )
    return train.Case(task, name, begin)


def test_measuring_does_not_count_and_what_comes_before_the_first_step_does(train, ticking):
    made = []
    rows = train.race(case_of(train, ticking, before_s=0.375, made=made), 0, 3e-3, 1.0, train.LOOKS, "test")
    assert [row["of_the_time"] for row in rows] == ["1/2", "all"]  # before these it had not begun
    assert [row["steps"] for row in rows] == [1, 5]
    assert [row["seconds"] for row in rows] == [0.5, 1.0]
    shares = made[0][1].shares
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(4 / 5)


def test_a_training_that_never_began_is_scored_as_it_is(train, ticking):
    rows = train.race(case_of(train, ticking, before_s=2.0), 0, 3e-3, 1.0, train.LOOKS, "test")
    assert [(row["of_the_time"], row["steps"], row["seconds"]) for row in rows] == [("all", 0, 2.0)]


@pytest.mark.parametrize("best", [1e-3, 3e-3, 1e-2])
def test_the_rate_is_the_best_on_other_data(train, ticking, best):
    made = []
    assert train.tuned_rate(case_of(train, ticking, best=best, made=made), 1.0) == best
    assert {setting.seed for setting, _ in made} == {train.TUNING_SEED}


def test_what_the_file_has_is_not_run_again(train, ticking, tmp_path, monkeypatch):
    made, path, facts = [], tmp_path / "train.csv", {"limit_s": 1.0, "threads": 1}
    cases = [case_of(train, ticking, made=made), case_of(train, ticking, name="other", made=made)]
    cases[1] = train.Case(cases[0].task, "other", cases[1].begin)
    monkeypatch.setattr(train, "CASES", cases)
    train.run_all(cases[:1], 2, 1.0, path, facts)
    first = path.read_text()
    made.clear()
    rows = train.run_all(cases, 2, 1.0, path, facts)
    assert path.read_text().startswith(first)
    seeds = [setting.seed for setting, _ in made if setting.seed != train.TUNING_SEED]
    assert seeds == [0, 1]  # of the other one alone
    made.clear()
    assert len(train.run_all(cases, 2, 1.0, path, facts)) == len(rows)
    assert made == []
    with pytest.raises(SystemExit, match="limit_s"):
        train.run_all(cases, 2, 2.0, path, facts | {"limit_s": 2.0})
    root = ET.fromstring(train.picture(rows))
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(name.startswith("other") for name in names)
    assert "stub task: points" in names


def test_every_case_has_a_plain_rival_and_a_name_of_its_own(train):
    names = [(case.task.name, case.method) for case in train.CASES]
    assert len(set(names)) == len(names)
    assert all((task, train.PLAIN) in names for task, _ in names)


def test_names_do_not_overlap_and_stay_near(chart):
    places = chart.apart([0.0, 1.0, 2.0, 100.0, 249.0])
    assert all(b - a >= chart.LINE_HEIGHT for a, b in pairwise(places))
    assert places[0] == 0.0
    assert places[3] == 100.0
    assert chart.apart([]) == []


def test_the_worst_values_take_no_room(chart):
    low, high = chart.room([1.0, 1.1, 1.2, 1.3, 50.0, 60.0], higher_is_better=False)
    assert low < 1.0
    assert high < 60
    low, high = chart.room([5.0, 80.0, 81.0, 82.0], higher_is_better=True)
    assert (low > 5, high > 82) == (True, True)


@pytest.mark.parametrize(("step", "found"), [(0.3, 0.5), (1.0, 1.0), (7.0, 10.0), (23.0, 50.0)])
def test_marks_are_at_round_numbers(chart, step, found):
    assert chart.nice(step) == pytest.approx(found)
