"""Train on the samples that still teach something: those whose outputs change most, chosen anew every few epochs.

After a warm-up on all samples, importance I_i = |p_i(t) - p_i(t-1)|^2 is the change of a sample's class probabilities
between two looks; the top share is trained on until the next look, when samples that were dropped may return.

    sampler = SwiftLearn(keep=0.3).sampler(labels, lambda: outputs_of(model, dataset))
    loader = DataLoader(dataset, batch_size=64, sampler=sampler)           # a plain loop, epoch after epoch

    class Chosen(Trainer):                                                 # transformers
        def _get_train_sampler(self, train_dataset=None): return sampler
    Chosen(model, args, train_dataset=dataset, callbacks=[sampler.for_trainer()])

A look costs a forward pass over the whole data set, inside the loop; it costs nothing after a warm-up pass whose
outputs were all handed to `sampler.note(indices, logits)`. An epoch always has as many samples as the subset, so that
lengths and schedules stay right; a warm-up pass over everything takes several of them.

Paper: SwiftLearn: A Data-Efficient Training Method of Deep Learning Models using Importance Sampling, 2023 (arXiv
2311.15134). The exact measure is our reconstruction of the paper's; loss, error (EL2N) and chance can take its place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.train._resumable import ResumableSampler, check_state, permutation

Scorer = Callable[[], Tensor]  # -> logits of all samples in the order of the data set, (n, classes)
CHANGE, RANDOM = "change", "random"
SCORES = (CHANGE, "loss", "el2n", RANDOM)


@dataclass(frozen=True)
class SwiftLearn(Settings):
    """Train on the share of the samples that matters most, and look again every few epochs."""

    keep: float = knob(0.3, low=0.001, high=1.0, help="share of the samples that is trained on after the warm-up")
    size: int = knob(0, low=0, help="samples that are trained on, instead of a share; 0: by `keep`")
    score: str = knob(CHANGE, choices=SCORES, help="what makes a sample important: change, loss, error, or chance")
    warmup: int = knob(1, low=0, high=10_000, help="passes over all samples before the first choice")
    refresh: int = knob(4, low=1, high=1_000_000, help="epochs on one subset between two looks")
    balanced: bool = knob(False, choices=(False, True), help="as many samples of each class, as far as there are any")
    seed: int = knob(0, low=0, help="order of the samples, and the choice by chance")
    facts: ClassVar[Facts] = Facts(stage="train", data=LABELLED, effect="fewer samples to train on")
    paper: ClassVar[str] = "swiftlearn"

    def __post_init__(self):
        super().__post_init__()
        if self.score == CHANGE and self.warmup == 0:
            raise UserError("SwiftLearn.warmup is 0, but a change needs training between two looks; give 1 or more")

    def sampler(self, labels: Tensor | Sequence[int], scorer: Scorer | None = None) -> ImportanceSampler:
        """A `torch.utils.data.Sampler` over a data set with these labels (n,).

        `scorer()` gives the logits of all samples (n, classes) by the model as it is; without one every output must
        be handed to `note`. Raises UserError when the subset would be empty or larger than the data set.
        """
        return ImportanceSampler(self, labels, scorer)


class ImportanceSampler(ResumableSampler[int]):
    """Indices of the samples to train on. `chosen` is the present subset, empty while everything is trained on."""

    def __init__(self, settings: SwiftLearn, labels: Tensor | Sequence[int], scorer: Scorer | None = None):
        super().__init__()
        self.settings, self.scorer = settings, scorer
        self.labels = torch.as_tensor(labels).long().cpu()
        self.size = subset_size(settings, self.labels)
        self.pass_epochs = math.ceil(len(self.labels) / self.size)
        self.scoring_passes, self.scoring_seconds = 0, 0.0
        self._forget()

    def _forget(self) -> None:
        self.chosen = torch.zeros(0, dtype=torch.long)
        self.outputs = self.before = torch.zeros(len(self.labels), 0)  # log probabilities (n, classes) of two looks
        self.fresh = torch.zeros(len(self.labels), dtype=torch.bool)  # whose outputs are newer than the last look
        self.looked = -1  # epoch of the last look

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Stand at the beginning of an epoch; before the last look, it is another training's, and all is forgotten."""
        super().set_epoch(epoch)
        if epoch < self.looked:
            self._forget()

    def order(self, epoch: int) -> list[int]:
        s, warmup = self.settings, self.settings.warmup * self.pass_epochs
        if epoch > self.looked and is_look(epoch, warmup, self.pass_epochs, s):
            self.look(epoch, choose=epoch >= warmup)
        if epoch >= warmup:
            if not len(self.chosen):
                raise _unready(epoch)
            return self.chosen[permutation(s.seed, epoch, self.size)].tolist()
        turn, part = divmod(epoch, self.pass_epochs)
        order = permutation(s.seed, turn, len(self.labels))
        places = torch.arange(part * self.size, (part + 1) * self.size) % len(order)  # the last part is filled up
        return order[places].tolist()

    @torch.no_grad()
    def note(self, indices: Tensor | Sequence[int], logits: Tensor) -> None:
        """Keep outputs (B, classes) that training computed anyway. Raises UserError when one is not finite."""
        at, found = torch.as_tensor(indices).long().cpu(), logits.detach().float().cpu()
        if found.ndim != 2 or at.shape != found.shape[:1]:
            raise UserError(f"logits have the shape {tuple(found.shape)}, not ({at.numel()} samples, classes)")
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < len(self.labels):
            raise UserError(f"a sample has the index {int(at.max())}; the data set has {len(self.labels)} samples")
        if bad := at[~torch.isfinite(found).all(1)].tolist():
            raise UserError(
                f"the outputs, and so the loss, of {len(bad)} of {len(at)} samples are not finite (the first is sample "
                f"{bad[0]}); lower the learning rate, or look at the data"
            )
        if not self.outputs.shape[1]:
            self._check_classes(found.shape[1])
            self.outputs = torch.zeros(len(self.labels), found.shape[1])
        self.outputs[at] = F.log_softmax(found, 1)
        self.fresh[at] = True

    def _check_classes(self, classes: int) -> None:
        if int(self.labels.max()) >= classes:
            raise UserError(f"a label is {int(self.labels.max())}, but outputs have {classes} classes; give labels "
                            "from 0 and one output for each class")  # fmt: skip

    def look(self, epoch: int, choose: bool = True) -> None:
        """Score the samples, by a pass over all of them when not every output is fresh, and choose the subset."""
        s = self.settings
        if s.score != RANDOM and not bool(self.fresh.all()):
            self._pass()
        if choose:
            found = self._importance(epoch)
            self.chosen = most_important(found, self.size, self.labels if s.balanced else None)
        self.before = self.outputs.clone()
        self.fresh.zero_()
        self.looked = epoch

    def _pass(self) -> None:
        if self.scorer is None:
            missing = int((~self.fresh).sum())
            raise UserError(
                f"{missing} samples have no fresh output; give sampler(labels, scorer), or note every batch"
            )
        start = time.perf_counter()
        self.note(torch.arange(len(self.labels)), self.scorer())
        self.scoring_seconds += time.perf_counter() - start
        self.scoring_passes += 1

    def _importance(self, epoch: int) -> Tensor:
        if self.settings.score == RANDOM:
            return permutation(self.settings.seed, epoch, len(self.labels)).float()
        if self.settings.score == CHANGE:
            if self.before.shape != self.outputs.shape:
                raise _unready(epoch)
            return change(self.outputs, self.before)
        return loss(self.outputs, self.labels) if self.settings.score == "loss" else el2n(self.outputs, self.labels)

    def state_dict(self, at: tuple[int, int] | None = None) -> dict[str, Any]:
        tensors = {"chosen": self.chosen, "outputs": self.outputs, "before": self.before, "fresh": self.fresh}
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        return super().state_dict(at) | held | {"looked": self.looked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(len(state["fresh"]), len(self.labels), "samples")
        super().load_state_dict(state)
        for name in ("chosen", "outputs", "before", "fresh"):
            setattr(self, name, state[name].clone())
        self.looked = int(state["looked"])


def _unready(epoch: int) -> UserError:
    return UserError(f"the sampler stands at epoch {epoch} but has not seen the ones before; use load_state_dict first")


def subset_size(settings: SwiftLearn, labels: Tensor) -> int:
    """Samples of the subset. Raises UserError when they are none, or more than there are."""
    if labels.ndim != 1 or not len(labels) or int(labels.min()) < 0:
        least = f" and the least is {int(labels.min())}" if labels.numel() else ""
        raise UserError(
            f"labels have the shape {tuple(labels.shape)}{least}; give a class from 0 for each sample, (n,)"
        )
    size = settings.size or round(settings.keep * len(labels))
    if not 1 <= size <= len(labels):
        given = f"size={settings.size}" if settings.size else f"keep={settings.keep}"
        raise UserError(f"{given} asks for {size} of {len(labels)} samples; ask for at least 1 and at most all")
    return size


def is_look(epoch: int, warmup: int, pass_epochs: int, settings: SwiftLearn) -> bool:
    """At the end of the warm-up, every `refresh` epochs from there, and for a change also one pass before the first."""
    first = settings.score == CHANGE and epoch == warmup - pass_epochs
    return first or (epoch >= warmup and (epoch - warmup) % settings.refresh == 0)


def change(now: Tensor, before: Tensor) -> Tensor:
    """(n,): squared distance between the probabilities of two looks; both are log probabilities (n, classes)."""
    return (now.exp() - before.exp()).square().sum(1)


def loss(now: Tensor, labels: Tensor) -> Tensor:
    """(n,): cross-entropy of log probabilities (n, classes), in nats."""
    return F.nll_loss(now, labels, reduction="none")


def el2n(now: Tensor, labels: Tensor) -> Tensor:
    """(n,): distance |p - y| of the probabilities from the label (Paul et al., 2021)."""
    return (now.exp() - F.one_hot(labels, now.shape[1])).norm(dim=1)


def most_important(importance: Tensor, size: int, classes: Tensor | None = None) -> Tensor:
    """Indices of the `size` highest, ascending. With classes (n,) the best of each class come first, then the second
    best of each, and so on; equals are taken in the order of the data set."""
    order = importance.argsort(descending=True, stable=True)
    if classes is not None:
        same = F.one_hot(classes[order]).cumsum(0).gather(1, classes[order].unsqueeze(1))  # place within the class
        order = order[same.squeeze(1).argsort(stable=True)]
    return order[:size].sort().values


def outputs_of(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 256,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    collate: Callable[[list], Any] | None = None,
) -> Tensor:
    """Logits (n, classes) of a whole data set in its order, in evaluation mode and without gradients.

    `forward(model, batch)` gives the logits of a batch; by default batches are pairs or dictionaries, whose labels are
    left out. torch's random state stays as it is.
    """
    loader = DataLoader(dataset, batch_size, collate_fn=collate, generator=torch.Generator())
    with evaluating(model), torch.no_grad():
        return torch.cat([(forward or _logits)(model, batch).float().cpu() for batch in loader])


def _logits(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        out = model(**{k: v for k, v in batch.items() if k not in ("label", "labels")})
    else:
        out = model(batch[0])
    return getattr(out, "logits", out)
