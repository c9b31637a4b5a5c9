"""The contract of every guard that doubts inputs, found by listing files: answers, doubts, a model left alone."""

import dataclasses

import pytest
import torch

from lilliput.errors import UserError
from lilliput.method import Guard, find_method, method_names
from lilliput.methods.defend._guarded import Detector, GuardedModel
from lilliput.workload import Workload

NAMES = [name for name in method_names() if issubclass(find_method(name), Detector)]
SMALL = {"steps": 2, "examples": 64, "patch": 4, "atoms": 16}  # where a guard has such a setting

every_guard = pytest.mark.parametrize("name", NAMES)


def small(name):
    cls = find_method(name)
    return cls(**{k: v for k, v in SMALL.items() if k in cls.knobs()})


@pytest.fixture
def work(tiny_cnn):
    """Pictures of as many classes as the tiny net has, enough of each to learn from."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(160) % 10
    x = torch.randn(10, 1, 16, 16, generator=generator)[labels] + torch.randn(160, 1, 16, 16, generator=generator)
    batches = [{"input": a, "label": b} for a, b in zip(x.split(40), labels.split(40))]
    return Workload.classifier(tiny_cnn, batches, batches, batches, training=batches, name="tiny")


def test_all_of_the_family_are_guards():
    found = [find_method(name) for name in method_names("defend.*")]
    assert all(issubclass(one, Guard) and one.facts.stage == "serve" for one in found)
    assert {"defend.cleann", "defend.curtail", "defend.deepfense"} <= set(NAMES)


@every_guard
def test_it_answers_as_a_model_does_and_tells_what_it_doubts(name, work):
    guarded, x = small(name).wrap(work.model, work), work.test[0]["input"]
    assert isinstance(guarded, GuardedModel)
    with torch.inference_mode():
        seen = guarded.inspect(x)
        assert torch.equal(guarded(x), seen.logits)
    assert seen.logits.shape == (40, 10)
    assert seen.score.shape == seen.flagged.shape == (40,)
    assert torch.isfinite(seen.score).all()
    assert torch.equal(seen.flagged, seen.score > 1)
    assert work.score(guarded, "test").value >= 0
    assert small(name).wrap(work.model, work).inspect(x).score.tolist() == seen.score.tolist()


@every_guard
def test_it_doubts_one_input_as_it_does_among_others(name, work):
    guarded, x = small(name).wrap(work.model, work), work.test[0]["input"]
    torch.testing.assert_close(guarded.inspect(x[3:4]).score[0], guarded.inspect(x).score[3], rtol=1e-2, atol=1e-3)


@every_guard
def test_the_model_stays_as_it_is(name, work):
    work.model.train()
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    guarded = small(name).wrap(work.model, work)
    guarded.inspect(work.test[0]["input"])
    assert guarded.model is work.model
    assert work.model.training
    assert all(torch.equal(before[k], v) for k, v in work.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in work.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in work.model.modules())


@every_guard
def test_it_never_looks_at_the_test_split(name, work):
    blind = dataclasses.replace(work, test=[{}])
    found = [small(name).wrap(work.model, w).inspect(work.test[0]["input"]).score for w in (work, blind)]
    assert torch.equal(*found)


@every_guard
def test_text_is_refused(name, llama_work):
    with pytest.raises(UserError, match=f"{name} guards classifiers of pictures"):
        small(name).wrap(llama_work.model, llama_work)


@every_guard
def test_sizes_are_whole_numbers(name):
    cls = find_method(name)
    for key, default in cls.defaults().items():
        if type(default) is int:
            with pytest.raises(UserError, match=f"{key} is {default + 0.5}"):
                cls(**{key: default + 0.5})
