"""Binary layers: training and packed forms agree, gradients, thresholds, whole models, bytes, bad settings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lilliput as lp
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.quantize.binary import (
    Binary,
    BinaryConv2d,
    BinaryLinear,
    KeepLatent,
    PackedBinaryConv2d,
    PackedBinaryLinear,
    pack,
    residual_sign,
    sign,
)
from lilliput.metrics.memory import weight_bytes
from lilliput.metrics.roofline import layer_costs
from lilliput.plan import Plan, Step
from lilliput.training import train

FORMS = [
    {"activations": "sign"},
    {"activations": "sign", "scale": "alpha_K", "shift": True},
    {"activations": "sign", "levels": 2, "scale": "none"},
    {"activations": "sign", "levels": 3, "scale": "layer", "shift": True},
    {"activations": "real"},
    {"activations": "real", "scale": "none"},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def randomized(layer):
    """Every parameter off its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return layer


def inputs(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- signs -----------------------------------------------------------------------------------------------------


def test_signs_of_zero_are_plus_one_and_gradients_pass_within_one():
    x = torch.tensor([-2.0, -1.0, -0.3, -0.0, 0.0, 0.3, 1.0, 2.0], requires_grad=True)
    y = sign(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    (y * torch.arange(8.0)).sum().backward()
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_residual_signs_are_those_of_numpy():
    x, levels = inputs(50), [0.7, 0.4, 0.1]
    r, total = x.numpy().copy(), np.zeros(50, np.float32)
    for level in np.float32(levels):
        e = np.where(r >= 0, level, -level)
        total, r = total + e, r - e
    assert np.array_equal(residual_sign(x, torch.tensor(levels)).numpy(), total)


def test_more_levels_come_closer():
    x = inputs(1000)
    errors = [
        float((residual_sign(x, torch.tensor(levels)) - x).square().mean())
        for levels in ([0.8], [0.8, 0.4], [0.8, 0.4, 0.2])
    ]
    assert errors[0] > 2 * errors[1] > 3 * errors[2]


def test_alpha_is_the_best_scale_of_a_row():
    layer = BinaryLinear(40, 3, bias=False)
    w = layer.weight.detach()
    for row, a in zip(w, layer.row_scale()):
        errors = [float((row - s * row.sign()).square().sum()) for s in (0.98 * a, a, 1.02 * a)]
        assert errors[1] == min(errors)


# --- packing ---------------------------------------------------------------------------------------------------


@forms
def test_training_and_packed_linear_layers_give_the_same(form):
    layer = randomized(BinaryLinear(50, 33, **form))
    packed = pack(layer)
    assert type(packed) is PackedBinaryLinear
    for x in (inputs(4, 7, 50), inputs(50), torch.zeros(2, 50), inputs(0, 50)):
        torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-4, atol=1e-5)


@forms
def test_training_and_packed_convolutions_give_the_same(form):
    layer = randomized(BinaryConv2d(20, 17, (3, 2), 2, (1, 0), **form))
    packed = pack(layer)
    assert type(packed) is PackedBinaryConv2d
    for x in (inputs(2, 20, 9, 8), inputs(2, 20, 9, 8).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-4, atol=1e-4)


@forms
def test_packed_layers_have_the_gradient_of_the_training_layer(form):
    for layer, x in ((BinaryLinear(24, 8, **form), inputs(5, 24)), (BinaryConv2d(9, 8, 3, **form), inputs(2, 9, 5, 5))):
        packed, grads = pack(randomized(layer)), []
        for module in (layer, packed):
            given = x.clone().requires_grad_()
            module(given).square().sum().backward()
            grads.append(given.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@forms
def test_packed_layers_rebuild_to_the_bit(form):
    for layer, x in ((BinaryLinear(24, 8, **form), inputs(5, 24)), (BinaryConv2d(9, 8, 3, **form), inputs(2, 9, 5, 5))):
        packed = pack(randomized(layer))
        with torch.device("meta"):
            again = type(packed)(**packed.rebuild_config())
        again = again.to_empty(device="cpu")
        again.load_state_dict(packed.state_dict())
        assert torch.equal(again(x), packed(x))


def test_packed_layers_hold_a_bit_for_each_weight():
    linear, conv = pack(BinaryLinear(512, 256)), pack(BinaryConv2d(64, 32, 3))
    assert linear.codes.nbytes == 512 * 256 // 8
    assert conv.codes.nbytes == 64 * 32 * 9 // 8
    assert weight_bytes(linear) < 512 * 256 // 8 + 256 * 8 + 16
    assert torch.equal(linear.dequantized().sign(), linear.signs().squeeze(1))


def test_other_types_of_input():
    packed = pack(BinaryLinear(16, 8))
    x = inputs(3, 16)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(packed.half()(x), pack(packed)(x))
    with pytest.raises(UserError, match="int64"):
        packed(torch.ones(3, 16, dtype=torch.int64))


def test_packed_layers_compile_and_export():
    model = nn.Sequential(pack(BinaryConv2d(8, 16, 3, padding=1)), nn.Flatten(), pack(BinaryLinear(16 * 25, 8)))
    x = inputs(3, 8, 5, 5)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_the_roofline_counts_bits():
    costs = layer_costs(
        nn.Sequential(pack(BinaryLinear(64, 32)), pack(BinaryLinear(32, 8, activations="real"))), inputs(1, 64)
    )
    assert [c.dtype for c in costs] == ["binary", "fp32"]
    assert costs[0].weight_bytes == 64 * 32 // 8 + 4 * 32


# --- models ----------------------------------------------------------------------------------------------------


def test_first_and_last_layers_stay_unless_asked(cnn_work, llama_work):
    assert list(Binary().targets(cnn_work.model)) == ["conv2", "conv3"]
    assert list(Binary(ends=True).targets(cnn_work.model)) == ["conv1", "conv2", "conv3", "fc"]
    assert all(name.startswith("model.layers.") for name in Binary().targets(llama_work.model))
    assert "lm_head" not in list(Binary(ends=True).targets(llama_work.model))  # tied to the embedding


def test_grouped_and_named_paddings_have_no_binary_form():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding_mode="circular"),
        nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    assert list(Binary(ends=True).targets(model)) == ["3"]


def test_thresholds_and_coefficients_start_from_data(cnn_work):
    model = Binary(levels=2).trainable(cnn_work.model, cnn_work)
    x = torch.cat([torch.relu(cnn_work.model.bn1(cnn_work.model.conv1(b["input"]))) for b in cnn_work.calibration])
    conv = model.conv2
    torch.testing.assert_close(conv.shift.detach(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    moved = x - conv.shift.view(1, -1, 1, 1)
    assert conv.levels[0].item() == pytest.approx(float(moved.abs().mean()), rel=0.02)
    assert conv.levels[1] < conv.levels[0]


def test_thresholds_keep_what_a_relu_leaves(cnn_work):
    """All inputs are >= 0: without thresholds every sign is +1."""
    plain = Binary(shift=False, steps=0).apply(cnn_work.model, cnn_work)
    moved = Binary(steps=0).apply(cnn_work.model, cnn_work)
    x = torch.relu(inputs(2, 16, 8, 8))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert plain.conv2(x)[inside].std((0, 2, 3)).max() < 1e-5
    assert moved.conv2(x)[inside].std((0, 2, 3)).min() > 1e-3


def test_training_learns_and_the_packed_model_answers_alike(cnn_work):
    settings = Binary(steps=60, lr=5e-3)
    model = settings.trainable(cnn_work.model, cnn_work)
    history = train(model, cnn_work.training, cnn_work.loss, steps=60, lr=5e-3, clip_norm=1.0, callbacks=[KeepLatent()])
    assert np.mean(history.losses[-5:]) < 0.6 * np.mean(history.losses[:5])
    packed, batch = pack(model.eval()), cnn_work.test[0]
    with torch.no_grad():
        torch.testing.assert_close(packed(batch["input"]), model(batch["input"]), rtol=1e-3, atol=1e-3)
    whole = settings.apply(cnn_work.model, cnn_work)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), packed.state_dict().values()))


