import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import multiclass_calibration_error

from lilliput.errors import UserError
from lilliput.metrics.quality import (
    calibration_error,
    changed_tokens,
    flipped_answers,
    paired_difference,
    reliability,
)


def _logits(*answers, classes=3):
    return torch.nn.functional.one_hot(torch.tensor(answers), classes).float()


def test_flipped_answers():
    assert flipped_answers(_logits(0, 1, 2, 0), _logits(0, 2, 2, 1)) == 0.5
    assert flipped_answers(_logits(0, 1), _logits(0, 1) * 7 - 2) == 0
    assert flipped_answers(_logits(0, 1), _logits(1, 0)) == 1
    windows = torch.randn(2, 5, 11)
    assert flipped_answers(windows, windows) == 0


def test_flipped_answers_refuses_what_it_cannot_compare():
    with pytest.raises(UserError, match="differ in shape"):
        flipped_answers(_logits(0, 1), _logits(0, 1, 2))
    with pytest.raises(UserError, match="logits"):
        flipped_answers(torch.ones(3), torch.ones(3))
    with pytest.raises(UserError, match="logits"):
        flipped_answers(torch.ones(0, 3), torch.ones(0, 3))


def test_changed_tokens():
    before, after = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 0], [4, 0, 6]])
    assert changed_tokens(before, after) == pytest.approx(2 / 6)
    assert changed_tokens(before, after, mask=torch.tensor([[1, 1, 0], [1, 1, 1]])) == pytest.approx(1 / 5)
    with pytest.raises(UserError, match="no token"):
        changed_tokens(before, after, mask=torch.zeros(2, 3))
    with pytest.raises(UserError, match="differ in shape"):
        changed_tokens(before, after[:1])


def _expected_calibration_error(logits, labels, bins):
    """The definition, in float64: bins over the confidence, each weighted by its share of the samples."""
    z = logits.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels.numpy()
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [
        (places == b).mean() * abs(confidence[places == b].mean() - right[places == b].mean())
        for b in range(bins)
        if (places == b).any()
    ]
    return sum(parts)


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_agrees_with_its_definition(bins):
    generator = torch.Generator().manual_seed(bins)
    logits = 3 * torch.randn(500, 6, generator=generator)
    labels = torch.randint(6, (500,), generator=generator)
    theirs = multiclass_calibration_error(logits.softmax(-1), labels, num_classes=6, n_bins=bins, norm="l1")
    found = calibration_error(logits, labels, bins)
    assert found == pytest.approx(_expected_calibration_error(logits, labels, bins), abs=1e-5)
    assert found == pytest.approx(float(theirs), abs=1e-5)


def test_the_reliability_diagram_counts_every_sample_once():
    counts, confidence, accuracy = reliability(10 * _logits(0, 1, 2, 0), torch.tensor([0, 1, 2, 1]), bins=4)
    assert counts.tolist() == [0, 0, 0, 4]
    assert confidence.tolist() == pytest.approx([0, 0, 0, 1 / (1 + 2 * np.exp(-10))])
    assert accuracy.tolist() == [0, 0, 0, 0.75]


def test_calibration_of_sure_answers():
    assert calibration_error(100 * _logits(0, 1, 2, 0), torch.tensor([0, 1, 2, 0])) == pytest.approx(0, abs=1e-6)
    assert calibration_error(100 * _logits(0, 1, 2, 0), torch.tensor([1, 2, 0, 1])) == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="two classes"):
        calibration_error(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))


def test_paired_difference_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 5, 80)
    b = a + rng.normal(0.3, 0.5, 80)
    ours = paired_difference(torch.from_numpy(a), torch.from_numpy(b), draws=4000)
    theirs = stats.bootstrap((b - a,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert ours.mean == pytest.approx(float((b - a).mean()))
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.01), pytest.approx(theirs.high, abs=0.01))
    assert ours.low > 0  # the pairs show what the spread of the samples would hide


def test_paired_difference_is_repeatable_and_antisymmetric():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    forward, back = paired_difference(a, b), paired_difference(b, a)
    assert forward == paired_difference(a, b)
    assert tuple(back) == pytest.approx((-forward.mean, -forward.high, -forward.low))
    assert paired_difference(a, a) == (0, 0, 0)


def test_paired_difference_refuses_unpaired_values():
    with pytest.raises(UserError, match="differ in shape"):
        paired_difference(torch.ones(3), torch.ones(4))
    with pytest.raises(UserError, match="two values"):
        paired_difference(torch.ones(1), torch.ones(1))
