"""A trojan by construction is cleaned away, harmless pictures stay as they are, and what does not fit is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import fft
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.defend._guarded import one_sided_limit
from lilliput.methods.defend.cleann import Analyser, Cleann

SMALL = Cleann(patch=4, atoms=48)


@pytest.fixture(scope="module")
def guarded(bars, trojaned):
    return SMALL.wrap(trojaned, bars)


def test_a_trigger_is_flagged_and_the_true_class_comes_back(guarded, trojaned, test_pictures, triggered):
    labels = test_pictures[1]
    assert (trojaned(triggered).argmax(-1) == 0).all()
    seen = guarded.inspect(triggered)
    assert seen.flagged.float().mean() > 0.95
    assert (seen.logits.argmax(-1) == labels).float().mean() > 0.9
    assert torch.equal(guarded(triggered), seen.logits)


def test_harmless_pictures_are_answered_to_the_bit_and_rarely_flagged(guarded, trojaned, test_pictures):
    x = test_pictures[0]
    with torch.inference_mode():
        seen = guarded.inspect(x)
        calm = ~seen.flagged
        assert calm.float().mean() > 0.9
        assert torch.equal(guarded.clean(x)[0][calm], x[calm])
        assert torch.allclose(seen.logits[calm], trojaned(x)[calm], atol=1e-5)


def test_only_flagged_pieces_change(guarded, test_pictures, triggered):
    cleaned, doubt = guarded.clean(triggered)
    assert torch.equal(doubt > 1, (cleaned != triggered).flatten(1).any(1))
    flagged = guarded.input_analyser(guarded._transformed(triggered))[1] > 1
    kept = ~guarded._restored_mask(flagged, triggered)
    assert torch.equal(cleaned[kept], triggered[kept])
    assert kept[:, :, :12, :12].float().mean() > 0.9
    assert cleaned[:, :, 13:, 13:].mean() < 0.5


def test_features_that_no_harmless_picture_gave_are_cleaned_too(bars, test_pictures):
    guard = SMALL.wrap(bars.model, bars)
    features = guard._features(test_pictures[0])
    odd = features + 20 * features.std() * torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0))
    simple, doubt = guard.feature_analyser(odd.unsqueeze(0))
    assert (doubt > 1).all()
    assert (simple[0] - features).norm() < (odd - features).norm()
    assert (guard.feature_analyser(features.unsqueeze(0))[1] > 1).float().mean() < 0.1


def test_the_transform_is_scipys(guarded, test_pictures):
    x = test_pictures[0][:2]
    parts = guarded._transformed(x)
    theirs = fft.dctn(x[1, 0, 4:8, 8:12].numpy(), norm="ortho")
    assert np.allclose(parts[1 * 4 + 2, 1].view(4, 4), theirs, atol=1e-5)
    assert torch.allclose(guarded._restored(parts, x.shape), x, atol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_the_bound_holds_for_any_distribution(share):
    generator = torch.Generator().manual_seed(0)
    for values in (torch.rand(10_000, generator=generator), torch.randn(10_000, generator=generator).exp(),
                   (torch.rand(10_000, generator=generator) < share).double()):  # fmt: skip
        assert float((values > one_sided_limit(values, share)).double().mean()) <= share


def test_fewer_false_alarms_are_a_higher_bound(bars):
    x = torch.cat([b["input"] for b in bars.calibration]).flatten(1).unsqueeze(0)
    for bound in ("percentile", "chebyshev"):
        bounds = [float(Analyser(x, SMALL.with_(bound=bound, false_alarms=share)).bound) for share in (0.2, 0.02)]
        assert bounds[0] < bounds[1]


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_what_it_does_not_fit_is_refused(bars, llama_work):
    with pytest.raises(UserError, match="linear head, which Headless has not"):
        SMALL.wrap(Headless(), bars)
    with pytest.raises(UserError, match="classifiers of pictures"):
        SMALL.wrap(llama_work.model, llama_work)
    few = [{k: v[:3] for k, v in bars.calibration[0].items()}]
    with pytest.raises(UserError, match="40 or more calibration examples that are harmless, 3 were given"):
        SMALL.wrap(bars.model, dataclasses.replace(bars, calibration=few))
    none = [{k: v[:0] for k, v in bars.calibration[0].items()}]
    with pytest.raises(UserError, match="0 were given"):
        SMALL.wrap(bars.model, dataclasses.replace(bars, calibration=none))
