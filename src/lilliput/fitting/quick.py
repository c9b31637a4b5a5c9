"""A candidate without healing: what is left of its accuracy once the statistics of its batch norms are taken anew.

After channels or ranks were cut, the stored means and variances are those of another net, and accuracy falls to chance
whatever was cut. With new statistics it ranks candidates as they rank after training: Li, Wu, Su and Wang, EagleEye,
2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lilliput.fitting.recover import bfloat16_pays, parts_around_recovery
from lilliput.hooks import channels_last, renewing_norms
from lilliput.plan import Plan
from lilliput.workload import Batch, Workload


def quick_model(plan: Plan, workload: Workload, batches: Sequence[Batch]) -> nn.Module:
    """The plan applied, with statistics of batch norms from `batches` between structural steps and quantization."""
    before, after = parts_around_recovery(plan)
    if not before:
        return plan.apply(workload)
    model = Plan(before).apply(workload)
    reestimate_norms_(model, workload, batches)
    return Plan(after).apply(dataclasses.replace(workload, model=model))


@contextmanager
def quick_products(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block float products run in bfloat16, where `wanted` and where this machine gains from it."""
    with channels_last(model), torch.autocast("cpu", torch.bfloat16, enabled=wanted and bfloat16_pays()):
        yield


def reestimate_norms_(model: nn.Module, workload: Workload, batches: Sequence[Batch]) -> None:
    """Means and variances of all batch norms, averaged over `batches`; the model is left in evaluation mode."""
    with renewing_norms(model) as norms, quick_products(model):
        for batch in batches if norms else ():
            workload.forward(model, batch)
