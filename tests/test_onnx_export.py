import importlib.util

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.onnx_export import expected_error, export_onnx, relative_error, workload_onnx


class Pair(nn.Module):
    """Two inputs, one output object with .logits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, left, right):
        out = type("Output", (), {})()
        out.logits = self.head(left) * right
        return out


class BakesBatch(nn.Module):
    """Its graph holds for the traced batch size only: the size leaves torch as a plain number."""

    def forward(self, x):
        return x + torch.ones(int(x.shape[0]), 1)


class Branching(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        return x * 2 if self.read(x.mean()) else x


class ChecksShapes(nn.Module):
    """Reads shapes and its own buffers in Python, which a trace may."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, x):
        if x.shape[1] != 4 or x.size(-1) != 4 or x.dim() != 2:
            raise ValueError("wrong shape")
        return x * 2 if float(self.gain) > 1 else x


def evaluate(path, **feeds):
    return ReferenceEvaluator(str(path)).run(None, {k: v.numpy() for k, v in feeds.items()})[0]


def test_the_file_computes_what_the_model_does_at_any_batch_size(tiny_cnn, tmp_path):
    path = export_onnx(tiny_cnn, torch.randn(1, 1, 16, 16), tmp_path / "deep" / "cnn.onnx")
    onnx.checker.check_model(str(path))
    for size in (1, 3):
        x = torch.randn(size, 1, 16, 16)
        with torch.no_grad():
            assert np.allclose(evaluate(path, input=x), tiny_cnn(x).numpy(), atol=1e-4)
    assert [p.name for p in path.parent.iterdir()] == ["cnn.onnx"]


def test_without_onnxruntime_the_reference_evaluator_checks(tiny_cnn, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "onnxruntime" else real(n, *rest))
    export_onnx(tiny_cnn, torch.randn(1, 1, 16, 16), tmp_path / "cnn.onnx")


def test_a_fixed_batch_size_is_written_as_such(tiny_cnn, tmp_path):
    path = export_onnx(tiny_cnn, torch.randn(2, 1, 16, 16), tmp_path / "cnn.onnx", dynamic_batch=False)
    (entry,) = onnx.load(path).graph.input
    assert [d.dim_value for d in entry.type.tensor_type.shape.dim] == [2, 1, 16, 16]


@pytest.mark.parametrize("kind", ["mapping", "sequence"])
def test_several_inputs_and_output_objects(kind, tmp_path):
    torch.manual_seed(0)
    model, left, right = Pair(), torch.randn(2, 4), torch.randn(2, 3)
    example = {"right": right, "left": left} if kind == "mapping" else [left, right]
    names = ("left", "right") if kind == "mapping" else ("input_0", "input_1")
    path = export_onnx(model, example, tmp_path / "pair.onnx")
    found = evaluate(path, **{names[0]: left, names[1]: right})
    assert np.allclose(found, model(left, right).logits.detach().numpy(), atol=1e-6)


def test_int8_weights_stay_int8_in_the_file(cnn_work, tmp_path):
    model = Int8Static().apply(cnn_work.model, cnn_work)
    path = export_onnx(model, cnn_work.example["input"], tmp_path / "int8.onnx")
    graph = onnx.load(path).graph
    stored = {i.name.removeprefix("model."): numpy_helper.to_array(i) for i in graph.initializer}
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_codes"):
            assert stored[f"{name}.weight_codes"].dtype == np.int8
            assert np.array_equal(stored[f"{name}.weight_codes"], layer.weight_codes.numpy())
            assert stored[f"{name}.weight_scale"].shape == (len(layer.weight_codes),)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 4
    assert kinds.count("DequantizeLinear") == 8
    assert not any(a.dtype == np.float32 and a.ndim > 1 for a in stored.values())
    x = cnn_work.test[0]["input"]
    with torch.no_grad():
        assert relative_error(torch.from_numpy(evaluate(path, input=x)), model(x)) < 0.01


@pytest.mark.parametrize("read", [bool, float, int, torch.Tensor.item, torch.Tensor.tolist], ids=lambda f: f.__name__)
def test_decisions_on_values_are_refused(read, tmp_path):
    with pytest.raises(UserError, match="Branching cannot be exported to ONNX: it decides in Python on values"):
        export_onnx(Branching(read), torch.ones(2, 4), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_decisions_on_shapes_and_buffers_are_fine(tmp_path):
    export_onnx(ChecksShapes(), torch.ones(2, 4), tmp_path / "x.onnx")


def test_a_graph_that_holds_for_one_batch_size_is_refused_and_written_when_fixed(tmp_path):
    with pytest.raises(UserError, match=r"dynamic_batch=False|does not run"):
        export_onnx(BakesBatch(), torch.ones(2, 4), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []
    export_onnx(BakesBatch(), torch.ones(2, 4), tmp_path / "x.onnx", dynamic_batch=False)


def test_an_output_that_is_no_tensor_is_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UserError, match="it returns a tuple; return one tensor"):
        export_onnx(Two(), torch.ones(2, 4), tmp_path / "x.onnx")


def test_a_failed_export_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"before")
    with pytest.raises(UserError):
        export_onnx(Branching(bool), torch.ones(2, 4), path)
    assert path.read_bytes() == b"before"


def test_a_workload_exports_through_its_own_forward(cnn_work):
    graph = onnx.load_model_from_string(workload_onnx(cnn_work.model, cnn_work)).graph
    assert [i.name for i in graph.input] == ["input"]
    assert [o.name for o in graph.output] == ["logits"]


def test_modes_of_all_modules_survive(tiny_cnn, tmp_path):
    tiny_cnn.train()
    tiny_cnn.bn2.eval()
    export_onnx(tiny_cnn, torch.randn(1, 1, 16, 16), tmp_path / "cnn.onnx")
    assert tiny_cnn.training
    assert tiny_cnn.bn1.training
    assert not tiny_cnn.bn2.training


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0
    assert relative_error(torch.tensor([3.0, float("nan")]), reference) == float("inf")
    assert relative_error(torch.tensor([[3.0, 4.0]]), reference) == float("inf")


def test_the_expected_error_is_that_of_rounding(cnn_work):
    x = cnn_work.test[0]["input"]
    with torch.no_grad():
        assert expected_error(cnn_work.model, lambda: cnn_work.model(x)) == 1e-3
        model = Int8Static().apply(cnn_work.model, cnn_work)
        quantization = relative_error(model(x), cnn_work.model(x))
        assert 1e-3 <= expected_error(model, lambda: model(x)) < 10 * quantization
        assert not any(layer._forward_pre_hooks for layer in model.modules())
