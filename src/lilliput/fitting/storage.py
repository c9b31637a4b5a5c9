"""An Optuna storage for thousands of cheap trials: read in memory, written to an SQLite file in whole transactions.

Optuna's own SQLite storage commits once per parameter, 90 to 160 ms for a trial of 60 knobs. Here one transaction
rewrites every trial that changed. The file has Optuna's own schema: optuna-dashboard and
`optuna.load_study("sqlite:///study.db", ...)` read it while a search runs.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlalchemy.event
import sqlalchemy.orm
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import OptunaError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from lilliput.errors import UserError

DELAY_S = 1.0  # how far the file may be behind what is not written at once
CHILDREN = (
    models.TrialParamModel,
    models.TrialValueModel,
    models.TrialIntermediateValueModel,
    models.TrialUserAttributeModel,
    models.TrialSystemAttributeModel,
)


class FileStorage(InMemoryStorage):
    """Trials in memory and in an SQLite file that this process alone writes.

    Durable, a finished trial is in the file when `tell` returns; otherwise, like every other change, a second later.
    Raises UserError when the file is damaged, of another kind, or in use by another process.
    """

    def __init__(self, path: Path | str, durable: bool = True):
        super().__init__()
        self.path, self.durable = Path(path).absolute(), durable
        self._writing = threading.RLock()
        self._changed: set[int] = set()
        self._timer: threading.Timer | None = None
        self._failure: UserError | None = None
        self._study_rows: dict[int, int] = {}
        self._trial_rows: dict[int, int] = {}
        self._guard = _lock(self.path)
        self._file = _open(self.path)
        self._load()

    def __getstate__(self) -> dict[Any, Any]:
        raise UserError(f"the study in {self.path} cannot be sent to another process; give a database URL to share it")

    def _load(self) -> None:
        try:
            for study in self._file.get_all_studies():
                study_id = super().create_new_study(study.directions, study.study_name)
                self._study_rows[study_id] = study._study_id
                for key, value in study.user_attrs.items():
                    super().set_study_user_attr(study_id, key, value)
                for key, value in study.system_attrs.items():
                    super().set_study_system_attr(study_id, key, value)
                for trial in _read_trials(self._file.engine, study._study_id):
                    self._add(study_id, trial)
        except (SQLAlchemyError, OptunaError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.path, error) from None
        self._next_row = max(self._trial_rows.values(), default=0) + 1

    def _add(self, study_id: int, trial: FrozenTrial) -> None:
        """Take a trial over from the file; its parameters are shared, not copied, which is most of the time saved."""
        params, distributions = trial.params, trial.distributions
        trial.params, trial.distributions = {}, {}
        trial_id = super().create_new_trial(study_id, trial)
        self._trial_rows[trial_id] = trial._trial_id
        kept = self.get_trial(trial_id)
        kept.params, kept.distributions = params, distributions

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        study_id = super().create_new_study(directions, study_name)
        name = self.get_study_name_from_id(study_id)
        self._study_rows[study_id] = self._file.create_new_study(directions, name)
        return study_id

    def delete_study(self, study_id: int) -> None:
        self.flush()
        super().delete_study(study_id)
        self._file.delete_study(self._study_rows.pop(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, value)
        self._file.set_study_user_attr(self._study_rows[study_id], key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_system_attr(study_id, key, value)
        self._file.set_study_system_attr(self._study_rows[study_id], key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        with self._writing:
            trial_id = super().create_new_trial(study_id, template_trial)
            self._trial_rows[trial_id], self._next_row = self._next_row, self._next_row + 1
            self._note(trial_id, write=template_trial is not None)
        return trial_id

    def set_trial_param(self, trial_id: int, param_name: str, param_value_internal: float, distribution) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._note(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        json.dumps(value)  # refused here, where the caller sees it, and not in the writer
        super().set_trial_user_attr(trial_id, key, value)
        self._note(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        self._note(trial_id)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._note(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        done = super().set_trial_state_values(trial_id, state, values)
        self._note(trial_id, write=state.is_finished())
        return done

    def _note(self, trial_id: int, write: bool = False) -> None:
        """A trial changed; with `write` it matters enough to be in the file at once, if the study is durable."""
        with self._writing:
            if self._failure:
                raise self._failure
            self._changed.add(trial_id)
            if write and self.durable:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(DELAY_S, self._flush_later)
                self._timer.daemon = True
                self._timer.start()

    def _flush_later(self) -> None:
        try:
            self.flush()
        except UserError as error:
            self._failure = error  # raised in the thread that searches, at its next change

    def flush(self) -> None:
        """Write every changed trial, unfinished ones too, in one transaction."""
        with self._writing:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            trials = {i: self.get_trial(i) for i in sorted(self._changed) if i in self._trial_id_to_study_id_and_number}
            try:
                if trials:
                    self._write(trials)
            except SQLAlchemyError as error:
                raise UserError(f"cannot write the study to {self.path}: {error.args[0]}") from None
            self._changed.clear()

    def _write(self, trials: dict[int, FrozenTrial]) -> None:
        rows = [{"row": self._trial_rows[i]} for i in trials]
        with sqlalchemy.orm.Session(self._file.engine) as session, session.begin():
            for model in (*CHILDREN, models.TrialModel):
                session.execute(sqlalchemy.delete(model.__table__).where(_row_of(model)), rows)
            for trial_id, trial in trials.items():
                study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
                session.add(_trial_row(self._trial_rows[trial_id], self._study_rows[study_id], trial))
            session.flush()
            for model in CHILDREN:
                children = [r for i, t in trials.items() for r in _child_rows(model, self._trial_rows[i], t)]
                if children:
                    session.execute(sqlalchemy.insert(model.__table__), children)

    def close(self) -> None:
        """Write what is left and let other processes use the file."""
        self.flush()
        self._file.engine.dispose()
        self._guard.release()


def _row_of(model: Any) -> Any:
    return model.__table__.c.trial_id == sqlalchemy.bindparam("row")


def _trial_row(row: int, study_row: int, trial: FrozenTrial) -> models.TrialModel:
    """The row of table `trials`; the model turns local times into the file's."""
    return models.TrialModel(
        trial_id=row,
        study_id=study_row,
        number=trial.number,
        state=trial.state,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
    )


