"""Distillation inside transformers' Trainer; apart, so that the rest needs no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.methods.distill.logits import IGNORED, SoftLoss

LOSS_FILE = "soft_loss.safetensors"  # beside the model in a checkpoint


class DistillationTrainer(Trainer):
    """A Trainer whose model learns the answers of `teacher`: the loss is `soft_loss(student_logits, teacher_logits)`.

    `hard` above 0 mixes in the model's own loss. Positions whose label is -100 are left out. A `soft_loss` with a state
    (an nn.Module, such as that of `distill.taid`) is stored in every checkpoint and read by `resume_from_checkpoint`.
    """

    def __init__(self, *args: Any, teacher: nn.Module, soft_loss: SoftLoss, hard: float = 0.0, **options: Any):
        super().__init__(*args, **options)
        self.teacher, self.soft_loss, self.hard = teacher, soft_loss, hard
        self.loss_is_scaled_for_ga = False  # the loss is the mean of a batch
        if isinstance(self.soft_loss, nn.Module):
            self.add_callback(_Stored(self.soft_loss))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.get("labels")
        plain = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**(inputs if self.hard else plain))
        with evaluating(self.teacher), torch.no_grad():
            taught = self.teacher(**plain).logits
        causal = type(self.teacher).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        loss = self.soft_loss(*(counted(logits, labels, causal) for logits in (outputs.logits, taught)))
        if self.hard:
            loss = (1 - self.hard) * loss + self.hard * outputs.loss
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if folder and isinstance(self.soft_loss, nn.Module):
            restore_(self.soft_loss, Path(folder) / LOSS_FILE)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)


def counted(logits: Tensor, labels: Tensor | None, causal: bool) -> Tensor:
    """(n, C) logits whose answer is labelled; those of a causal model answer for the next position."""
    if labels is None or logits.ndim == labels.ndim + 1 == 2:
        return logits.flatten(0, -2)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != IGNORED]


def restore_(loss: nn.Module, file: Path) -> None:
    """Read a loss's state. Raises UserError when the file is missing or belongs to another loss."""
    try:
        loss.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{file} holds no state of {type(loss).__name__} ({what}); start without it") from None


class _Stored(TrainerCallback):
    """Writes the loss's state into each checkpoint."""

    def __init__(self, loss: nn.Module):
        self.loss = loss

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_file({k: v.clone() for k, v in self.loss.state_dict().items()}, folder / LOSS_FILE)
        return control
