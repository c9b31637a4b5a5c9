"""Data-free compression: exactness of its preparations, its samples against closed forms, and no look at any data."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn

from lilliput.edits import describe, replay
from lilliput.errors import UserError
from lilliput.methods.quantize._coded import CodedConv2d
from lilliput.methods.quantize._equalize import (
    ChannelReLU6,
    absorb_bias_,
    by_input,
    equalize_,
    find_pairs,
    output_ranges,
)
from lilliput.methods.quantize._qdq import Int8Conv2d
from lilliput.methods.quantize._statistics import fold_batchnorm_, input_ranges, like_pictures, sampled_moments
from lilliput.methods.quantize.data_free import DataFree, best_step, fit_codes, prepare_, refit


class Mobile(nn.Module):
    """A stem, an inverted residual with ReLU6, a flattened head: every kind of pair."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last, self.relu = nn.Conv2d(8, 12, 3, groups=2), nn.ReLU()
        self.pool, self.flatten, self.fc = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 9, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.fc(self.flatten(self.pool(self.relu(self.last(x)))))


def trained(model):
    """Uneven statistics, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features) * 2 + 0.2)
                module.bias.copy_(torch.randn(module.num_features))
                module.momentum = 0.3
        for _ in range(15):
            model.train()(torch.randn(16, 1, 16, 16))
    return model.eval()


@pytest.fixture
def mobile():
    torch.manual_seed(0)
    return trained(Mobile())


@pytest.fixture(params=["mobile", "cnn"])
def network(request, mobile, tiny_cnn):
    return mobile if request.param == "mobile" else trained(tiny_cnn)


X = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(5))


def test_folding_keeps_the_function(network):
    before = network(X)
    stats = fold_batchnorm_(network)
    torch.testing.assert_close(network(X), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert all(isinstance(network.get_submodule(name), nn.Conv2d) for name in stats)


def test_a_batchnorm_whose_input_is_read_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    model = Twice().eval()
    assert list(fold_batchnorm_(model)) == ["bn"]
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_equalising_keeps_the_function_and_evens_the_ranges(network):
    stats = fold_batchnorm_(network)
    before = network(X)
    pairs = equalize_(network, stats)
    torch.testing.assert_close(network(X), before, rtol=1e-3, atol=1e-3)
    assert pairs
    for pair in pairs:
        first, second = network.get_submodule(pair.first), network.get_submodule(pair.second)
        into = by_input(second, len(first.weight)).abs().amax((1, 3)).flatten()
        torch.testing.assert_close(output_ranges(first), into, rtol=0.02, atol=0)


def test_pairs_never_cross_a_branch(mobile, tiny_cnn):
    fold_batchnorm_(mobile)
    found = {(p.first, p.second) for p in find_pairs(mobile)}
    assert found == {("expand.0", "depthwise.0"), ("depthwise.0", "project.0"), ("last", "fc")}
    fold_batchnorm_(tiny_cnn)  # conv1's output is also the shortcut, conv2's enters the sum
    assert [(p.first, p.second) for p in find_pairs(tiny_cnn)] == [("conv3", "fc")]


def test_statistics_move_with_the_scales(network):
    """After equalising, the stored moments are still those of the layers' outputs on the same inputs."""
    stats = fold_batchnorm_(network)
    old = {name: (mean.clone(), std.clone()) for name, (mean, std) in stats.items()}
    outputs, changed = record(network, stats), None
    equalize_(network, stats)
    changed = record(network, stats)
    for name, (mean, std) in stats.items():
        scale = outputs[name].std((0, 2, 3)) / changed[name].std((0, 2, 3))
        torch.testing.assert_close(old[name][1] / std, scale, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(old[name][0] / mean, scale, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def record(model, names):
    found = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, out, n=n: found.__setitem__(n, out)) for n in names
    ]
    model(X)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_absorbing_is_exact_above_the_bend(act):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), act(), nn.Conv2d(4, 2, 1, bias=False)).eval()
    with torch.no_grad():
        model[1].bias.fill_(3.0)
        model[1].weight.fill_(0.2)
        model[1].running_var.fill_(float(model[0](X).var()))
    before = model(X)
    stats = fold_batchnorm_(model)
    pairs = equalize_(model, stats, sweeps=0)
    absorb_bias_(model, pairs, stats)
    torch.testing.assert_close(stats["0"][0], torch.full((4,), 0.6))
    above = (model[0](X) >= 0).all(1, keepdim=True).expand_as(before)  # of the shifted outputs
    assert 0.9 < above.float().mean() < 1
    torch.testing.assert_close(model(X)[above], before[above], rtol=1e-4, atol=1e-5)
    assert model[3].bias is not None


