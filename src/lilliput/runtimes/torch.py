"""Eager PyTorch: takes every model, compresses nothing into time by itself."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lilliput.onnx_export import inputs_of
from lilliput.runtimes import Runtime, Session
from lilliput.workload import Batch, Workload


class TorchSession(Session):
    """Runs `workload.forward` in inference mode on a set number of threads."""

    def __init__(self, model: nn.Module, workload: Workload, threads: int | None):
        self.model, self.workload, self.threads = model, workload, threads
        self.names = tuple(inputs_of(workload.example))
        self._channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())

    def run(self, tensors: list[Tensor]) -> Tensor:
        before = torch.get_num_threads()
        if self.threads and self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return self.workload.forward(self.model, self._batch(tensors))
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def _batch(self, tensors: list[Tensor]) -> Batch:
        if self._channels_last:
            tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
        return dict(zip(self.names, tensors))


class Torch(Runtime):
    """Any module, in eager mode; convolutional networks in the channels-last layout, the faster one on CPUs."""

    name = "torch"
    rank = 9

    def supports(self, model: nn.Module, workload: Workload) -> list[str]:
        return []

    def prepare(self, model: nn.Module, workload: Workload, threads: int | None = None) -> TorchSession:
        """A session over a copy of a convolutional network, else over the module itself, in evaluation mode."""
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return TorchSession(model.eval(), workload, threads)
