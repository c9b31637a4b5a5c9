"""The one small training loop under recovery, quantization-aware training, distillation and the zoo.

A run that is killed and started again with the same `checkpoint` ends in exactly the state of an uninterrupted one:
parameters, buffers, optimizer, order of the data, torch's random numbers and callbacks are all stored, without pickle.
Started by torchrun, several processes train together, each on its rows of every batch.
"""

from __future__ import annotations

import math
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
from torch import Tensor, nn

from lilliput.checkpoints import copy_into_, restore_, save, tensors_of
from lilliput.data_parallel import Processes, joined
from lilliput.errors import UserError

Schedule = Callable[[float], float]  # share of the run that is done, 0..1 -> factor on the learning rate
adamw = partial(torch.optim.AdamW, weight_decay=0.01)


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
    lr: float = 0.0  # the highest, as the run was asked for
    checkpoint: Path | None = None

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
            self.tensors = {name: t.detach().clone() for name, t in tensors_of(state.model)}

    def on_end(self, state: State) -> None:
        if self.tensors:
            copy_into_(state.model, self.tensors)

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
    data_parallel: bool | None = None,
) -> History:
    """Train `model` in place on `loss_fn(model, batch)` until `steps` or `seconds` are used up, whichever is first.

    The order of the batches is drawn anew each epoch from `seed`. `optimizer(parameters, lr=lr)` gets every float
    parameter; frozen ones are skipped for as long as they are frozen. With `checkpoint` the run is stored there every
    `checkpoint_every_s` seconds and continues from it when the file exists. Ctrl-C ends the run after the step that is
    under way; a second one ends it at once. Raises UserError when the loss or its gradient is not finite.

    In processes that torchrun started, all of which make this call with the same arguments, each takes its share of
    every batch and only the first one writes; `data_parallel` False trains each on its own, True joins a process group
    that the program made itself.
    """
    _check(model, batches, steps, seconds)
    processes = joined(data_parallel)
    label = progress if isinstance(progress, str) else "training"
    watchers = [*callbacks, *([Progress(label)] if progress and processes.first else [])]
    floats = [p for p in model.parameters() if p.is_floating_point()]
    state = State(model, optimizer(floats, lr=lr), History(), len(batches), lr=lr, checkpoint=checkpoint)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if checkpoint is not None and checkpoint.exists():
        restore_(checkpoint, state, watchers)
    processes.agree({"weights": sum(p.numel() for p in floats), "batches": len(batches), "finished steps": state.step})
    processes.spread_(model)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    _call(watchers, "on_start", state)
    with _deferred_interrupt() as interrupt:
        _run(state, batches, loss_fn, schedule or cosine(), _Limits(steps, seconds), clip_norm, watchers, seed,
             _Saver(checkpoint if processes.first else None, checkpoint_every_s), interrupt, processes)  # fmt: skip
    _call(watchers, "on_end", state)
    processes.spread_(model)
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


def _run(state, batches, loss_fn, schedule, limits, clip_norm, watchers, seed, saver, interrupt, processes) -> None:
    before = state.history.seconds
    start = time.perf_counter()
    state.done = limits.done(state.history)
    state.stop = processes.total(state.stop)[0] > 0
    while state.done < 1 and not state.stop:
        batch = batches[_order(seed, state.epoch, len(batches))[state.step % len(batches)]]
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(state.done)
        loss = _step_(state, loss_fn, batch, clip_norm, processes)
        state.history.losses.append(loss)
        seconds = before + time.perf_counter() - start
        state.history.seconds = processes.total(seconds if processes.first else 0.0)[0]
        state.done = limits.done(state.history)
        _call(watchers, "on_step", state)
        if state.step % len(batches) == 0:
            _call(watchers, "on_epoch", state)
        saver.tick(state, watchers)
        stopped, interrupted = processes.total(state.stop, interrupt.is_set())
        state.history.interrupted = interrupted > 0
        state.stop = stopped + interrupted > 0
    state.history.stopped = state.stop and not state.history.interrupted
    saver.tick(state, watchers, now=True)
    processes.total(0.0)  # none goes on to read the checkpoint before it is there


def _step_(state: State, loss_fn: Callable, batch: Any, clip_norm: float | None, processes: Processes) -> float:
    """One update; the loss before it, which is that of the whole batch in every process."""
    state.optimizer.zero_grad(set_to_none=True)
    rows, share = processes.rows(batch)
    loss = loss_fn(state.model, rows) if share else None
    value = processes.total(0.0 if loss is None else share * float(loss.detach()))[0]
    _finite(value, "loss", state)
    if loss is not None:
        loss.backward()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    processes.average_(parameters, share)
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
    _finite(float(norm), "norm of the gradient", state)
    state.optimizer.step()
    return value


def _finite(value: float, what: str, state: State) -> None:
    if not math.isfinite(value):
        lr = state.optimizer.param_groups[0]["lr"]
        kept = state.checkpoint is not None and state.checkpoint.exists()
        raise UserError(
            f"the {what} became {value} at step {state.step} (learning rate {lr:.3g}); lower lr, set clip_norm=1.0, "
            "or look for bad values in the data"
            + (f"; {state.checkpoint} is kept, and the next call goes on from it" if kept else "")
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
