"""How much each option would damage the model, without building it: the change of a layer's output, weighed by what the
loss says of that output.

For a target module f with inputs x_t and loss gradient g_t at its output, the second-order expectation of the increase
of the loss when f becomes f' is  1/2 mean_t sum_j g_tj^2 (f'(x_t) - f(x_t))_j^2  (diagonal empirical Fisher).

Quantization changes each row of a weight matrix by itself, but for tables that rows share. So a few rows stand for a
large layer, the same ones in all formats.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from lilliput import __version__
from lilliput.cache import folder, write_atomically
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import Method
from lilliput.methods.prune.depth import Depth
from lilliput.workload import Batch, Workload

ROWS = 128  # of a layer that roundings are judged on


@dataclass
class Trace:
    """What one module saw: inputs (rows, ...), outputs and squared gradients of the summed loss at the outputs."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    weights: list[Tensor]

    def damage(self, module: nn.Module) -> float:
        """Expected increase of the loss when `module` stands in."""
        with torch.inference_mode():
            changed = [_first(module(x)) for x in self.inputs]
        total = sum(
            float((w * (new.float() - old.float()).square()).sum())
            for new, old, w in zip(changed, self.outputs, self.weights)
        )
        return 0.5 * total / sum(w.shape[0] * (w.shape[1] if w.ndim == 3 else 1) for w in self.weights)


def trace(workload: Workload, names: Iterable[str], batches: Sequence[Batch]) -> dict[str, Trace]:
    """Inputs, outputs and squared output gradients of the named modules over `batches`, kept in bfloat16."""
    model = workload.model
    traces = {name: Trace([], [], []) for name in names}
    handles = [model.get_submodule(n).register_forward_hook(_record(t)) for n, t in traces.items()]
    states = [(p, p.requires_grad) for p in model.parameters()]
    embedding_grad = next(p for p in model.parameters())
    try:
        for p, _ in states:
            p.requires_grad_(False)
        embedding_grad.requires_grad_(True)  # lets gradients flow through the whole graph, costs one weight's gradient
        for batch in batches:
            loss = workload.loss(model, batch)
            if not torch.isfinite(loss):
                raise UserError("the loss is NaN or infinite on the calibration data; look for broken samples in it")
            outputs = [t.outputs[-1] for t in traces.values()]
            count = _tokens(batch)
            for t, gradient in zip(traces.values(), torch.autograd.grad(loss, outputs)):
                t.weights.append((gradient.detach() * count).square().bfloat16())
                t.outputs[-1] = t.outputs[-1].detach()
    finally:
        for handle in handles:
            handle.remove()
        for p, wanted in states:
            p.requires_grad_(wanted)
    return traces


def _tokens(batch: Batch) -> int:
    """How many terms the mean loss averages, so that gradients are per term."""
    ids = batch.get("input_ids")
    return ids.shape[0] * (ids.shape[1] - 1) if ids is not None else next(iter(batch.values())).shape[0]


def _record(trace: Trace):
    def hook(module, args, output):
        trace.inputs.append(args[0].detach())
        trace.outputs.append(_first(output))

    return hook


def _first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _OneModule(Workload):
    """What a method sees while it is tried on one module: its traced inputs as data, its call as the forward pass."""

    def __init__(self, target: str, seen: Trace, real: Workload):
        batches = [{"input": x} for x in seen.inputs]
        super().__init__(real.model, batches, batches, batches, real.metric, batches[0])
        self.target = target

    def forward(self, model, batch: Batch) -> Tensor:
        return _first(model.get_submodule(self.target)(batch["input"]))


