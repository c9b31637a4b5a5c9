"""A chain of students, each trained from scratch on what the one before says about the very same crop.

The first generation learns the labels; every later one the whole distribution that its predecessor, in evaluation mode,
gives for the changed picture that the student sees, without labels and without a temperature. A crop that shows
nothing of its class is no longer called by it.

    chain = LabelRefinery(generations=4).refine(make_model, data)            # chain[-1].model
    chain = LabelRefinery(generations=1).refine(make_small, data, refinery=trained_model)    # another architecture

Paper: Bagherinezhad et al., Label Refinery: Improving ImageNet Classification through Label Progression, 2018 (arXiv
1805.02641). Its crops of other sizes and its adversarial ones are left out: crops here are pictures moved by whole
pixels, mirrored and erased in part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.distill._views import ViewedDataset, Views
from lilliput.methods.distill.logits import distillation_loss
from lilliput.training import History
from lilliput.workload import Batch


@dataclass(frozen=True)
class Generation:
    """A trained student, and the mean entropy of what it was taught: 0 nats for labels."""

    model: nn.Module
    history: History
    target_nats: float


@dataclass(frozen=True)
class LabelRefinery(Settings):
    """Train students one after the other, each on the answers of the one before to the same crops."""

    generations: int = knob(3, low=1, high=1000, help="students trained, the first one included")
    steps: int = knob(1000, low=1, high=10_000_000, help="updates of each")
    batch: int = knob(64, low=1, high=100_000, help="pictures of an update")
    lr: float = knob(3e-3, low=1e-6, high=1.0, log=True, help="highest learning rate of AdamW")
    padding: int = knob(4, low=0, high=1000, help="pixels that a picture is moved by, at most")
    flip: bool = knob(True, choices=(True, False), help="mirror half of the crops")
    erase: float = knob(0.0, low=0.0, high=1.0, help="chance that a rectangle is erased")
    seed: int = knob(0, low=0, high=2**62, help="of the crops, the order of the data and the first weights")
    facts: ClassVar[Facts] = Facts(
        stage="distill", data=LABELLED, effect="better students, a training for each generation"
    )
    paper: ClassVar[str] = "label_refinery"

    def refine(self, make: Callable[[], nn.Module], data: Any, refinery: nn.Module | None = None) -> list[Generation]:
        """Every generation, the last one best taught. `make()` gives a new student; `data` is a map-style dataset of
        (picture (C, H, W), label). With a `refinery` the first generation learns from it, and labels are not used."""
        chain: list[Generation] = []
        for number in range(self.generations):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + number)
                student = make()
                chain.append(self._taught(student, data, refinery, self.seed + number))
            refinery = student.eval()
        return chain

    def _taught(self, student: nn.Module, data: Any, refinery: nn.Module | None, seed: int) -> Generation:
        if refinery is student:
            raise UserError("make() gave the same model again; let it build a new one for every generation")
        crops = ViewedDataset(data, Views(self.padding, self.flip, self.erase), seed)
        nats: list[float] = []

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            if refinery is None:
                return labelled_loss(_logits(model, batch), batch["label"])
            return refined_loss(model, refinery, batch, nats)

        history = crops.learn_(student, loss, self.batch, seed, steps=self.steps, lr=self.lr)
        return Generation(student, history, sum(nats) / len(nats) if nats else 0.0)


def refined_loss(student: nn.Module, refinery: nn.Module, batch: Batch, nats: list[float] | None = None) -> Tensor:
    """KL of the student from the refinery's answer to the same pictures: its gradient is that of the cross-entropy with
    soft targets. The targets' mean entropy is appended to `nats`."""
    with evaluating(refinery), torch.no_grad():
        targets = _logits(refinery, batch).float()
    if nats is not None:
        nats.append(float(torch.distributions.Categorical(logits=targets).entropy().mean()))
    return distillation_loss(_logits(student, batch), targets, 1.0)


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy. Raises UserError for a label without an output."""
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= logits.shape[-1]:
        raise UserError(
            f"a picture has the label {least if least < 0 else most}, but the student has {logits.shape[-1]} outputs; "
            "give labels from 0, or a refinery, which needs none"
        )
    return F.cross_entropy(logits, labels)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch["input"])
    return getattr(out, "logits", out)
