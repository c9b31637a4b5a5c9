"""Depth: remove whole blocks, those that change the residual stream least first.

Paper: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (Men et al., 2024, arXiv 2403.03853)

    influence_i = 1 - E[ cos(x_i, x_{i+1}) ]        (x_i enters block i, the mean is over tokens)

In a convolutional net the blocks are those that give back the shape they take; places of the picture are its tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Anatomy, anatomy, needs_blocks, shape_keeping_blocks
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, PACKED_WEIGHTS, UNLABELLED, Facts, Method, knob
from lilliput.workload import Workload, need_workload


def influence(before: Tensor, after: Tensor) -> Tensor:
    """(..., dim) block inputs and outputs -> scalar, 1 - the mean cosine; 0 for a block that does nothing."""
    return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean()


def removable_blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, else of the convolutional ones that give back the shape they take."""
    return [b.name for b in anatomy(model).blocks] or shape_keeping_blocks(model)


def block_influences(model: nn.Module, workload: Workload) -> dict[str, float]:
    """Block name -> its influence on the residual stream, averaged over the calibration batches."""
    names = removable_blocks(model)
    sums = dict.fromkeys(names, 0.0)

    def hook(name: str):
        def see(_: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            states = (x.movedim(1, -1) if x.ndim == 4 else x for x in (before, after))
            sums[name] += float(influence(*states))

        return see

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    with attached(handles), torch.no_grad(), evaluating(model):
        for batch in workload.calibration:
            workload.forward(model, batch)
    return {name: total / len(workload.calibration) for name, total in sums.items()}


@dataclass(frozen=True)
class Depth(Method):
    """Remove whole blocks: the `blocks` of least influence, or exactly those that `layers` names."""

    blocks: int = knob(1, low=0, high=256, help="how many blocks to remove; unused when layers names them")

    facts: ClassVar[Facts] = Facts(
        stage="prune",
        keeps={FLOAT_WEIGHTS, PACKED_WEIGHTS, OUTPUT_SHAPE, LAYER_SHAPES},
        data=UNLABELLED,
        effect="faster, smaller, smaller KV-cache",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the blocks. Raises UserError for a model without any."""
        yield from removable_blocks(model) or (b.name for b in needs_blocks(model, self.name()).blocks)

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        names = list(self.targets(model))
        doomed = list(layers) if len(layers) < len(names) else self._weakest(model, workload, names, layers)
        found = anatomy(model)
        if found.blocks:
            drop_blocks_(model, found, doomed)
        else:
            to_identities_(model, doomed)
        return model

    def _weakest(
        self, model: nn.Module, workload: Workload | None, names: list[str], layers: Mapping[str, Self]
    ) -> list[str]:
        count = next(iter(layers.values())).blocks
        if count >= len(names) and anatomy(model).blocks:
            raise UserError(f"blocks is {count}, but the model has {len(names)}; give at most {len(names) - 1}")
        if count == 0:
            return []
        why = f"to look at calibration data (or name the blocks: layers=[{names[0]!r}])"
        data = need_workload(workload, self.name(), why)
        scores = block_influences(model, data)
        return sorted(names, key=lambda name: scores[name])[:count]


def drop_blocks_(model: nn.Module, found: Anatomy, doomed: list[str]) -> None:
    """Remove the named blocks and renumber the rest: their `layer_idx`, and counts and lists per layer in the configs.

    A block of an nn.Sequential becomes an nn.Identity, which is the same and keeps the other names.
    """
    blocks = model.get_submodule(found.block_list)
    before = len(blocks)  # pyright: ignore
    stays = [b for b in found.blocks if b.name not in doomed]
    if not stays:
        raise UserError(f"all {before} blocks would go; keep at least one")
    if isinstance(blocks, nn.Sequential):
        to_identities_(model, doomed)
        return
    gone = {b.index for b in found.blocks if b.name in doomed}
    keep_blocks_(model, found, [i for i in range(before) if i not in gone])


def keep_blocks_(model: nn.Module, found: Anatomy, kept: list[int]) -> None:
    """Make the blocks of a ModuleList those with the indices `kept`, in that order, copies where one comes again, and
    renumber them: their `layer_idx`, and counts and lists per layer in the configs."""
    blocks: Any = model.get_submodule(found.block_list)
    before, configs = len(blocks), {id(config): config for config in _configs(model)}
    survivors = [copy.deepcopy(blocks[i], dict(configs)) if i in kept[:at] else blocks[i] for at, i in enumerate(kept)]
    blocks._modules = {str(i): module for i, module in enumerate(survivors)}
    for i, block in enumerate(survivors):
        for module in block.modules():
            if type(getattr(module, "layer_idx", None)) is int:
                module.layer_idx = i
    for config in configs.values():
        shorten_config_(config, before, kept)


def to_identities_(model: nn.Module, doomed: list[str]) -> nn.Module:
    """Make each named block hand on what it gets."""
    for name in doomed:
        model.set_submodule(name, nn.Identity())
    return model


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object the modules hold, each once."""
    held = [vars(m)["config"] for m in model.modules() if "config" in vars(m)]
    return list({id(config): config for config in held}.values())


def shorten_config_(config: Any, before: int, kept: list[int]) -> None:
    if getattr(config, "num_hidden_layers", None) != before:
        return
    config.num_hidden_layers = len(kept)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == before:
            setattr(config, name, type(value)(value[i] for i in kept))
