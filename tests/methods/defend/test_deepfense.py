"""Densities against scipy, the choice under a limit against all sets, and inputs unlike harmless ones are doubted."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.defend import _redundancy as core
from lilliput.methods.defend.curtail import overlap
from lilliput.methods.defend.deepfense import Cost, DeepFense, best_set, costs, stepped
from lilliput.methods.quantize.int8 import Int8
from lilliput.metrics.intervals import ranking_area

SMALL = DeepFense(steps=20, rank=4)


@pytest.fixture(scope="module")
def guarded(bars):
    return SMALL.wrap(bars.model, bars)


def test_its_answers_are_the_models(guarded, bars, test_pictures):
    assert torch.equal(guarded(test_pictures[0]), bars.model(test_pictures[0]))


def test_it_flags_the_share_that_is_accepted(guarded, bars, test_pictures):
    calibration = torch.cat([b["input"] for b in bars.calibration])
    assert guarded.inspect(calibration).flagged.float().mean() == pytest.approx(0.05, abs=0.005)
    assert guarded.inspect(test_pictures[0]).flagged.float().mean() < 0.12


def test_it_doubts_what_is_unlike_harmless_pictures(guarded, bars, test_pictures):
    x = test_pictures[0]
    noisy = x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    calm = guarded.inspect(x).score
    assert ranking_area(guarded.inspect(noisy).score, calm).value > 0.95
    pushed = stepped(bars.model, x, 0.5)
    assert ranking_area(guarded.inspect(pushed).score, calm).value > 0.8


def test_attackers_get_a_gradient(guarded, test_pictures):
    x = test_pictures[0][:8].clone().requires_grad_(True)
    logits, score = guarded.suspicion(x)
    (slope,) = torch.autograd.grad(score.sum(), x)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0
    assert torch.allclose(score.detach(), guarded.inspect(x.detach()).score, rtol=1e-4)
    assert logits.shape == (8, 3)


def test_together_they_are_one_less_a_product(guarded):
    values = guarded.mean + guarded.deviation * torch.tensor([[0.3], [1.5], [-0.7]])
    tails = 1 - np.prod([stats.norm.cdf(-z) for z in (0.3, 1.5, -0.7)])
    assert float(1 - torch.exp(-guarded._together(values))) == pytest.approx(tails, abs=1e-4)


def test_densities_are_scipys_where_every_direction_is_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    labels = torch.arange(300) % 2
    density = core.ClassDensity(x, labels, 2, rank=4)
    ours = density(x, labels)
    for c in (0, 1):
        own = x[labels == c]
        theirs = stats.multivariate_normal(own.mean(0), np.cov(own.T.numpy())).logpdf(own.numpy())
        gap = ours[labels == c].numpy() + theirs
        assert np.allclose(gap, gap[0], atol=1e-2)
    part = core.ClassDensity(x, labels, 2, rank=2)
    assert part.directions.shape == (2, 4, 2)
    assert torch.isfinite(part(x, labels)).all()


def test_training_brings_features_to_their_centres(bars):
    examples = core.examples_of(bars, bars.model, 400, "it")
    ratios = []
    for gamma in (0.0, 5.0):
        settings = SMALL.with_(steps=100, gamma=gamma)
        (module,) = core.latent_modules(bars.model, ["head"], "head", examples, settings)
        ratios.append(overlap(module.features(examples.inputs), examples.labels))
    assert ratios[1] < 0.9 * ratios[0]


def test_later_modules_see_pictures_pushed_against_the_one_before(guarded, test_pictures):
    module, (x, labels) = guarded.watchers[0], test_pictures
    moved = core.pushed(module, x, labels)
    assert (moved - x).abs().max() == pytest.approx(core.PUSH * float(x.std()), rel=1e-3)
    assert module(moved, labels).mean() > module(x, labels).mean()


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.2, 9.0])
def test_the_best_set_is_the_best_of_all(limit):
    given = [Cost(0.4, 0.1), Cost(1.0, 0.3), Cost(1.2, 0.31), Cost(2.0, -0.1)]
    sets = [c for n in range(1, 5) for c in itertools.combinations(range(4), n) if sum(given[i].ms for i in c) <= limit]
    found = best_set(given, limit)
    assert sum(given[i].gain for i in found) == pytest.approx(max(sum(given[i].gain for i in c) for c in sets))
    assert tuple(found) in sets


def test_a_limit_of_time_keeps_fewer_modules(guarded, bars, test_pictures, monkeypatch):
    found = costs(guarded, test_pictures[0][:50])
    assert all(one.ms > 0 and -0.5 <= one.gain <= 0.5 for one in found)
    monkeypatch.setattr(
        "lilliput.methods.defend.deepfense.costs", lambda *given: [Cost(1, 0.1), Cost(1, 0.4), Cost(1, 0.2)]
    )
    assert len(SMALL.with_(ms=2.5).wrap(bars.model, bars).watchers) == 2
    with pytest.raises(UserError, match=r"ms is 0\.5, and the fastest module takes 1"):
        SMALL.with_(ms=0.5).wrap(bars.model, bars)


def test_modules_of_a_packed_model_are_copies_of_the_workloads(bars):
    packed = Int8().apply(bars.model, bars)
    guard = SMALL.wrap(packed, bars)
    x = bars.test[0]["input"]
    assert torch.equal(guard(x), packed(x))
    with pytest.raises(UserError, match="are packed"):
        SMALL.wrap(packed, dataclasses.replace(bars, model=packed))


def test_sites_are_spread_from_the_last_backwards(bars):
    places = core.sites(bars.model, "it")
    assert places == ["stages.0", "stages.1", "head"]
    assert SMALL.with_(latent=1).chosen_sites(bars.model, places, None) == ["head"]
    assert SMALL.with_(latent=3).chosen_sites(bars.model, places, None) == ["head", "stages.1", "stages.0"]
    assert SMALL.with_(latent=4).chosen_sites(bars.model, places, None)[3] == "head"


def only(bars, keep):
    """The workload with a part of its training data."""
    x, y = (torch.cat([b[k] for b in bars.training]) for k in ("input", "label"))
    mask = keep(y)
    return dataclasses.replace(bars, training=[{"input": x[mask], "label": y[mask]}])


def test_too_little_to_learn_from_is_refused(bars):
    with pytest.raises(UserError, match=r"all .* training examples are of class 1"):
        SMALL.wrap(bars.model, only(bars, lambda y: y == 1))
    with pytest.raises(UserError, match="40 or more labelled training examples, 3 were given"):
        SMALL.wrap(bars.model, only(bars, lambda y: torch.arange(len(y)) < 3))
    with pytest.raises(UserError, match="2 training examples of class 2"):
        SMALL.wrap(bars.model, only(bars, lambda y: (y != 2) | ((y == 2).cumsum(0) < 3)))
    with pytest.raises(UserError, match="0 were given"):
        SMALL.wrap(bars.model, dataclasses.replace(bars, training=None))
    with pytest.raises(UserError, match="neither latent nor input modules"):
        SMALL.with_(latent=0, inputs=0).wrap(bars.model, bars)
    with pytest.raises(UserError, match="linear head"):
        SMALL.wrap(nn.Sequential(nn.Conv2d(1, 3, 16), nn.Flatten()), bars)
