"""Early stopping inside transformers' Trainer; apart, so that the rest needs no transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from lilliput.methods.train.early_stop import Stopper


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