def test_latent_weights_stay_within_one_and_around_zero():
    layer = BinaryLinear(8, 4)
    with torch.no_grad():
        layer.weight.mul_(100).add_(3)
    train(layer, [inputs(4, 8)], lambda m, x: m(x).square().mean(), steps=2, callbacks=[KeepLatent(center=True)])
    assert layer.weight.abs().max() <= 1
    centered = BinaryLinear(8, 4)
    train(centered, [inputs(4, 8)], lambda m, x: m(x).square().mean(), steps=2, callbacks=[KeepLatent(center=True)])
    assert centered.weight.mean(1).abs().max() < 1e-6


def test_it_works_on_any_module_in_a_few_lines(tmp_path):
    """As the docstring says, without a workload."""
    net = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 2))
    x = inputs(256, 12)
    label = (x[:, 0] * x[:, 1] > 0).long()
    model = Binary(activations="sign", shift=False).trainable(net)
    loss = nn.functional.cross_entropy
    history = train(model, [(x, label)], lambda m, b: loss(m(b[0]), b[1]), steps=80, lr=1e-2, callbacks=[KeepLatent()])
    assert history.losses[-1] < 0.75 * history.losses[0]
    packed = pack(model.eval())
    assert type(packed[2]) is PackedBinaryLinear
    torch.testing.assert_close(packed(x), model(x), rtol=1e-3, atol=1e-3)


def test_an_artifact_shrinks_on_disk(cnn_work, tmp_path):
    work = copy.copy(cnn_work)
    plan = Plan([Step(Binary(steps=1))])
    model = plan.apply(work)
    folder = save(model, tmp_path / "bits", work, plan)
    again = load(folder, model=type(work.model)())
    x = work.test[0]["input"]
    assert torch.equal(again(x), model(x))
    assert again.conv3.codes.nbytes == 32 * 144 // 8 + 32 * 2  # 18 bytes of a row are filled up to 20
    assert lp.methods.quantize.Binary is Binary


# --- bad settings ----------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(cnn_work):
    with pytest.raises(UserError, match="alpha_K"):
        Binary(levels=2, scale="alpha_K", steps=0).apply(cnn_work.model)
    with pytest.raises(UserError, match="alpha_K"):
        Binary(activations="real", scale="alpha_K", steps=0).apply(cnn_work.model)
    with pytest.raises(UserError, match="steps=0"):
        Binary().apply(cnn_work.model)
    with pytest.raises(UserError, match="levels"):
        BinaryLinear(4, 4, levels=4)
    with pytest.raises(UserError, match="levels"):
        PackedBinaryLinear(4, 4, levels=9)
    with pytest.raises(UserError, match="activations"):
        BinaryConv2d(4, 4, 3, activations="ternary")
