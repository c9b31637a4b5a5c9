"""Trials as Ray tasks: a trial with its parameters goes out, values and user attributes come back."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from optuna.trial import FrozenTrial

from lilliput.errors import UserError, missing_extra

POLL_S = 0.5  # how long Ctrl-C may go unnoticed


class Tasks:
    """Running tasks and the trial each belongs to."""

    def __init__(self, ray: Any, objective: Callable, slots: int):
        self._ray, self.slots = ray, slots
        self._evaluate = ray.remote(max_retries=1)(evaluate)
        self._objective = _shipped(ray, objective)
        self._running: dict[Any, FrozenTrial] = {}

    def __len__(self) -> int:
        return len(self._running)

    def submit(self, trial: FrozenTrial) -> None:
        """Start the evaluation of a trial whose parameters are set."""
        self._running[self._evaluate.remote(self._objective, trial)] = trial

    def finished(self) -> Iterator[tuple[FrozenTrial, Any, dict[str, Any], Exception | None]]:
        """(trial, values, user attributes, error) of the tasks that ended; waits up to half a second for one."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
        for task in ready:
            trial = self._running.pop(task)
            try:
                yield trial, *self._ray.get(task)
            except self._ray.exceptions.RayError as lost:
                yield trial, None, {}, RuntimeError(f"the Ray worker was lost: {str(lost).strip().splitlines()[-1]}")

    def cancel(self) -> list[FrozenTrial]:
        """Stop what is running; the trials that were not finished."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        trials = list(self._running.values())
        self._running.clear()
        return trials


def evaluate(objective: Callable, trial: FrozenTrial) -> tuple[Any, dict[str, Any], Exception | None]:
    """Runs on a worker; an error comes back as a value so that Ray neither wraps nor repeats it."""
    try:
        return objective(trial), trial.user_attrs, None
    except Exception as error:
        return None, trial.user_attrs, RuntimeError(f"{type(error).__name__}: {error}")


def _shipped(ray: Any, objective: Callable) -> Any:
    try:
        return ray.put(objective)
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"the objective cannot be sent to Ray's workers ({str(error).splitlines()[0]}); use a module-level "
            "function or an object of a module-level class, with attributes that can be pickled"
        ) from None


@contextmanager
def tasks(address: str, workers: int, objective: Callable) -> Iterator[Tasks]:
    """Tasks on the Ray at `address`; "local" starts one of `workers` or 2 processes and stops it afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: no telemetry
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # those of tasks we cancelled
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray") from None
    own = not ray.is_initialized()
    if own:
        _start(ray, address, workers)
    try:
        yield Tasks(ray, objective, workers or max(int(ray.cluster_resources().get("CPU", 1)), 1))
    finally:
        if own:
            ray.shutdown()


def _start(ray: Any, address: str, workers: int) -> None:
    local: dict[str, Any] = {}
    if address == "local":
        same_modules = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
        local = {"num_cpus": workers or 2, "include_dashboard": False, "runtime_env": same_modules}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no Ray answers at {address!r} ({reason}); start one with: ray start --head") from None
