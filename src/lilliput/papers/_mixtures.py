"""llama-tiny as a mixture of experts, and windows of its text, for experiments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lilliput.methods.experts.upcycle import Upcycle
from lilliput.papers.relu_strikes_back import Effort, tiny_workload
from lilliput.workload import Workload


def tiny_mixture(experts: int, top_k: int, steps: int, test_windows: int, seed: int) -> tuple[Workload, Any]:
    """The workload of llama-tiny, and a mixture made of its model and healed for `steps` updates on training text."""
    work = tiny_workload(Effort(steps, seeds=1, test_windows=test_windows), seed)
    return work, Upcycle(experts=experts, top_k=top_k, steps=steps, seed=seed).apply(work.model, work)


def text_of(work: Workload, split: str, windows: int) -> Tensor:
    """The first `windows` windows of a split, (windows, length)."""
    return torch.cat([batch["input_ids"] for batch in getattr(work, split)])[:windows]
