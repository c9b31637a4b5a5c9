"""Layer-wise scaling: heads and neurons grow from the first block to the last, with the same number of weights.

    alpha_i = first + (last - first) i / (N - 1)     query width of block i = alpha_i d, to whole groups of heads
    beta_i  = likewise                               neurons of block i = beta_i d, to a multiple of `round_to`

Paper: OpenELM: An Efficient Language Model Family with Open Training and Inference Framework (Mehta et al., 2024, arXiv
2404.14619): this rule with alpha 0.5 to 1, beta 0.5 to 4, both rounded to two decimals. Cutting a trained parent to the
shape, by what prune.heads and prune.neurons find its output misses least, is ours, and so is `within`.

    LayerWiseScaling().apply(model, workload)                    # cut out of a trained parent, to be healed
    settings = LayerWiseScaling().within(3_000_000, 192, 6, head_dim=16, queries=3)
    settings.untrained(config)                                   # to be trained from scratch
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from torch import nn

from lilliput.anatomy import Attention, Mlp, needs_blocks, to_linear_
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.prune.heads import Heads
from lilliput.methods.prune.neurons import Neurons
from lilliput.workload import Workload


class BlockShape(NamedTuple):
    """What differs from block to block."""

    heads: int
    kv_heads: int
    neurons: int

    def weights(self, width: int, head_dim: int) -> int:
        """Weights of a Llama block of this shape without its norms: four projections, gate, up and down."""
        return width * (2 * head_dim * (self.heads + self.kv_heads) + 3 * self.neurons)


def spread(first: float, last: float, count: int) -> list[float]:
    """`count` factors at equal distances from `first` to `last`, to two decimals; one alone is `first`."""
    return [round(first + (last - first) * i / max(count - 1, 1), 2) for i in range(count)]


def rounded(value: float, multiple: int) -> int:
    """The nearest multiple, at least one; the next one up where the nearest is more than a tenth below `value`."""
    nearest = max(multiple, int(value + multiple / 2) // multiple * multiple)
    return nearest if nearest >= 0.9 * value else nearest + multiple


@dataclass(frozen=True)
class LayerWiseScaling(Method):
    """Give each block heads and neurons by its place in the model; a cut keeps the most important ones.

    A parent is never widened: where the rule asks for more than a block has, it stays as it is. An alpha of 1 stands
    for all of a parent's heads, whatever their width. The paper's last factors are the larger; the reverse works.
    """

    alpha_first: float = knob(0.5, low=0.1, high=4.0, help="query width of the first block, in widths of the model")
    alpha_last: float = knob(1.0, low=0.1, high=4.0, help="query width of the last block")
    beta_first: float = knob(0.5, low=0.25, high=16.0, help="neurons of the first block, in widths of the model")
    beta_last: float = knob(4.0, low=0.25, high=16.0, help="neurons of the last block")
    round_to: int = knob(32, low=1, high=1024, help="neurons are a multiple of this; the paper has 256")

    paper: ClassVar[str] = "openelm"
    facts: ClassVar[Facts] = Facts(
        stage="initialize",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="faster, smaller, smaller KV-cache",
    )

    def shapes(
        self, width: int, blocks: int, head_dim: int, queries: int = 1, query_width: int | None = None
    ) -> list[BlockShape]:
        """The shape of each block of a model; `queries` heads share a key-value head, `query_width` is `width` if not
        given and what alpha is a share of."""
        whole, group = query_width or width, head_dim * queries
        alphas = spread(self.alpha_first, self.alpha_last, blocks)
        betas = spread(self.beta_first, self.beta_last, blocks)
        groups = [rounded(alpha * whole, group) // group for alpha in alphas]
        neurons = [rounded(beta * width, self.round_to) for beta in betas]
        return [BlockShape(g * queries, g, n) for g, n in zip(groups, neurons)]

    def within(self, weights: int, width: int, blocks: int, head_dim: int, queries: int = 1) -> Self:
        """These settings with both betas multiplied so that the blocks come closest to so many weights together.

        Raises UserError when no multiple within the ranges of the knobs is within a tenth of it.
        """
        found = [(abs(one.weights(width, blocks, head_dim, queries) - weights), one) for one in self._multiples()]
        off, best = min(found, key=lambda pair: pair[0], default=(weights, self))
        if off > 0.1 * weights:
            raise UserError(
                f"{blocks} blocks of width {width} cannot have about {weights} weights; give another width or alpha"
            )
        return best

    def _multiples(self) -> Iterator[Self]:
        """These settings with all multiples of their betas that the knobs allow, in steps of half a percent."""
        limits = self.knobs()["beta_first"]
        low, high = sorted((self.beta_first, self.beta_last))
        factor = 1.0001 * (limits.low or 0) / low  # just inside
        while factor * high <= (limits.high or high):
            yield self.with_(beta_first=self.beta_first * factor, beta_last=self.beta_last * factor)
            factor *= 1.005

    def weights(self, width: int, blocks: int, head_dim: int, queries: int = 1) -> int:
        """Weights of all blocks of a Llama with these settings, norms not counted."""
        return sum(shape.weights(width, head_dim) for shape in self.shapes(width, blocks, head_dim, queries))

    def untrained(self, config: Any) -> nn.Module:
        """A new causal language model of transformers for a configuration, its blocks in this shape.

        Width, number of blocks, head width and queries per key-value head are those of the configuration; its numbers
        of heads and neurons become the largest of a block. Weights are drawn by torch's random numbers.
        """
        from transformers import AutoModelForCausalLM

        if not isinstance(getattr(config, "num_key_value_heads", None), int):
            raise UserError(f"{self.name()} builds Llama-type models; {type(config).__name__} has no key-value heads")
        config = copy.deepcopy(config)
        queries = config.num_attention_heads // config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shapes = self.shapes(config.hidden_size, config.num_hidden_layers, head_dim, queries)
        config.head_dim, config.num_attention_heads = head_dim, _allowed(config.hidden_size, shapes, queries)
        config.num_key_value_heads = config.num_attention_heads // queries
        config.intermediate_size = max(shape.neurons for shape in shapes)
        model = AutoModelForCausalLM.from_config(config).eval()
        parts = _parts(model, self.name())
        cut_(model, None, parts, shapes)
        for name in (n for a, mlp in parts for n in (a.q, a.k, a.v, a.o, *mlp.into, mlp.down)):
            layer: Any = model.get_submodule(name)
            nn.init.normal_(layer.weight, std=config.initializer_range)  # the cut kept the largest: draw without a bias
        return model

    def targets(self, model: nn.Module) -> Iterator[str]:
        """The name of the list of blocks. Raises UserError unless all are ordinary transformer blocks."""
        _parts(model, self.name())
        yield needs_blocks(model, self.name()).block_list

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        to_linear_(model)
        parts = _parts(model, self.name())
        first, _ = parts[0]
        queries, width = first.heads // first.kv_heads, _inputs(model, first.q)
        whole = max(a.heads * a.head_dim for a, _ in parts)
        (settings,) = layers.values()
        cut_(model, workload, parts, settings.shapes(width, len(parts), first.head_dim, queries, whole))
        return model


def cut_(
    model: nn.Module, workload: Workload | None, parts: Sequence[tuple[Attention, Mlp]], shapes: Sequence[BlockShape]
) -> None:
    """Keep in each block as many key-value heads, with their queries, and neurons as its shape says, or all it has.

    By the error that calibration data show, by norms without a workload.
    """
    heads = {
        a.name: Heads(ratio=1 - min(shape.kv_heads, a.kv_heads) / a.kv_heads) for (a, _), shape in zip(parts, shapes)
    }
    Heads().apply_(model, workload, heads)
    score = "magnitude" if workload is None else "activation"
    neurons = {}
    for (_, mlp), shape in zip(parts, shapes):
        there = _inputs(model, mlp.down)
        neurons[mlp.name] = Neurons(ratio=1 - min(shape.neurons, there) / there, score=score, round_to=1)
    Neurons().apply_(model, workload, neurons)


def _parts(model: nn.Module, method: str) -> list[tuple[Attention, Mlp]]:
    """Attention and feed-forward part of every block, all of ordinary linear layers."""
    blocks, found = needs_blocks(model, method).blocks, []
    cuttable = {*Heads().targets(model), *Neurons().targets(model)}
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        if attention is None or mlp is None or not {attention.name, mlp.name} <= cuttable:
            raise UserError(
                f"{method} needs attention and a feed-forward part of ordinary linear layers in every block; "
                f"{block.name!r} of this {type(model).__name__} is another kind"
            )
        found.append((attention, mlp))
    return found


def _allowed(width: int, shapes: Sequence[BlockShape], queries: int) -> int:
    """Heads that a configuration may name: at least those of every block, and transformers wants a divisor of the
    width."""
    most = max(shape.heads for shape in shapes)
    return next((n for n in range(most, width + 1, queries) if width % n == 0), most)


def _inputs(model: nn.Module, name: str) -> int:
    layer: Any = model.get_submodule(name)
    return layer.in_features
