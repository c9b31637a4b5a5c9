"""Differentiable k-means (DKM): weights as soft mixtures of a few centroids, with gradients for the weights.

A_ij = softmax_j(-(u_i - c_j)^2 / tau),  c_j <- sum_i A_ij u_i / sum_i A_ij  (a few rounds),  w~_i = sum_j A_ij c_j

u are weights divided by the scale of their group and rounded to bfloat16, so that few values are distinct.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.methods.quantize._codebook import LARGEST, CodebookLinear, fit_codebook, nearest
from lilliput.methods.quantize._saving import Keeper, Unique


def attention(u: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Values (n,) and centroids (k,) -> (n, k), rows that sum to 1."""
    return torch.softmax((u.unsqueeze(1) - centroids).square() / -tau, 1)


def soft_weights(u: Tensor, centroids: Tensor, tau: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Plain DKM: values (n,) and starting centroids (k,) -> mixtures (n,) and the centroids after `rounds`."""
    for _ in range(rounds):
        a = attention(u, centroids, tau)
        centroids = (a * u.unsqueeze(1)).sum(0) / a.sum(0).clamp_min(1e-7)
    return attention(u, centroids, tau) @ centroids, centroids


def counted_centroids(values: Tensor, counts: Tensor, centroids: Tensor, tau: float, rounds: int) -> Tensor:
    """The centroids of `soft_weights` from distinct values (m,) and how many weights have each."""
    for _ in range(rounds):
        a = attention(values, centroids, tau) * counts.unsqueeze(1)
        centroids = (a * values.unsqueeze(1)).sum(0) / a.sum(0).clamp_min(1e-7)
    return centroids


class TableWeights(torch.autograd.Function):
    """`soft_weights` computed, forward and backward, on the distinct values alone; the gradient is the same.

    Saved are the distinct values, the starting centroids and a 16-bit index per weight; the rest is computed again.
    """

    @staticmethod
    def forward(ctx, u: Tensor, centroids: Tensor, tau: float, rounds: int):  # type: ignore[override]
        unique = Unique.of(u)
        values = u[unique.first]
        after = counted_centroids(values, unique.counts, centroids, tau, rounds)
        ctx.tau, ctx.rounds = tau, rounds
        ctx.save_for_backward(values, centroids, (unique.index - 2**15).to(torch.int16))
        ctx.mark_non_differentiable(after)
        return (attention(values, after, tau) @ after)[unique.index], after

    @staticmethod
    def backward(ctx, slope: Tensor, _):  # type: ignore[override]
        values, start, packed = ctx.saved_tensors
        index = packed.long() + 2**15
        counts = torch.bincount(index, minlength=len(values)).float()
        total = torch.zeros_like(values).index_add_(0, index, slope)
        with torch.enable_grad():
            own, shared = values.clone().requires_grad_(), values.clone().requires_grad_()
            after = counted_centroids(shared, counts, start, ctx.tau, ctx.rounds)
            mixed = attention(own, after, ctx.tau) @ after
            direct = torch.autograd.grad(mixed.sum(), own, retain_graph=True)[0]
        via_centroids = torch.zeros_like(values)
        if ctx.rounds:
            via_centroids = torch.autograd.grad(mixed, shared, total)[0] / counts
        return slope * direct[index] + via_centroids[index], None, None, None


class Rounded(torch.autograd.Function):
    """Values of bfloat16 in float32; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope


class DKMLinear(nn.Module):
    """A linear layer in training whose weights (out_features, in_features) are soft mixtures of 2**bits centroids.

    It begins with the codebook of the weights. Centroids carry over from step to step; the scale per group of inputs
    stays. With a `keeper` the plain computation runs and the keeper holds what autograd saves of it, otherwise
    `TableWeights` does.
    """

    centroids: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, bits: int, group: int, temperature: float = 0.03, rounds: int = 3):
        super().__init__()
        self.bits, self.group, self.temperature, self.rounds = bits, group, temperature, rounds
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())
        _, scale, tables = fit_codebook(self.weight, bits, group)
        self.register_buffer("scale", scale)
        self.register_buffer("centroids", tables[0].float())
        self.keeper: Keeper | None = None

    def _normalised(self) -> Tensor:
        return self.weight / self.scale.repeat_interleave(self.group, 1)

    @property
    def tau(self) -> float:
        """`temperature` in units of the mean squared distance between neighbouring centroids."""
        gaps = self.centroids.sort().values.diff().square().mean()
        return max(float(gaps) * self.temperature, 1e-8)

    def soft_weight(self) -> Tensor:
        """The weights (N, K) that the forward pass uses; in training it moves the centroids."""
        rounds = self.rounds if self.training else 0
        u = Rounded.apply(self._normalised()).flatten()
        if self.keeper is None:
            mixed, after = TableWeights.apply(u, self.centroids, self.tau, rounds)
        else:
            with self.keeper.saving(), self.keeper.clustering(u):
                mixed, after = soft_weights(u, self.centroids, self.tau, rounds)
        if self.training:
            self.centroids = after.detach().clone()
        return mixed.view_as(self.weight) * self.scale.repeat_interleave(self.group, 1)

    def soft_rows(self, ids: Tensor) -> Tensor:
        """Rows (n, K) of the weights as mixtures of the centroids as they are: only `soft_weight` moves these."""
        scale = self.scale[ids].repeat_interleave(self.group, 1)
        u = Rounded.apply(self.weight[ids] / scale).flatten()
        mixed, _ = TableWeights.apply(u, self.centroids, self.tau, 0)
        return mixed.view_as(scale) * scale

    def embedding(self, factor: float, dtype: str) -> DKMEmbedding:
        """An embedding of the same weights while they train, in float32 as these are."""
        return DKMEmbedding(self, factor)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.soft_weight(), self.bias)

    @torch.no_grad()
    def finalise(self) -> CodebookLinear:
        """The packed layer: each weight at its nearest centroid, centroids as signed bytes."""
        centroids = self.centroids.sort().values
        unit = centroids.abs().max().clamp_min(1e-30) / LARGEST
        tables = (centroids / unit).round().to(torch.int8).unsqueeze(0)
        scale = (self.scale * unit).bfloat16().float()
        q = nearest(self.weight / scale.repeat_interleave(self.group, 1), tables, self.bits)
        return CodebookLinear.from_codes(q, scale, tables, self.bits, self.bias)


class DKMEmbedding(nn.Module):
    """An embedding in training: rows of a head's soft weights, times `embed_scale`. The head is no child of it."""

    def __init__(self, head: DKMLinear, embed_scale: float):
        super().__init__()
        self._head = (head,)  # in a tuple, where torch does not see a second place of the same module
        self.num_embeddings, self.embedding_dim = head.weight.shape
        self.embed_scale = embed_scale

    @property
    def weight(self) -> nn.Parameter:
        """The head's: both are tied."""
        return self._head[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return self._head[0].soft_rows(ids.flatten()).view(*ids.shape, self.embedding_dim) * self.embed_scale
