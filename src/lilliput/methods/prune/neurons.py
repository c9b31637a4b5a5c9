"""Neurons: remove intermediate neurons of the feed-forward parts (rows of gate and up, columns of down).

Paper: the second-moment score is that of Optimal Brain Surgeon's first term (Hassibi & Stork, 1993) for a whole column,
as in Wanda (Sun et al., 2023, arXiv 2306.11695) per weight.

    score_j = E[h_j^2] * ||W_down[:, j]||^2        (the exact expected squared error of the output without neuron j)
    refit:    W_down' = W_down E[h h_S^T] E[h_S h_S^T]^-1        (least squares on the neurons S that stay)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import Mlp, anatomy, needs_blocks, to_linear_
from lilliput.graph import kept_count
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.prune._surgery import average_inputs, keep_columns_, keep_rows_, plain, refuse_replaced, select
from lilliput.workload import Workload, need_workload

DAMPING = 1e-5  # of the mean diagonal, so that dead neurons do not make the least-squares system singular


def neuron_scores(down: Tensor, second_moment: Tensor) -> Tensor:
    """(out, n) output weight and (n,) E[h^2] -> (n,) expected squared output error of removing each neuron alone."""
    return second_moment * down.float().square().sum(0)


def magnitude_scores(into: Sequence[Tensor], down: Tensor) -> Tensor:
    """[(n, in), ...] input weights and (out, n) output weight -> (n,) product of their squared norms, without data."""
    scores = down.float().square().sum(0)
    for weight in into:
        scores = scores * weight.float().square().sum(1)
    return scores


def refit(down: Tensor, bias: Tensor | None, gram: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output weight (out, k) and bias for the kept neurons that come closest to the full output.

    `gram` (n + 1, n + 1) is the second moment of the neurons followed by a constant 1; the constant takes part only
    when there is a bias.
    """
    n = down.shape[1]
    full = gram.double() if bias is not None else gram[:n, :n].double()
    weight = down.double() if bias is None else torch.cat((down, bias[:, None]), 1).double()
    stays = kept if bias is None else torch.cat((kept, kept.new_tensor([n])))
    inner = full[stays][:, stays]
    inner = inner + DAMPING * inner.diagonal().mean() * torch.eye(len(stays))
    target = weight @ full[:, stays] + DAMPING * full[stays][:, stays].diagonal().mean() * weight[:, stays]
    solved = torch.linalg.solve(inner, target.T).T.to(down.dtype)
    return (solved, None) if bias is None else (solved[:, :-1], solved[:, -1])


@dataclass(frozen=True)
class Neurons(Method):
    """Remove the feed-forward neurons of transformer blocks that the output misses least."""

    ratio: float = knob(0.25, low=0.0, high=0.95, per_layer=True, help="share of a block's neurons to remove")
    score: str = knob("activation", choices=("activation", "magnitude"), help="what a neuron is worth")
    round_to: int = knob(32, low=1, high=1024, help="kept neurons are a multiple of this, and at least this many")
    refit: bool = knob(False, choices=(False, True), help="least-squares refit of the down projection on the data")

    facts: ClassVar[Facts] = Facts(
        stage="prune",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the feed-forward modules (anatomy's `Mlp.name`). Raises UserError without transformer blocks."""
        found = [b.mlp for b in needs_blocks(model, self.name()).blocks if b.mlp]
        fit = _mlps(model)
        if not fit:
            refuse_replaced(model, [n for m in found for n in (*m.into, m.down)], self.name())
        yield from fit

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        to_linear_(model)
        mlps = {name: mlp for name, mlp in _mlps(model).items() if name in layers}
        keep = {name: _keep(model, mlp, layers[name]) for name, mlp in mlps.items()}
        mlps = {name: mlp for name, mlp in mlps.items() if keep[name] < _width(model, mlp)}
        grams = _moments(model, workload, mlps, layers)
        for name, mlp in mlps.items():
            settings, gram = layers[name], grams.get(name)
            kept = select(_scores(model, mlp, settings, gram), keep[name])
            _cut_(model, mlp, kept, gram if settings.refit else None)
        return model


def _mlps(model: nn.Module) -> dict[str, Mlp]:
    """Name -> parts of every feed-forward module of separate ordinary linear layers."""
    mlps = [block.mlp for block in anatomy(model).blocks if block.mlp]
    fused = [m for m in mlps if m.gated and len(m.into) == 1]
    return {m.name: m for m in mlps if m not in fused and plain(model, (*m.into, m.down))}


def _width(model: nn.Module, mlp: Mlp) -> int:
    return _layer(model, mlp.down).in_features


def _layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _keep(model: nn.Module, mlp: Mlp, settings: Neurons) -> int:
    return kept_count(_width(model, mlp), settings.ratio, settings.round_to)


def _moments(
    model: nn.Module, workload: Workload | None, mlps: Mapping[str, Mlp], layers: Mapping[str, Neurons]
) -> dict[str, Tensor]:
    """Name -> second moment of the neurons: (n,) for the score alone, (n + 1, n + 1) with a constant for a refit."""
    wanted = {mlps[n].down: layers[n] for n in mlps if layers[n].refit or layers[n].score == "activation"}
    if not wanted:
        return {}
    why = "to look at calibration data (or use score='magnitude' without refit)"
    data = need_workload(workload, "prune.neurons", why)

    def statistic(name: str, _: nn.Module, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if not wanted[name].refit:
            return rows.square().mean(0)
        rows = torch.cat((rows, torch.ones(len(rows), 1)), 1)
        return rows.T @ rows / len(rows)

    found = average_inputs(model, data, wanted, statistic)
    return {name: found[mlp.down] for name, mlp in mlps.items() if mlp.down in found}


def _scores(model: nn.Module, mlp: Mlp, settings: Neurons, gram: Tensor | None) -> Tensor:
    down = _layer(model, mlp.down).weight.detach()
    if settings.score == "magnitude" or gram is None:
        return magnitude_scores([_layer(model, n).weight.detach() for n in mlp.into], down)
    return neuron_scores(down, gram if gram.dim() == 1 else gram.diagonal()[:-1])


@torch.no_grad()
def _cut_(model: nn.Module, mlp: Mlp, kept: Tensor, gram: Tensor | None) -> None:
    down = _layer(model, mlp.down)
    fitted = None if gram is None else refit(down.weight, down.bias, gram, kept)
    for name in mlp.into:
        keep_rows_(_layer(model, name), kept)
    keep_columns_(down, kept)
    if fitted is not None:
        down.weight.copy_(fitted[0])
        if fitted[1] is not None:
            down.bias.copy_(fitted[1])
    for attribute in ("intermediate_size", "d_ff", "hidden"):
        owner = _layer(model, mlp.name)
        if type(getattr(owner, attribute, None)) is int:
            setattr(owner, attribute, len(kept))
