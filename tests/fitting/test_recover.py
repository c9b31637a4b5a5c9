"""Recovery fits the time, and its plan gives the same model again."""

import dataclasses

import pytest
import torch

from lilliput.fitting.recover import HARD, TIMED_STEPS, compensate, recover, recovering
from lilliput.methods.distill.logits import Logits
from lilliput.methods.prune.channels import Channels
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.metrics.size import state_bytes
from lilliput.plan import Plan, Step


def test_distillation_stands_before_quantization(cnn_work):
    plan = recovering(Plan([Step(Channels(ratio=0.5)), Step(Int8Static())]), cnn_work, steps=7)
    assert plan is not None
    assert [s.method.name() for s in plan.steps] == ["prune.channels", "distill.logits", "quantize.int8_static"]
    again = recovering(plan, cnn_work, steps=9)
    assert again is not None
    assert [s.method.steps for s in again.steps if isinstance(s.method, Logits)] == [9]


def test_labels_teach_where_there_are_some(cnn_work):
    def share(work):
        plan = recovering(Plan([Step(Channels(ratio=0.5))]), work, steps=7)
        return [s.method.hard for s in plan.steps if isinstance(s.method, Logits)]

    bare = [{"input": batch["input"]} for batch in cnn_work.training]
    assert share(cnn_work) == [HARD]
    assert share(dataclasses.replace(cnn_work, training=bare)) == [0]
    assert share(dataclasses.replace(cnn_work, training=None)) == [0]


def test_what_changes_no_structure_needs_no_recovery(cnn_work):
    assert recovering(Plan([Step(Int8Static())]), cnn_work, steps=7) is None
    assert recover(cnn_work, Plan([Step(Int8Static())]), 60) is None


def test_no_time_is_no_recovery(cnn_work):
    assert recover(cnn_work, Plan([Step(Channels(ratio=0.5))]), 5.0) is None


def test_the_plan_of_a_recovery_gives_the_same_model(cnn_work, monkeypatch):
    seconds = iter([0.8, 1.6])  # with few steps, and with more
    monkeypatch.setattr("lilliput.fitting.recover._seconds", lambda plan, workload: next(seconds))
    found = recover(cnn_work, Plan([Step(Channels(ratio=0.5))]), 20)
    assert found is not None
    plan, model = found
    steps = next(s.method.steps for s in plan.steps if isinstance(s.method, Logits))
    few, more = TIMED_STEPS
    assert steps == pytest.approx(few + (20 - 2 * 0.8 - 1.6) / (0.8 / (more - few)), abs=1.5)
    again = Plan.from_yaml(plan.to_yaml()).apply(cnn_work)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    before = Plan([Step(Channels(ratio=0.5))]).apply(cnn_work).state_dict()
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rounding_is_made_good_in_the_same_formats(llama_work):
    first, second, *_ = Group().targets(llama_work.model)
    plan = Plan([Step(Int8(), {second: {}}), Step(Group(bits=3, group=32), {first: {"bits": 2}})])
    found = compensate(llama_work, plan, 60)
    assert found is not None
    better, model = found
    assert [s.method.name() for s in better.steps] == ["quantize.int8", "quantize.gptq"]
    rounded = plan.apply(llama_work)
    assert state_bytes(model.state_dict()) == state_bytes(rounded.state_dict())
    assert not torch.equal(model.state_dict()[f"{first}.codes"], rounded.state_dict()[f"{first}.codes"])
    assert torch.equal(model.state_dict()[f"{second}.codes"], rounded.state_dict()[f"{second}.codes"])
    again = Plan.from_yaml(better.to_yaml()).apply(llama_work)
    assert torch.equal(model.state_dict()[f"{first}.codes"], again.state_dict()[f"{first}.codes"])


def test_nothing_rounded_and_no_time_is_nothing_made_good(llama_work):
    assert compensate(llama_work, Plan([Step(Int8())]), 60) is None
    assert compensate(llama_work, Plan([Step(Group())]), 0.0) is None
