"""The one small training loop under recovery, quantization-aware training, distillation and the zoo.

A run that is killed and started again with the same `checkpoint` ends in exactly the state of an uninterrupted one:
parameters, buffers, optimizer, order of the data, torch's random numbers and callbacks are all stored, without pickle.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.errors import UserError

Schedule = Callable[[float], float]  # share of the run that is done, 0..1 -> factor on the learning rate
adamw = partial(torch.optim.AdamW, weight_decay=0.01)
FORMAT = 1


def cosine(warmup: float = 0.05, floor: float = 0.0) -> Schedule:
    """A linear rise over the first `warmup` share of the run, then half a cosine down to `floor`."""

    def factor(done: float) -> float:
        if done < warmup:
            return max(done / warmup, 1e-3)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))

    return factor


def constant(done: float) -> float:
    """A learning rate that does not change."""
    return 1.0


@dataclass
class History:
    """What a run did: the loss of every step (before its update), and how it ended."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # training time, earlier runs of the same checkpoint included
    interrupted: bool = False  # by Ctrl-C; the model holds the last finished step
    stopped: bool = False  # by a callback

    @property
    def steps(self) -> int:
        return len(self.losses)


@dataclass
class State:
    """What callbacks see. They may freeze parameters, change the optimizer's groups, or set `stop`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    history: History
    batches_per_epoch: int
    done: float = 0.0  # share of the run, 0..1
    stop: bool = False

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.history.steps

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.batches_per_epoch


class Callback:
    """Looks at, and may change, a run. Override what is needed; a callback with memory also overrides the last two."""

    def on_start(self, state: State) -> None:
        """Before the first step of this process, after a checkpoint was read."""

    def on_step(self, state: State) -> None:
        """After each update of the weights."""

    def on_epoch(self, state: State) -> None:
        """After each pass over the batches."""

    def on_end(self, state: State) -> None:
        """After the last step, also when Ctrl-C ended the run."""

    def memory(self) -> dict[str, Any]:
        """What a resumed run must know: tensors and plain JSON values."""
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` gave."""


class KeepBest(Callback):
    """Scores the model after each epoch and ends the run with the best weights seen."""

    def __init__(self, score: Callable[[nn.Module], float], higher_is_better: bool = True):
        self.score, self.sign = score, 1 if higher_is_better else -1
        self.best: float | None = None
        self.tensors: dict[str, Tensor] = {}

    def on_epoch(self, state: State) -> None:
        state.model.eval()
        value = float(self.score(state.model))
        state.model.train()
        if self.best is None or self.sign * value > self.sign * self.best:
            self.best = value
            self.tensors = {name: t.detach().clone() for name, t in _tensors(state.model)}

    def on_end(self, state: State) -> None:
        if self.tensors:
            _copy_into(state.model, self.tensors)

    def memory(self) -> dict[str, Any]:
        return {"best": self.best, **{f"best.{name}": t for name, t in self.tensors.items()}}

    def recall(self, memory: dict[str, Any]) -> None:
        self.best = memory["best"]
        self.tensors = {name.removeprefix("best."): t for name, t in memory.items() if isinstance(t, Tensor)}


class Progress(Callback):
    """A line on stderr every few seconds: share done, step, mean loss of the last 50 steps, seconds left."""

    def __init__(self, label: str = "training", every_s: float = 10.0):
        self.label, self.every_s, self.last = label, every_s, -math.inf

    def on_step(self, state: State) -> None:
        h = state.history
        if h.seconds - self.last < self.every_s and state.done < 1:
            return
        self.last = h.seconds
        recent = h.losses[-50:]
        left_s = h.seconds * (1 - state.done) / max(state.done, 1e-9)
        text = (
            f"{self.label} {state.done:4.0%}  step {h.steps}  loss {sum(recent) / len(recent):.4f}  {left_s:.0f} s left"
        )
        print(text, file=sys.stderr, flush=True)


def train(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: bool | str = False,
    seed: int = 0,
) -> History:
    """Train `model` in place on `loss_fn(model, batch)` until `steps` or `seconds` are used up, whichever is first.

    The order of the batches is drawn anew each epoch from `seed`. `optimizer(parameters, lr=lr)` gets every float
    parameter; frozen ones are skipped for as long as they are frozen. With `checkpoint` the run is stored there every
    `checkpoint_every_s` seconds and continues from it when the file exists. Ctrl-C ends the run after the step that is
    under way; a second one ends it at once. Raises UserError when the loss or its gradient is not finite.
    """
    _check(model, batches, steps, seconds)
    watchers = [*callbacks, *([Progress(progress if isinstance(progress, str) else "training")] if progress else [])]
    floats = [p for p in model.parameters() if p.is_floating_point()]
    state = State(model, optimizer(floats, lr=lr), History(), len(batches))
    for group in state.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if checkpoint is not None and checkpoint.exists():
        restore_(checkpoint, state, watchers)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    _call(watchers, "on_start", state)
    with _deferred_interrupt() as interrupt:
        _run(state, batches, loss_fn, schedule or cosine(), _Limits(steps, seconds), clip_norm, watchers, seed,
             _Saver(checkpoint, checkpoint_every_s), interrupt)  # fmt: skip
    _call(watchers, "on_end", state)
    for module, mode in modes:
        module.training = mode
    return state.history


