"""Every pair of methods: legal by its facts and then it runs, or refused with both names."""

import itertools

import pytest
import torch
from small import small_method, targets

from lilliput.errors import UserError
from lilliput.method import STAGES, Method, find_method, method_names
from lilliput.plan import Plan, Step

NAMES = [name for name in method_names() if issubclass(find_method(name), Method)]
WORKS = ("cnn_work", "llama_work")
EMPTIES = {
    ("prune.depth", "prune.depth"): "the model has 1; give at most 0",  # two blocks, both would go
    ("initialize.tleg", "prune.depth"): "the model has 1; give at most 0",
    ("layers.layer_wise_scaling", "layers.shared_attention"): "cannot reuse",  # blocks of different heads
    ("layers.layer_wise_scaling", "layers.shared_kv"): "cannot reuse",
    ("layers.layer_wise_scaling", "train.epas"): "cannot reuse",
}


@pytest.fixture(scope="module")
def first_steps():
    return {}


def after_one(name, work_name, work, first_steps):
    """The model after the first method, made once."""
    key = name, work_name
    if key not in first_steps:
        method = small_method(name)
        first_steps[key] = Plan([Step(method)]).apply(work) if targets(method, work.model) else None
    return first_steps[key]


@pytest.mark.parametrize("work_name", WORKS)
@pytest.mark.parametrize(("first", "second"), itertools.product(NAMES, NAMES))
def test_a_pair_runs_or_is_refused(first, second, work_name, request, first_steps):
    work, a, b = request.getfixturevalue(work_name), small_method(first), small_method(second)
    plan = Plan([Step(a), Step(b)])
    if plan.check():
        with pytest.raises(UserError) as caught:
            plan.apply(work)
        assert first in str(caught.value)
        assert second in str(caught.value)
        return
    if not targets(a, work.model):
        with pytest.raises(UserError):
            plan.apply(work)
        return
    model = after_one(first, work_name, work, first_steps)
    step = Plan([Step(b)])
    if (first, second) in EMPTIES or not targets(b, model):
        with pytest.raises(UserError, match=EMPTIES.get((first, second))):
            step.apply(work, model)
        return
    changed = step.apply(work, model)
    with torch.inference_mode():
        assert torch.isfinite(work.forward(changed, work.example)).all()


@pytest.mark.parametrize(("first", "second"), itertools.product(NAMES, NAMES))
def test_legality_follows_from_stages_and_facts(first, second):
    a, b = small_method(first), small_method(second)
    late = STAGES.index(a.facts.stage) > STAGES.index(b.facts.stage)
    legal = not late and not set(b.facts.needs) & set(a.facts.takes)
    assert (Plan([Step(a), Step(b)]).check() == []) == legal
    elsewhere = Plan([Step(a, {"one": {}}), Step(b, {"two": {}})]).check()
    assert (elsewhere == []) == (not late)
    for problem in Plan([Step(a), Step(b)]).check():
        assert first in problem
        assert second in problem
        assert "put" in problem or "give" in problem


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_order_of_stages_is_legal(name):
    """Methods that take nothing can all stand in one plan with this one, in the order of their stages."""
    others = [small_method(n) for n in NAMES if not small_method(n).facts.takes and n != name]
    steps = sorted([*others, small_method(name)], key=lambda m: STAGES.index(m.facts.stage))
    assert Plan([Step(m) for m in steps]).check() == []
