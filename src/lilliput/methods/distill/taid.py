"""Learn from targets that move from the student's own answers to the teacher's.   L = T^2 KL(p_t || softmax(s / T))

p_t = softmax(((1 - t) s' + t z) / T), where s' are the student's logits without their gradient and z the teacher's. t
rises from `t_start` to `t_end`, never slower than a straight line over `steps`, and faster while the loss falls: m, the
running mean of its relative fall, adds alpha sigmoid(m) (1 - t) at each step.

    loss = Taid(steps=1000).soft_loss()                  # plain PyTorch: loss(student_logits, teacher_logits)
    Taid(steps=1000).apply(student, workload)            # lilliput's own loop
    Taid(steps=1000).trainer(student, arguments, teacher, train_dataset=data).train()            # transformers

Paper: Shing et al., TAID: Temporally Adaptive Interpolated Distillation, ICLR 2025 (arXiv 2501.16937), with its default
settings; that a rise of the loss counts as the whole of it at most is ours. In a run alpha adds about alpha steps / 2
of the way, so runs of fewer than some 4,000 steps follow the straight line unless it is raised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import knob
from lilliput.methods.distill.logits import Logits, check_same_question, distillation_loss


@dataclass(frozen=True)
class Taid(Logits):
    """Train a compressed model on targets between its own answers and the original's, nearer to these step by step.

    `steps` counts calls of the loss: with gradient accumulation several for each update.
    """

    temperature: float = knob(1.0, low=0.1, high=20.0, log=True, help="softens target and student")
    t_start: float = knob(0.4, low=0.0, high=1.0, help="the teacher's share of the target at the beginning")
    t_end: float = knob(1.0, low=0.0, high=1.0, help="the teacher's largest share")
    alpha: float = knob(5e-4, low=0.0, high=1.0, help="how fast the share rises beside the line; 0: not at all")
    beta: float = knob(0.99, low=0.0, high=1.0, help="memory of the running mean of the loss's relative fall")
    paper: ClassVar[str] = "taid"

    def __post_init__(self):
        super().__post_init__()
        if self.t_end < self.t_start:
            raise UserError(f"Taid.t_end is {self.t_end}, below t_start {self.t_start}; the share can only rise")

    def soft_loss(self) -> TaidLoss:
        """A loss that remembers how far the teacher's share has risen; a new one for every run."""
        return TaidLoss(self)


class TaidLoss(nn.Module):
    """loss(student, teacher) of logits (..., C), in nats. Each call with a gradient moves `t` afterwards.

    The state is in `state_dict()`: t, momentum, the loss before, and the number of calls.
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor
    calls: Tensor

    def __init__(self, settings: Taid):
        super().__init__()
        self.settings = settings
        values = {"t": settings.t_start, "momentum": 0.0, "previous": math.nan, "calls": 0.0}
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_same_question(student, teacher)
        target = torch.lerp(student.detach().float(), teacher.float(), float(self.t))
        loss = distillation_loss(student, target, self.settings.temperature)
        if loss.requires_grad:
            self._advance_(float(loss.detach()))
        return loss

    def _advance_(self, loss: float) -> None:
        s, t, before = self.settings, float(self.t), float(self.previous)
        self.calls += 1
        if math.isfinite(before):
            fall = max((before - loss) / max(before, 1e-12), -1.0)
            self.momentum.mul_(s.beta).add_((1 - s.beta) * fall)
            line = s.t_start + (s.t_end - s.t_start) * min(float(self.calls) / max(s.steps, 1), 1.0)
            added = s.alpha * float(torch.sigmoid(self.momentum)) * (1 - t)
            self.t.fill_(min(s.t_end, max(line, t + added)))
        self.previous.fill_(loss)
