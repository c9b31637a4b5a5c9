"""A block whose tokens are shared out between attention and a state space model, so that both take equally long.

    n_a with  F_attention(n_a) = F_ssm(N - n_a),      x + W norm(y)      y: each token's output of its branch, in order

    model = FlowHN(length=256).language_model(vocabulary=2048, dim=96, layers=3)
    HybridBlock(96, share=FlowHN().share(96), shift=1)                            # one block alone

Paper: Balancing Computation Load and Representation Expressivity in Parallel Hybrid Neural Networks (Moradi et al.,
2025, arXiv 2505.19472), FlowHN: tokens are split by what they cost in the two branches, which run at the same time, and
both outputs are projected, normalised and mixed; in its later version tokens change branches from layer to layer. The
split is recomputed for other lengths: attention's share falls as texts grow, since its cost grows with their square.

Which tokens go where is ours (reconstructed): evenly spread ones, shifted by a token from layer to layer; so are the
form of the state space model (Mamba-2's), a norm for each branch and one mixing matrix. The split is balanced for the
`length` of the settings and does not follow the text as it grows, which would move tokens that were seen. A token sees
earlier tokens of its branch alone. Of the gain over blocks that run both branches on all tokens, half is half the work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.layers._hybrid import AttentionBranch, SsmBranch

__all__ = ["FlowHN", "HybridBlock", "HybridModel"]
HYBRID, ATTENTION, SSM = "hybrid", "attention", "ssm"
KINDS = (HYBRID, ATTENTION, SSM)
_beside = ThreadPoolExecutor(1, "hybrid")  # runs one of the branches while the caller runs the other


@dataclass(frozen=True)
class Balance:
    """How the tokens of a text are shared out, and the operations of each branch."""

    tokens: int
    attention_tokens: int
    attention_operations: float
    ssm_operations: float

    @property
    def idle_share(self) -> float:
        """Of the time of the slower branch the share in which the other has nothing to do, at equal speed."""
        both = sorted((self.attention_operations, self.ssm_operations))
        return 1 - both[0] / both[1]


@dataclass(frozen=True)
class FlowHN(Settings):
    """Hybrid blocks in which each token runs through attention or a state space model, balanced by their cost."""

    split: str = knob("flops", choices=("flops", "half"), help="tokens by the branches' cost, or one half to each")
    length: int = knob(256, low=2, high=10**7, help="tokens of a text for which the branches take equally long")
    heads: int = knob(4, low=1, high=1024, help="of the attention")
    state: int = knob(16, low=1, high=4096, help="width of the state space model's state")
    chunk: int = knob(64, low=1, high=4096, help="tokens that the state space model takes at once")

    paper: ClassVar[str] = "flowhn"
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="faster language models, to be trained")

    def balance(self, dim: int, tokens: int | None = None) -> Balance:
        """The split of so many tokens (the settings' length if not given) in a block of this width."""
        tokens = tokens or self.length
        with torch.device("meta"):
            attention, ssm = AttentionBranch(dim, self.heads), SsmBranch(dim, self.state, chunk=self.chunk)
        chosen = tokens // 2 if self.split == "half" else balanced(tokens, attention.operations, ssm.operations)
        return Balance(tokens, chosen, attention.operations(chosen), ssm.operations(tokens - chosen))

    def share(self, dim: int) -> float:
        """Of the tokens that go to attention."""
        return self.balance(dim).attention_tokens / self.length

    def language_model(self, vocabulary: int, dim: int, layers: int) -> HybridModel:
        """An untrained language model of hybrid blocks."""
        return HybridModel(vocabulary, dim, [HYBRID] * layers, self)


def balanced(tokens: int, first: Callable[[int], float], second: Callable[[int], float]) -> int:
    """How many of the tokens the first branch gets so that both cost as nearly the same as they can."""
    low = bisect_left(range(tokens + 1), 0.0, key=lambda n: first(n) - second(tokens - n))
    return min((n for n in (low - 1, low) if 0 <= n <= tokens), key=lambda n: abs(first(n) - second(tokens - n)))


def attends(tokens: int, share: float, shift: int) -> Tensor:
    """Which tokens go to attention, bool (tokens,): evenly spread; it does not depend on how many tokens follow."""
    places = torch.arange(shift, shift + tokens + 1, dtype=torch.float64)
    steps = (places * share).floor()
    return steps[1:] > steps[:-1]


class HybridBlock(nn.Module):
    """Tokens (B, T, dim) to the same; each runs through one of two branches.

    With `parallel` the branches run at the same time, each in a thread of its own, where no gradient is wanted; give
    torch half of the cores then (`torch.set_num_threads`).
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        state: int = 16,
        chunk: int = 64,
        share: float = 0.5,
        shift: int = 0,
        parallel: bool = False,
    ):
        super().__init__()
        if not 0 <= share <= 1:
            raise UserError(f"share is {share}; give the share of the tokens that go to attention, from 0 to 1")
        self.dim, self.share, self.shift, self.parallel = dim, share, shift, parallel
        self.attention, self.ssm = AttentionBranch(dim, heads), SsmBranch(dim, state, chunk=chunk)
        self.norm_attention, self.norm_ssm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.mix = nn.Linear(dim, dim, bias=False)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        inner = {"heads": self.attention.heads, "state": self.ssm.state, "chunk": self.ssm.chunk}
        return {"dim": self.dim, **inner, "share": self.share, "shift": self.shift, "parallel": self.parallel}

    def extra_repr(self) -> str:
        return f"share={self.share:.3f}, shift={self.shift}"

    def forward(self, x: Tensor) -> Tensor:
        chosen = attends(x.shape[1], self.share, self.shift)
        first, second = (which.nonzero().squeeze(1) for which in (chosen, ~chosen))
        runs = [(self.attention, self.norm_attention, first), (self.ssm, self.norm_ssm, second)]
        parts = self._run([run for run in runs if len(run[2])], x)
        joined = torch.cat(parts, 1)[:, torch.cat([first, second]).argsort()]
        return x + self.mix(joined)

    def _run(self, runs: Sequence[tuple[nn.Module, nn.Module, Tensor]], x: Tensor) -> list[Tensor]:
        """Normalised outputs of the branches for their tokens, at the same time if that is wanted."""

        def one(run: tuple[nn.Module, nn.Module, Tensor]) -> Tensor:
            branch, norm, places = run
            return norm(branch(x[:, places], places))

        if len(runs) < 2 or not self.parallel or torch.is_grad_enabled():
            return [one(run) for run in runs]
        other = _beside.submit(torch.no_grad()(one), runs[1])
        return [one(runs[0]), other.result()]


class WholeBlock(nn.Module):
    """One branch for all tokens (B, T, dim)."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x, torch.arange(x.shape[1]))


class HybridModel(nn.Module):
    """A language model of blocks of KINDS, with tied embeddings: token ids (B, T) to logits (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, dim: int, kinds: Sequence[str], settings: FlowHN | None = None):
        super().__init__()
        settings = settings or FlowHN()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(_block(kind, dim, shift, settings) for shift, kind in enumerate(kinds))
        self.norm = nn.RMSNorm(dim)

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def _block(kind: str, dim: int, shift: int, s: FlowHN) -> nn.Module:
    if kind not in KINDS:
        raise UserError(f"there is no block {kind!r}; choose among {', '.join(KINDS)}")
    if kind == ATTENTION:
        return WholeBlock(AttentionBranch(dim, s.heads))
    if kind == SSM:
        return WholeBlock(SsmBranch(dim, s.state, chunk=s.chunk))
    return HybridBlock(dim, s.heads, s.state, s.chunk, s.share(dim), shift)
