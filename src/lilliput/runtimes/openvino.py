"""OpenVINO on the CPU, by way of an ONNX graph in memory. Layers with static 8-bit activations run on integers."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.onnx_export import first_line, inputs_of, workload_onnx
from lilliput.runtimes import Runtime, Session
from lilliput.workload import Workload

PRODUCTS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}  # layer types that hold the arithmetic
INSIDE = re.compile(r"/(?:Conv|Gemm|MatMul)(?:_\d+)?(?=,|$)")  # ONNX nodes of products inside a generated kernel
Shapes = tuple[tuple[int, ...], ...]


class OpenVINOSession(Session):
    """Compiled for the shapes of the example; other shapes share a second compilation with a free batch size."""

    def __init__(self, content: bytes, names: tuple[str, ...], example: list[Tensor], threads: int | None):
        import openvino

        self._core = openvino.Core()
        self._graph = self._core.read_model(content)
        self._config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            self._config["INFERENCE_NUM_THREADS"] = threads
        self._free = self._graph.clone()
        used = {name for port in self._graph.inputs for name in port.get_names()}
        self.names = tuple(name for name in names if name in used)
        self._fixed = tuple(tuple(t.shape) for name, t in zip(names, example) if name in used)
        self._graph.reshape(dict(zip(self.names, map(list, self._fixed))))
        self._free_request: Any = None
        self._compile_()

    def _compile_(self) -> None:
        self.compiled = self._core.compile_model(self._graph, "CPU", self._config)
        self._request: Any = self.compiled.create_infer_request()

    def again(self) -> OpenVINOSession:
        """Compiled anew: where its buffers come to lie makes one copy up to ten percent slower than the next."""
        other = copy.copy(self)
        other._compile_()
        return other

    def run(self, tensors: list[Tensor]) -> Tensor:
        request = self._request
        if tuple(tuple(t.shape) for t in tensors) != self._fixed:
            if self._free_request is None:
                compiled = self._core.compile_model(self._free, "CPU", self._config)
                self._free_request = compiled.create_infer_request()
            request = self._free_request
        inputs = {name: t.detach().contiguous().numpy() for name, t in zip(self.names, tensors)}
        request.infer(inputs, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data.copy())


def executed_precisions(session: OpenVINOSession) -> dict[str, int]:
    """Number type (u8, i8, f32, ...) -> how many convolutions and matrix products the compiled graph runs in it."""
    counts: Counter[str] = Counter()
    for node in session.compiled.get_runtime_model().get_ordered_ops():
        info: Any = node.get_rt_info()
        kind, precision = str(info["layerType"].value), str(info["runtimePrecision"].value)
        if kind in PRODUCTS:
            counts[precision] += 1
        elif kind == "Subgraph":
            counts[precision] += len(INSIDE.findall(str(info["originalLayersNames"].value)))
    return dict(+counts)


class OpenVINO(Runtime):
    """Feed-forward networks, float32 or with static 8-bit activations."""

    name = "openvino"
    rank = 0

    def supports(self, model: nn.Module, workload: Workload) -> list[str]:
        try:
            self.prepare(model, workload, threads=1)
        except UserError as error:
            return [str(error)]
        return []

    def prepare(self, model: nn.Module, workload: Workload, threads: int | None = None) -> OpenVINOSession:
        if importlib.util.find_spec("openvino") is None:
            raise UserError("openvino is not installed; install it with: pip install openvino")
        if workload.kind == "causal_lm":
            raise UserError("a causal language model keeps keys and values between steps, which this graph does not")
        content = workload_onnx(model, workload)
        example = inputs_of(workload.example)
        try:
            return OpenVINOSession(content, tuple(example), list(example.values()), threads)
        except RuntimeError as error:  # what OpenVINO raises for an operator or shape that it lacks
            raise UserError(f"OpenVINO cannot load the graph: {first_line(error)}") from error