@dataclass
class _Limits:
    steps: int | None
    seconds: float | None

    def done(self, history: History) -> float:
        """Share of the run that is behind, 0..1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(history.steps / self.steps if self.steps else 1.0)
        if self.seconds is not None:
            shares.append(history.seconds / self.seconds if self.seconds else 1.0)
        return min(max(shares), 1.0)


@dataclass
class _Saver:
    file: Path | None
    every_s: float
    last: float = field(default_factory=time.monotonic)

    def tick(self, state: State, watchers: list[Callback], now: bool = False) -> None:
        if self.file is not None and (now or time.monotonic() - self.last >= self.every_s):
            save(self.file, state, watchers)
            self.last = time.monotonic()


def _run(state, batches, loss_fn, schedule, limits, clip_norm, watchers, seed, saver, interrupt) -> None:
    before = state.history.seconds
    start = time.perf_counter()
    state.done = limits.done(state.history)
    while state.done < 1 and not state.stop:
        batch = batches[_order(seed, state.epoch, len(batches))[state.step % len(batches)]]
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(state.done)
        loss = _step_(state, loss_fn, batch, clip_norm)
        state.history.losses.append(loss)
        state.history.seconds = before + time.perf_counter() - start
        state.done = limits.done(state.history)
        _call(watchers, "on_step", state)
        if state.step % len(batches) == 0:
            _call(watchers, "on_epoch", state)
        saver.tick(state, watchers)
        if interrupt.is_set():
            state.history.interrupted = state.stop = True
    state.history.stopped = state.stop and not state.history.interrupted
    saver.tick(state, watchers, now=True)


def _step_(state: State, loss_fn: Callable, batch: Any, clip_norm: float | None) -> float:
    """One update; the loss before it."""
    state.optimizer.zero_grad(set_to_none=True)
    loss = loss_fn(state.model, batch)
    value = float(loss.detach())
    _finite(value, "loss", state)
    loss.backward()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
    _finite(float(norm), "norm of the gradient", state)
    state.optimizer.step()
    return value


def _finite(value: float, what: str, state: State) -> None:
    if not math.isfinite(value):
        lr = state.optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the {what} became {value} at step {state.step} (learning rate {lr:.3g}); lower lr, set clip_norm=1.0, "
            "or look for bad values in the data"
        )


def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def _call(watchers: list[Callback], event: str, state: State) -> None:
    for watcher in watchers:
        getattr(watcher, event)(state)


def _check(model: nn.Module, batches: Sequence[Any], steps: int | None, seconds: float | None) -> None:
    if steps is None and seconds is None:
        raise UserError("training has no end; give steps or seconds")
    if min(steps or 0, seconds or 0) < 0:
        raise UserError(f"training is to last {steps} steps, {seconds} seconds; give numbers that are not negative")
    if len(batches) == 0:
        raise UserError("the training data is empty; give at least one batch")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"{type(model).__name__} has no parameter that requires a gradient; there is nothing to train")


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that no update is cut in half; only the main thread can listen."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    usual = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        pressed.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)


# --- checkpoints: one safetensors file, the rest of the state as JSON in its header -------------------------------


def save(file: Path, state: State, watchers: Sequence[Callback] = ()) -> None:
    """Write the run to `file`, beside it first and then renamed, so that a crash leaves the old one."""
    tensors = {f"model.{name}": t for name, t in _tensors(state.model)}
    optimizer = state.optimizer.state_dict()
    scalars = {"optimizer": _split(optimizer["state"], "optimizer", tensors)}
    scalars |= {"callbacks": _split({i: w.memory() for i, w in enumerate(watchers)}, "callback", tensors)}
    tensors["losses"] = torch.tensor(state.history.losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    frozen = [name for name, p in state.model.named_parameters() if not p.requires_grad]
    plain = scalars | {"format": FORMAT, "groups": optimizer["param_groups"], "frozen": frozen}
    plain |= {"seconds": state.history.seconds, "batches_per_epoch": state.batches_per_epoch}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    packed = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    save_file(packed, beside, {"training": _json(plain)})
    os.replace(beside, file)


def restore_(file: Path, state: State, watchers: Sequence[Callback] = ()) -> None:
    """Put a stored run back into `state`. Raises UserError for a damaged file or another model's."""
    try:
        with safe_open(file, "pt") as stored:
            plain = json.loads((stored.metadata() or {})["training"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise UserError(f"checkpoint {file} cannot be read ({error}); delete it to start afresh") from None
    if plain.get("format") != FORMAT or plain.get("batches_per_epoch") != state.batches_per_epoch:
        raise UserError(f"checkpoint {file} belongs to another run (format or number of batches); delete it")
    _copy_into(state.model, _under("model", tensors), file)
    for name, parameter in state.model.named_parameters():
        parameter.requires_grad_(name not in plain["frozen"])
    slots = _join(plain["optimizer"], "optimizer", tensors)
    flat = [p for group in state.optimizer.param_groups for p in group["params"]]
    slots = {i: {k: _laid_out_as(flat[i], v) for k, v in slot.items()} for i, slot in slots.items()}
    state.optimizer.load_state_dict({"state": slots, "param_groups": plain["groups"]})
    memories = _join(plain["callbacks"], "callback", tensors)
    for i, watcher in enumerate(watchers):
        watcher.recall(memories[i]) if memories.get(i) else None
    state.history.losses, state.history.seconds = tensors["losses"].tolist(), plain["seconds"]
    torch.set_rng_state(tensors["random"])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: dict[str, Tensor], file: Path | None = None) -> None:
    own = dict(_tensors(model))
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in tensors.items()}:
        raise UserError(f"checkpoint {file} belongs to another model; delete it or give another path")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


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
