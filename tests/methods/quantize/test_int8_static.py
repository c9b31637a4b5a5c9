import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lilliput.edits import build_module, describe, module_config, replay
from lilliput.errors import UserError
from lilliput.methods.quantize import _qdq
from lilliput.methods.quantize._fold import fold_, fold_batch_norms_
from lilliput.methods.quantize._qdq import Int8Conv2d, Int8Linear, activation_grid, fake_quantize, quantize_weight
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.onnx_export import relative_error
from lilliput.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")


def work_of(model, *inputs):
    batches = [{"input": x, "label": torch.zeros(len(x), dtype=torch.long)} for x in inputs]
    return Workload.classifier(model.eval(), batches, batches, batches)


def numpy_quantized(x, scale, zero, low, high):
    """The ONNX definition: DequantizeLinear(QuantizeLinear(x)), in float64."""
    q = np.clip(np.round(x.astype(np.float64) / scale) + zero, low, high)
    return (q - zero) * scale


# --- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (7, 63)])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7)])
def test_weights_round_as_in_numpy(shape, bits, most):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    codes, scale = quantize_weight(torch.from_numpy(w), bits)
    expected = np.abs(w.reshape(shape[0], -1)).max(1) / most
    assert np.allclose(scale.numpy(), expected, rtol=1e-6)
    wide = expected.reshape(-1, *[1] * (len(shape) - 1))
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), np.round(w / wide.astype(np.float32)))
    assert np.abs(codes.numpy()).max() == most
    assert np.abs(codes.numpy() * wide - w).max() <= expected.max() / 2 * 1.001


def test_a_channel_of_zeros_stays_zero_and_nan_is_refused():
    w = torch.randn(3, 4)
    w[1] = 0
    codes, scale = quantize_weight(w)
    assert scale[1] == 1
    assert not codes[1].any()
    w[2, 2] = float("nan")
    with pytest.raises(UserError, match="a weight is NaN"):
        quantize_weight(w)


# --- activation ranges -----------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.booleans())
def test_grids_cover_the_range_and_hold_zero_exactly(a, b, symmetric):
    low, high = min(a, b), max(a, b)
    scale, zero, dtype = activation_grid(low, high, symmetric)
    first, last = _qdq.LIMITS[dtype]
    assert scale > 0
    assert first <= zero <= last
    assert (first - zero) * scale <= min(low, 0) + 0.51 * scale
    assert (last - zero) * scale >= max(high, 0) - 0.51 * scale
    if symmetric:
        assert zero == 0


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "expected"),
    [
        (0.0, 5.1, False, (0.02, 0, torch.uint8)),
        (0.0, 5.1, True, (0.02, 0, torch.uint8)),
        (-1.0, 1.55, False, (0.01, 100, torch.uint8)),
        (-1.27, 0.5, True, (0.01, 0, torch.int8)),
        (2.0, 5.1, False, (0.02, 0, torch.uint8)),
        (-5.1, -2.0, False, (0.02, 255, torch.uint8)),
        (0.0, 0.0, False, (1.0, 0, torch.uint8)),
        (0.0, 0.0, True, (1.0, 0, torch.uint8)),
    ],
)
def test_grids_of_known_ranges(low, high, symmetric, expected):
    scale, zero, dtype = activation_grid(low, high, symmetric)
    assert (zero, dtype) == expected[1:]
    assert scale == pytest.approx(expected[0])


@pytest.mark.parametrize(("zero", "dtype"), [(0, torch.uint8), (131, torch.uint8), (0, torch.int8)])
def test_fake_quantization_is_that_of_onnx(zero, dtype):
    x = np.random.default_rng(1).normal(size=4000).astype(np.float32) * 3
    found = fake_quantize(torch.from_numpy(x), torch.tensor(0.0317), torch.tensor(zero, dtype=dtype))
    expected = numpy_quantized(x, np.float64(np.float32(0.0317)), zero, *_qdq.LIMITS[dtype])
    assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_percentile_range_is_numpys():
    sample = torch.from_numpy(np.random.default_rng(2).normal(size=5000))
    found = _qdq.percentile_range(sample, 98)
    assert np.allclose(found, np.percentile(sample.numpy(), [1, 99]), atol=1e-9)


