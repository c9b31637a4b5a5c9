"""One net from two: the neurons of one are moved to those of the other that they are most like, then both are averaged.

    T = argmin <T, C> over couplings of neurons,  C_ij = |f_i - g_j|^2        layer by layer, from the input on
    W_A <- diag(1 / b) T^T W_A        W_A of the next layer <- W_A diag(1 / a) T        W = s W_A + (1 - s) W_B

f and g are the neurons' incoming weights, or what they answer to the same inputs; a and b are 1 / n and 1 / m.

    fused = OtFusion().fuse(model, other, workload)        # of the shape of `model`

Paper: Model Fusion via Optimal Transport (Singh and Jaggi, NeurIPS 2020, arXiv 1910.05653). Where widths differ the
paper divides the outgoing weights by b: here a neuron that is split hands on as much as before, so that a net with
copied neurons is carried over exactly; at equal widths it is the same. Transformers are aligned in their feed-forward
parts alone, so both must come from one ancestor. Batch norms take new statistics from the calibration data (ours).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating, renewing_norms, watching
from lilliput.method import FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, UNLABELLED, Facts, Settings, knob
from lilliput.methods.initialize._coupling import distances, exact, sinkhorn
from lilliput.methods.initialize._hidden import Hidden, Tensors, carry_, hidden_layers
from lilliput.workload import Workload

Costs = Mapping[Hidden, Tensor]


@dataclass(frozen=True)
class OtFusion(Settings):
    """Fuse two nets of the same layers, also of other widths, into one by aligning their neurons."""

    ground: str = knob("weights", choices=("weights", "activations"), help="what neurons are compared by")
    solver: str = knob("exact", choices=("exact", "sinkhorn"), help="exact assignment, or entropic in torch alone")
    epsilon: float = knob(0.01, low=1e-4, high=10.0, log=True, help="entropy of sinkhorn, as a share of the mean cost")
    share: float = knob(0.5, low=0.0, high=1.0, help="weight of the net that is moved; 0 leaves the other as it is")

    paper: ClassVar[str] = "ot_fusion"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, LAYER_SHAPES},
        data=UNLABELLED,
        effect="one net instead of two",
    )

    def fuse(self, model: nn.Module, other: nn.Module, workload: Workload) -> nn.Module:
        """A net of the shape of `model`: `other` aligned with it, and the average of both.

        The workload's example shows how layers follow each other, its calibration data what neurons answer. Raises
        UserError for nets whose neurons cannot be told apart, or whose layers are not the same.
        """
        moved = self.aligned(model, other, workload)
        fused = copy.deepcopy(model)
        fused.load_state_dict({name: self._mean(t, moved[name]) for name, t in model.state_dict().items()})
        fused.eval()
        with renewing_norms(fused) as norms:
            for batch in workload.calibration if norms else ():
                workload.forward(fused, batch)
        return fused

    @torch.no_grad()
    def aligned(self, model: nn.Module, other: nn.Module, workload: Workload) -> Tensors:
        """The tensors of `other`, by name, with its hidden neurons in the places of those of `model`."""
        found = hidden_layers(model, workload)
        check_alike(model, other, found)
        if hidden_layers(other, workload) != found:
            raise _other_layers(model)
        costs = _answers_apart(model, other, workload, found) if self.ground == "activations" else {}
        fixed, moving = model.state_dict(), {name: t.clone() for name, t in other.state_dict().items()}
        for hidden in found:
            cost = costs[hidden] if costs else distances(_incoming(moving, hidden), _incoming(fixed, hidden))
            coupling = self.coupling(cost)
            n, m = coupling.shape
            carry_(moving, hidden, m * coupling.T, n * coupling)
        return moving

    def coupling(self, cost: Tensor) -> Tensor:
        """How much of each neuron of the moved net (rows) goes to each of the other's (columns); all sum to 1."""
        return exact(cost) if self.solver == "exact" else sinkhorn(cost, self.epsilon)

    def _mean(self, fixed: Tensor, moved: Tensor) -> Tensor:
        return torch.lerp(fixed, moved, self.share) if fixed.is_floating_point() else fixed