def test_padded_layers_take_no_absorbed_bias(mobile):
    stats = fold_batchnorm_(mobile)
    pairs, bias = equalize_(mobile, stats), mobile.expand[0].bias.clone()
    stats["expand.0"] = (stats["expand.0"][0] + 100, stats["expand.0"][1])
    absorb_bias_(mobile, pairs, stats)
    torch.testing.assert_close(mobile.expand[0].bias, bias)  # its reader, the depthwise layer, pads


def test_samples_have_the_moments_of_a_rectified_gaussian(tiny_cnn):
    stats = fold_batchnorm_(trained(tiny_cnn))
    found = sampled_moments(tiny_cnn, stats, ["conv2"], "independent", 256, 16, seed=0)["conv2"]
    mean, std = (m.numpy() for m in stats["conv1"])
    ratio = mean / std
    expected = std * scipy_stats.norm.pdf(ratio) + mean * scipy_stats.norm.cdf(ratio)
    square = (mean**2 + std**2) * scipy_stats.norm.cdf(ratio) + mean * std * scipy_stats.norm.pdf(ratio)
    centre = found.mean[0].view(16, 9)[:, 4]  # the middle of a patch never lies in the padding
    np.testing.assert_allclose(centre, expected, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(found.gram[0].diagonal().view(16, 9)[:, 4], square, rtol=0.06, atol=0.02)


def test_a_sum_adds_independent_samples(tiny_cnn):
    """conv3 reads relu(relu(bn1) + bn2): its moments are those of two independent draws."""
    stats = fold_batchnorm_(trained(tiny_cnn))
    found = sampled_moments(tiny_cnn, stats, ["conv3"], "independent", 256, 16, seed=0)["conv3"]
    rng = np.random.default_rng(0)
    draws = [rng.normal(m, s, (100_000, 16)) for m, s in (map(np.asarray, stats[n]) for n in ("conv1", "conv2"))]
    total = np.maximum(np.maximum(draws[0], 0) + draws[1], 0)
    np.testing.assert_allclose(found.mean[0].view(16, 9)[:, 4], total.mean(0), rtol=0.05, atol=0.02)


def test_propagated_samples_have_the_stored_moments_too(tiny_cnn):
    stats = fold_batchnorm_(trained(tiny_cnn))
    by = {s: sampled_moments(tiny_cnn, stats, ["conv2"], s, 256, 16, 0)["conv2"] for s in ("independent", "propagated")}
    torch.testing.assert_close(by["propagated"].mean, by["independent"].mean, rtol=0.1, atol=0.05)
    off = [m.gram[0] - m.mean[0].outer(m.mean[0]) for m in by.values()]
    off = [float((o - o.diagonal().diag()).norm() / o.norm()) for o in off]
    assert off[1] > 2 * off[0]  # the correlations that the weights make


def test_pictures_are_smooth_and_standard():
    white = torch.randn(64, 2, 32, 24, generator=torch.Generator().manual_seed(0))
    found = like_pictures(white)
    assert found.shape == white.shape
    assert float(found.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.std()) == pytest.approx(1, abs=1e-4)
    power = torch.fft.rfft2(found).abs().square().mean((0, 1))[0]  # along the width, frequencies 0 .. 12
    slope = np.polyfit(np.log(np.arange(1, 12)), np.log(power[1:12].numpy()), 1)[0]
    assert slope == pytest.approx(-2, abs=0.3)  # amplitude as 1 / frequency
    assert torch.isfinite(like_pictures(torch.randn(1, 1, 1, 1))).all()


def test_pictures_of_one_pixel_have_nothing_to_smooth(tiny_cnn):
    white = torch.randn(50, 3, 1, 1)
    torch.testing.assert_close(like_pictures(white), (white - white.mean()) / white.std(correction=0))
    x = torch.randn(32, 1, 1, 1)
    for settings in ({"sampler": "independent"}, {"sampler": "propagated"}, {"samples": 1}, {"activation_bits": 8}):
        model = DataFree(size=1, steps=5, **{"samples": 32, **settings}).apply(trained(tiny_cnn))
        assert (model(x) - tiny_cnn(x)).norm() < 0.05 * tiny_cnn(x).norm()


def test_ranges_are_six_deviations_out(tiny_cnn):
    stats = fold_batchnorm_(trained(tiny_cnn))
    ranges = input_ranges(tiny_cnn, stats, ["conv1", "conv2"], 16)
    assert ranges["conv1"].tolist() == [-6.0, 6.0]
    mean, std = stats["conv1"]
    torch.testing.assert_close(ranges["conv2"], torch.tensor([0.0, float((mean + 6 * std).max())]))


# --- the arithmetic of one layer -------------------------------------------------------------------------------


def quadratic(d, moments):
    return ((d @ moments) * d).sum(-1)


def test_best_step_has_the_least_error_of_those_tried():
    w = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) ** 3
    shares = np.linspace(1.0, 0.2, 41)
    for g, n in itertools.product(range(2), range(3)):
        row = w[g, n].double().numpy()
        steps = shares * np.abs(row).max() / 3
        errors = [((np.clip(np.round(row / s), -3, 3) * s - row) ** 2).sum() for s in steps]
        found = float(best_step(w, 3, True, 40)[g, n, 0])
        assert found == pytest.approx(steps[int(np.argmin(errors))], rel=1e-5)
    assert best_step(w, 3, False, 40).unique().numel() == 1
    torch.testing.assert_close(best_step(w, 7, True, 0), w.abs().amax(-1, keepdim=True) / 7)


