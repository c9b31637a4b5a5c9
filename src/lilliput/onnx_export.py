"""PyTorch to ONNX: a checked file, or the graph as bytes for a runtime, or the reasons why a model cannot be exported.

The exporter traces one run (`torch.onnx.export(dynamo=False)`, which needs nothing but torch). A trace records only the
branch it took, so a model that reads numbers out of tensors that depend on its input is refused.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating, tensors_in
from lilliput.workload import Batch, Workload, is_input

OPSET = 19  # the first in which the reference evaluator knows DequantizeLinear
LARGEST_BYTES = 2**31 - 1  # what one ONNX file can hold
LEAST_ERROR, NOISE = 1e-3, 1e-4
READS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__"}
SHAPE_READS = {"__get__", "size", "dim", "numel", "__len__", "stride", "is_contiguous"}
# What the exporter raises depends on the operator at hand; a NameError or the like is a mistake and passes.
EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Forward = Callable[[nn.Module, Batch], Any]


def export_onnx(model: nn.Module, example_input: Example, path: str | Path, dynamic_batch: bool = True) -> Path:
    """Write `model` to an ONNX file, which appears only after its outputs were compared with the model's.

    `example_input` is a tensor, a sequence of positional tensors or a mapping of keyword tensors, the batch first.
    With `dynamic_batch` the file takes any batch size, and two are compared. Raises UserError when the model cannot
    be exported or the outputs differ.
    """
    path = Path(path)
    batch, forward = _named(example_input)
    content = onnx_bytes(model, batch, forward, dynamic_batch)
    _verify(model, batch, forward, content, dynamic_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def workload_onnx(model: nn.Module, workload: Workload, dynamic_batch: bool = True) -> bytes:
    """The ONNX graph of `workload.forward(model, ...)`: inputs as in the batch, output `logits`; not yet compared."""
    return onnx_bytes(model, inputs_of(workload.example), workload.forward, dynamic_batch)


def inputs_of(batch: Batch) -> Batch:
    """A batch without what the model does not see."""
    return {name: value for name, value in batch.items() if is_input(name)}


def onnx_bytes(model: nn.Module, batch: Batch, forward: Forward, dynamic_batch: bool = True) -> bytes:
    """The ONNX graph of `forward(model, batch)`. Raises UserError with the reason when there is none."""
    reasons = obstacles(model)
    if reasons:
        raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {'; '.join(reasons)}")
    traced = _Traced(model, list(batch), forward)
    buffer = io.BytesIO()
    axes = {name: {0: "batch"} for name in [*batch, "logits"]} if dynamic_batch else None
    with torch.no_grad(), evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's warnings name shape checks too; _InputReads tells them apart
        traced.eval()
        try:
            torch.onnx.export(
                traced,
                tuple(batch.values()),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=OPSET,
                input_names=list(batch),
                output_names=["logits"],
                dynamic_axes=axes,
            )
        except UserError as error:
            raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {error}") from None
        except EXPORT_ERRORS as error:
            raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {first_line(error)}") from error
    return buffer.getvalue()


def obstacles(model: nn.Module) -> list[str]:
    """What can be seen without tracing that keeps a model from ONNX."""
    reasons = []
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    if size > LARGEST_BYTES:
        reasons.append(f"its tensors take {size:,} bytes and one ONNX file holds {LARGEST_BYTES:,}")
    packed = [name for name, module in model.named_modules() if _is_packed(module)]
    if packed:
        kind = type(model.get_submodule(packed[0])).__name__
        reasons.append(
            f"layer {packed[0]!r} ({kind}, {len(packed)} such) keeps packed weights, which ONNX would unpack to float"
        )
    return reasons


def _is_packed(module: nn.Module) -> bool:
    """One of our layers with integer matrices that does not say that it has an ONNX form."""
    if not hasattr(module, "rebuild_config") or getattr(module, "exports_to_onnx", False):
        return False
    codes = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return any(t.dtype in codes and t.ndim >= 2 for t in module.buffers(recurse=False))


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --- tracing ---------------------------------------------------------------------------------------------------


class _Traced(nn.Module):
    """`forward(model, batch)` with positional tensors, under watch."""

    def __init__(self, model: nn.Module, names: list[str], run: Forward):
        super().__init__()
        self.model, self.names, self.run = model, names, run

    def forward(self, *tensors: Tensor) -> Tensor:
        with _InputReads(tensors):
            out = self.run(self.model, dict(zip(self.names, tensors)))
        return _logits(out)


class _InputReads(TorchFunctionMode):
    """Refuses to turn a tensor that depends on the inputs' values into a Python number; shapes may be read."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self._depends = {id(t): t for t in inputs}  # the tensors are kept so that their ids stay taken

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        touched = any(id(t) in self._depends for t in tensors_in([*args, *(kwargs or {}).values()]))
        if touched and name in READS:
            raise UserError(
                f"it decides in Python on values of its input (Tensor.{name}), and a graph would keep one branch; use "
                "torch.where, or run it in the torch runtime"
            )
        out = func(*args, **(kwargs or {}))
        if touched and name not in SHAPE_READS:
            self._depends.update((id(t), t) for t in tensors_in([out]))
        return out