def some_rows(layer: nn.Linear, seen: Trace) -> tuple[nn.Linear, Trace]:
    """A layer of about ROWS rows of a larger one, and their trace: a damage on it is about that on the whole layer.

    A row's damage is about in proportion to a_j = sum_t g_tj^2 |w_j|^2. The rows stand at equal steps of the sum of a
    over rows, which takes those with a large part of it for certain, and each counts for what it stands for.
    """
    w = layer.weight.detach()
    if len(w) <= 2 * ROWS:
        return layer, seen
    squares = torch.stack([g.flatten(0, -2).sum(0, dtype=torch.float32) for g in seen.weights]).sum(0)
    sums = (squares.double() * w.double().square().sum(1)).cumsum(0)
    if not sums[-1] > 0:
        return layer, seen
    places = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS * sums[-1]
    rows, count = torch.searchsorted(sums, places).unique(return_counts=True)
    parts = sums[rows] - torch.where(rows > 0, sums[rows - 1], 0.0)
    stands_for = (count * sums[-1] / (ROWS * parts)).float()
    few = nn.Linear(layer.in_features, len(rows), layer.bias is not None, dtype=w.dtype)
    few.weight = nn.Parameter(w[rows])
    if layer.bias is not None:
        few.bias = nn.Parameter(layer.bias.detach()[rows])
    outputs, weights = [y[..., rows] for y in seen.outputs], [g[..., rows] * stands_for for g in seen.weights]
    return few.train(layer.training), Trace(seen.inputs, outputs, weights)


def option_damage(
    workload: Workload, method: Method, target: str, seen: Trace, stand_in: nn.Module | None = None
) -> float:
    """Damage of one method on one target, or on a layer that stands in for it; the model is left as it was."""
    if isinstance(method, Depth):
        return seen.damage(nn.Identity())
    model = workload.model
    with trial(model, target, model.get_submodule(target) if stand_in is None else stand_in):
        method.apply_(model, _OneModule(target, seen, workload), {target: method})
        return seen.damage(model.get_submodule(target))


@contextmanager
def trial(model: nn.Module, target: str, stand_in: nn.Module):
    """Inside, a copy of `stand_in` is the target, for a method to change or replace; afterwards all is as before."""
    structure = {module: dict(module._modules) for module in model.modules()}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    set_module(model, target, copy.deepcopy(stand_in))
    try:
        yield
    finally:
        for module, children in structure.items():
            module._modules.clear()
            module._modules.update(children)
        if tied is not None:
            model.config.tie_word_embeddings = tied  # type: ignore[union-attr]


def option_damages(
    workload: Workload, options: Mapping[str, Sequence[Method]], progress: Callable[[str], None]
) -> dict[tuple[str, Method], float]:
    """Damage of every method on every target, (target, method) -> nats; kept in the cache by the model's hash."""
    batches = workload.calibration[:1]
    path = folder("sensitivity") / f"{fingerprint(workload.model, batches)}.json"
    known = read_known(path)
    missing = {t: [m for m in ms if _key(t, m) not in known] for t, ms in options.items()}
    missing = {t: ms for t, ms in missing.items() if ms}
    if missing:
        traces = trace(workload, missing, batches)
        for target, methods in missing.items():
            progress(f"judging {target}")
            known |= _damages(workload, methods, target, traces.pop(target))
        write_atomically(path, json.dumps(known).encode())
    return {(t, m): known[_key(t, m)] for t, ms in options.items() for m in ms}


def _damages(workload: Workload, methods: Sequence[Method], target: str, seen: Trace) -> dict[str, float]:
    """Damages of several methods on one target, by the keys of the cache; roundings are judged on the same rows."""
    found: dict[str, float] = {}
    roundings = [m for m in methods if m.facts.stage == "quantize"]
    layer = workload.model.get_submodule(target)
    if roundings and isinstance(layer, nn.Linear):
        few, trace_of_few = some_rows(layer, seen)
        found |= {_key(target, m): option_damage(workload, m, target, trace_of_few, few) for m in roundings}
    others = (m for m in methods if _key(target, m) not in found)
    return found | {_key(target, m): option_damage(workload, m, target, seen) for m in others}


def _key(target: str, method: Method) -> str:
    rows = f", {ROWS} rows" if method.facts.stage == "quantize" else ""
    return f"{target}{rows}: {method.name()} {method!r}"


def fingerprint(model: nn.Module, batches: Sequence[Batch]) -> str:
    """A hash of the weights and the data that damages depend on."""
    digest = sha256(__version__.encode())
    for tensor in [*model.state_dict().values(), *(t for b in batches for t in b.values())]:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def read_known(path: Path) -> dict[str, float]:
    """Cached damages; a missing or damaged file counts as empty and is written again."""
    try:
        return {str(k): float(v) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
