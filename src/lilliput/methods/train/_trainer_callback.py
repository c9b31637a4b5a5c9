"""What runs inside transformers' Trainer; apart, so that the rest needs no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lilliput.errors import UserError

if TYPE_CHECKING:
    from lilliput.methods.train._resumable import ResumableSampler
    from lilliput.methods.train.early_stop import Stopper
    from lilliput.methods.train.epas import Sharing


class TrainerStopper(TrainerCallback):
    """Looks at the model every few steps of a Trainer, and stops it."""

    def __init__(self, stopper: Stopper):
        self.stopper = stopper

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        every, share = self.stopper.settings.every, state.global_step / state.max_steps
        if state.global_step % every == 0 and self.stopper.look(share, kwargs["model"]).stop and self.stopper.stops:
            control.should_training_stop = True
        return control


class KeptState(TrainerCallback):
    """Writes a sampler's state into each checkpoint of a Trainer, and reads it when the Trainer resumes from one."""

    FILE = "lilliput_sampler.safetensors"

    def __init__(self, sampler: ResumableSampler):
        self.sampler = sampler

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        held = self.sampler.state_dict()
        tensors = {k: v.contiguous() for k, v in held.items() if isinstance(v, Tensor)}
        plain = {k: v for k, v in held.items() if not isinstance(v, Tensor)}
        save_file(tensors, _checkpoint(args, state) / self.FILE, {"state": json.dumps(plain)})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:
            return
        file = _checkpoint(args, state) / self.FILE
        if not file.exists():
            raise UserError(
                f"there is no {file}, which the sampler goes on from; resume with the output_dir of that run"
            )
        with safe_open(file, "pt") as stored:
            plain = json.loads((stored.metadata() or {})["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        self.sampler.load_state_dict(plain | tensors)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class TrainerSharing(TrainerCallback):
    """Lets more and more layers of the model of a Trainer reuse attention."""

    def __init__(self, sharing: Sharing):
        self.sharing = sharing

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sharing.see_(kwargs["model"], state.global_step / state.max_steps)
