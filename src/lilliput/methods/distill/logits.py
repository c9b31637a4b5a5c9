"""Learn from the original model's answers.   L = (1 - h) T^2 KL(softmax(t / T) || softmax(s / T)) + h L_hard

Paper: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531). The teacher t
is the workload's model, the student s the model that is given; T^2 keeps the gradient's size the same for every T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import channels_last, evaluating
from lilliput.method import BLOCK_COUNT, LAYER_SHAPES, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.training import train
from lilliput.workload import Batch, Workload, need_workload

LEARNS = "whose model and data it learns from"
IGNORED = -100  # label of what the cross-entropy leaves out
SoftLoss = Callable[[Tensor, Tensor], Tensor]  # logits of student and teacher (..., C) -> nats


@dataclass(frozen=True)
class Logits(Method):
    """Train a compressed model to give the same distribution over classes or tokens as the original.

    Only float parameters that require a gradient move; of packed layers these are the biases, and the norms around
    them. `hard` above 0 mixes in the workload's own loss, which needs labels for a classifier.
    """

    temperature: float = knob(2.0, low=0.1, high=20.0, log=True, help="softens both distributions")
    hard: float = knob(0.0, low=0.0, high=1.0, help="weight of the workload's own loss; needs labels above 0")
    lr: float = knob(1e-3, low=1e-6, high=0.1, log=True, help="highest learning rate of AdamW")
    steps: int = knob(200, low=0, high=1_000_000, help="updates of the weights")
    seconds: float = knob(0.0, low=0.0, help="stop after this long, whatever the steps; 0 sets no limit")
    seed: int = knob(0, low=0, help="order of the data")
    bfloat16: bool = knob(False, choices=(True, False), help="products in bfloat16, weights and sums in float32")
    facts: ClassVar = Facts(
        stage="distill",
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=UNLABELLED,
        effect="wins back quality, same speed and size",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        yield from trainable_modules(model)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        work, soft_loss = need_workload(workload, self.name(), LEARNS), self.soft_loss()
        self.check(work, model)

        def loss_fn(student: nn.Module, batch: Batch) -> Tensor:
            logits, taught = work.forward(student, batch), teacher_logits(work, batch)
            soft = soft_loss(logits, taught)
            return soft if self.hard == 0 else (1 - self.hard) * soft + self.hard * hard_loss(work, logits, batch)

        with only(model, layers), evaluating(work.model):
            self.fit(model, work, loss_fn)
        return model

    def check(self, work: Workload, student: nn.Module) -> None:
        """Raises UserError, before anything is learned, for a student or data that it cannot be done with."""
        check_student(work, student)
        if self.hard:
            check_labels(work, student, "set hard=0")

    def soft_loss(self) -> SoftLoss:
        """How far a student's logits are from a teacher's; for plain PyTorch, and what subclasses replace."""
        return partial(distillation_loss, temperature=self.temperature)

    def trainer(self, model: nn.Module, arguments: Any, teacher: nn.Module, **options: Any) -> Any:
        """A `transformers.Trainer` of the student that learns from `teacher` with this loss; `lr`, `steps`, `seconds`,
        `seed` and `bfloat16` are those of `arguments`."""
        from lilliput.methods.distill._trainer import DistillationTrainer

        return DistillationTrainer(
            model, arguments, teacher=teacher, soft_loss=self.soft_loss(), hard=self.hard, **options
        )

    def fit(self, model: nn.Module, work: Workload, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> None:
        """Train `model` on the workload's training batches, or on its calibration batches when it has none."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                return loss_fn(model, batch)

        with channels_last(model), channels_last(work.model):
            train(model, batches_of(work), loss, steps=self.steps, seconds=self.seconds or None, lr=self.lr,
                  clip_norm=1.0, seed=self.seed)  # fmt: skip


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened logits (..., C), the mean over all leading dimensions, in nats."""
    check_same_question(student, teacher)
    s = F.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    t = F.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def check_same_question(student: Tensor, teacher: Tensor) -> None:
    """Raises UserError when logits differ in shape."""
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise UserError(f"student and teacher give logits of the shapes {shapes}; they must answer the same question")


# --- shared by the methods of this family ----------------------------------------------------------------------


def trainable_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that own float parameters which require a gradient; the model itself is called by its own
    name only when it owns some. Raises UserError when all float parameters are frozen."""
    floats = [p.requires_grad for p in model.parameters() if p.is_floating_point()]
    if floats and not any(floats):
        raise UserError(
            f"all {len(floats)} float parameters of {type(model).__name__} are frozen; call requires_grad_(True) on "
            "those that shall learn"
        )
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if any(p.requires_grad and p.is_floating_point() for p in own):
            yield name