def test_least_error_range_beats_the_full_one_on_outliers_and_keeps_a_full_uniform_one():
    generator = torch.Generator().manual_seed(0)
    sample = torch.cat([torch.randn(4000, generator=generator), torch.tensor([60.0])])

    def error(high):
        scale, zero, dtype = activation_grid(-high, high)
        rounded = fake_quantize(sample, torch.tensor(scale), torch.tensor(zero, dtype=dtype))
        return float((rounded - sample).square().sum())

    low, high = _qdq.least_error_range(sample, -60.0, 60.0, symmetric=False)
    assert low == -high
    assert error(high) <= min(error(60.0 * share) for share in (0.25, 0.5, 0.75, 1.0))
    level = torch.linspace(-1, 1, 4001)
    assert _qdq.least_error_range(level, -1.0, 1.0, symmetric=False)[1] > 0.97


def test_ranges_come_from_the_calibration_data_as_asked():
    x = torch.rand(64, 50)
    x[0, 0] = 100.0
    model = nn.Sequential(nn.Linear(50, 4))
    work = work_of(model, x)
    kinds = ("minmax", "percentile", "mse")
    scales = {r: float(Int8Static(ranges=r, percentile=90).apply(model, work)[0].input_scale) for r in kinds}
    assert scales["minmax"] == pytest.approx(100 / 255)
    assert scales["percentile"] == pytest.approx(np.percentile(x.numpy(), 95) / 255, rel=1e-4)
    assert scales["mse"] == pytest.approx(_qdq.least_error_range(x.flatten(), 0.0, 100.0, False)[1] / 255)


# --- batch norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_batch_norm_changes_nothing(bias, affine):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3, bias=bias).double(), nn.BatchNorm2d(6, affine=affine).double()
    norm(torch.randn(20, 6, 5, 5, dtype=torch.float64) * 3 + 1)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = norm.eval()(conv(x))
    assert fold_(conv, norm)
    assert torch.allclose(conv(x), expected, atol=1e-12)
    assert not fold_(conv, nn.BatchNorm2d(6, track_running_stats=False))


class Tangle(nn.Module):
    """Batch norms that may be folded and such that may not."""

    def __init__(self):
        super().__init__()
        self.good, self.good_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.twice_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.left, self.right, self.shared_bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.late, self.pooled_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x + self.good_bn(self.good(x))
        y = self.twice(x)
        x = F.relu(self.twice_bn(y)) * y
        x = self.shared_bn(self.left(x)) * self.shared_bn(self.right(x))
        return self.pooled_bn(F.avg_pool2d(self.late(x), 2)).mean((2, 3))


def test_only_a_batch_norm_that_takes_one_convolution_alone_is_folded():
    torch.manual_seed(0)
    model = Tangle().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 4, 6, 6)
    work = work_of(model, x)
    expected = model(x)
    sums = fold_batch_norms_(model, work, ["good", "twice", "left", "right", "late"])
    assert [n for n, m in model.named_children() if isinstance(m, nn.Identity)] == ["good_bn"]
    assert sums == {"good"}
    assert torch.allclose(model(x), expected, atol=1e-5)


# --- the method ------------------------------------------------------------------------------------------------


def test_the_emulation_is_the_onnx_arithmetic_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(5 * 16, 4))
    x = torch.randn(6, 3, 8, 8)
    new = Int8Static(bias_correction=False).apply(model, work_of(model, x))

    def layer(module, value, product):
        w = module.weight_codes.double() * module.weight_scale.double().view(-1, *[1] * (module.weight_codes.ndim - 1))
        grid = float(module.input_scale), int(module.input_zero), 0, 255
        return product(torch.from_numpy(numpy_quantized(value.numpy(), *grid)), w, module.bias.double())

    hidden = layer(new[0], x, lambda v, w, b: F.conv2d(v, w, b, 2, 1))
    assert torch.allclose(new[0](x).double(), hidden, atol=1e-5)
    flat = new[0](x).flatten(1)
    assert torch.allclose(new(x).double(), layer(new[2], flat, F.linear), atol=1e-4)


