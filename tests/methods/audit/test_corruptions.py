"""Corruptions against their definitions, and a model that relies on what they take away."""

import numpy as np
import pytest
import torch
from scipy import fft, ndimage
from torch import nn

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit._pictures import KINDS, STRENGTHS, corrupt, cosines, jpeg_steps
from lilliput.methods.audit.corruptions import Corruptions
from lilliput.workload import Workload


@pytest.fixture
def pictures():
    """Smooth pictures in 0 .. 1."""
    noise = torch.rand(6, 2, 20, 28, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise, 3, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_more_severe_is_further_away_and_stays_in_range(kind, pictures):
    found = [corrupt(pictures, kind, severity) for severity in range(1, 6)]
    distances = [float((x - pictures).square().mean()) for x in found]
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1]
    assert all(x.shape == pictures.shape and x.min() >= 0 and x.max() <= 1 for x in found)
    assert torch.equal(found[2], corrupt(pictures, kind, 3))


def test_blur_is_scipys_gaussian(pictures):
    deviation = STRENGTHS["blur"][4]
    reach = int(np.ceil(3 * deviation))
    ours = corrupt(pictures, "blur", 5)[0, 0]
    theirs = ndimage.gaussian_filter(pictures[0, 0].numpy(), deviation, mode="nearest", radius=reach)
    assert np.allclose(ours, theirs, atol=1e-4)


def test_jpeg_rounds_the_coefficients_of_scipys_cosine_transform(pictures):
    assert torch.allclose(cosines() @ cosines().T, torch.eye(8), atol=1e-6)
    block = (pictures[0, 0, :8, :8] * 255).round().numpy() - 128
    steps = jpeg_steps(25).numpy()
    kept = np.round(fft.dctn(block, norm="ortho") / steps) * steps
    theirs = np.clip((np.round(fft.idctn(kept, norm="ortho") + 128)) / 255, 0, 1)
    assert np.allclose(corrupt(pictures, "jpeg", 3)[0, 0, :8, :8], theirs, atol=1.1 / 255)
    assert jpeg_steps(50)[0, 0] == 16
    assert jpeg_steps(100).max() == 1


class Bright(nn.Module):
    """Class 1 where the picture is brighter than a limit; the mean survives every change but the brightness."""

    def __init__(self, limit, fine=0.0):
        super().__init__()
        self.limit, self.fine = limit, fine

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        detail = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))  # noise adds to it
        score = 50 * (mean - self.limit + self.fine * (detail - 0.05).clamp_min(0))
        return torch.stack([-score, score], -1)


@pytest.fixture
def work():
    """Flat grey pictures of mean -1.5 or 1.5 with one bright and one dark pixel."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (200,), generator=generator)
    x = (3.0 * labels - 1.5).view(-1, 1, 1, 1) + 0.01 * torch.randn(200, 1, 12, 12, generator=generator)
    x[:, :, 0, 0], x[:, :, -1, -1] = 4.0, -4.0
    batches = [{"input": a, "label": b} for a, b in zip(x.split(50), labels.split(50))]
    return Workload.classifier(Bright(0.0), batches, batches, batches, name="grey")


def test_lost_robustness_to_noise_is_found_and_named(work):
    found = Corruptions().check(work, work.model, Bright(0.0, fine=5.0))
    assert found.details["clean"] == [1.0, 1.0]
    assert found.verdict == HARM
    assert found.changes[0].name == "noise"
    assert found.change("noise").before > 0.95 > found.change("noise").after
    assert found.change("blur").verdict == NO_HARM


def test_the_same_model_shows_no_harm_and_few_pictures_cannot_tell(work):
    assert Corruptions().check(work, work.model, work.model).verdict == NO_HARM
    assert Corruptions(samples=20).check(work, work.model, work.model).verdict == UNSURE


def test_what_clean_pictures_lost_is_not_counted_again(work):
    flipped = nn.Sequential(Bright(0.0), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        flipped[1].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    found = Corruptions().check(work, work.model, flipped)
    assert found.details["clean"] == [1.0, 0.0]
    assert found.verdict == NO_HARM


def test_what_is_no_picture_is_refused(llama_work, work, scripted):
    with pytest.raises(UserError, match="no pictures"):
        Corruptions().check(llama_work, llama_work.model, llama_work.model)
    flat, model = scripted([0, 1], [0, 1], [0, 1])
    with pytest.raises(UserError, match="no pictures"):
        Corruptions().check(flat, flat.model, model)
    empty = [{k: v[:0] for k, v in work.test[0].items()}]
    work.test = empty
    with pytest.raises(UserError, match="holds no sample"):
        Corruptions().check(work, work.model, work.model)
