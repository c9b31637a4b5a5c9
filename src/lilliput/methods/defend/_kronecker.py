"""A Gaussian around the weights of one linear layer, from Kronecker factors of its curvature.

    precision = n A (x) G + tau I,   A = mean a a',  G = mean over tokens of sum over classes of (weighted) g g'

in the eigenvectors of A (inputs, k) and G (outputs, d) it is diagonal: n lambda_G lambda_A + tau. Only the top `rank`
of A may be kept; all other directions then share the mean of their eigenvalues.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Sums:
    """What a layer's tokens add up to: `inputs` = sum a a' (k, k), `outputs` = sum g g' (d, d), how many tokens."""

    def __init__(self, inputs: int, outputs: int):
        self.inputs = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.outputs = torch.zeros(outputs, outputs, dtype=torch.float64)
        self.tokens = 0

    def add(self, a: Tensor, g: Tensor, p: Tensor) -> None:
        """Add tokens: inputs a (n, k), gradients of the logits g (classes, n, d), probabilities p (n, classes).

        The classes' curvature diag(p) - p p' is the exact expectation over labels that the model itself gives.
        """
        mean = torch.einsum("nc,cnd->nd", p, g)
        spread = ((g - mean) * p.T.sqrt().unsqueeze(-1)).flatten(0, 1)
        self.inputs += (a.T @ a).double()
        self.outputs += (spread.T @ spread).double()
        self.tokens += len(a)


class Factors(nn.Module):
    """The eigenvectors and eigenvalues of a layer's curvature."""

    inputs: Tensor  # (k, r) eigenvectors of A
    outputs: Tensor  # (d, d) eigenvectors of G
    curvature: Tensor  # (d, r): n lambda_G lambda_A
    rest: Tensor  # (d,): n lambda_G times the mean eigenvalue of A in the k - r directions that were left out

    def __init__(self, sums: Sums, rank: int, share: float):
        """`share` is how much of the training data the sums are of; the curvature is raised to that of all."""
        super().__init__()
        k, tokens = len(sums.inputs), max(1, sums.tokens)
        rank = min(rank or k, k) if sums.tokens else 0
        a_values, a_vectors = torch.linalg.eigh(sums.inputs / tokens)
        g_values, g_vectors = torch.linalg.eigh(sums.outputs / tokens)
        a_values, g_values = a_values.clamp_min(0), g_values.clamp_min(0) * sums.tokens / share
        left_out = a_values[: k - rank]
        self.register_buffer("inputs", a_vectors[:, k - rank :].float())
        self.register_buffer("outputs", g_vectors.float())
        self.register_buffer("curvature", g_values[:, None] * a_values[k - rank :])
        self.register_buffer("rest", g_values * (left_out.mean() if k > rank else 0.0))

    @property
    def left_out(self) -> int:
        """Input directions that are not kept."""
        return len(self.inputs) - self.inputs.shape[1]

    def log_ratio(self, precision: float) -> float:
        """log det(prior precision) - log det(posterior precision)."""
        kept = (1 + self.curvature / precision).log().sum()
        return -float(kept + self.left_out * (1 + self.rest / precision).log().sum())

    def covariance(self, a: Tensor, g: Tensor, precisions: Iterable[float]) -> Tensor:
        """(precisions, classes, classes) of the logits of one sample, for each prior precision.

        Its tokens have inputs a (n, k) and gradients of the logits g (classes, n, d); J = sum over tokens of g a'.
        """
        read, turned = a @ self.inputs, g @ self.outputs
        jacobian = torch.einsum("cnd,nr->cdr", turned, read)
        missed = a - read @ self.inputs.T if self.left_out else None
        found = []
        for precision in precisions:
            weighted = jacobian / (self.curvature + precision).to(jacobian.dtype)
            total = (weighted.flatten(1) @ jacobian.flatten(1).T).double()
            if missed is not None:
                far = torch.einsum("cnd,nm->cmd", turned, missed @ missed.T).double() / (self.rest + precision)
                total = total + torch.einsum("cmd,emd->ce", far, turned.double())
            found.append(total)
        return torch.stack(found)
