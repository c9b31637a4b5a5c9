"""A model that learned its training data by heart is told from one that did not; chance tells nothing."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit._attacks import fresh, halves, likelihood_ratios, log_odds, shadow_scores
from lilliput.methods.audit.membership import Membership
from lilliput.metrics.intervals import ranking_area
from lilliput.training import train
from lilliput.workload import Workload


def small_net():
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 2))


@pytest.fixture(scope="module")
def learned():
    """(workload, the same net after it learned the training data by heart); labels are chance."""
    torch.manual_seed(0)
    x = torch.randn(240, 12)
    y = torch.randint(2, (240,))
    batches = [{"input": a, "label": b} for a, b in zip(x.split(30), y.split(30))]
    model = small_net()
    work = Workload.classifier(model, batches[4:], batches[4:], batches[4:], training=batches[:4], name="by-heart")
    overfit = copy.deepcopy(model)
    train(overfit, batches[:4], work.loss, steps=500, lr=5e-3)
    return work, overfit.eval()


def test_a_model_that_learned_by_heart_is_found(learned):
    work, overfit = learned
    found = Membership().check(work, work.model, overfit)
    assert found.verdict == HARM
    area = found.change("area, loss threshold")
    assert area.verdict == HARM
    assert area.before < 0.65
    assert area.after > 0.75
    assert area.low < area.after - area.before < area.high
    assert found.details["area_after"][0] == pytest.approx(area.after)
    assert found.change("rate, loss threshold").after > 0.01


def test_the_original_against_itself_shows_no_harm(learned):
    work, overfit = learned
    found = Membership().check(work, overfit, overfit)
    assert found.verdict == NO_HARM
    assert all((c.low, c.high) == (0, 0) for c in found.changes)


def test_few_samples_cannot_tell(learned):
    work, overfit = learned
    assert Membership(samples=10).check(work, work.model, overfit).verdict == UNSURE


def test_shadow_models_find_it_too(learned):
    work, overfit = learned
    found = Membership(shadows=8, steps=500, lr=5e-3).check(work, work.model, overfit)
    ratio = found.change("area, likelihood ratio")
    assert ratio.verdict == HARM
    assert ratio.after > 0.65 > ratio.before
    with pytest.raises(UserError, match="shadows is 3; give 0 for none, or at least 4"):
        Membership(shadows=3).check(work, work.model, overfit)


def test_likelihood_ratios_are_those_of_normals():
    shadow = torch.tensor([[2.0, 0.0], [4.0, 2.0], [0.0, 5.0], [-2.0, 3.0]], dtype=torch.float64)
    inside = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    scores = torch.tensor([3.5, 1.0], dtype=torch.float64)
    deviation = math.sqrt(4 / 2)  # on each side four residuals of 1, and two means taken
    expected = [
        stats.norm.logpdf(3.5, 3, deviation) - stats.norm.logpdf(3.5, -1, deviation),
        stats.norm.logpdf(1.0, 4, deviation) - stats.norm.logpdf(1.0, 1, deviation),
    ]
    found = likelihood_ratios(scores, shadow, inside)
    assert found.tolist() == pytest.approx(expected)


def test_ratios_find_members_that_a_threshold_cannot():
    """Hard samples: sure of none, but a member's score is above what it would be otherwise."""
    generator = torch.Generator().manual_seed(0)
    hard = 10 * torch.randn(400, generator=generator, dtype=torch.float64)
    inside = halves(16, 400, seed=1)
    shadow = hard + inside + 0.3 * torch.randn(16, 400, generator=generator)
    member = torch.arange(400) < 200
    scores = hard + member + 0.3 * torch.randn(400, generator=generator)
    ratios = likelihood_ratios(scores, shadow, inside)
    assert ranking_area(scores[member], scores[~member]).value < 0.6
    assert ranking_area(ratios[member], ratios[~member]).value > 0.95


def test_halves_are_exact():
    assert (halves(6, 50, 0).sum(0) == 3).all()
    assert not torch.equal(halves(6, 50, 0), halves(6, 50, 1))


def test_log_odds_are_of_the_softmax():
    logits, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    p = logits.double().softmax(-1).gather(-1, labels.view(-1, 1)).squeeze(-1)
    assert torch.allclose(log_odds(logits, labels), (p / (1 - p)).log())
    assert torch.isfinite(log_odds(1000 * logits, labels)).all()


def test_fresh_models_know_nothing_of_the_old(learned):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Parameter(torch.arange(8.0))
            self.body = nn.Linear(8, 8)

    old = Tokens()
    new = fresh(old, 1)
    assert not torch.isclose(new.start, old.start).any()
    assert not torch.isclose(new.body.weight, old.body.weight).any()
    assert torch.equal(fresh(old, 1).start, new.start)


def test_text_is_attacked_by_its_likelihood(llama_work):
    found = Membership(samples=8, fewest=2, false_rate=0.2).check(llama_work, llama_work.model, llama_work.model)
    assert [c.n for c in found.changes] == [8, 8]
    assert found.verdict == NO_HARM


def test_a_rate_that_so_few_cannot_show_is_said_to_be_of_so_many(llama_work):
    found = Membership(samples=8, fewest=2, false_rate=0.1).check(llama_work, llama_work.model, llama_work.model)
    assert found.change("rate, loss threshold").verdict == UNSURE
    assert found.change("rate, loss threshold").n == 8
    assert "rate, loss threshold (8 examples)" in found.summary


def test_missing_data_is_named(learned, cnn_work):
    work = learned[0]
    cnn_work.training = None
    with pytest.raises(UserError, match="no training data"):
        Membership().check(cnn_work, cnn_work.model, cnn_work.model)
    cnn_work.training = [{"input": work.test[0]["input"]}]
    with pytest.raises(UserError, match="no labels"):
        Membership().check(cnn_work, cnn_work.model, cnn_work.model)
    cnn_work.training = [{k: v[:0] for k, v in work.test[0].items()}]
    with pytest.raises(UserError, match="training data holds no sample"):
        Membership().check(cnn_work, cnn_work.model, cnn_work.model)
    with pytest.raises(UserError, match="at least 4"):
        shadow_scores(work, work.test, 2, 1, 1e-3)
