"""Decoders with a part that learns beside a model: the settings of its training, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.cache import write_atomically
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import Decoder, knob
from lilliput.methods.distill.logits import batches_of, only
from lilliput.training import History, train
from lilliput.workload import Batch, Workload

DECAY = 0.8  # of the loss from one level of guesses to the next, as in the paper of Medusa


class Part(nn.Module):
    """What a decoder learned beside its model."""

    def rebuild_config(self) -> dict[str, Any]:
        """What the constructor takes, as plain JSON values."""
        raise NotImplementedError

    def save(self, file: str | Path) -> Path:
        """Write it to a safetensors file, what its constructor takes in the header."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        header = {"part": json.dumps([type(self).__name__, self.rebuild_config()])}
        return write_atomically(file, lambda beside: save_file(tensors, beside, header))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """What `save` wrote, to the bit. Raises UserError for a file that is damaged or holds something else."""
        try:
            with safe_open(file, "pt") as stored:
                kind, config = json.loads((stored.metadata() or {})["part"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise UserError(f"{str(file)!r} holds nothing that a decoder saved ({error}); train it again") from None
        if kind != cls.__name__:
            raise UserError(f"{str(file)!r} holds {kind}, not {cls.__name__}; load it with {kind}.load")
        part = cls(**config)
        part.load_state_dict(tensors)
        return part.eval()


@dataclass(frozen=True)
class LearnedDecoder(Decoder):
    """A decoder with a part that learns from a workload's text, while the model stays as it is."""

    steps: int = knob(200, low=0, high=1_000_000, help="updates of the weights in `train`")
    seconds: float = knob(0.0, low=0.0, help="end training after this long, whatever the steps; 0 sets no limit")
    places: int = knob(256, low=1, help="tokens of a batch behind which it learns to guess, drawn anew each step")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    seed: int = knob(0, low=0, help="first values, and order of the data")

    def learn_(self, part: Part, workload: Workload, loss: Callable[[Any, Batch], Tensor]) -> History:
        """Train a part in place on the workload's training text (else its calibration text); its losses."""
        model = workload.model
        with only(model, {}), evaluating(model):
            history = train(part, batches_of(workload), loss, steps=self.steps, seconds=self.seconds or None,
                            lr=self.lr, clip_norm=1.0, seed=self.seed)  # fmt: skip
        part.eval()
        return history
