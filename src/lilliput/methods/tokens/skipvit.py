"""A skip connection for tokens: those that the class token looks at least go around the middle blocks and come back.

Paper: SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection (Ataiefard et al., 2024, arXiv
2401.15293)

    block l:            importance_t = mean over heads of attention(class, t)
    blocks l+1 .. m:    x_t <- block(x of the class and the most important),  the others: x_t <- x_t
    blocks m+1 ..:      all tokens

without new weights, in training and afterwards. Which blocks are skipped is ours (reconstructed): from the middle to
the last but one or two. The surgery keeps the names of all weights, so a state_dict fits with and without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lilliput.anatomy import needs_blocks
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, Facts, Method, knob
from lilliput.methods.tokens._skipping import SCORES, SERVING, OrderingBlock, SkippedBlock
from lilliput.workload import Workload
from lilliput.zoo.nets import TransformerBlock, VisionTransformer


@dataclass(frozen=True)
class SkipViT(Method):
    """Let unimportant tokens skip the middle blocks of one of the zoo's vision transformers.

    Train the model afterwards. With `serving="all"` tokens skip in training alone.
    """

    drop: float = knob(0.55, low=0.0, high=0.95, per_layer=True, help="share of the tokens that skip a block")
    start: float = knob(0.5, low=0.0, high=1.0, help="share of the blocks before the first skipped one")
    end: float = knob(0.85, low=0.0, high=1.0, help="share of the blocks up to the last skipped one")
    score: str = knob("cls", choices=SCORES, help="importance: attention of the class token, length, or none at random")
    serving: str = knob("skip", choices=SERVING, help="outside of training: tokens skip too, or all run")

    paper: ClassVar[str] = "skipvit"
    facts: ClassVar[Facts] = Facts(
        stage="tokens",
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        effect="fewer tokens in the middle blocks, faster; at a loss of quality until it is trained",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.score == "random" and self.serving == "skip":
            raise UserError("SkipViT.score is 'random', by which a served model would answer at random; serving='all'")
        if self.start > self.end:
            raise UserError(f"SkipViT.start is {self.start}, after end, {self.end}; give a start that is not later")

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the blocks but the first. Raises UserError for other models and for blocks that were replaced."""
        names = [block.name for block in needs_blocks(model, self.name()).blocks]
        kinds = {type(model.get_submodule(name)) for name in names}
        if not isinstance(model, VisionTransformer) or kinds != {TransformerBlock}:
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UserError(
                f"{self.name()} knows the zoo's VisionTransformer with blocks of the kind TransformerBlock; this is a "
                f"{type(model).__name__} with {found}"
            )
        yield from names[1:]

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        blocks = [block.name for block in needs_blocks(model, self.name()).blocks]
        skipped = list(layers) if len(layers) < len(blocks) - 1 else self._middle(blocks)
        for name in ordering(blocks, skipped):
            set_module(model, name, OrderingBlock.of(_block(model, name), self.serving, self.score))
        for name in skipped:
            set_module(model, name, SkippedBlock.of(_block(model, name), self.serving, layers[name].drop))
        return model

    def _middle(self, blocks: list[str]) -> list[str]:
        """The blocks from `start` to `end`, one at least."""
        first = min(max(1, int(self.start * len(blocks))), len(blocks) - 1)
        return blocks[first : max(first + 1, int(self.end * len(blocks)))]


def ordering(blocks: list[str], skipped: Collection[str]) -> list[str]:
    """The blocks right before a run of skipped ones."""
    return [a for a, b in itertools.pairwise(blocks) if b in skipped and a not in skipped]


def _block(model: nn.Module, name: str) -> TransformerBlock:
    block = model.get_submodule(name)
    assert isinstance(block, TransformerBlock)
    return block
