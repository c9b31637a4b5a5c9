"""ONNX Runtime on the CPU, by way of an ONNX graph in memory. An extra: pip install 'lilliput[onnxruntime]'."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import UserError, missing_extra
from lilliput.onnx_export import first_line, inputs_of, workload_onnx
from lilliput.runtimes import Runtime, Session
from lilliput.workload import Workload

# Joining MatMul and Add to a Gemm hides 8-bit linear layers from the integer kernels: 12 ms instead of 4.6 for a ViT.
DISABLED = ["MatMulAddFusion"]


class ONNXRuntimeSession(Session):
    """An `InferenceSession`; any batch size."""

    def __init__(self, content: bytes, names: tuple[str, ...], threads: int | None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        self.names = names
        self.inner: Any = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
        )
        self._wanted = {entry.name for entry in self.inner.get_inputs()}

    def run(self, tensors: list[Tensor]) -> Tensor:
        feeds = {n: t.detach().contiguous().numpy() for n, t in zip(self.names, tensors) if n in self._wanted}
        return torch.from_numpy(self.inner.run(None, feeds)[0])


class ONNXRuntime(Runtime):
    """Feed-forward networks, float or with static 8-bit activations."""

    name = "onnxruntime"
    rank = 1

    def supports(self, model: nn.Module, workload: Workload) -> list[str]:
        try:
            self.prepare(model, workload, threads=1)
        except UserError as error:
            return [str(error)]
        return []

    def prepare(self, model: nn.Module, workload: Workload, threads: int | None = None) -> ONNXRuntimeSession:
        if importlib.util.find_spec("onnxruntime") is None:
            raise missing_extra("onnxruntime", "onnxruntime")
        if workload.kind == "causal_lm":
            raise UserError("a causal language model keeps keys and values between steps, which this graph does not")
        content = workload_onnx(model, workload)
        try:
            return ONNXRuntimeSession(content, tuple(inputs_of(workload.example)), threads)
        except Exception as error:  # onnxruntime has no common base for its errors
            raise UserError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error