@contextmanager
def only(model: nn.Module, names: Mapping[str, object]) -> Iterator[None]:
    """Within the block, only the parameters that the named modules own require a gradient."""
    before = {p: p.requires_grad for p in model.parameters()}
    chosen = {p for name in names for p in model.get_submodule(name).parameters(recurse=False)}
    try:
        for parameter in before:
            parameter.requires_grad_(before[parameter] and parameter in chosen)
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
            parameter.grad = None


def batches_of(work: Workload) -> Sequence[Batch]:
    """Training batches, or the calibration batches of a workload without any."""
    found = work.calibration if work.training is None else work.training
    return found if isinstance(found, Sequence) else list(found)


def _batches_in_memory(work: Workload) -> Sequence[Batch]:
    """The batches of `batches_of` where they need not be made first."""
    found = work.calibration if work.training is None else work.training
    return found if isinstance(found, Sequence) else ()


@torch.no_grad()
def check_student(work: Workload, student: nn.Module) -> None:
    """Raises UserError when a student does not answer the same question as the workload's model, or when one of them
    does not know a token of the data."""
    for model in (student, work.model):
        check_tokens(work, model)
    with evaluating(student), evaluating(work.model):
        check_same_question(work.forward(student, work.example), teacher_logits(work, work.example))


def check_tokens(work: Workload, model: nn.Module) -> None:
    """Raises UserError when the training data holds a token that a model of transformers does not embed."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    ids = [batch["input_ids"] for batch in _batches_in_memory(work) if "input_ids" in batch]
    known = getattr(getter(), "num_embeddings", None) if getter and ids else None
    if known is None:
        return
    low, high = min(int(part.min()) for part in ids), max(int(part.max()) for part in ids)
    if low < 0 or high >= known:
        raise UserError(
            f"the training data holds token {low if low < 0 else high}, but {type(model).__name__} knows {known}; "
            "use the tokenizer that belongs to the model"
        )


@torch.no_grad()
def check_labels(work: Workload, model: nn.Module, otherwise: str) -> None:
    """Raises UserError when the workload's loss is the cross-entropy and a training batch has no label for it, or one
    that the model has no output for; `otherwise` is what to do without labels."""
    batches = _batches_in_memory(work)
    if type(work).loss is not Workload.loss or not batches:
        return
    if any("label" not in batch for batch in batches):
        raise UserError(f"a batch has no 'label'; {otherwise} or give labelled data")
    labels = torch.cat([batch["label"].flatten() for batch in batches])
    with evaluating(model):
        classes = work.forward(model, work.example).shape[1]
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if len(wrong) and not labels.is_floating_point():
        raise UserError(
            f"a batch has the label {int(wrong[0])}, but {type(model).__name__} has {classes} outputs; "
            f"give labels from 0 to {classes - 1}"
        )


@torch.no_grad()
def teacher_logits(work: Workload, batch: Batch) -> Tensor:
    return work.forward(work.model, batch)


def hard_loss(work: Workload, logits: Tensor, batch: Batch) -> Tensor:
    """The workload's own loss of logits that are already there. Raises UserError for a classifier without labels."""
    try:
        return work.loss(_Answer(logits), batch)
    except KeyError as error:
        raise UserError(f"hard is above 0, but a batch has no {error}; set hard=0 or give labelled data") from None


class _Answer(nn.Module):
    """A model that gives the same logits whatever it is asked: saves a second pass through the student."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, *inputs, **named) -> Tensor:
        return self.logits
