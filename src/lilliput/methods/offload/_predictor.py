"""Who will fire: a classifier of low rank for each neuron of a feed-forward part, taught by the gate that it replaces.

    scores = B A x + b, a neuron is taken to fire above the threshold

A and B start as the best approximation of that rank to the gate on the inputs seen, and learn by logistic regression in
which neurons that fire weigh as much as those that do not. The threshold is set on other inputs, for the asked recall.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating, watching
from lilliput.training import train
from lilliput.workload import Batch, Workload

TOKENS = 4096  # of the calibration data that a predictor sees
HELD_OUT = 4  # one token in so many is kept for the threshold
BATCH, LR = 256, 1e-3
RIDGE = 1e-3  # on the covariance of the inputs, relative to their mean square


class Predictor(nn.Module):
    """Scores (..., neurons) of inputs (..., inputs), in float32."""

    threshold: Tensor

    def __init__(self, inputs: int, neurons: int, rank: int):
        super().__init__()
        if not 1 <= rank <= min(inputs, neurons):
            raise UserError(f"the rank of a predictor is {rank}; give from 1 to {min(inputs, neurons)}")
        self.into = nn.Parameter(torch.zeros(rank, inputs))  # A
        self.out = nn.Parameter(torch.zeros(neurons, rank))  # B
        self.bias = nn.Parameter(torch.zeros(neurons))
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.float(), self.into.float()), self.out.float(), self.bias.float())

    def fires(self, x: Tensor) -> Tensor:
        """Which neurons are taken to fire, (..., neurons)."""
        return self(x) > self.threshold


def fit_predictor(gate: nn.Linear, shift: float, x: Tensor, rank: int, recall: float, steps: int) -> Predictor:
    """The predictor of a gate that fires above `shift`, from inputs x (tokens, inputs).

    `recall` is the share of the neurons that fire which it must find on tokens that it was not taught.
    """
    held_out = torch.arange(len(x)) % HELD_OUT == 0
    with torch.no_grad():
        gates = F.linear(x, gate.weight.float(), None if gate.bias is None else gate.bias.float())
        fires = gates > shift
        predictor = low_rank_gate(gate, shift, x[~held_out], rank)
    share = float(fires.float().mean())
    weight = torch.tensor((1 - share) / max(share, 1e-6))
    pairs = zip(x[~held_out].split(BATCH), fires[~held_out].float().split(BATCH))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch["x"]), batch["fires"], pos_weight=weight)

    train(predictor, [{"x": a, "fires": b} for a, b in pairs], loss, steps=steps, lr=LR, clip_norm=1.0)
    predictor.zero_grad(set_to_none=True)
    predictor.requires_grad_(False)
    with torch.no_grad():
        predictor.threshold = threshold_for(predictor(x[held_out]), fires[held_out], recall)
    return predictor.eval()


@torch.no_grad()
def low_rank_gate(gate: nn.Linear, shift: float, x: Tensor, rank: int) -> Predictor:
    """The predictor whose scores are nearest to the gate's values above `shift` on x, in units of their spread."""
    weight = gate.weight.double()
    second = x.double().T @ x.double() / len(x)
    second.diagonal().add_(RIDGE * second.diagonal().mean().clamp_min(1e-12))
    root = torch.linalg.cholesky(second)  # x = root z, and the z are uncorrelated
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    spread = (s.square().sum() / len(weight)).sqrt().clamp_min(1e-12)
    predictor = Predictor(gate.in_features, gate.out_features, rank)
    predictor.into.copy_(torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False))
    predictor.out.copy_(u[:, :rank] * s[:rank] / spread)
    bias = torch.zeros(len(weight)) if gate.bias is None else gate.bias.double()
    predictor.bias.copy_((bias - shift) / spread)
    return predictor


def threshold_for(scores: Tensor, fires: Tensor, recall: float) -> Tensor:
    """The highest threshold that at least the share `recall` of the scores of neurons that fire exceeds."""
    found = scores[fires].sort(descending=True).values
    if not len(found):
        return torch.tensor(float("inf"))
    needed = min(len(found), max(1, -int(-recall * len(found) // 1)))
    return torch.nextafter(found[needed - 1], torch.tensor(float("-inf")))


def inputs_of_parts(model: nn.Module, work: Workload, names: Iterable[str]) -> dict[str, Tensor]:
    """Up to TOKENS inputs (tokens, inputs) of each named part on the calibration data, evenly spaced, float32."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    limit = -(-TOKENS // len(work.calibration))

    def see(name: str, part: nn.Module, x: Tensor) -> None:
        tokens = x.flatten(0, -2)
        kept[name].append(tokens[:: -(-len(tokens) // limit)].float().clone())

    with torch.no_grad(), evaluating(model), watching(model, kept, see):
        for batch in work.calibration:
            work.forward(model, batch)
    found = {name: torch.cat(parts) if parts else torch.zeros(0, 1) for name, parts in kept.items()}
    for name, x in found.items():
        if len(x) < 2 * HELD_OUT or not torch.isfinite(x).all():
            raise UserError(f"{name!r} saw {len(x)} calibration tokens, or values that are not finite; give more")
    return found
