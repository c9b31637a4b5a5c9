"""ReLU in the place of smooth activations, so that most neurons are exactly silent.

Paper: ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models (Mirzadeh et al., 2023, 2310.04564)

    stage 1:  activation(x) -> max(0, x - b)        stage 2:  also norm(x) -> max(0, norm(x)) before attention and FFN

b is 0, or the quantile of a block's pre-activations on the calibration data that silences the share asked for. The
model must be trained afterwards (distill.logits, distill.hidden); layers.sparse_ffn then skips the silent neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lilliput.anatomy import Block, Mlp, needs_blocks
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, UNLABELLED, Facts, Method, knob
from lilliput.methods.layers._rectified import RectifiedNorm, ShiftedReLU, activation_name
from lilliput.workload import Workload, need_workload

SAMPLES = 2**20  # pre-activations of a block that the quantile is taken from


@dataclass(frozen=True)
class Relufy(Method):
    """Replace the activations of feed-forward parts by (shifted) ReLUs, in stage 2 also put ReLUs behind the norms."""

    stage: int = knob(1, choices=(1, 2), help="1: activations; 2: also the norms before attention and feed-forward")
    sparsity: float = knob(
        0.0, low=0.0, high=0.99, per_layer=True, help="share of silent neurons that the shift is set for; 0: no shift"
    )
    paper: ClassVar[str] = "relu_strikes_back"
    facts: ClassVar[Facts] = Facts(
        stage="train",
        needs={FLOAT_WEIGHTS},
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        data=UNLABELLED,
        effect="sparse activations, at a loss of quality until it is trained",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the feed-forward modules. Raises UserError when none has an activation that is a module."""
        mlps = [b.mlp for b in needs_blocks(model, self.name()).blocks if b.mlp]
        found = [m.name for m in mlps if activation_name(model, m)]
        if not found:
            raise UserError(
                f"{self.name()} finds no activation to replace in {type(model).__name__}: feed-forward parts must hold "
                "theirs as a module (act_fn = nn.SiLU()), not call a function"
            )
        yield from found

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        blocks = {b.mlp.name: b for b in needs_blocks(model, self.name()).blocks if b.mlp}
        mlps = {name: mlp for name in layers if (mlp := blocks[name].mlp)}
        shifts = _shifts(model, workload, mlps, layers)
        norms = _norms(model, workload, [blocks[n] for n, settings in layers.items() if settings.stage == 2])
        for name, mlp in mlps.items():
            set_module(model, activation_name(model, mlp) or "", ShiftedReLU(shifts[name]))
        for name in norms:
            set_module(model, name, RectifiedNorm.from_norm(model.get_submodule(name)))
        return model


def shift_for(samples: Tensor, sparsity: float) -> float:
    """b >= 0 such that at least the share `sparsity` of the pre-activations is not above it."""
    if not samples.numel() or not torch.isfinite(samples).all():
        raise UserError("the pre-activations are not finite, or there are none; check the calibration data")
    rank = min(max(int(-(-sparsity * samples.numel() // 1)), 1), samples.numel())
    return max(0.0, float(samples.flatten().float().kthvalue(rank).values))


def _shifts(
    model: nn.Module, workload: Workload | None, mlps: Mapping[str, Mlp], layers: Mapping[str, Relufy]
) -> dict[str, float]:
    wanted = {n: mlp for n, mlp in mlps.items() if layers[n].sparsity > 0}
    found = dict.fromkeys(mlps, 0.0)
    if wanted:
        work = need_workload(workload, "layers.relufy", "to set the shift (or use sparsity=0)")
        samples = inputs_of(model, work, {n: activation_name(model, m) or "" for n, m in wanted.items()})
        found |= {n: shift_for(samples[n], layers[n].sparsity) for n in wanted}
    return found


@torch.no_grad()
def inputs_of(model: nn.Module, work: Workload, modules: Mapping[str, str]) -> dict[str, Tensor]:
    """Key -> evenly spaced samples of what reaches the named module on the calibration data."""
    kept: dict[str, list[Tensor]] = {key: [] for key in modules}
    limit = -(-SAMPLES // len(work.calibration))

    def keep(key: str):
        def see(module, args):
            values = args[0].detach().flatten()
            kept[key].append(values[:: max(1, values.numel() // limit)].float().clone())

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(key)) for key, name in modules.items()]
    with attached(handles), evaluating(model):
        for batch in work.calibration:
            work.forward(model, batch)
    return {key: torch.cat(parts) if parts else torch.zeros(0) for key, parts in kept.items()}


@torch.no_grad()
def _norms(model: nn.Module, workload: Workload | None, blocks: Iterable[Block]) -> list[str]:
    """Names of the norms whose output the attention or the feed-forward part of a block reads as it is."""
    blocks = list(blocks)
    if not blocks:
        return []
    work = need_workload(workload, "layers.relufy", "to find the norms (or use stage=1)")
    readers = {b.attention.q for b in blocks if b.attention} | {b.mlp.into[0] for b in blocks if b.mlp}
    outputs: list[tuple[str, Any]] = []
    found: dict[str, str] = {}

    def read(reader: str):
        def see(module, args):
            found.update((reader, norm) for norm, out in outputs if out is args[0])

        return see

    norms = [(n, m) for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    handles = [m.register_forward_hook(lambda _, args, out, n=n: outputs.append((n, out))) for n, m in norms]
    handles += [model.get_submodule(name).register_forward_pre_hook(read(name)) for name in readers]
    with attached(handles), evaluating(model):
        work.forward(model, {k: v[:1] for k, v in work.calibration[0].items()})
    if missing := sorted(readers - set(found)):
        raise UserError(f"no norm stands right before {missing[0]!r}; use stage=1")
    return [n for n in dict.fromkeys(found.values()) if not isinstance(model.get_submodule(n), RectifiedNorm)]
