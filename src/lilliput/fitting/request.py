"""What a fit is told: the options, checked before any work, and what of them the run's folder remembers."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.budget import Budget
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.method import method_names
from lilliput.methods.circuits._fpga import Fpga
from lilliput.runtimes import find_runtime
from lilliput.workload import Workload

FAMILIES = ("quantize", "prune")
KNOWN_FAMILIES = ("quantize", "prune", "factorize")


@dataclass(frozen=True)
class Options:
    """Everything a fit can be told besides workload and budget."""

    minutes: float = 10
    device: str | None = None
    runtime: str | None = None
    threads: int | None = None
    families: tuple[str, ...] = FAMILIES
    sampler: str = "genecai"
    trials: int = 250
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    storage: str | None = None
    ray: str | None = None
    recover: bool = True
    rivals: bool = True
    context: int | None = None  # tokens of a language model's text that time and memory are measured with
    serve: bool = True  # whether ways to serve the best plans are tried
    quiet: bool = False


def read_options(options: dict[str, Any]) -> Options:
    """The options of a call. Raises UserError for an unknown one and for a value that would fail later."""
    known = {f.name for f in dataclasses.fields(Options)}
    unknown = set(options) - known
    if unknown:
        raise UserError(f"fit has no option {', '.join(sorted(unknown))}; it has: {', '.join(sorted(known))}")
    o = Options(**options)
    if not o.minutes > 0:
        raise UserError(f"minutes is {o.minutes!r}; give a time above zero")
    wrong = [f for f in o.families if f not in KNOWN_FAMILIES]
    if wrong or not o.families:
        raise UserError(f"families is {', '.join(o.families) or 'empty'!r}; choose from {', '.join(KNOWN_FAMILIES)}")
    check_names(o.runtime, o.sampler)
    return dataclasses.replace(o, families=tuple(o.families), out=Path(o.out) if o.out else None)


def check_names(runtime: str | None, sampler: str) -> None:
    """Raise UserError for a runtime or a sampler that does not exist, with those that do."""
    samplers = [name.removeprefix("search.") for name in method_names("search.*")]
    if sampler not in samplers:
        raise UserError(f"the sampler is {sampler!r}; choose one of {', '.join(samplers)}")
    if runtime is not None:
        find_runtime(runtime)


def remembered(workload: Workload, budget: Budget, device: Device | Fpga, o: Options) -> dict[str, Any]:
    """What the run's folder says was asked; a resumed run must ask the same."""
    return {
        "workload": workload.name,
        "budget": str(budget),
        "device": device.name,
        "families": list(o.families),
        "sampler": o.sampler,
        "minutes": o.minutes,
        "seed": o.seed,
        "context": o.context,
        "command": shlex.join(["lilliput", *sys.argv[1:]]) if "lilliput" in sys.argv[0] else "lilliput.fit(...)",
    }


def facts_of(request: dict[str, Any]) -> dict[str, Any]:
    """What an artifact says of what was asked of it."""
    return {"context": request["context"]} if request.get("context") else {}
