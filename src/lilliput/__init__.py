"""Lilliput fits neural networks into small machines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput import methods as methods
    from lilliput.artifact import save as save
    from lilliput.auditing import audit as audit
    from lilliput.budget import Budget as Budget
    from lilliput.device import Device as Device
    from lilliput.errors import UserError as UserError
    from lilliput.fitting.outcome import Fitted as Fitted
    from lilliput.fitting.run import fit as fit
    from lilliput.measuring import measure as measure
    from lilliput.plan import Plan as Plan
    from lilliput.plan import Step as Step
    from lilliput.serving import load as load
    from lilliput.workload import Metric as Metric
    from lilliput.workload import Workload as Workload

__version__ = "0.1.0"

_HOMES = {
    "Budget": "budget",
    "Device": "device",
    "Fitted": "fitting.outcome",
    "Metric": "workload",
    "Plan": "plan",
    "Step": "plan",
    "UserError": "errors",
    "Workload": "workload",
    "audit": "auditing",
    "fit": "fitting.run",
    "load": "serving",
    "measure": "measuring",
    "save": "artifact",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import lilliput` loads neither torch nor transformers."""
    if name == "methods":
        return importlib.import_module("lilliput.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'lilliput' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lilliput.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "methods", "__version__"])


def _register_with_transformers() -> None:
    from lilliput import _transformers_hook

    _transformers_hook.install()


_register_with_transformers()
