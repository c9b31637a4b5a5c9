"""A run's folder: every finished step is a JSON file written at once, so that a killed fit goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lilliput.budget import format_quantity
from lilliput.cache import write_atomically
from lilliput.errors import UserError

REQUEST = "request"


class Run:
    """The folder `runs/<name>/` with its steps (`original.json`, `candidates/*.json`, ...)."""

    def __init__(self, folder: Path, request: dict[str, Any], resume: bool):
        self.folder = folder
        started = (folder / f"{REQUEST}.json").exists()
        if started and not resume:
            raise UserError(f"{str(folder)!r} holds a run already; go on with --resume or choose another --out")
        if resume and not started:
            raise UserError(f"there is no run to resume in {str(folder)!r}; leave out --resume to start one")
        try:
            for steps in ("candidates", "serving"):
                (folder / steps).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another --out") from None
        if started:
            self._check_same(request)
        else:
            self.write(REQUEST, request)

    def _check_same(self, request: dict[str, Any]) -> None:
        before = self.read(REQUEST) or {}
        asked = ("workload", "budget", "device", "families", "seed", "context")
        differs = [k for k in asked if before.get(k) != request.get(k)]
        if differs:
            raise UserError(
                f"{str(self.folder)!r} was started with {differs[0]} = {before.get(differs[0])!r}, not "
                f"{request.get(differs[0])!r}; resume with the same request or choose another --out"
            )

    def read(self, name: str) -> Any:
        """A finished step, or None. Raises UserError when its file is damaged."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{str(path)!r} is damaged ({str(error)[:80]}); delete it and resume the run") from None

    def write(self, name: str, value: Any) -> None:
        """Store a finished step; a full disk is told with the folder's name."""
        path = self.folder / f"{name}.json"
        try:
            write_atomically(path, json.dumps(value, indent=1).encode())
        except OSError as error:
            raise UserError(f"cannot write {str(path)!r}: {error.strerror}; free some space and resume") from None

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored result of a step, or `compute()` stored now."""
        found = self.read(name)
        if found is None:
            found = compute()
            self.write(name, found)
        return found

    def candidates(self) -> list[dict[str, Any]]:
        """All built and measured candidates, in the order they were measured."""
        files = sorted((self.folder / "candidates").glob("*.json"))
        found = [self.read(f"candidates/{f.stem}") for f in files]
        return sorted(found, key=lambda c: c["number"])


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or with the first free number behind it."""
    names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
    return next(parent / n for n in names if not (parent / n).exists())


def summary(record: dict[str, Any]) -> str:
    """The request and the answer in one line."""
    v, original = record["verify"], record["original"]["values"]
    parts = [
        f"{key.rsplit('_', 1)[0].replace('_', ' ')} {format_quantity(key, original[key])} -> "
        f"{format_quantity(key, v['measured'][key])}"
        for key in record["limits"]
        if key in original
    ]
    score = f"{v['score_before']['name']} {v['score_before']['value']:.4g} -> {v['score_after']['value']:.4g}"
    state = "met" if not v["violations"] else "NOT met: " + "; ".join(v["violations"])
    note = " (times modelled)" if record["modelled"] else ""
    serving = record.get("serving") or {}
    if serving.get("chosen"):
        note += f", served with {serving['label']}"
    asked = f"{record['request']['workload']} into {record['request']['budget']}"
    if record["request"].get("context"):
        asked += f" at {record['request']['context']} tokens"
    return f"{asked}: {state}. {', '.join([*parts, score])}{note}"