def test_fit_finds_the_optimum_of_a_small_problem():
    g = torch.Generator().manual_seed(3)
    w, x = (
        torch.rand(1, 20, 4, generator=g) * 2 - 1,
        torch.randn(30, 1, generator=g) + 0.3 * torch.randn(30, 4, generator=g),
    )
    moments, step = (x.T @ x / 30)[None], torch.full((1, 20, 1), 0.5)
    codes = torch.tensor(list(itertools.product(range(-2, 3), repeat=4))).float()
    optimum = quadratic(codes.unsqueeze(1) * 0.5 - w, moments[0]).amin(0)  # of all 625
    found = quadratic(fit_codes(w, moments, step, 2, 300) * 0.5 - w, moments)[0]
    rounding = quadratic((w / 0.5).round() * 0.5 - w, moments)[0]
    assert (found <= rounding + 1e-6).all()
    assert (found - optimum).sum() < 0.25 * (rounding - optimum).sum()


def test_fit_without_steps_is_rounding_and_zeros_stay():
    w, moments = torch.randn(1, 5, 12), torch.eye(12)[None]
    w[..., ::3] = 0
    step = best_step(w, 7, True, 0)
    assert torch.equal(fit_codes(w, moments, step, 7, 0), (w / step).round().clamp(-7, 7))
    x = torch.randn(20, 12) + 1
    assert not fit_codes(w, (x.T @ x)[None], step, 7, 50)[..., ::3].any()