def _logits(out: Any) -> Tensor:
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        raise UserError(f"it returns a {type(out).__name__}; return one tensor, or an object with .logits")
    return out


# --- comparing -------------------------------------------------------------------------------------------------


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Root of the mean squared difference over that of the reference; infinite for NaN or another shape."""
    if ours.shape != reference.shape or not torch.isfinite(ours).all():
        return float("inf")
    ours, reference = ours.detach().double(), reference.detach().double()
    difference, size = (ours - reference).norm(), reference.norm()
    return float(difference / size.clamp_min(1e-12))


def expected_error(model: nn.Module, run: Callable[[], Tensor]) -> float:
    """The relative error of `run()`, which gives logits, that float rounding explains: 1e-3, or more with 8-bit layers.

    Rounding tips an activation to the next step, and through many layers that grows to the size of the quantization
    error itself. So it is measured: thrice what noise of 1e-4 of their spread changes at the inputs of all such layers.
    """
    layers = [module for module in model.modules() if getattr(module, "exports_to_onnx", False)]
    if not layers:
        return LEAST_ERROR
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: tuple) -> tuple:
        noise = torch.randn(args[0].shape, generator=generator) * args[0].std() * NOISE
        return (args[0] + noise, *args[1:])

    expected = run()
    handles = [layer.register_forward_pre_hook(disturb) for layer in layers]
    with attached(handles):
        return max(LEAST_ERROR, 3 * relative_error(run(), expected))


def _named(example: Example) -> tuple[Batch, Forward]:
    if isinstance(example, Mapping):
        return dict(example), lambda model, batch: model(**batch)
    tensors = [example] if isinstance(example, Tensor) else list(example)
    names = ["input"] if len(tensors) == 1 else [f"input_{i}" for i in range(len(tensors))]
    return dict(zip(names, tensors)), _by_position


def _by_position(model: nn.Module, batch: Batch) -> Any:
    return model(*batch.values())


def _verify(model: nn.Module, batch: Batch, forward: Forward, content: bytes, dynamic_batch: bool) -> None:
    """Compare at the example's batch size and, if it may vary, at one more than twice that size."""
    grown = {name: torch.cat([t, t, t[:1]]) for name, t in batch.items()}
    for inputs in [batch, grown] if dynamic_batch else [batch]:
        error = graph_error(content, model, inputs, forward)
        with torch.no_grad(), evaluating(model):
            allowed = expected_error(model, partial(lambda b: _logits(forward(model, b)), inputs))
        if not error <= allowed:
            size = next(iter(inputs.values())).shape[0]
            raise UserError(
                f"the exported graph differs from the model by {error:.3g} (relative) at batch size {size}; if only "
                "the batch size is at fault, export with dynamic_batch=False"
            )


def graph_error(content: bytes, model: nn.Module, batch: Batch, forward: Forward | None = None) -> float:
    """The relative error of a graph's logits against the model's on one batch. Raises UserError when it does not run.

    `forward(model, batch)` is how the model runs; by default its inputs are passed by position.
    """
    forward = forward or _by_position
    with torch.no_grad(), evaluating(model):
        expected = _logits(forward(model, batch))
    try:
        found = _evaluate(content, batch)
    except Exception as error:  # the errors of onnxruntime have no common base
        raise UserError(f"the exported graph does not run: {first_line(error)}") from error
    return relative_error(expected.new_tensor(found), expected)


def evaluator() -> str:
    """What executes graphs to compare them: ONNX Runtime if installed, else the slow one of the onnx package."""
    return "onnx.reference" if importlib.util.find_spec("onnxruntime") is None else "onnxruntime"


def _evaluate(content: bytes, batch: Batch) -> np.ndarray:
    feeds = {name: t.detach().numpy() for name, t in batch.items()}
    if evaluator() == "onnx.reference":
        from onnx.reference import ReferenceEvaluator

        return np.asarray(ReferenceEvaluator(content).run(None, feeds)[0])  # type: ignore[index]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])
