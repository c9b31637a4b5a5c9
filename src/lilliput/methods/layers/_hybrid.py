"""The two branches of a hybrid block, attention with a feed-forward part and a state space model, and what they cost.

Both map tokens (B, T, dim) to what is added to them; a token sees the tokens before it in its branch alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.methods.layers._span_layers import rotated

REACH = 4  # tokens that the state space model's convolution sees


class AttentionBranch(nn.Module):
    """Causal attention with rotary positions, then a feed-forward part of four times the width."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise UserError(f"dim is {dim} with {heads} heads; give heads that divide it into an even width")
        self.dim, self.heads = dim, heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, T, dim) and its tokens' positions in the text (T,), int64 -> (B, T, dim)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = self._tables(places, x.dtype)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return mixed + self.mlp(self.norm2(x + mixed))

    def _tables(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, T, width of a head) of the rotary angles."""
        width = self.dim // self.heads
        speeds = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = (places.float()[:, None] * speeds).repeat(1, 2)[None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def operations(self, tokens: int) -> float:
        """Of one pass over so many tokens, a multiplication and an addition counted as two."""
        return tokens * 24 * self.dim**2 + 4 * tokens**2 * self.dim


class SsmBranch(nn.Module):
    """A selective state space model in the form of Mamba-2 (arXiv 2405.21060): one decay for each head and token.

    h_t = a_t h_t-1 + b_t (dt_t u_t)^T,   y_t = h_t^T c_t + D u_t,   a_t = exp(-dt_t A)
    """

    def __init__(self, dim: int, state: int = 16, expand: int = 2, head: int = 32, chunk: int = 64):
        super().__init__()
        self.dim, self.state, self.chunk, self.inner = dim, state, chunk, expand * dim
        if self.inner % head:
            raise UserError(f"a head of the state space model is {head} wide, which does not divide {self.inner}")
        self.heads, mixed = self.inner // head, self.inner + 2 * state
        self.norm, self.norm_out = nn.RMSNorm(dim), nn.RMSNorm(self.inner)
        self.into = nn.Linear(dim, self.inner + mixed + self.heads, bias=False)  # gate | u, b, c | dt
        self.conv = nn.Conv1d(mixed, mixed, REACH, groups=mixed, padding=REACH - 1)
        self.out = nn.Linear(self.inner, dim, bias=False)
        self.rate = nn.Parameter(torch.arange(1.0, self.heads + 1).log())  # of A, which stays positive
        self.step = nn.Parameter(torch.linspace(-6.0, -2.0, self.heads))  # dt from about 0.002 to 0.1
        self.skip = nn.Parameter(torch.ones(self.heads))

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """x (B, T, dim) -> (B, T, dim); positions do not matter."""
        gate, mixed, dt = self.into(self.norm(x)).split((self.inner, self.inner + 2 * self.state, self.heads), -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        u, b, c = mixed.split((self.inner, self.state, self.state), -1)
        u, dt = u.unflatten(-1, (self.heads, -1)), F.softplus(dt + self.step)
        y = scan(u * dt[..., None], -dt * self.rate.exp(), b, c, self.chunk) + u * self.skip[:, None]
        return self.out(self.norm_out(y.flatten(2) * F.silu(gate)))

    def operations(self, tokens: int) -> float:
        """Of one pass over so many tokens, a multiplication and an addition counted as two."""
        mixed = self.inner + 2 * self.state
        layers = self.dim * (2 * self.inner + 2 * self.state + self.heads) + REACH * mixed + self.inner * self.dim
        scanned = self.chunk * (self.state + self.inner) + 2 * self.state * self.inner
        return tokens * 2 * (layers + scanned)


def scan(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """y_t = h_t^T c_t with h_t = exp(decay_t) h_t-1 + b_t x_t^T, by products of matrices within chunks of tokens.

    x (B, T, heads, width), decay (B, T, heads) at most 0, b and c (B, T, state) -> (B, T, heads, width).
    """
    tokens, rest = x.shape[1], -x.shape[1] % chunk
    x, decay, b, c = (F.pad(t, [0, 0] * (t.ndim - 2) + [0, rest]).unflatten(1, (-1, chunk)) for t in (x, decay, b, c))
    total = decay.cumsum(2)  # (B, chunks, chunk, heads)
    gaps = total[:, :, :, None] - total[:, :, None]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weights = gaps.masked_fill(later[..., None], -torch.inf).exp() * (c @ b.transpose(-1, -2))[..., None]
    inside = torch.einsum("bkijh,bkjhp->bkihp", weights, x)
    left = torch.einsum("bkjs,bkjhp->bkhsp", b, x * (total[:, :, -1:] - total).exp()[..., None])
    before = torch.einsum("bkis,bkhsp->bkihp", c, carried(left, total[:, :, -1].exp()))
    return (inside + before * total.exp()[..., None]).flatten(1, 2)[:, :tokens]


def carried(left: Tensor, decay: Tensor) -> Tensor:
    """What each chunk begins with, from what each leaves (B, chunks, heads, ...) and the fading (B, chunks, heads)."""
    state, found = torch.zeros_like(left[:, 0]), []
    for k in range(left.shape[1]):
        found.append(state)
        state = state * decay[:, k, :, None, None] + left[:, k]
    return torch.stack(found, 1)