def test_refit_is_least_squares_of_the_survivors():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 3, 10, generator=g), torch.randn(2, 60, 10, generator=g).double() + 0.5
    keep = torch.rand(2, 3, 10, generator=g) > 0.5
    found = refit(w, keep, (x.transpose(1, 2) @ x / 60).float())
    for a, n in itertools.product(range(2), range(3)):
        on = keep[a, n].numpy()
        expected = np.linalg.lstsq(x[a].numpy()[:, on], x[a].numpy() @ w[a, n].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[a, n].numpy()[on], expected, rtol=5e-3, atol=5e-3)
        assert not found[a, n].numpy()[~on].any()


# --- the whole method ------------------------------------------------------------------------------------------


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"workload.{name} was looked at")


def relative_change(model, other):
    with torch.no_grad():
        return float((model(X) - other(X)).norm() / other(X).norm())


@pytest.mark.parametrize(
    "settings", [{}, {"activation_bits": 8}, {"bits": 4, "sparsity": 0.3}, {"sampler": "propagated"}]
)
def test_no_data_is_looked_at(network, settings):
    model = DataFree(samples=16, size=16, steps=5, **settings).apply(network, Untouchable())
    assert torch.isfinite(model(X)).all()


def test_eight_bits_change_next_to_nothing(network):
    floats = DataFree(bits=8, size=16, steps=5, samples=32)
    assert relative_change(floats.apply(network), network) < 0.02
    assert relative_change(floats.with_(activation_bits=8).apply(network), network) < 0.2


def test_each_part_helps(mobile):
    def change(**settings):
        return relative_change(
            DataFree(bits=4, per_channel=False, size=16, samples=64, **{"steps": 60, **settings}).apply(mobile), mobile
        )

    rounding = change(equalize=False, steps=0, correct_bias=False, search=0)
    equalized = change(steps=0, correct_bias=True, search=0)
    everything = change(sampler="propagated")
    assert equalized < rounding
    assert everything < equalized


def test_sparsity_leaves_real_zeros(network):
    thin = DataFree(bits=32, sparsity=0.5, size=16, samples=32).apply(network)
    for module in thin.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert float((module.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    packed = DataFree(bits=4, sparsity=0.5, size=16, samples=32, steps=20).apply(network)
    shares = [float((m.dequantized() == 0).float().mean()) for m in packed.modules() if isinstance(m, CodedConv2d)]
    assert shares
    assert min(shares) >= 0.5


def test_the_same_seed_gives_the_same_model(mobile):
    method = DataFree(bits=4, steps=20, samples=32, size=16)
    first, second = (method.apply(mobile).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("settings", "kind"), [({"bits": 5}, CodedConv2d), ({"activation_bits": 8}, Int8Conv2d)])
def test_what_it_makes_can_be_rebuilt(mobile, settings, kind):
    model = DataFree(steps=0, samples=16, size=16, **settings).apply(mobile)
    again = replay(copy.deepcopy(mobile), describe(model, copy.deepcopy(mobile)))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(X), model(X))
    assert isinstance(again.last, kind)
    assert isinstance(again.expand[2], ChannelReLU6)


def test_preparing_twice_changes_nothing(mobile):
    prepare_(mobile)
    before = mobile(X)
    prepare_(mobile)
    torch.testing.assert_close(mobile(X), before, rtol=1e-3, atol=1e-3)


def test_one_layer_can_have_its_own_bits(mobile):
    model = DataFree(bits=8, steps=0, size=16).apply(mobile, None, {"stem.0": {}, "last": {"bits": 3}})
    assert model.stem[0].bits == 8
    assert model.last.bits == 3
    assert isinstance(model.project[0], nn.Conv2d)


def test_wrong_networks_are_refused_with_a_reason(mobile, tiny_llama):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.twice = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.twice(self.twice(self.bn(self.conv(x))))

    class Branching(Shared):
        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    with pytest.raises(UserError, match="finds no layer"):
        DataFree().apply(tiny_llama)
    with pytest.raises(UserError, match="'twice' runs more than once"):
        DataFree().apply(Shared())
    with pytest.raises(UserError, match="cannot be traced"):
        DataFree().apply(Branching())
    with pytest.raises(UserError, match="set `size`"):
        DataFree(size=40).apply(mobile)
