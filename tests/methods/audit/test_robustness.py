"""Attacks against linear models, whose weakest points are known, and a model that hides its gradients."""

import dataclasses
import importlib.metadata
import math

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit._adversarial import ATTACKS, BOUNDED, UnitInput, crafted, within, without_toolbox
from lilliput.methods.audit.robustness import ANY, TRANSFERRED, Robustness
from lilliput.methods.quantize.int8 import Int8
from lilliput.workload import Workload

SIDE, EPS = 8, 0.02
needs_toolbox = pytest.mark.skipif(without_toolbox() is not None, reason="the extra `attacks` is not there")


class Plane(nn.Module):
    """Two classes on both sides of a plane through 0.5; the first and last value have no weight."""

    def __init__(self, weight, scale=1.0):
        super().__init__()
        self.fc = nn.Linear(SIDE * SIDE, 2)
        self.scale = scale
        with torch.no_grad():
            self.fc.weight.copy_(torch.stack([-weight, weight]) / 2)
            self.fc.bias.copy_(torch.tensor([1.0, -1.0]) * 0.25 * weight.sum())

    def forward(self, input):
        return self.scale * self.fc(input.flatten(1))


def direction(seed, dead=()):
    weight = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
    weight[[0, -1, *dead]] = 0
    return weight / weight.norm()


@pytest.fixture
def weight():
    return direction(0)


@pytest.fixture
def work(weight):
    """120 pictures between 0.3 and 0.7 but for a 0 and a 1, labelled by the plane, at distances 0.01 .. 0.4 of it."""
    generator = torch.Generator().manual_seed(1)
    x = 0.5 + 0.02 * torch.randn(120, SIDE * SIDE, generator=generator)
    x = x - ((x - 0.5) @ weight).unsqueeze(1) * weight
    distance = torch.linspace(0.01, 0.4, 120) * torch.where(torch.arange(120) % 2 == 0, 1.0, -1.0)
    x = x + distance.unsqueeze(1) * weight
    x[:, 0], x[:, -1] = 0, 1
    labels = (distance > 0).long()
    batches = [{"input": a.view(-1, 1, SIDE, SIDE), "label": b} for a, b in zip(x.split(60), labels.split(60))]
    return Workload.classifier(Plane(weight), batches, batches, batches, name="plane")


def withstands(weight, attack):
    """The share of those distances that an attack on the plane cannot cross, in theory."""
    reach = EPS * float(weight.abs().sum()) if attack in BOUNDED else EPS * SIDE
    return float((torch.linspace(0.01, 0.4, 120) > reach).double().mean())


@needs_toolbox
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_reach_as_far_as_theory_says(attack, work, weight):
    findings = Robustness(eps=EPS, samples=120).check(work, work.model, work.model)
    found, summary = findings.change(attack), findings.summary
    assert 0.2 < withstands(weight, attack) < 0.9
    assert f"{attack} {found.before:.3g} -> {found.after:.3g} [" in summary
    assert found.before == pytest.approx(withstands(weight, attack), abs=0.02 if attack != "cw" else 0.1)
    assert found.before >= withstands(weight, attack) - 0.02
    assert found.after == found.before


@needs_toolbox
@pytest.mark.parametrize("attack", ATTACKS)
def test_examples_are_near_and_the_same_again(attack, work):
    unit = UnitInput(work, work.model, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    x, labels = work.test[0]["input"], work.test[0]["label"]
    before = np.random.get_state()[1].copy()
    made = crafted(unit, x, labels, attack, EPS, 5)
    change = (made - x).flatten(1)
    assert change.abs().max() <= EPS + 1e-6 if attack in BOUNDED else change.norm(dim=1).max() <= EPS * SIDE + 1e-5
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, crafted(unit, x, labels, attack, EPS, 5))
    assert np.array_equal(before, np.random.get_state()[1])


def test_examples_that_went_too_far_are_pulled_back():
    x = torch.full((2, 1, 2, 2), 0.5)
    far = torch.tensor([0.5, -0.4]).view(2, 1, 1, 1) + x
    assert torch.allclose(within(x, far, 0.1, "pgd"), x + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1))
    assert (within(x, far, 0.1, "cw") - x).flatten(1).norm(dim=1).tolist() == pytest.approx([0.2, 0.2])
    assert torch.equal(within(x, torch.full_like(x, math.nan), 0.1, "cw"), x)


