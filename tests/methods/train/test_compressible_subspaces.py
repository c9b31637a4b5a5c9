"""Layers of a subspace against plain ones by hand, what a point of it is, and that training serves every point."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lilliput as lp
from lilliput.errors import UserError
from lilliput.methods.prune.magnitude import mask
from lilliput.methods.train._subspace import SubspaceLayer, at, closeness, set_alpha_, subspace_layers
from lilliput.methods.train.compressible_subspaces import CompressibleSubspaces, _Walk
from lilliput.training import History, State


def layer_of(plain, line=True, seed=0, **how):
    """A subspace layer whose second end is random."""
    made = SubspaceLayer.of(plain, line, **how)
    generator = torch.Generator().manual_seed(seed)
    if line:
        with torch.no_grad():
            for parameter in made.end.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_weights_lie_on_the_line_and_the_smallest_go(alpha):
    plain = nn.Linear(10, 7)
    layer, x = layer_of(plain, lowest=0.2), randn(4, 10)
    layer.alpha = alpha
    w = (1 - alpha) * plain.weight + alpha * layer.end.weight
    b = (1 - alpha) * plain.bias + alpha * layer.end.bias
    kept = mask(w, 1 - (0.2 + 0.8 * alpha))
    assert int(kept.sum()) == round((0.2 + 0.8 * alpha) * 70)
    torch.testing.assert_close(layer(x), x @ (w * kept).T + b)
    torch.testing.assert_close(layer.plain()(x), layer(x))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_lose_their_last_channels(alpha, groups):
    plain = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups)
    inputs = 8 if groups == 1 else 0
    layer = layer_of(plain, lowest=0.25, unstructured=False, outputs=8, inputs=inputs)
    layer.alpha = alpha
    channels = {0.0: 2, 0.5: 5, 1.0: 8}[alpha]
    w = torch.lerp(plain.weight, layer.end.weight, alpha)[:channels, : channels if inputs else 1]
    b = torch.lerp(plain.bias, layer.end.bias, alpha)[:channels]
    x = randn(2, channels, 6, 6)
    expected = F.conv2d(x, w, b, 2, 1, 1, channels if groups == 8 else 1)
    torch.testing.assert_close(layer(x), expected)
    small = layer.plain()
    torch.testing.assert_close(small(x), expected)
    assert small.in_channels == small.out_channels == channels


def test_an_input_channel_may_be_several_columns():
    layer = layer_of(nn.Linear(12, 3), line=False, lowest=0.5, unstructured=False, inputs=4)
    layer.alpha = 0.0
    assert layer(randn(2, 6)).shape == (2, 3)
    assert torch.equal(layer.plain().weight, layer.start.weight[:, :6])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.GroupNorm(8, 8), (2, 5, 4, 4)), (nn.BatchNorm2d(8), (6, 5, 4, 4))],
)
def test_norms_of_fewer_channels(norm, shape):
    layer = layer_of(norm, lowest=0.25, unstructured=False, outputs=8)
    layer.alpha, x = 0.5, randn(*shape)
    small = layer.plain()
    assert len(small.weight) == 5
    torch.testing.assert_close(layer(x), small(x))


def test_norms_keep_all_channels_where_weights_go():
    for norm, x in ((nn.GroupNorm(2, 8), randn(2, 8, 3, 3)), (nn.LayerNorm(8), randn(2, 3, 8))):
        layer = layer_of(norm, lowest=0.25)
        layer.alpha = 0.5
        torch.testing.assert_close(layer(x), layer.plain()(x))
        torch.testing.assert_close(layer.plain().weight, 0.5 * (norm.weight + layer.end.weight))


def test_closeness_is_the_squared_cosine_of_all_weights(cnn_work):
    model = CompressibleSubspaces(steps=0, ends="fresh").apply(cnn_work.model)
    pairs = [(m.start.weight, m.end.weight) for _, m in subspace_layers(model) if m.start.weight.ndim > 1]
    a, b = (torch.cat([w.flatten() for w in side]) for side in zip(*pairs))
    torch.testing.assert_close(closeness(model), torch.cosine_similarity(a, b, dim=0) ** 2)
    alike, single = (CompressibleSubspaces(steps=0, mode=m).apply(cnn_work.model) for m in ("line", "point"))
    assert float(closeness(alike)) == pytest.approx(1)
    assert float(closeness(single)) == 0


# --- the whole model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["line", "point"])
@pytest.mark.parametrize("regime", ["unstructured", "structured"])
def test_a_point_is_an_ordinary_model_with_the_same_answers(regime, mode, cnn_work):
    method = CompressibleSubspaces(regime=regime, mode=mode, steps=4, ends="fresh")
    model, x = method.apply(cnn_work.model, cnn_work), cnn_work.test[0]["input"]
    weights = []
    for alpha in (0.0, 0.4, 1.0):
        set_alpha_(model, alpha)
        small = at(model, alpha)
        assert not any(isinstance(m, SubspaceLayer) for m in small.modules())
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
        matrices = [p for p in small.parameters() if p.ndim > 1]
        weights.append(sum(int((p != 0).sum()) for p in matrices))
        assert regime == "structured" or weights[-1] == pytest.approx((0.25 + 0.75 * alpha) * 7376, abs=3)
    assert weights == sorted(weights)
    assert weights[0] < 0.3 * weights[2] if regime == "unstructured" else weights[0] < 0.12 * weights[2]
    assert weights[2] == 16 * 9 + 16 * 16 * 9 + 32 * 16 * 9 + 320


def test_residual_channels_go_together(cnn_work):
    model = CompressibleSubspaces(regime="structured", steps=0).apply(cnn_work.model, cnn_work)
    layers = dict(subspace_layers(model))
    assert {n: (m.outputs, m.inputs) for n, m in layers.items()} == {
        "conv1": (16, 0), "bn1": (16, 0), "conv2": (16, 16), "bn2": (16, 0), "conv3": (32, 16), "bn3": (32, 0),
        "fc": (0, 32),
    }  # fmt: skip
    assert all(m.start.num_groups == m.start.num_channels for n, m in layers.items() if n.startswith("bn"))


def test_layers_outside_the_line_hold_their_channels(cnn_work):
    method = CompressibleSubspaces(regime="structured", steps=0)
    model = method.apply(cnn_work.model, cnn_work, layers=["conv3", "bn3", "fc"])
    assert {n: (m.outputs, m.inputs) for n, m in subspace_layers(model)} == {
        "conv3": (32, 0), "bn3": (32, 0), "fc": (0, 32)
    }  # fmt: skip
    assert at(model, 0.0).conv3.weight.shape == (8, 16, 3, 3)
    with pytest.raises(UserError, match="no channels that can go together"):
        method.apply(cnn_work.model, cnn_work, layers=["conv1", "conv2"])


def test_without_compression_or_training_the_ends_are_the_model(cnn_work):
    model = CompressibleSubspaces(norm="batch", steps=0).apply(cnn_work.model)
    x = cnn_work.test[0]["input"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), cnn_work.model.train()(x), rtol=1e-4, atol=1e-4)
    assert all(type(m) is not nn.BatchNorm2d for m in CompressibleSubspaces(steps=0).apply(cnn_work.model).modules())


def test_all_points_are_trained(cnn_work):
    """After training every point fits the labels better than the same point of the untrained line."""

    def losses(model):
        points = [at(model, alpha) for alpha in (0.0, 0.5, 1.0)]
        with torch.no_grad():
            return [float(torch.stack([cnn_work.loss(p, b) for b in cnn_work.training]).mean()) for p in points]

    method = CompressibleSubspaces(regime="structured", lr=1e-2)
    before, after = (losses(method.with_(steps=n).apply(cnn_work.model, cnn_work)) for n in (0, 30))
    assert all(b < 0.8 * a for a, b in zip(before, after))


def test_unstructured_compression_grows_while_training():
    walk = _Walk(CompressibleSubspaces())
    state = State(nn.Identity(), None, History(), 1)
    seen = []
    for state.done in (0.0, 0.4, 0.8, 1.0):
        walk.on_step(state)
        seen.append(walk.ease)
    assert seen == pytest.approx([1.0, 0.5, 0.0, 0.0])
    drawn = list(itertools.chain(*(walk.points() for _ in range(2000))))
    assert sum(a in (0.0, 1.0) for a in drawn) == pytest.approx(1000, abs=100)
    assert all(0 <= a <= 1 for a in drawn)
    layer = layer_of(nn.Linear(4, 4), lowest=0.25)
    layer.alpha, layer.ease = 0.0, 0.5
    assert layer.share == pytest.approx(0.625)


def test_structured_steps_train_both_ends_and_two_between():
    walk = _Walk(CompressibleSubspaces(regime="structured"))
    assert walk.ease == 0
    points = walk.points()
    assert points[:2] == [0.0, 1.0]
    assert len(points) == 4
    memory = walk.memory()
    expected = walk.points()
    walk.recall(memory)
    assert walk.points() == expected


def test_a_saved_line_comes_back_at_the_point_it_stood_at(cnn_work, tmp_path):
    plan = lp.Plan([lp.Step(CompressibleSubspaces(regime="structured", steps=2))])
    model = set_alpha_(plan.apply(cnn_work), 0.3)
    folder = lp.save(model, tmp_path / "line", cnn_work, plan)
    again, x = lp.load(folder, model=type(cnn_work.model)()), cnn_work.test[0]["input"]
    with torch.no_grad():
        for alpha in (None, 0.0, 1.0):
            if alpha is not None:
                set_alpha_(model, alpha)
                set_alpha_(again, alpha)
            assert torch.equal(again(x), model(x))


def test_bad_input_is_refused(cnn_work):
    model = CompressibleSubspaces(steps=0).apply(cnn_work.model)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="alpha"):
            set_alpha_(model, alpha)
    with pytest.raises(UserError, match="no subspace"):
        at(cnn_work.model, 0.5)
    with pytest.raises(UserError, match="steps=0"):
        CompressibleSubspaces().apply(cnn_work.model)
    with pytest.raises(UserError, match="trace"):
        CompressibleSubspaces(regime="structured", steps=0).apply(cnn_work.model)
    with pytest.raises(UserError, match="kind"):
        SubspaceLayer("Embedding", {})
