"""Opening a search's study and running its trials: in this process or on Ray, resumable whatever kills it.

A path means one SQLite file that this process alone writes (see `storage`); a database URL is Optuna's own storage,
which several drivers may share. Trials that were interrupted are marked failed and queued again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from lilliput.errors import UserError
from lilliput.fitting import _ray
from lilliput.fitting.storage import FileStorage

log = logging.getLogger(__name__)

FAILURES = 10  # so many failed trials in a row end a search: the mistake is not in the settings that are tried
RETRIES = 2  # how often a trial that took the process down with it is tried again
STALE_S = 3600.0  # when another machine's running trial in a shared database counts as lost
VIOLATION, WORKER, RETRY, ERROR = "violation", "worker", "retries", "error"  # user attributes of a trial

Objective = Callable[[Any], float | Sequence[float]]


@dataclass
class Ran:
    """What a run of trials did."""

    complete: int = 0
    failed: int = 0
    interrupted: bool = False


def open_study(
    where: Path | str | None,
    name: str,
    sampler: optuna.samplers.BaseSampler | None = None,
    directions: Sequence[str] = ("minimize",),
) -> optuna.Study:
    """The study `name` in the SQLite file or database URL `where` (None: memory), made or resumed.

    Raises UserError for a damaged or foreign file, one in use, an unreachable database, other directions than before.
    """
    if optuna.logging.get_verbosity() == optuna.logging.INFO:  # Optuna's default prints a line per trial
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted = [optuna.study.StudyDirection[d.upper()] for d in directions]
    study = optuna.create_study(
        storage=_storage(where), sampler=sampler, study_name=name, directions=wanted, load_if_exists=True
    )
    if study.directions != wanted:
        close_study(study)
        known = ", ".join(d.name.lower() for d in study.directions)
        raise UserError(
            f"study {name!r} in {_shown(where)} has the directions {known}, not {', '.join(directions)}; "
            "choose another name or another folder"
        )
    _requeue_lost(study)
    return study


def close_study(study: optuna.Study) -> None:
    """Write what is left and release the study's file."""
    if isinstance(study._storage, FileStorage):
        study._storage.close()


def _storage(where: Path | str | None) -> optuna.storages.BaseStorage:
    if where is None:
        return optuna.storages.InMemoryStorage()
    if "://" not in str(where):
        return FileStorage(where)
    try:
        return optuna.storages.get_storage(str(where))
    except ImportError as error:
        raise UserError(f"the driver of {_shown(where)} is not installed: {error.__cause__ or error}") from None
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the database {_shown(where)} cannot be used ({reason}); check its URL") from None


def _shown(where: Path | str | None) -> str:
    """`where` without the password of a URL."""
    with suppress(sqlalchemy.exc.ArgumentError):
        return sqlalchemy.make_url(str(where)).render_as_string(hide_password=True)
    return str(where)


# --- trials that were lost -------------------------------------------------------------------------------------


def _requeue_lost(study: optuna.Study) -> None:
    """Fail the running trials whose process is gone and queue their parameters again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if isinstance(study._storage, FileStorage) or _is_lost(trial):
            _give_up(study, trial, "its process ended")


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether the process that ran a trial of a shared database is gone, or silent for too long on another machine."""
    host, _, process = str(trial.user_attrs.get(WORKER, "")).partition("|")
    if host == socket.gethostname():
        pid, _, created = process.partition("|")
        try:
            return abs(psutil.Process(int(pid)).create_time() - float(created)) > 1
        except psutil.Error:
            return True
    start = trial.datetime_start
    return start is None or time.time() - start.timestamp() > STALE_S


def _worker() -> str:
    return f"{socket.gethostname()}|{os.getpid()}|{psutil.Process().create_time()}"


def _give_up(study: optuna.Study, trial: FrozenTrial | Trial, why: str) -> None:
    """Fail an unfinished trial; queue it again unless it was lost too often already."""
    retries, params = int(trial.user_attrs.get(RETRY, 0)), dict(trial.params)
    study._storage.set_trial_user_attr(trial._trial_id, ERROR, why)
    study.tell(trial.number, state=TrialState.FAIL)
    if params and retries < RETRIES:
        study.enqueue_trial(params, user_attrs={RETRY: retries + 1})


# --- running ---------------------------------------------------------------------------------------------------


def run_trials(
    study: optuna.Study,
    objective: Objective,
    trials: int | None = None,
    seconds: float | None = None,
    workers: int = 0,
    ray_address: str | None = None,
    on_trial: Callable[[FrozenTrial], Any] | None = None,
    durable: bool = True,
) -> Ran:
    """Run trials until the study holds `trials` complete ones, or for so many seconds.

    `objective(trial)` is Optuna's: it suggests its knobs and returns a value per objective; the user attribute
    `violation` says by how much limits are missed. One that raises is a failed trial. On Ray ("local", "auto" or an
    address) `workers` trials run at once, 0: one per CPU there; the first runs here, to learn the knobs. With `durable`
    a finished trial is on disk before the next starts; without, at most a second later (for predictions, which cost
    nothing to repeat). Ctrl-C ends the run, not the program. Raises UserError when the knobs are not the study's, or
    when there are only failures.
    """
    if trials is None and seconds is None:
        raise UserError("the search has no end; give a number of trials or of seconds")
    if workers and ray_address is None:
        raise UserError(f"workers is {workers} but trials run in this process; give a Ray address, for example 'local'")
    storage = study._storage
    if isinstance(storage, FileStorage):
        storage.durable = durable
    run = _Run(study, objective, trials, time.monotonic() + seconds if seconds is not None else None, on_trial)
    with _interrupts(run):
        run.on_ray(ray_address, workers) if ray_address else run.here()
    if isinstance(storage, FileStorage):
        storage.flush()
    return run.ran


