from collections import Counter

import onnx
import onnxruntime
import torch

from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.onnx_export import workload_onnx
from lilliput.runtimes import find_runtime
from lilliput.runtimes.onnxruntime import DISABLED


def optimized(model, work, path) -> Counter:
    """Operators of the graph after ONNX Runtime's own rewriting, as our session asks for it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        workload_onnx(model, work), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
    )
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_linear_layers_run_on_integers(vit_work, tmp_path):
    model = Int8Static().apply(vit_work.model, vit_work)
    counts = optimized(model, vit_work, tmp_path / "m.onnx")
    assert counts["MatMulIntegerToFloat"] == 9
    assert counts["Gemm"] == 0


def test_rounded_residual_sums_let_more_convolutions_run_on_integers(cnn_work, tmp_path):
    plain = optimized(Int8Static().apply(cnn_work.model, cnn_work), cnn_work, tmp_path / "a.onnx")
    summed = Int8Static(residual_sums=True).apply(cnn_work.model, cnn_work)
    assert optimized(summed, cnn_work, tmp_path / "b.onnx")["QLinearConv"] > plain["QLinearConv"]


def test_threads_are_those_asked_for(mobile_work):
    session = find_runtime("onnxruntime").prepare(mobile_work.model, mobile_work, threads=1)
    assert session.inner.get_session_options().intra_op_num_threads == 1


def test_non_contiguous_inputs_run(mobile_work):
    session = find_runtime("onnxruntime").prepare(mobile_work.model, mobile_work, threads=1)
    x = mobile_work.test[0]["input"].transpose(2, 3)
    with torch.no_grad():
        assert torch.allclose(session({"input": x}), mobile_work.model(x), atol=1e-4)
