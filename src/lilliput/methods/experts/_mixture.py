"""A feed-forward part as a mixture of experts: a router chooses k of E small parts for each token.

    y = s * sum over chosen e of softmax(r_chosen)_e down_e(act(gate_e x) * up_e x),   r = W x + b

The layers call each other as in the mixtures of transformers: `gate(x)` gives logits, weights and chosen experts,
`experts(x, chosen, weights)` the sum. So whatever looks at one (lilliput.methods.experts) looks at both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lilliput.errors import UserError


class Expert(nn.Module):
    """down(act(gate x) * up x), with the names of a Llama's feed-forward part and without biases."""

    def __init__(self, width: int, neurons: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=False)
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedExpert(nn.Module):
    """One expert as transformers stores it: gate and up in one matrix (2 n, d), down (d, n)."""

    def __init__(self, width: int, neurons: int, activation: nn.Module):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * neurons, width))
        self.down_proj = nn.Parameter(torch.empty(width, neurons))
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, -1)
        return F.linear(self.act_fn(gate) * up, self.down_proj)


class Router(nn.Module):
    """x (..., d) -> logits (N, E), weights (N, k) that sum to `scale`, chosen experts (N, k)."""

    def __init__(self, width: int, experts: int, top_k: int, scale: float):
        super().__init__()
        self.hidden_dim, self.num_experts, self.top_k, self.scale = width, experts, top_k, scale
        self.weight = nn.Parameter(torch.zeros(experts, width))
        self.bias = nn.Parameter(torch.zeros(experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight, self.bias)
        best = logits.topk(self.top_k, -1)
        return logits, self.scale * best.values.softmax(-1), best.indices


class Experts(nn.ModuleList):
    """x (N, d), chosen (N, k), weights (N, k) -> the weighted sum of what the chosen experts give, (N, d)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            add_expert_(total, hidden_states, top_k_index, top_k_weights, number, self[number])
        return total


def add_expert_(
    total: Tensor, x: Tensor, chosen: Tensor, weights: Tensor, number: int, expert: Callable[[Tensor], Tensor]
) -> None:
    """Add to `total` (N, d) what one expert gives for the rows of x (N, d) that chose it."""
    rows, slots = (chosen == number).nonzero(as_tuple=True)
    total.index_add_(0, rows, (expert(x[rows]) * weights[rows, slots, None]).to(total.dtype))


class Mixture(nn.Module):
    """A feed-forward part (..., d) -> (..., d) of `experts` experts with `neurons` neurons, `top_k` of them a token."""

    def __init__(self, width: int, neurons: int, experts: int, top_k: int, scale: float, activation: str):
        super().__init__()
        if not 1 <= top_k <= experts or activation not in ACT2FN:
            raise UserError(f"a mixture of {experts} experts, {top_k} of them a token, with {activation!r} cannot be")
        self.width, self.neurons, self.activation = width, neurons, activation
        self.gate = Router(width, experts, top_k, scale)
        self.experts = Experts(Expert(width, neurons, activation) for _ in range(experts))

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"width": self.width, "neurons": self.neurons, "experts": self.gate.num_experts}
        return sizes | {"top_k": self.gate.top_k, "scale": self.gate.scale, "activation": self.activation}

    def extra_repr(self) -> str:
        return f"{self.gate.num_experts} experts of {self.neurons} neurons, {self.gate.top_k} a token"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width)
        _, weights, chosen = self.gate(rows)
        return self.experts(rows, chosen, weights).view(x.shape)


@torch.no_grad()
def split_mixture(
    layers: Sequence[nn.Linear], owner: Tensor, top_k: int, activation: str, router: tuple[Tensor, Tensor]
) -> Mixture:
    """The neurons of gate, up and down dealt to experts, owner (n,) being that of each; all with weight 1 are it."""
    gate, up, down = (layer.weight for layer in layers)
    experts = int(owner.max()) + 1
    made = _empty(gate, gate.shape[0] // experts, experts, top_k, float(top_k), activation)
    for number, expert in enumerate(made.experts):
        neurons = (owner == number).nonzero().flatten()
        _fill_(expert, gate[neurons], up[neurons], down[:, neurons])
    return _routed(made, router)


@torch.no_grad()
def copied_mixture(
    layers: Sequence[nn.Linear], experts: int, top_k: int, activation: str, noise: float, seed: int
) -> Mixture:
    """Whole copies of gate, up and down, with normal noise of `noise` times the deviation of each matrix."""
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.weight for layer in layers]
    made = _empty(weights[0], weights[0].shape[0], experts, top_k, 1.0, activation)

    def draw(w: Tensor, deviation: float) -> Tensor:
        return deviation * torch.randn(w.shape, generator=generator).to(w.dtype)

    for expert in made.experts:
        _fill_(expert, *(w + draw(w, noise * float(w.std())) for w in weights))
    start = draw(made.gate.weight, made.width**-0.5)
    return _routed(made, (start, torch.zeros(experts)))


def _empty(like: Tensor, neurons: int, experts: int, top_k: int, scale: float, activation: str) -> Mixture:
    with torch.device("meta"):
        return Mixture(like.shape[1], neurons, experts, top_k, scale, activation).to(like.dtype)


def _fill_(expert: Any, gate: Tensor, up: Tensor, down: Tensor) -> None:
    for layer, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, down)):
        layer.weight = nn.Parameter(weight.detach().clone().contiguous())


def _routed(mixture: Mixture, router: tuple[Tensor, Tensor]) -> Mixture:
    weight, bias = (t.to(mixture.gate.weight.dtype).clone() for t in router)
    mixture.gate.weight, mixture.gate.bias = nn.Parameter(weight), nn.Parameter(bias)
    return mixture