def test_the_error_is_small_and_the_model_small_and_the_original_untouched(cnn_work):
    model = cnn_work.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for setting in ({}, {"ranges": "mse"}, {"ranges": "percentile"}, {"activations": "symmetric"}, {"bits": 7}):
        new = Int8Static(**setting).apply(model, cnn_work)
        x = cnn_work.test[0]["input"]
        assert 0 < relative_error(new(x), model(x)) < 0.03
        assert (new(x).argmax(-1) == model(x).argmax(-1)).float().mean() > 0.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def size(m):
        return sum(t.numel() * t.element_size() for t in m.state_dict().values())

    assert size(new) < 0.35 * size(model)


def test_seven_bits_err_more_than_eight(cnn_work):
    x = cnn_work.test[0]["input"]
    eight, seven = (Int8Static(bits=b).apply(cnn_work.model, cnn_work)(x) for b in (8, 7))
    expected = cnn_work.model(x)
    assert relative_error(eight, expected) < relative_error(seven, expected)


def test_bias_correction_removes_the_mean_error_where_rounding_is_biased():
    """Every weight of a row but one falls 0.4 steps above a code, so that each product errs to the same side."""
    w = torch.full((3, 65), 10.4 / 127)
    w[:, 0] = 1.0
    model = nn.Sequential(nn.Linear(65, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    generator = torch.Generator().manual_seed(0)
    seen, fresh = torch.rand(2, 200, 65, generator=generator)
    errors = {}
    for switch in (False, True):
        new = Int8Static(bias_correction=switch).apply(model, work_of(model, seen[:80], seen[80:]))
        assert (new[0].bias is not None) is switch
        errors[switch] = (new(fresh) - model(fresh)).mean(0).abs().max().item()
        if switch:
            assert (new(seen) - model(seen)).mean(0).abs().max() < 1e-5
    assert errors[False] > 0.08  # 64 weights, 0.4 / 127 each, inputs of mean 0.5
    assert errors[True] < 0.05 * errors[False]


def test_bias_correction_of_convolutions_is_per_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2))
    x = torch.rand(10, 4, 7, 7) * 2
    work = work_of(model, x[:4], x[4:])
    for switch, limit in ((True, 1e-6), (False, 1.0)):
        new = Int8Static(bias_correction=switch, bits=7).apply(model, work)
        error = (new(x) - model(x)).mean((0, 2, 3)).abs().max().item()
        assert error < limit
    assert error > 1e-4


def test_constant_and_zero_activations():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -100.0)
    x = torch.full((3, 4), 0.7)
    new = Int8Static().apply(model, work_of(model, x))
    assert float(new[2].input_scale) == 1.0
    assert torch.allclose(new(x), model(x), atol=1e-6)
    assert torch.allclose(fake_quantize(x, new[0].input_scale, new[0].input_zero), x)
    assert torch.isfinite(new(torch.randn(3, 4))).all()


