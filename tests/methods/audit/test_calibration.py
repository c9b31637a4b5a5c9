"""Calibration: sharper answers with the same classes are harm, the same model is none, few samples cannot tell."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit.calibration import Calibration, binned_error
from lilliput.metrics.quality import calibration_error, confidence_gaps


def calibrated(n, seed=0):
    """Logits whose labels are drawn from their own probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()


def test_the_binned_error_is_the_calibration_error():
    logits, labels = calibrated(300)
    confidence, right, places = confidence_gaps(logits, labels, 10)
    assert binned_error(confidence - right, places, 10) == pytest.approx(calibration_error(logits, labels, 10))


def test_overconfidence_is_found(scripted):
    logits, labels = calibrated(3000)
    work, model = scripted(labels, logits, 3 * logits)
    found = Calibration().check(work, work.model, model)
    change = found.change("calibration error")
    assert found.verdict == HARM
    assert change.before == pytest.approx(calibration_error(logits, labels))
    assert change.after == pytest.approx(calibration_error(3 * logits, labels))
    assert 0 < change.low < change.after - change.before < change.high
    diagram = found.details["after"]
    assert sum(diagram["samples"]) == 3000
    assert diagram["upto"][-1] == 1
    assert diagram["confidence"][-1] > diagram["accuracy"][-1] + 0.1


def test_the_same_answers_are_no_harm(scripted):
    logits, labels = calibrated(1000)
    work, model = scripted(labels, logits, logits)
    found = Calibration().check(work, work.model, model)
    assert found.verdict == NO_HARM
    assert (found.changes[0].low, found.changes[0].high) == (0, 0)


def test_few_samples_cannot_tell(scripted):
    logits, labels = calibrated(20)
    work, model = scripted(labels, logits, 3 * logits)
    assert Calibration().check(work, work.model, model).verdict == UNSURE


def test_other_classes_are_refused(scripted):
    logits, labels = calibrated(20)
    work, model = scripted(labels, logits, logits[:, :4])
    with pytest.raises(UserError, match=r"\(20, 5\) before, \(20, 4\) after"):
        Calibration().check(work, work.model, model)