@contextmanager
def _interrupts(run: _Run) -> Iterator[None]:
    """Ctrl-C stops between trials or inside an objective, never in the middle of a write; a second one always does."""

    def stop(number, frame):
        again, run.ran.interrupted = run.ran.interrupted, True
        if again or run.may_interrupt:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Run:
    """The state of one call of `run_trials`."""

    study: optuna.Study
    objective: Objective
    trials: int | None
    deadline: float | None
    on_trial: Callable[[FrozenTrial], Any] | None
    ran: Ran = field(default_factory=Ran)
    may_interrupt: bool = False
    failures: int = 0  # in a row

    def __post_init__(self):
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self.before = len(complete)
        self.knobs: dict[str, BaseDistribution] = complete[-1].distributions if complete else {}
        self.shared = isinstance(self.study._storage, optuna.storages._CachedStorage)

    def wants_more(self, pending: int = 0) -> bool:
        """Whether another trial should start while `pending` are running."""
        if self.ran.interrupted or (self.deadline is not None and time.monotonic() >= self.deadline):
            return False
        return self.trials is None or self.before + self.ran.complete + pending < self.trials

    def here(self) -> None:
        """One trial after the other in this process."""
        while self.wants_more():
            self.one_here()

    def one_here(self) -> Trial:
        """One trial in this process, whatever becomes of it."""
        trial = self.ask()
        values, error = None, None
        try:
            self.may_interrupt = True
            values = self.objective(trial)
        except KeyboardInterrupt:
            self.ran.interrupted = True
        except Exception as raised:
            error = raised
        finally:
            self.may_interrupt = False
        if self.ran.interrupted and values is None:
            _give_up(self.study, trial, "interrupted")
        else:
            self.tell(trial, values, {}, error)
        return trial

    def ask(self, knobs: dict[str, BaseDistribution] | None = None) -> Trial:
        """The next trial; in a shared database it says whose it is."""
        trial = self.study.ask(knobs)
        if self.shared:
            trial.set_user_attr(WORKER, _worker())
        return trial

    def tell(self, trial: Trial | FrozenTrial, values: Any, notes: dict[str, Any], error: Exception | None) -> None:
        """Record what a trial measured or why it failed; give up when there are only failures."""
        storage, number = self.study._storage, trial._trial_id
        for key, value in notes.items():
            storage.set_trial_user_attr(number, key, value)
        trial = storage.get_trial(number)
        error = error or _problem(values, len(self.study.directions))
        self._check_knobs(trial)
        if error is None:
            if VIOLATION in trial.user_attrs:  # for Optuna's own samplers
                storage.set_trial_system_attr(number, f"constraints:{VIOLATION}", float(trial.user_attrs[VIOLATION]))
            done = self.study.tell(trial.number, values)
        else:
            log.debug("trial %d failed", trial.number, exc_info=error)
            storage.set_trial_user_attr(number, ERROR, f"{type(error).__name__}: {error}"[:1000])
            done = self.study.tell(trial.number, state=TrialState.FAIL)
        self._count(done, error)

    def _count(self, done: FrozenTrial, error: Exception | None) -> None:
        self.ran.complete += error is None
        self.ran.failed += error is not None
        self.failures = 0 if error is None else self.failures + 1
        if self.on_trial:
            self.on_trial(done)
        if self.failures >= FAILURES:
            raise UserError(f"{FAILURES} trials in a row failed, the last: {type(error).__name__}: {error}") from error

    def _check_knobs(self, trial: FrozenTrial) -> None:
        """Refuse to mix trials whose knobs of one name have different ranges."""
        for name in set(self.knobs) & set(trial.distributions):
            if self.knobs[name] != trial.distributions[name]:
                self.study.tell(trial.number, state=TrialState.FAIL)
                raise UserError(
                    f"study {self.study.study_name!r} was made with other knobs: {name} was {self.knobs[name]} and is "
                    f"{trial.distributions[name]}; choose another name or another folder"
                )

    def on_ray(self, address: str, workers: int) -> None:
        """Trials as Ray tasks; only this process asks, tells and writes."""
        knobs: dict[str, BaseDistribution] = {}
        while not knobs and self.wants_more():
            knobs = self.one_here().distributions
        if not self.wants_more():
            return
        with _ray.tasks(address, workers, self.objective) as tasks:
            try:
                while self.wants_more(len(tasks)) or (tasks and not self.ran.interrupted):
                    while len(tasks) < tasks.slots and self.wants_more(len(tasks)):
                        tasks.submit(self._asked(knobs))
                    for trial, values, notes, error in tasks.finished():
                        self.tell(trial, values, notes, error)
            finally:
                for trial in tasks.cancel():
                    _give_up(self.study, trial, "interrupted")

    def _asked(self, knobs: dict[str, BaseDistribution]) -> FrozenTrial:
        """The next trial with all its parameters, on disk as running."""
        trial, storage = self.ask(knobs), self.study._storage
        if isinstance(storage, FileStorage) and storage.durable:
            storage.flush()
        return storage.get_trial(trial._trial_id)


def _problem(values: Any, objectives: int) -> Exception | None:
    """What is wrong with the values of an objective, if anything."""
    numbers = list(values) if isinstance(values, Sequence) else [values]
    if len(numbers) != objectives or not all(isinstance(v, Real) and v == v for v in numbers):
        return ValueError(f"the objective returned {values!r}; it needs {objectives} numbers that are not NaN")
    return None
