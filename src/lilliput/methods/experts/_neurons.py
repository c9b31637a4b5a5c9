"""Which neurons of a feed-forward part belong together, and which groups a token needs, from what they do on data.

Papers: Zhang et al., MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, 2022 (arXiv 2110.01786), for
equal groups of neurons that fire together. There a trained network predicts the groups; here ridge regression does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.hooks import evaluating, watching
from lilliput.workload import Workload

ROUNDS = 20  # of k-means, at most
RIDGE = 1e-2  # of the mean variance of an input
SPREAD = 0.5  # standard deviation of the router's first logits: the weights of the chosen begin near one another


@torch.no_grad()
def input_rows(model: nn.Module, work: Workload, names: Iterable[str], limit: int) -> dict[str, Tensor]:
    """Name -> up to `limit` evenly spaced tokens (T, d) of what the named parts read on the calibration data."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    share = -(-limit // len(work.calibration))

    def see(name: str, _: nn.Module, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        kept[name].append(rows[:: max(1, len(rows) // share)][:share].float().clone())

    with evaluating(model), watching(model, kept, see):
        for batch in work.calibration:
            work.forward(model, batch)
    return {name: torch.cat(parts) for name, parts in kept.items()}


@torch.no_grad()
def contributions(layers: Iterable[Any], activation: nn.Module, x: Tensor) -> Tensor:
    """(T, n): the norm of what each neuron of gate, up and down adds to the output for the tokens x (T, d)."""
    gate, up, down = (layer.weight.float() for layer in layers)
    return (activation(x @ gate.T) * (x @ up.T)).abs() * down.norm(dim=0)


def firing_together(size: Tensor) -> Tensor:
    """(T, n) contributions -> (n, T) of unit norm, whose products are the correlations of the neurons."""
    centred = size.T - size.T.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)


def equal_clusters(points: Tensor, count: int, seed: int) -> Tensor:
    """The cluster (n,) of each point (n, t): k-means with n / count points in each."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    centres, before = points[order[:count]], None
    for _ in range(ROUNDS):
        found = dealt(torch.cdist(points, centres))
        if before is not None and torch.equal(found, before):
            break
        centres, before = torch.stack([points[found == c].mean(0) for c in range(count)]), found
    assert before is not None
    return before


def dealt(cost: Tensor) -> Tensor:
    """A cluster (n,) for each row of cost (n, c), n / c rows a cluster, the cheapest pairs first."""
    rows, clusters = cost.shape
    room, owner = [rows // clusters] * clusters, [-1] * rows
    for place in cost.flatten().argsort(stable=True).tolist():
        row, cluster = divmod(place, clusters)
        if owner[row] < 0 and room[cluster]:
            owner[row] = cluster
            room[cluster] -= 1
    return torch.tensor(owner)


def fitted_router(x: Tensor, size: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (E, d) and bias (E,) of logits that follow what each expert contributes, by ridge regression.

    x (T, d) are tokens, size (T, n) the contributions of neurons, owner (n,) their experts.
    """
    target = torch.zeros(len(x), int(owner.max()) + 1).index_add_(1, owner, size.square()).sqrt().double()
    centred, mean = x.double() - x.double().mean(0), target.mean(0)
    gram = centred.T @ centred / len(x)
    gram += RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (target - mean) / len(x)).T
    bias = mean - weight @ x.double().mean(0)
    logits = x.double() @ weight.T + bias
    factor = SPREAD / logits.std().clamp_min(1e-12)
    return (factor * weight).float(), (factor * (bias - logits.mean())).float()
