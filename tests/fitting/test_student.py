"""Students: shapes that meet the budget, lessons that fit the time, plans that give them again, equal time for all."""

import json
from types import SimpleNamespace

import pytest
import torch

import lilliput as lp
from lilliput.budget import Budget
from lilliput.fitting import student
from lilliput.fitting.decoder_space import FORMATS, DecoderSpace
from lilliput.fitting.run import Job
from lilliput.fitting.student import (
    FORMAT,
    SHAPES,
    compare_students,
    in_units,
    lesson_of,
    narrower,
    slack,
    smaller,
    starts_within,
    taught,
    wants_student,
)
from lilliput.methods.distill.logits import Logits
from lilliput.methods.initialize._resize import Sizes
from lilliput.methods.initialize.weight_subcloning import WeightSubcloning
from lilliput.methods.quantize.gptq import Gptq
from lilliput.metrics.size import state_bytes
from lilliput.plan import Plan, Step

HALF = WeightSubcloning(width=0.5, heads=0.5, ffn=0.5, depth=1.0)


class FakeRun:
    def __init__(self, candidates):
        self.found = {f"candidates/{student.key_of(c['plan'])}": c for c in candidates}

    def candidates(self):
        return sorted(self.found.values(), key=lambda c: c["number"])

    def write(self, name, value):
        self.found[name] = json.loads(json.dumps(value))


class FakeJob:
    """As much of a job as students need: sizes are real, time and damage are not."""

    def __init__(self, work, limit):
        self.workload = self.light = work
        self.budget = Budget(f"size<={limit:.0f}B")
        self.options = SimpleNamespace(recover=True, families=("quantize", "prune"))
        self.device = SimpleNamespace(measured=True)
        self.space = DecoderSpace([])
        four_bits = Plan([Step(FORMATS[FORMAT])]).apply(work)
        self.predictor = SimpleNamespace(costs=lambda genome: {"size_bytes": state_bytes(four_bits.state_dict())})
        self.progress = SimpleNamespace(step=lambda text: None, say=lambda text: None)
        self.bench = SimpleNamespace(quantities=self.quantities, candidate=self.candidate)
        plan = Plan([Step(FORMATS[FORMAT])]).to_yaml()
        self.run = FakeRun([{"number": 1, "name": "joint 1", "plan": plan, "damage": 0.9}])
        self.made, self.left, self.recovered = {}, 300.0, []

    def quantities(self, model):
        return {"size_bytes": float(state_bytes(model.state_dict()))}

    def candidate(self, number, name, plan, space, genome, model):
        return {"number": number, "name": name, "plan": plan.to_yaml(), "damage": 0.4}

    def best(self):
        return self.run.candidates()[0]

    def seconds_left(self):
        return self.left

    def recover(self, best, seconds):
        self.recovered.append(seconds)
        self.left -= seconds
        return Plan.from_yaml(best["plan"]), self.workload.model

    def damage_of(self, model):
        return 0.5


@pytest.fixture
def four_bit_bytes(llama_work):
    return state_bytes(Plan([Step(FORMATS[FORMAT])]).apply(llama_work).state_dict())


@pytest.fixture
def job(llama_work, four_bit_bytes):
    return FakeJob(llama_work, 0.6 * four_bit_bytes)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share", "kept"), [(576, 0.7, 384), (576, 1.0, 576), (96, 0.5, 48), (32, 0.1, 8)])
def test_sides_keep_whole_groups(count, share, kept):
    assert round(in_units(count, share) * count) == kept


def test_both_shapes_have_as_many_weights_to_a_fifth():
    parent = Sizes(width=1024, heads=16, kv_heads=16, head_dim=64, ffn=4096, blocks=24)
    for share in (0.4, 0.6, 0.8):
        a, b = (shape(share, parent) for shape in (narrower, smaller))
        weights = [s["width"] * s["ffn"] * s["depth"] for s in (a, b)]
        assert weights[0] == pytest.approx(weights[1], rel=0.2)
        assert a["depth"] == 1 > b["depth"]


def test_slack_is_that_of_the_tightest_limit():
    budget = Budget("size<=100B, time_per_token<=10ms, drop<=1%")
    assert slack(budget, {"size_bytes": 50.0, "token_ms": 20.0}) == pytest.approx(0.5 * (1 - student.SAFETY))
    assert slack(Budget("drop<=1%"), {"size_bytes": 50.0}) == float("inf")


def test_shapes_meet_the_budget_and_use_it(job):
    taken_s = []
    starts = starts_within(job, taken_s)
    assert set(starts) == set(SHAPES)
    assert len(taken_s) >= len(starts)
    for start in starts.values():
        model = Plan([Step(start), Step(FORMATS[FORMAT])]).apply(job.workload)
        assert 0.3 <= state_bytes(model.state_dict()) / job.budget.limits["size_bytes"] <= 1