def test_nan_in_calibration_names_the_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    with torch.no_grad():
        model[0].bias[1] = float("inf")
    with pytest.raises(UserError, match="layer '1' meets NaN or infinity on the calibration data"):
        Int8Static().apply(model, work_of(model, x))
    x[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer '0' meets NaN"):
        Int8Static().apply(model, work_of(model, x))


def test_layers_stay_float_by_name_and_by_setting(cnn_work):
    model = cnn_work.model
    named = Int8Static().apply(model, cnn_work, layers=["conv2", "fc"])
    assert isinstance(named.conv1, nn.Conv2d)
    assert isinstance(named.bn1, nn.BatchNorm2d)
    assert isinstance(named.conv2, Int8Conv2d)
    assert isinstance(named.bn2, nn.Identity)
    assert isinstance(named.fc, Int8Linear)
    chosen = Int8Static().apply(model, cnn_work, layers={"*": {}, "conv1": {"bits": 32}, "fc": {"ranges": "mse"}})
    assert isinstance(chosen.conv1, nn.Conv2d)
    assert isinstance(chosen.conv3, Int8Conv2d)
    untouched = Int8Static(bits=32).apply(model, cnn_work)
    x = cnn_work.test[0]["input"]
    assert torch.equal(untouched(x), model(x))


def test_residual_sums_round_the_output_of_the_convolution_that_ends_in_a_sum(cnn_work):
    new = Int8Static(residual_sums=True).apply(cnn_work.model, cnn_work)
    assert [n for n, m in new.named_modules() if getattr(m, "output_type", None)] == ["conv2"]
    outputs = []
    new.conv2.register_forward_hook(lambda m, args, out: outputs.append(out))
    new(cnn_work.test[0]["input"])
    steps = outputs[0] / new.conv2.output_scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert len(outputs[0].unique()) <= 256


def test_it_saves_as_edits_and_builds_on_the_meta_device(cnn_work):
    import copy

    new = Int8Static(residual_sums=True).apply(cnn_work.model, cnn_work)
    skeleton = replay(copy.deepcopy(cnn_work.model), describe(new, cnn_work.model))
    skeleton.load_state_dict(new.state_dict())
    x = cnn_work.test[0]["input"]
    assert torch.equal(skeleton(x), new(x))
    described = module_config(new.conv2)
    with torch.device("meta"):
        built = build_module(described["type"], described["config"])
    assert built.weight_codes.is_meta
    assert {k: (v.shape, v.dtype) for k, v in built.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in new.conv2.state_dict().items()
    }


def test_models_that_ask_a_layer_for_its_weight_run():
    """As transformers' ViT does, to learn the dtype."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 2)

        def forward(self, x):
            return self.patches(x.to(self.patches.weight.dtype))

    torch.manual_seed(0)
    model, x = Asks(), torch.randn(2, 3, 6, 6)
    new = Int8Static().apply(model, work_of(model, x))
    assert 0 < relative_error(new(x), model(x)) < 0.03
    assert relative_error(new.patches.weight, model.patches.weight) < 0.01
    assert not [name for name, _ in new.named_parameters()]


def test_language_models_run_too(llama_work):
    new = Int8Static().apply(llama_work.model, llama_work)
    batch = llama_work.test[0]
    with torch.no_grad():
        error = relative_error(llama_work.forward(new, batch), llama_work.forward(llama_work.model, batch))
    assert 0 < error < 0.1


def test_wrong_calls(cnn_work):
    with pytest.raises(UserError, match=r"needs a workload.*calibration data; call apply\(model, workload\)"):
        Int8Static().apply(cnn_work.model)
    with pytest.raises(UserError, match="ranges is 'max'; choose one of 'minmax'"):
        Int8Static(ranges="max")
    with pytest.raises(UserError, match=r"bits is 4; choose one of 8, 7, 32"):
        Int8Static(bits=4)
    with pytest.raises(UserError, match=r"layer 'conv1' has torch.bfloat16 weights; convert the model with .float\(\)"):
        Int8Static().apply(cnn_work.model.bfloat16(), cnn_work)
    with pytest.raises(UserError, match="finds no layer"):
        Int8Static().apply(nn.Sequential(nn.ReLU()), cnn_work)
    with pytest.raises(UserError, match="input_type is 'int4'; choose uint8 or int8"):
        Int8Linear(3, 4, input_type="int4")


def test_a_layer_that_never_runs_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.aside = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    model = Aside()
    work = work_of(model, torch.randn(3, 4))
    with pytest.raises(UserError, match="layer 'aside' never runs on the calibration data"):
        Int8Static().apply(model, work)
    assert isinstance(Int8Static().apply(model, work, layers=["used"]).used, Int8Linear)


def test_what_is_called_by_other_means_than_its_forward_is_no_target():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    padded = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    model = nn.ModuleDict({"encoder": encoder, "padded": padded, "head": nn.Linear(8, 2)})
    assert list(Int8Static().targets(model)) == ["head"]
