import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.edits import describe, replay
from lilliput.errors import UserError
from lilliput.methods.layers.patch_whitening import PatchWhitening, patch_moments, whitening


@pytest.fixture
def pictures():
    """Smooth pictures of two channels that hang together, more than one chunk of them."""
    noise = torch.randn(300, 2, 14, 14, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 3, 1, 1)
    return smooth + 0.5 * smooth.flip(1) + torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)


def patches_of(pictures, size):
    """(n, C k k), by slices."""
    x = pictures.double().numpy()
    places = [(i, j) for i in range(x.shape[2] - size + 1) for j in range(x.shape[3] - size + 1)]
    return np.concatenate([x[:, :, i : i + size, j : j + size].reshape(len(x), -1) for i, j in places])


def test_moments_are_those_of_numpy(pictures):
    mean, covariance = patch_moments(pictures, 3)
    patches = patches_of(pictures, 3)
    np.testing.assert_allclose(mean, patches.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(patches.T, bias=True), atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_patches_become_white(pictures, size):
    filters, bias = whitening(pictures, size, eps=1e-9)
    white = F.conv2d(pictures, filters, bias).double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(white.mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(white, bias=True), np.eye(len(filters)), atol=1e-2)


def test_eps_damps_small_variances(pictures):
    filters, bias = whitening(pictures, 3, eps=0.1)
    white = F.conv2d(pictures, filters, bias).double().transpose(0, 1).flatten(1).numpy()
    values = np.linalg.eigvalsh(np.cov(patches_of(pictures, 3).T, bias=True))[::-1]
    np.testing.assert_allclose(np.cov(white, bias=True), np.diag(values / (values + 0.1)), atol=1e-3)


def test_constant_pictures_give_finite_filters():
    filters, bias = whitening(torch.ones(4, 1, 8, 8), 3, eps=1e-2)
    assert torch.isfinite(filters).all()
    assert torch.isfinite(bias).all()


def test_the_layer_is_frozen_whitening_and_a_learned_mix(pictures):
    layer = PatchWhitening().layer(pictures, outputs=5, stride=2)
    assert layer(pictures).shape == (300, 5, 7, 7)
    assert [p.requires_grad for p in layer.parameters()] == [False, False, True]
    filters, bias = whitening(pictures, 3, 1e-2)
    expected = F.conv2d(pictures, filters, bias, 2, 1)
    torch.testing.assert_close(layer[0](pictures), expected)
    layer(pictures).sum().backward()
    assert layer[0].weight.grad is None
    assert layer[1].weight.grad.abs().sum() > 0


def test_it_takes_the_place_of_a_first_convolution_and_can_be_saved(tiny_cnn):
    grey = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(tiny_cnn)
    shape = tiny_cnn(grey).shape
    model = PatchWhitening().into_(tiny_cnn, grey)
    assert model is tiny_cnn
    assert [type(m) for m in model.conv1] == [nn.Conv2d, nn.Conv2d]
    assert model(grey).shape == shape
    again = replay(before, describe(model, before))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(grey), model.eval()(grey))


def test_a_whitened_network_resumes_as_any_other(tiny_cnn):
    grey = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = PatchWhitening().into_(tiny_cnn, grey).train()

    def go(model, optimizer, steps):
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(grey), torch.arange(20) % 10)
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    optimizer = sgd(model)
    go(model, optimizer, 3)
    again = copy.deepcopy(model)
    restored = sgd(again)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    white = model.conv1[0].weight.clone()
    assert go(again, restored, 5) == go(model, optimizer, 5)
    assert torch.equal(model.conv1[0].weight, white)


@pytest.mark.parametrize(
    "first",
    [nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.Conv2d(2, 4, 7, 2, 3), nn.Conv2d(2, 4, 1, padding=1)],
)
def test_sizes_stay_where_it_takes_a_convolutions_place(first, pictures):
    model = PatchWhitening().into_(nn.Sequential(copy.deepcopy(first)), pictures)
    assert model(pictures[:2]).shape == first(pictures[:2]).shape
    assert (model[0][1].bias is None) == (first.bias is None)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), r"\(0, 1, 8, 8\)"),
        (torch.zeros(3, 1, 2, 8), r"\(2, 8\) pixels hold no patch of size=3"),
        (torch.full((3, 1, 8, 8), float("nan")), "not finite"),
        ([1, 2], "list"),
    ],
)
def test_other_pictures_are_refused(pictures, message):
    with pytest.raises(UserError, match=message):
        PatchWhitening().layer(pictures, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "no 2-D convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "takes 3 channels"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2)), "dilation"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, stride=(1, 2))), r"stride \(1, 2\)"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, padding="same")), "'same'"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")), "reflect"),
        (nn.Sequential(nn.Conv2d(2, 4, 4)), "use size=4"),
        (nn.Sequential(nn.Conv2d(2, 4, 5)), "use size=5"),
    ],
)
def test_models_without_an_ordinary_first_convolution_are_refused(model, message, pictures):
    with pytest.raises(UserError, match=message):
        PatchWhitening().into_(model, pictures)


def test_a_patch_has_whole_pixels():
    with pytest.raises(UserError, match="whole number"):
        PatchWhitening(size=2.5)