_written: dict[int, tuple[BaseDistribution, str]] = {}


def _distribution_text(distribution: BaseDistribution) -> str:
    """JSON of a distribution; a search space is one set of objects, so each is turned into text once."""
    known = _written.get(id(distribution))
    if known is None or known[0] is not distribution:
        if len(_written) > 10_000:
            _written.clear()
        known = _written[id(distribution)] = (distribution, distribution_to_json(distribution))
    return known[1]


def _child_rows(model: Any, row: int, trial: FrozenTrial) -> list[dict[str, Any]]:
    """The rows of one child table that belong to a trial."""
    if model is models.TrialParamModel:
        items = [(name, value, trial.distributions[name]) for name, value in trial.params.items()]
        cells = [
            {"param_name": n, "param_value": d.to_internal_repr(v), "distribution_json": _distribution_text(d)}
            for n, v, d in items
        ]
    elif model is models.TrialValueModel:
        stored = [model.value_to_stored_repr(v) for v in trial.values or ()]
        cells = [{"objective": i, "value": v, "value_type": kind} for i, (v, kind) in enumerate(stored)]
    elif model is models.TrialIntermediateValueModel:
        steps = {s: model.intermediate_value_to_stored_repr(v) for s, v in trial.intermediate_values.items()}
        cells = [
            {"step": s, "intermediate_value": v, "intermediate_value_type": kind} for s, (v, kind) in steps.items()
        ]
    else:
        attrs = trial.user_attrs if model is models.TrialUserAttributeModel else trial.system_attrs
        cells = [{"key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
    return [{"trial_id": row, **cell} for cell in cells]


# --- reading ---------------------------------------------------------------------------------------------------


def _read_trials(engine: Any, study_row: int) -> list[FrozenTrial]:
    """The trials of a study in the order of their numbers; Optuna's own reader is ten times slower."""
    with sqlalchemy.orm.Session(engine) as session:
        query = sqlalchemy.select(models.TrialModel).filter_by(study_id=study_row).order_by(models.TrialModel.number)
        trials = {t.trial_id: _bare_trial(t) for t in session.scalars(query)}
        for model in CHILDREN:
            table = model.__table__
            order = table.c.objective if model is models.TrialValueModel else next(iter(table.primary_key))
            rows = sqlalchemy.select(table).join(models.TrialModel.__table__).filter_by(study_id=study_row)
            for cells in session.execute(rows.order_by(order)).mappings():
                _take_child(model, trials[cells["trial_id"]], cells)
    return list(trials.values())


def _bare_trial(row: Any) -> FrozenTrial:
    return FrozenTrial(
        number=row.number,
        state=row.state,
        value=None,
        datetime_start=row.datetime_start,
        datetime_complete=row.datetime_complete,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=row.trial_id,
    )


_read: dict[str, BaseDistribution] = {}


def _take_child(model: Any, trial: FrozenTrial, cells: Any) -> None:
    """Put one row of a child table into its trial."""
    if model is models.TrialParamModel:
        text = cells["distribution_json"]
        if text not in _read:
            _read[text] = json_to_distribution(text)
        trial.distributions[cells["param_name"]] = _read[text]
        trial.params[cells["param_name"]] = _read[text].to_external_repr(cells["param_value"])
    elif model is models.TrialValueModel:
        value = model.stored_repr_to_value(cells["value"], cells["value_type"])
        trial.values = [*(trial.values or ()), value]
    elif model is models.TrialIntermediateValueModel:
        value = model.stored_repr_to_intermediate_value(cells["intermediate_value"], cells["intermediate_value_type"])
        trial.intermediate_values[cells["step"]] = value
    else:
        attrs = trial.user_attrs if model is models.TrialUserAttributeModel else trial.system_attrs
        attrs[cells["key"]] = json.loads(cells["value_json"])


# --- opening ---------------------------------------------------------------------------------------------------


def _lock(path: Path) -> FileLock:
    """The lock beside the file; the system gives it back when the process dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    guard = FileLock(f"{path}.lock")
    try:
        guard.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is in use by another search; wait for it, choose another folder, or share a database by its URL"
        ) from None
    return guard


def _open(path: Path) -> RDBStorage:
    """Optuna's tables in the file, checked, in write-ahead mode: readers never block, a kill loses no commit."""
    try:
        connection = sqlite3.connect(path)
        try:
            problems = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
        if problems != "ok":
            raise _damaged(path, problems)
        storage = RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
        sqlalchemy.event.listen(storage.engine, "connect", _fast_commits)
        storage.engine.dispose()
    except (sqlite3.Error, SQLAlchemyError, RuntimeError, OptunaError) as error:
        raise _damaged(path, error) from None
    return storage


def _fast_commits(connection: Any, _: Any) -> None:
    """In write-ahead mode this survives any death of the process; only a power cut can take the last commits."""
    connection.execute("PRAGMA synchronous=NORMAL")


def _damaged(path: Path, why: Any) -> UserError:
    return UserError(
        f"{path} is not a study database that can be read ({str(why).splitlines()[0]}); restore a copy of it, or move "
        "it away to start the search anew"
    )
