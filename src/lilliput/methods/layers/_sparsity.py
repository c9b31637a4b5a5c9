"""How sparse activations are on real text: zeros of each layer, over windows of tokens, and neurons used again.

Aggregated sparsity is the share of neurons that none of w consecutive tokens used; with reuse, tokens may only use
neurons that the tokens before them loaded. Both from ReLU Strikes Back (arXiv 2310.04564), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import needs_blocks
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.workload import Workload


@dataclass(frozen=True)
class LayerSparsity:
    """Share of exact zeros among the inputs of one down projection, and of neurons silent all through w tokens."""

    name: str
    zeros: float
    silent: dict[int, float]  # w -> share


def aggregated(active: Tensor, window: int) -> float:
    """Share of neurons that no token of a window used, the mean over whole windows; active (B, T, n) is boolean."""
    if window < 1 or active.shape[1] < window:
        raise UserError(f"the window is {window} tokens, texts have {active.shape[1]}; give from 1 to that many")
    whole = active[:, : active.shape[1] // window * window]
    return 1 - float(whole.unflatten(1, (-1, window)).any(2).float().mean())


def reusable(active: Tensor, gamma: int) -> Tensor:
    """Which neurons tokens may use when gamma of them load theirs and the next gamma use those alone: (B, T, n)."""
    if gamma < 1:
        raise UserError(f"gamma is {gamma} tokens; give at least 1")
    tokens = active.shape[1]
    allowed = torch.ones_like(active)
    for start in range(0, tokens, 2 * gamma):
        loaded = active[:, start : start + gamma].any(1, keepdim=True)
        allowed[:, start + gamma : start + 2 * gamma] = loaded
    return allowed


def hidden_layers(model: nn.Module) -> dict[str, str]:
    """Name of each feed-forward part -> the layer whose inputs are its neurons."""
    blocks = needs_blocks(model, "a sparsity report").blocks
    return {b.mlp.name: b.mlp.down for b in blocks if b.mlp}


@torch.no_grad()
def sparsity_report(
    model: nn.Module, workload: Workload, windows: Sequence[int] = (1, 8, 32), split: str = "validation"
) -> list[LayerSparsity]:
    """Zeros of every feed-forward part over a split, and aggregated over windows of consecutive tokens."""
    layers = hidden_layers(model)
    sums = {name: torch.zeros(1 + len(windows), dtype=torch.float64) for name in layers}
    batches = getattr(workload, split)

    def see(name: str, hidden: Tensor) -> None:
        active = (hidden != 0).reshape(1, -1, hidden.shape[-1]) if hidden.ndim < 3 else hidden != 0
        found = [1 - float(active.float().mean()), *(aggregated(active, w) for w in windows)]
        sums[name] += torch.tensor(found, dtype=torch.float64)

    with evaluating(model), _watching_hidden(model, layers, see):
        for batch in batches:
            workload.forward(model, batch)
    means = {name: (total / len(batches)).tolist() for name, total in sums.items()}
    return [LayerSparsity(name, found[0], dict(zip(windows, found[1:]))) for name, found in means.items()]


@contextmanager
def _watching_hidden(model: nn.Module, layers: dict[str, str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `see(part, hidden)` with the neurons of each part (B, T, n); sparse parts are asked for theirs."""
    handles = []
    for name, down in layers.items():
        part: Any = model.get_submodule(name)
        asks = hasattr(part, "activations")

        def hook(_: nn.Module, args: tuple, name: str = name, part: Any = part, asks: bool = asks) -> None:
            see(name, part.activations(args[0]) if asks else args[0])

        handles.append((part if asks else model.get_submodule(down)).register_forward_pre_hook(hook))
    with attached(handles):
        yield


@contextmanager
def limited(model: nn.Module, allow: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the neurons (B, T, n) of each feed-forward part are multiplied by `allow(part, neurons)`.

    For parts of ordinary layers: it shows what leaving neurons out does to the answers.
    """
    handles = []
    for name, down in hidden_layers(model).items():

        def hook(_: nn.Module, args: tuple, name: str = name) -> tuple[Tensor]:
            return (args[0] * allow(name, args[0]),)

        handles.append(model.get_submodule(down).register_forward_pre_hook(hook))
    with attached(handles):
        yield


def reused(gamma: int) -> Callable[[str, Tensor], Tensor]:
    """For `limited`: gamma tokens load their neurons, the next gamma use those alone."""
    return lambda name, hidden: reusable(hidden != 0, gamma)


def random_of_equal_size(gamma: int, seed: int = 0) -> Callable[[str, Tensor], Tensor]:
    """For `limited`: as `reused`, but with as many neurons drawn at random; what reuse must beat."""
    generator = torch.Generator().manual_seed(seed)

    def allow(name: str, hidden: Tensor) -> Tensor:
        allowed = reusable(hidden != 0, gamma)
        ranks = torch.rand(hidden.shape[-1], generator=generator).argsort()
        return allowed[..., ranks]

    return allow