def check_alike(model: nn.Module, other: nn.Module, found: Sequence[Hidden]) -> None:
    """Raises UserError for two nets whose tensors differ in more than the numbers of hidden neurons."""
    fixed, moving = model.state_dict(), other.state_dict()
    if set(fixed) != set(moving):
        raise _other_layers(model)
    ours, theirs = (_without_neurons(tensors, found) for tensors in (fixed, moving))
    for name in fixed:
        if ours[name] != theirs[name]:
            raise UserError(
                f"{name!r} is {list(fixed[name].shape)} in one net and {list(moving[name].shape)} in the other; only "
                "the widths of hidden layers may differ"
            )


def _without_neurons(tensors: Tensors, found: Sequence[Hidden]) -> dict[str, list[float]]:
    """Name -> shape of each tensor, with hidden neurons counted as one."""
    shapes: dict[str, list[float]] = {name: [float(size) for size in t.shape] for name, t in tensors.items()}
    for hidden in found:
        count = hidden.neurons(tensors)
        for name in (*hidden.into, *hidden.norms):
            for leaf in (n for n in tensors if n.rpartition(".")[0] == name):
                if shapes[leaf][:1] == [count]:
                    shapes[leaf][0] = 1
        shapes[f"{hidden.out}.weight"][1] /= count
    return shapes


def _other_layers(model: nn.Module) -> UserError:
    return UserError(f"the two nets are not of the same layers; fuse two {type(model).__name__} of any widths")


def _incoming(tensors: Mapping[str, Tensor], hidden: Hidden) -> Tensor:
    """(n, k): the weights and biases that make each neuron."""
    leaves = [f"{name}.{leaf}" for name in hidden.into for leaf in ("weight", "bias")]
    return torch.cat([tensors[leaf].flatten(1) if tensors[leaf].ndim > 1 else tensors[leaf][:, None]
                      for leaf in leaves if leaf in tensors], 1)  # fmt: skip


@torch.no_grad()
def _answers_apart(model: nn.Module, other: nn.Module, workload: Workload, found: Sequence[Hidden]) -> Costs:
    """Hidden layer -> (n of `other`, m of `model`) mean squared differences of what neurons hand on."""
    totals: dict[Hidden, Tensor] = {}
    for batch in workload.calibration:
        theirs, ours = (_answers(one, workload, batch, found) for one in (other, model))
        for hidden in found:
            a, b = theirs[hidden], ours[hidden]
            if a.shape[1] != b.shape[1]:
                raise UserError(f"{hidden.into[0]!r} answers at different places in the two nets; use ground='weights'")
            totals[hidden] = totals.get(hidden, torch.zeros(())) + distances(a, b) / a.shape[1]
    return {hidden: total / len(workload.calibration) for hidden, total in totals.items()}


def _answers(model: nn.Module, workload: Workload, batch: dict, found: Sequence[Hidden]) -> dict[Hidden, Tensor]:
    """Hidden layer -> (n, inputs and places) of what its neurons give to the next layer for one batch."""
    seen: dict[str, Tensor] = {}
    names = [hidden.out for hidden in found]
    with evaluating(model), watching(model, names, lambda name, _, x: seen.update({name: x})):
        workload.forward(model, batch)
    tensors = model.state_dict()
    return {hidden: _by_neuron(seen[hidden.out], tensors, hidden) for hidden in found}


def _by_neuron(x: Tensor, tensors: Mapping[str, Tensor], hidden: Hidden) -> Tensor:
    """(n, ...) of the input of the layer that reads n neurons."""
    if tensors[f"{hidden.out}.weight"].ndim > 2:
        return x.movedim(1, 0).flatten(1)
    return x.reshape(-1, hidden.neurons(tensors), x.shape[-1] // hidden.neurons(tensors)).movedim(1, 0).flatten(1)