def test_out_of_reach_is_no_shape(llama_work):
    assert starts_within(FakeJob(llama_work, 100), []) == {}


# --- when a student is tried -----------------------------------------------------------------------------------------


def test_a_student_is_tried_under_a_budget_that_four_bits_do_not_meet(llama_work, four_bit_bytes):
    assert wants_student(FakeJob(llama_work, 0.6 * four_bit_bytes))
    assert not wants_student(FakeJob(llama_work, 1.2 * four_bit_bytes))


@pytest.mark.parametrize(
    "change",
    [
        lambda job: setattr(job.options, "recover", False),
        lambda job: setattr(job.options, "families", ("quantize",)),
        lambda job: setattr(job.device, "measured", False),
        lambda job: setattr(job.workload, "training", None),
        lambda job: setattr(job, "space", object()),
    ],
)
def test_no_student_where_it_cannot_be_made_taught_or_timed(job, change):
    change(job)
    assert not wants_student(job)


# --- teaching --------------------------------------------------------------------------------------------------------


def test_the_plan_gives_the_taught_student_again(llama_work, monkeypatch, one_thread):
    monkeypatch.setattr(student, "lesson_of", lambda *given: Logits(steps=5, lr=2e-3))
    plan, model = taught(llama_work, HALF, Gptq(bits=4, group=32), 60)
    assert [s.method.name() for s in plan.steps] == [
        "initialize.weight_subcloning",
        "distill.logits",
        "quantize.gptq",
    ]
    again = Plan.from_yaml(plan.to_yaml()).apply(llama_work)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert model.config.hidden_size == 16
    float_plan, float_model = taught(llama_work, HALF, None, 60)
    assert len(float_plan.steps) == 2
    assert state_bytes(float_model.state_dict()) > state_bytes(model.state_dict())


def test_too_little_time_is_no_student(llama_work):
    assert taught(llama_work, HALF, None, 1e-3) is None


def test_a_lesson_fills_the_time(llama_work, monkeypatch):
    tried = []

    def seconds(lesson, work, model):
        tried.append(lesson.steps)
        return 0.1 * lesson.steps

    monkeypatch.setattr(student, "_seconds", seconds)
    lesson = lesson_of(llama_work, llama_work.model, 100.0)
    assert tried == [2, 50]
    assert lesson.steps == pytest.approx(950, abs=2)
    assert lesson_of(llama_work, llama_work.model, 0.15) is None


# --- beside the best plan in place -----------------------------------------------------------------------------------


def test_all_get_equal_time_and_are_noted(job, monkeypatch):
    given = []

    def teach(work, start, rounding, seconds):
        given.append(seconds)
        job.left -= seconds
        return Plan([Step(start), Step(rounding)]), work.model

    monkeypatch.setattr(student, "taught", teach)
    assert compare_students(job)
    assert len(given) == 2
    assert given == [pytest.approx(job.recovered[0], rel=0.1)] * 2
    assert job.left >= 0
    first, *students = job.run.candidates()
    assert first["recovered"]["damage"] == 0.5
    assert [c["name"] for c in students] == list(SHAPES)
    assert [c["number"] for c in students] == [2, 3]
    assert set(job.made) == {1, 2, 3}
    job.left = 300.0
    assert compare_students(job)  # a resumed run teaches none again
    assert len(given) == 2


def test_too_little_time_leaves_the_search_as_it_was(job):
    job.left = student.SHORTEST_S
    assert compare_students(job) is False
    assert "recovered" not in job.best()


@pytest.mark.parametrize(("student_damage", "first"), [(0.4, "student"), (0.6, "joint")])
def test_the_better_after_recovery_comes_first(student_damage, first):
    in_place = {"name": "joint", "measured": {"size_bytes": 50.0}, "damage": 0.9, "recovered": {"damage": 0.5}}
    taught_one = {"name": "student", "measured": {"size_bytes": 50.0}, "damage": student_damage}
    run = SimpleNamespace(candidates=lambda: [in_place, taught_one])
    found = SimpleNamespace(budget=Budget("size<=100B"), served=[], run=run)
    assert Job._by_quality(found)[0]["name"] == first


def test_a_fit_under_a_strong_budget_says_what_became_of_both(llama_work, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "SHORTEST_S", 0.2)
    fitted = lp.fit(llama_work, "size<=11%", minutes=0.5, trials=12, threads=1, quiet=True, out=tmp_path / "run")
    found = [c for c in fitted.record["candidates"] if "recovered" in c]
    assert {"student, narrower"} < {c["name"] for c in found}
    assert fitted.met, fitted.summary()
    assert "After equal time of recovery" in (tmp_path / "run" / "report.html").read_text()
    again = lp.load(tmp_path / "run" / "fitted")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), fitted.model.state_dict().values()))
    assert sum(fitted.record["seconds"].values()) < 0.5 * 60 + 10
