"""A small model for one task from a large general one: adapt that, let it answer, learn its answers, fine-tune.

A linear head on the large model's features learns the few labels there are; its answers to unlabelled inputs teach the
small model, which then sees the labels. `retrieve` finds unlabelled inputs that resemble the labelled ones.

    result = TaskOrientedTransfer().transfer(features, student, labelled, unlabelled)   # result.model, result.seconds
    picks = retrieve(features_of(gallery), features_of(labelled), 1000)

`features` gives one vector per input; `labelled` is {"input" (n, ...), "label" (n,)}, `unlabelled` the inputs alone.

Paper: Vemulapalli et al., Knowledge Transfer from Vision Foundation Models for Efficient Training of Small
Task-specific Models, ICML 2024 (arXiv 2311.18237). It also adapts the large model by fine-tuning all of it and matches
features; here its features stay as they are, and only answers are matched. Details of `retrieve` are our own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import LABELLED, Facts, Settings, knob
from lilliput.methods.distill.logits import distillation_loss
from lilliput.training import train
from lilliput.workload import Batch


@dataclass(frozen=True)
class Transferred:
    """A student that knows its task, the large model's head for it, and the seconds of each part."""

    model: nn.Module
    head: Head
    seconds: dict[str, float]  # features, head, learning, tuning


@dataclass(frozen=True)
class TaskOrientedTransfer(Settings):
    """Teach a small model one task with the answers of an adapted large model to unlabelled inputs."""

    steps: int = knob(500, low=0, high=10_000_000, help="updates on the large model's answers")
    tuning_steps: int = knob(100, low=0, high=10_000_000, help="updates on the labels afterwards")
    batch: int = knob(64, low=1, high=100_000, help="inputs of an update")
    lr: float = knob(3e-3, low=1e-6, high=1.0, log=True, help="highest learning rate of AdamW on the answers")
    tuning_lr: float = knob(3e-4, low=1e-7, high=1.0, log=True, help="the same on the labels")
    temperature: float = knob(1.0, low=0.1, high=20.0, log=True, help="softens the answers")
    decay: float = knob(1e-2, low=0.0, high=100.0, help="weight of the squared weights of the head")
    seed: int = knob(0, low=0, high=2**62, help="order of the data")
    facts: ClassVar[Facts] = Facts(stage="distill", data=LABELLED, effect="a small model from few labels")
    paper: ClassVar[str] = "task_oriented_transfer"

    def transfer(self, features: nn.Module, student: nn.Module, labelled: Batch, unlabelled: Tensor) -> Transferred:
        """A taught copy of the student, whose outputs are as many logits as there are classes.

        Raises UserError, before the large model is asked, for labels, inputs or a student that do not fit each other.
        """
        _check_fit(student, labelled, unlabelled)
        start = perf_counter()
        ours, theirs = features_of(features, labelled["input"]), features_of(features, unlabelled)
        found = perf_counter()
        head = Head.fitted(ours, labelled["label"], self.decay)
        taught = head(theirs)
        adapted = perf_counter()
        model = copy.deepcopy(student)
        self.learn_(model, unlabelled, taught)
        learned = perf_counter()
        self.tune_(model, labelled)
        times = {"features": found - start, "head": adapted - found, "learning": learned - adapted}
        return Transferred(model, head, times | {"tuning": perf_counter() - learned})

    def learn_(self, model: nn.Module, inputs: Tensor, taught: Tensor) -> None:
        """Train a model on logits (n, classes) for inputs (n, ...)."""

        def loss(model: nn.Module, picks: Tensor) -> Tensor:
            return distillation_loss(_logits(model, inputs[picks]), taught[picks], self.temperature)

        self._train_(model, len(inputs), loss, self.steps, self.lr)

    def tune_(self, model: nn.Module, labelled: Batch) -> None:
        """Train a model on the labels."""

        def loss(model: nn.Module, picks: Tensor) -> Tensor:
            return F.cross_entropy(_logits(model, labelled["input"][picks]), labelled["label"][picks])

        self._train_(model, len(labelled["label"]), loss, self.tuning_steps, self.tuning_lr)

    def _train_(self, model: nn.Module, count: int, loss: Any, steps: int, lr: float) -> None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        train(model, order.split(self.batch), loss, steps=steps, lr=lr, clip_norm=1.0, seed=self.seed)