@needs_toolbox
def test_a_model_that_leans_on_what_is_easily_moved_is_harmed(work, weight):
    other = direction(5)
    other = other - (other @ weight) * weight  # says nothing about the classes
    work.test = [b | {"input": flat_along(b["input"], other)} for b in work.test]
    found = Robustness(eps=EPS, samples=120).check(work, work.model, Plane(weight + 1.5 * other / other.norm()))
    assert found.details["clean"][1] > 0.97
    assert found.change("pgd").verdict == HARM
    assert found.change(ANY).verdict == found.verdict == HARM
    assert found.change("pgd").after < found.change("pgd").before - 0.1


def flat_along(x, direction):
    """The pictures without what they have along a direction, but for their 0 and 1."""
    flat = x.flatten(1)
    unit = direction / direction.norm()
    return (flat - ((flat - 0.5) @ unit).unsqueeze(1) * unit).view_as(x)


@needs_toolbox
def test_a_model_that_hides_its_gradient_is_seen_through(work, weight):
    """Logits so large that the gradient of the loss is 0: attacks on the loss fail, and the model is the same."""
    found = Robustness(eps=EPS, samples=120).check(work, work.model, Plane(weight, scale=1e6))
    assert found.change("pgd").after > found.change("pgd").before + 0.2
    assert found.details["masked"]
    assert "mislead" in found.summary
    moved = found.change(TRANSFERRED)
    assert moved.after == moved.before == found.change("pgd").before
    assert found.change(ANY).after == found.change(ANY).before
    assert found.change(ANY).before <= min(found.change(a).before for a in ATTACKS)


@needs_toolbox
def test_integer_weights_are_attacked_straight_through_and_judged_themselves(work):
    packed = Int8().apply(work.model, work)
    found = Robustness(eps=EPS, samples=120).check(work, work.model, packed)
    assert found.details["integer_layers"] == 1
    assert "straight" in found.summary
    assert "on the model itself" in found.summary
    assert abs(found.change("pgd").after - found.change("pgd").before) < 0.1
    assert not found.details["masked"]
    assert "straight" not in Robustness(eps=EPS, samples=60).check(work, work.model, work.model).summary


@needs_toolbox
def test_the_same_model_shows_no_harm_and_too_little_tells_nothing(work):
    assert Robustness(eps=EPS, samples=120, tolerance=0.1).check(work, work.model, work.model).verdict == NO_HARM
    assert Robustness(eps=EPS, samples=20).check(work, work.model, work.model).verdict == UNSURE
    fallen = Robustness(eps=0.3, samples=120, steps=5).check(work, work.model, work.model)
    assert fallen.verdict == UNSURE
    assert "smaller eps" in fallen.summary


class Cut(Plane):
    def forward(self, input):
        return super().forward(input.detach())


@needs_toolbox
def test_what_cannot_be_attacked_is_refused(work, weight, llama_work, scripted):
    with pytest.raises(UserError, match="no gradient reaches the input of Cut"):
        Robustness().check(work, work.model, Cut(weight))
    with pytest.raises(UserError, match="not a session"):
        Robustness().check(work, work.model, lambda batch: batch)
    with pytest.raises(UserError, match="no pictures"):
        Robustness().check(llama_work, llama_work.model, llama_work.model)
    flat, model = scripted([0, 1], [0, 1], [0, 1])
    with pytest.raises(UserError, match="no pictures"):
        Robustness().check(flat, flat.model, model)
    nothing = dataclasses.replace(work, test=[{k: v[:0] for k, v in work.test[0].items()}])
    with pytest.raises(UserError, match="holds no sample"):
        Robustness().check(nothing, work.model, work.model)


def test_a_missing_toolbox_names_the_extra(work, monkeypatch):
    def gone(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    with pytest.raises(UserError, match=r"lilliput\[attacks\]"):
        Robustness().check(work, work.model, work.model)
    unit = UnitInput(work, work.model, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    with pytest.raises(UserError, match=r"lilliput\[attacks\]"):
        crafted(unit, work.test[0]["input"], work.test[0]["label"], "pgd", EPS, 5)
