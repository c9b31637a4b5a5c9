"""A training on disk: parameters, buffers, optimizer, callbacks, losses and torch's random numbers in one safetensors
file; what is no tensor stands as JSON in its header. Nothing is pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.errors import UserError

if TYPE_CHECKING:
    from lilliput.training import Callback, State

FORMAT = 1


def save(file: Path, state: State, watchers: Sequence[Callback] = ()) -> None:
    """Write the run to `file`, beside it first and then renamed, so that a crash leaves the old one."""
    tensors = {f"model.{name}": t for name, t in tensors_of(state.model)}
    optimizer = state.optimizer.state_dict()
    scalars = {"optimizer": _split(optimizer["state"], "optimizer", tensors)}
    scalars |= {"callbacks": _split({i: w.memory() for i, w in enumerate(watchers)}, "callback", tensors)}
    tensors["losses"] = torch.tensor(state.history.losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    frozen = [name for name, p in state.model.named_parameters() if not p.requires_grad]
    plain = scalars | {"format": FORMAT, "groups": optimizer["param_groups"], "frozen": frozen, "lr": state.lr}
    plain |= {"seconds": state.history.seconds, "batches_per_epoch": state.batches_per_epoch}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    packed = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    save_file(packed, beside, {"training": _json(plain)})
    os.replace(beside, file)


def restore_(file: Path, state: State, watchers: Sequence[Callback] = ()) -> None:
    """Put a stored run back into `state`. Raises UserError for a damaged file or another model's.

    A learning rate other than the stored run's takes its place: all groups follow in proportion.
    """
    plain, tensors = _read(file)
    if plain.get("format") != FORMAT or plain.get("batches_per_epoch") != state.batches_per_epoch:
        raise UserError(f"checkpoint {file} belongs to another run (format or number of batches); delete it")
    copy_into_(state.model, _under("model", tensors), file)
    for name, parameter in state.model.named_parameters():
        parameter.requires_grad_(name not in plain["frozen"])
    slots = _join(plain["optimizer"], "optimizer", tensors)
    flat = [p for group in state.optimizer.param_groups for p in group["params"]]
    slots = {i: {k: _laid_out_as(flat[i], v) for k, v in slot.items()} for i, slot in slots.items()}
    state.optimizer.load_state_dict({"state": slots, "param_groups": plain["groups"]})
    _follow_rate_(state, plain.get("lr"))
    memories = _join(plain["callbacks"], "callback", tensors)
    for i, watcher in enumerate(watchers):
        watcher.recall(memories[i]) if memories.get(i) else None
    state.history.losses, state.history.seconds = tensors["losses"].tolist(), plain["seconds"]
    torch.set_rng_state(tensors["random"])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def copy_into_(model: nn.Module, tensors: dict[str, Tensor], file: Path | None = None) -> None:
    """Take the values of tensors by name. Raises UserError when they are not the model's."""
    own = dict(tensors_of(model))
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in tensors.items()}:
        raise UserError(f"checkpoint {file} belongs to another model; delete it or give another path")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as stored:
            plain = json.loads((stored.metadata() or {})["training"])
            return plain, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise UserError(f"checkpoint {file} cannot be read ({error}); delete it to start afresh") from None


def _follow_rate_(state: State, stored: float | None) -> None:
    if stored and stored != state.lr:
        for group in state.optimizer.param_groups:
            group["initial_lr"] *= state.lr / stored


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """Rounding can depend on the memory format (channels_last), so the optimizer's tensors get their parameter's."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if same else value


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): t for k, t in tensors.items() if k.startswith(f"{prefix}.")}


def _split(slots: dict[int, dict[str, Any]], prefix: str, tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Move the tensors of `slots` into `tensors`; what is left is plain."""
    for i, slot in slots.items():
        tensors.update({f"{prefix}.{i}.{k}": v for k, v in slot.items() if isinstance(v, Tensor)})
    return {i: {k: v for k, v in slot.items() if not isinstance(v, Tensor)} for i, slot in slots.items()}


def _join(plain: dict[str, dict[str, Any]], prefix: str, tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    return {int(i): values | _under(f"{prefix}.{i}", tensors) for i, values in plain.items()}


def _json(plain: dict[str, Any]) -> str:
    try:
        return json.dumps(plain)
    except TypeError as error:
        raise UserError(f"this optimizer or callback cannot be stored ({error}); train without a checkpoint") from None
