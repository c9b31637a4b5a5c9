"""Legality from facts, YAML in and out, and clear errors for everything else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.cache.low_bit import LowBit
from lilliput.methods.decode.ngram import Ngram
from lilliput.methods.prune.neurons import Neurons
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.plan import Plan, Step


def test_two_quantizers_on_one_layer_are_illegal_and_named():
    plan = Plan([Step(Int8(), {"a.b": {}}), Step(Group(), {"a.b": {}})])
    (problem,) = plan.check()
    assert "quantize.group" in problem
    assert "quantize.int8" in problem
    assert "float weights" in problem


def test_two_quantizers_on_different_layers_are_legal():
    assert Plan([Step(Int8(), {"a.b": {}}), Step(Group(), {"a.c": {}})]).check() == []


@pytest.mark.parametrize("other", ["a.b.0", "a.*", "a"])
def test_overlap_is_seen_through_patterns_and_children(other):
    assert Plan([Step(Int8(), {"a.b": {}}), Step(Group(), {other: {}})]).check()


def test_order_of_stages_is_fixed(llama_work):
    plan = Plan([Step(Int8(), {"model.layers.0.*": {}}), Step(Neurons(), {"model.layers.1.mlp": {}})])
    assert any("put prune.neurons before it" in p for p in plan.check())
    with pytest.raises(UserError, match="illegal"):
        plan.apply(llama_work)


def test_apply_leaves_the_original_alone(llama_work):
    before = {k: v.clone() for k, v in llama_work.model.state_dict().items()}
    Plan([Step(Neurons(ratio=0.5, round_to=8)), Step(Int8())]).apply(llama_work)
    after = llama_work.model.state_dict()
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() for k in before)


def test_yaml_round_trip_keeps_layers_and_settings():
    plan = Plan([Step(Neurons(ratio=0.25)), Step(Group(bits=3), {"x.*": {"bits": 2}, "y": {}})])
    assert Plan.from_yaml(plan.to_yaml()) == plan


@pytest.mark.parametrize("serving", [None, LowBit(bits=2, residual=16), Ngram(tokens=4, runtime="lean")])
def test_how_it_is_served_goes_with_a_plan(serving):
    plan = Plan([Step(Int8())], serving)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert ("serving" in plan.to_yaml()) == (serving is not None)


def test_plans_of_before_there_was_serving_are_served_plainly():
    assert Plan.from_yaml("version: 1\nsteps: []").serving is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nsteps: []\nserving: 3", "serving is '3'"),
        ("version: 1\nsteps: []\nserving: {method: cache.low_bit}", "'method' and 'settings'"),
        ("version: 1\nsteps: []\nserving: {method: cache.none, settings: {}}", "no method 'cache.none'"),
        ("version: 1\nsteps: []\nserving: {method: decode.medusa, settings: {}}", "more than its settings"),
        ("version: 1\nsteps: []\nserving: {method: quantize.int8, settings: {}}", "more than its settings"),
        ("version: 1\nsteps: []\nserving: {method: cache.low_bit, settings: {bits: 3}}", "bits is 3"),
        ("version: 1\nsteps: []\nserving: {method: cache.low_bit, settings: {bytes: 3}}", "no setting bytes"),
        ("steps: [", "not valid YAML"),
        ("[]", "mapping"),
        ("version: 1\nsteps: 3", "list of 'steps'"),
        ("version: 7\nsteps: []", "version 7"),
        ("version: 1\nsteps: [{settings: {}}]", "no method name"),
        ("version: 1\nsteps: [{method: prune.everything}]", "prune.everything"),
        ("version: 1\nsteps: [{method: quantize.group, settings: {bits: 5}}]", "bits is 5"),
        ("version: 1\nsteps: [{method: quantize.group, settings: {bitz: 4}}]", "bitz"),
        ("version: 1\nsteps: [{method: quantize.group, layers: 7}]", "step 1"),
        ("version: 1\nsteps: [{method: quantize.group, where: x}]", "where"),
        ("version: 1\nsteps: [{method: search.random}]", "cannot be a step"),
        ("version: 1\nsteps: [{method: ../../x}]", "no method"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_plans_say_what_is_wrong(text, message):
    with pytest.raises(UserError, match=message):
        Plan.from_yaml(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="version: 1\nsteps[]{}-methodquantize.group,&*!|>#'\"", max_size=80))
def test_fuzzed_text_is_a_plan_or_a_user_error(text):
    try:
        plan = Plan.from_yaml(text)
    except UserError:
        return
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_missing_plan_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        Plan.load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a text file"):
        Plan.load(tmp_path / "binary.yaml")
