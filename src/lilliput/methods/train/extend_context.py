"""Long documents for a model with a short window: it learns the document, answers, and is restored.

The document is cut into overlapping chunks of the model's window, and for a few epochs a part of the weights learns to
predict them; then the question is asked. Memory does not grow with the document, time does so linearly.

    with ExtendContext().read(model, document_ids):
        model.generate(question_ids)

Paper: Zahirnia et al., ETT: Expanding the Long Context Understanding Capability of LLMs at Test-Time, 2025 (arXiv
2507.06313). Overlap, rate and epochs are values of our own, and so is the choice among the parts that can learn: the
paper's best is the second layer of the feed-forward parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import FLOAT_WEIGHTS, Facts, Settings, knob
from lilliput.methods.train._adapting import PARTS, PARTS_HELP, adapting, learn_, token_ids


@dataclass(frozen=True)
class ExtendContext(Settings):
    """Let a model with a short window learn a long document before it answers, and forget it afterwards."""

    part: str = knob("ffn_out", choices=PARTS, help=PARTS_HELP)
    window: int = knob(512, low=2, high=1_000_000, help="tokens of a chunk; a model that reads fewer gets fewer")
    overlap: float = knob(0.5, low=0.0, high=0.9, help="share of a chunk that the next one repeats")
    epochs: int = knob(2, low=1, high=100, help="passes over the document")
    batch: int = knob(2, low=1, high=1024, help="chunks per update")
    lr: float = knob(3e-4, low=1e-7, high=0.1, log=True, help="learning rate")
    rank: int = knob(8, low=1, high=1024, help="width of the adapters, if those learn")
    seed: int = knob(0, low=0, help="order of the chunks, first values of adapters")
    facts: ClassVar[Facts] = Facts(
        stage="serve", needs={FLOAT_WEIGHTS}, effect="longer documents in constant memory, slower first answer"
    )
    paper: ClassVar[str] = "ett"

    @contextmanager
    def read(self, model: nn.Module, document: Any) -> Iterator[nn.Module]:
        """The model with the document (token ids, (T,) or (1, T)) in its weights; afterwards restored to the bit.

        Raises UserError for ids that the model does not know and for a model without float weights in `part`.
        """
        with adapting(model, self.part, self.rank, self.seed):
            self._learn_(model, document)
            yield model

    def memory(self, model: nn.Module, document: Any) -> dict[str, Tensor]:
        """What reading the document writes, by parameter: keep it (safetensors) and `recall` it later."""
        with adapting(model, self.part, self.rank, self.seed) as learning:
            self._learn_(model, document)
            return {name: p.detach().clone() for name, p in learning.items()}

    @contextmanager
    def recall(self, model: nn.Module, memory: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The model as `read` gives it, from a memory made with the same part and rank. Raises UserError otherwise."""
        with adapting(model, self.part, self.rank, self.seed) as learning:
            shapes = {name: tuple(p.shape) for name, p in learning.items()}
            if shapes != {name: tuple(tensor.shape) for name, tensor in memory.items()}:
                raise UserError(
                    f"the memory holds {len(memory)} tensors that do not fit part={self.part!r}, rank={self.rank} of "
                    f"{type(model).__name__}; recall it with the settings and the model that made it"
                )
            with torch.no_grad():
                for name, parameter in learning.items():
                    parameter.copy_(memory[name])
            yield model

    def _learn_(self, model: nn.Module, document: Any) -> None:
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or self.window
        ids = token_ids(document, model, "the document")
        pieces = chunks(ids, min(self.window, longest), self.overlap)
        batches = list(pieces.split(self.batch))
        learn_(model, batches, next_token_loss, self.epochs * len(batches), self.lr, self.seed)


def chunks(ids: Tensor, window: int, overlap: float) -> Tensor:
    """(T,) -> (n, window): pieces that repeat the share `overlap` of the one before, the last one ending at the end.

    A document shorter than the window is one piece. Raises UserError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError(f"the document has {len(ids)} tokens; there is nothing to learn from fewer than 2")
    window = min(window, len(ids))
    step = max(1, round(window * (1 - overlap)))
    starts = list(range(0, len(ids) - window + 1, step))
    if starts[-1] + window < len(ids):
        starts.append(len(ids) - window)
    return torch.stack([ids[s : s + window] for s in starts])


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of the tokens (B, T) after the first ones, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
