"""A plan: methods in order, with settings per layer. Legal when every method's needs still hold for its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lilliput.errors import UserError
from lilliput.method import STAGES, CachePolicy, Decoder, Method, Settings, find_method

if TYPE_CHECKING:
    from torch import nn

    from lilliput.workload import Workload

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One method on some layers: names or patterns of the model that this step receives -> settings that differ."""

    method: Method
    layers: Mapping[str, Mapping[str, Any]] | None = None  # None: every layer the method can change

    def __str__(self) -> str:
        where = "all layers" if self.layers is None else f"{len(self.layers)} layers"
        return f"{self.method.name()} on {where}"


@dataclass(frozen=True)
class Plan:
    """Steps in the fixed order of stages, and how the model that they make is served; None is plainly."""

    steps: list[Step] = field(default_factory=list)
    serving: Decoder | CachePolicy | None = None

    def check(self) -> list[str]:
        """What is illegal, each with both methods and the way out; empty when the plan can run."""
        return [p for i, step in enumerate(self.steps) for p in self._problems(self.steps[:i], step)]

    def _problems(self, earlier: list[Step], step: Step) -> list[str]:
        facts, name, problems = step.method.facts, step.method.name(), []
        for before in earlier:
            other = before.method
            if STAGES.index(other.facts.stage) > STAGES.index(facts.stage):
                problems.append(
                    f"{name} ({facts.stage}) comes after {other.name()} ({other.facts.stage}); put {name} before it"
                )
                continue
            lost = set(facts.needs) & set(other.facts.takes)
            shared = _overlap(before.layers, step.layers)
            if lost and shared:
                problems.append(
                    f"{name} needs {', '.join(sorted(lost))}, which {other.name()} takes away on {shared}; "
                    f"give the two different layers or drop one"
                )
        return problems

    def apply(self, workload: Workload, model: nn.Module | None = None) -> nn.Module:
        """A changed copy of the workload's model (or of `model`). Raises UserError when the plan is illegal."""
        problems = self.check()
        if problems:
            raise UserError("the plan is illegal: " + "; ".join(problems))
        model = copy.deepcopy(workload.model if model is None else model)
        for step in self.steps:
            model = step.method.apply_(model, workload, step.method.resolve(model, step.layers))
        return model

    def to_yaml(self) -> str:
        """The plan as YAML; settings equal to a method's defaults are written too, so that defaults may change."""
        steps = [
            {"method": s.method.name(), "settings": _plain(asdict(s.method))}
            | ({} if s.layers is None else {"layers": {k: _plain(v) for k, v in s.layers.items()}})
            for s in self.steps
        ]
        data = {"version": VERSION, "steps": steps}
        if self.serving is not None:
            data["serving"] = serving_entry(self.serving)
        return yaml.safe_dump(data, sort_keys=False, width=120)

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """The inverse of `to_yaml`. Raises UserError that says where the text is wrong."""
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"the plan is not valid YAML: {str(error)[:200]}") from None
        if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
            raise UserError("a plan is a mapping with 'version' and a list of 'steps'")
        if data.get("version") != VERSION:
            raise UserError(f"the plan has version {data.get('version')!r}; this lilliput reads version {VERSION}")
        return cls([_step(i, entry) for i, entry in enumerate(data["steps"])], read_serving(data.get("serving")))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """A plan from a YAML file."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no plan file {str(path)!r}")
        try:
            return cls.from_yaml(path.read_text())
        except UnicodeDecodeError:
            raise UserError(f"{str(path)!r} is not a text file; give a plan.yaml") from None


def serving_entry(serving: Decoder | CachePolicy) -> dict[str, Any]:
    """A decoder or a cache policy as plain data."""
    return {"method": serving.name(), "settings": _plain(asdict(serving))}


def read_serving(entry: Any) -> Decoder | CachePolicy | None:
    """The inverse of `serving_entry`; None of None. Raises UserError for what a file alone cannot serve with."""
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) != {"method", "settings"} or not isinstance(entry["settings"], dict):
        raise UserError(f"serving is {str(entry)[:80]!r}; give a mapping with 'method' and 'settings', or leave it out")
    cls = find_method(str(entry["method"]))
    if not issubclass(cls, CachePolicy) and not hasattr(cls, "drafter"):
        raise UserError(
            f"serving names {entry['method']}, which needs more than its settings; "
            "take a cache policy, or a decoder that drafts from the text alone (decode.ngram)"
        )
    found: Settings = _with(cls, entry["settings"], "serving")
    assert isinstance(found, Decoder | CachePolicy)
    return found


def _with(cls: type[Settings], settings: dict, where: str) -> Any:
    """A method with settings out of a file."""
    if not all(isinstance(k, str) for k in settings):
        raise UserError(f"{where}: settings must map names to values")
    try:
        return cls().with_(**settings)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{where} ({cls.name()}): {error}") from None


def _step(index: int, entry: Any) -> Step:
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise UserError(f"step {index + 1} of the plan has no method name")
    unknown = set(entry) - {"method", "settings", "layers"}
    if unknown:
        raise UserError(f"step {index + 1} holds {sorted(map(str, unknown))}; known are method, settings, layers")
    settings, layers = entry.get("settings") or {}, entry.get("layers")
    cls = find_method(entry["method"])
    if not issubclass(cls, Method):
        raise UserError(f"step {index + 1}: {entry['method']} does not change a model, it cannot be a step")
    if not isinstance(settings, dict) or not all(isinstance(k, str) for k in settings):
        raise UserError(f"step {index + 1}: settings must map names to values")
    try:
        method = cls().with_(**settings)
        if isinstance(layers, list):
            layers = {name: {} for name in layers}
        if layers is not None:
            layers = {str(name): dict(changes or {}) for name, changes in layers.items()}
            for changes in layers.values():
                method.with_(**changes)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"step {index + 1} ({entry['method']}): {error}") from None
    return Step(method, layers)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _overlap(a: Mapping | None, b: Mapping | None) -> str:
    """Where two sets of layer names meet, in words; empty when they do not."""
    if a is None or b is None:
        return "all layers" if a is None and b is None else next(iter(a or b or {}), "")
    for x in a:
        for y in b:
            inside = x.startswith(y + ".") or y.startswith(x + ".")
            if x == y or inside or fnmatchcase(x, y) or fnmatchcase(y, x):
                return x
    return ""