class Head(nn.Module):
    """A linear classifier of standardized features (n, D) -> logits (n, classes)."""

    def __init__(self, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight / scale)
            self.linear.bias.copy_(bias - (weight / scale) @ mean)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)

    @classmethod
    def fitted(cls, features: Tensor, labels: Tensor, decay: float) -> Head:
        """The logistic regression with the least loss plus `decay` times the mean square of weights per class.

        Raises UserError when fewer than two classes are labelled.
        """
        classes = classes_of(labels, len(features))
        mean, scale = features.mean(0), features.std(0).clamp_min(1e-4 * float(features.std()) + 1e-12)
        x = (features - mean) / scale
        weight = torch.zeros(classes, x.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(x @ weight.T + bias, labels) + decay * weight.square().sum() / classes
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)  # type: ignore[arg-type]
        return cls(mean, scale, weight.detach(), bias.detach()).requires_grad_(False)


def classes_of(labels: Tensor, inputs: int) -> int:
    """How many classes the labels (n,) of so many inputs are of. Raises UserError for others than numbers from 0."""
    fits = labels.ndim == 1 and len(labels) == inputs and not labels.is_floating_point()
    if not fits or len(labels.unique()) < 2 or int(labels.min()) < 0:
        seen = f"{labels.unique().tolist()!s:.80} of the shape {tuple(labels.shape)}"
        raise UserError(f"{inputs} inputs have the labels {seen}; give one label from 0 for each, of at least two "
                        "classes")  # fmt: skip
    return int(labels.max()) + 1


def _check_fit(student: nn.Module, labelled: Batch, unlabelled: Tensor) -> None:
    missing = [name for name in ("input", "label") if name not in labelled]
    if missing or len(unlabelled) == 0:
        raise UserError(
            f"labelled holds {', '.join(labelled) or 'nothing'} and there are {len(unlabelled)} unlabelled inputs; "
            "give {'input', 'label'} and at least one unlabelled input"
        )
    classes = classes_of(labelled["label"], len(labelled["input"]))
    outputs = features_of(student, labelled["input"][:1]).shape[1]
    if outputs != classes:
        raise UserError(
            f"the student has {outputs} outputs, but the labels are of {classes} classes; give one for each"
        )


def retrieve(gallery: Tensor, queries: Tensor, count: int, balanced: bool = True) -> Tensor:
    """(count,) different rows of `gallery` (n, D) that resemble the `queries` (q, D) most, by cosine.

    Balanced, every query in turn takes the nearest row that is still there, so that none rules; otherwise those with
    the highest similarity to any query are taken. Raises UserError when there are fewer rows.
    """
    if not 0 < count <= len(gallery) or len(queries) == 0:
        raise UserError(f"{count} of {len(gallery)} rows were asked for by {len(queries)} queries; ask for 1 to all")
    similarity = F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T  # (q, n)
    if not balanced:
        return similarity.amax(0).topk(count).indices
    ranked = similarity.argsort(dim=-1, descending=True).tolist()
    taken: dict[int, None] = {}
    following = [iter(row) for row in ranked]
    while len(taken) < count:
        for rows in following:
            nearest = next((row for row in rows if row not in taken), None)
            if nearest is not None and len(taken) < count:
                taken[nearest] = None
    return torch.tensor(list(taken))


@torch.no_grad()
def features_of(features: nn.Module, inputs: Tensor, batch: int = 64) -> Tensor:
    """(n, D) vectors of inputs (n, ...). Raises UserError for outputs of another shape."""
    with evaluating(features):
        found = torch.cat([_logits(features, part).float() for part in inputs.split(batch)])
    if found.ndim != 2 or len(found) != len(inputs):
        raise UserError(f"features has the shape {tuple(found.shape)} for {len(inputs)} inputs; give a vector for each")
    return found


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    out = model(inputs)
    return getattr(out, "logits", out)
