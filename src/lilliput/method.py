"""What a method is: a frozen dataclass of settings, the facts it declares, and how methods are found.

A method is one file under `methods/<family>/`; its name is `<family>.<file>`. Nothing lists it anywhere else.
Outside packages add methods through the entry-point group `lilliput.methods`.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import importlib
import math
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from importlib.metadata import entry_points
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lilliput.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache

    from lilliput.workload import Workload

STAGES = ("initialize", "prune", "factorize", "tokens", "depth", "train", "distill", "quantize", "serve", "audit")

# What can be true of a layer's weights or of the whole model. A method `needs` some, `gives` some, `takes` some away.
FLOAT_WEIGHTS = "float weights"
PACKED_WEIGHTS = "packed weights"
ACTIVATION_RANGES = "fixed activation ranges"
OUTPUT_SHAPE = "output shape"
LAYER_SHAPES = "layer shapes"
BLOCK_COUNT = "block count"
EXACT_OUTPUT = "exact output"

NONE, UNLABELLED, LABELLED = "none", "unlabelled", "labelled"

# What an audit says of each change and of all together.
HARM, NO_HARM, UNSURE = "harm found", "no harm found", "cannot tell (too few examples)"


@dataclass(frozen=True)
class Knob:
    """The search range of one setting: `low`..`high` (optionally logarithmic) or `choices`."""

    low: float | None = None
    high: float | None = None
    choices: tuple | None = None
    per_layer: bool = False
    log: bool = False
    help: str = ""

    def check(self, name: str, value: Any, owner: str) -> None:
        """Refuse a value outside the range with the value and the range in the message."""
        if self.choices is not None and value not in self.choices:
            raise UserError(f"{owner}.{name} is {value!r}; choose one of {', '.join(map(repr, self.choices))}")
        if self.low is None and self.high is None:
            return
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
            raise UserError(f"{owner}.{name} is {value!r}; give a number")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise UserError(f"{owner}.{name} is {value!r}; give a number from {self.low} to {self.high}")


def knob(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence | None = None,
    per_layer: bool = False,
    log: bool = False,
    help: str = "",
) -> Any:
    """A dataclass field with its search range in the metadata."""
    limits = Knob(low, high, tuple(choices) if choices is not None else None, per_layer, log, help)
    return field(default=default, metadata={"knob": limits})


@dataclass(frozen=True)
class Facts:
    """What a method needs, gives and takes; legality of a plan follows from these alone."""

    stage: str
    needs: frozenset[str] | set[str] = frozenset()
    gives: frozenset[str] | set[str] = frozenset()
    takes: frozenset[str] | set[str] = frozenset()
    keeps: frozenset[str] | set[str] = frozenset()
    data: str = NONE
    cost: float | None = None  # seconds per million parameters, measured on two cores
    effect: str = ""  # "faster, smaller", "size only", ...

    def __post_init__(self):
        if self.stage not in STAGES:
            raise UserError(f"stage {self.stage!r} is unknown; choose one of {', '.join(STAGES)}")


@dataclass(frozen=True)
class Settings:
    """Base of everything configured by a frozen dataclass of knobs: checks its values when it is made."""

    def __post_init__(self):
        defaults, owner = self.defaults(), type(self).__name__
        for name, limits in self.knobs().items():
            value = getattr(self, name)
            limits.check(name, value, owner)
            if type(defaults.get(name)) is int and not isinstance(value, Integral):
                raise UserError(f"{owner}.{name} is {value!r}; give a whole number")
            if type(defaults.get(name)) is float and not (isinstance(value, Real) and math.isfinite(value)):
                raise UserError(f"{owner}.{name} is {value!r}; give a number")

    @classmethod
    def name(cls) -> str:
        """`<family>.<file>` for our own methods, the module path for others."""
        return cls.__module__.removeprefix("lilliput.methods.")

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """Name -> search range of every setting."""
        return {f.name: f.metadata["knob"] for f in dataclasses.fields(cls) if "knob" in f.metadata}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Name -> default value of every setting."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not MISSING}

    def with_(self, **settings) -> Self:
        """A copy with some settings changed; an unknown name is refused with the names that exist."""
        unknown = set(settings) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(self)) or "none"
            raise UserError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}; it has: {known}")
        return dataclasses.replace(self, **settings)


@dataclass(frozen=True)
class Method(Settings):
    """A model transformation. Subclasses declare `facts`, say their `targets` and change the model in `apply_`."""

    facts: ClassVar[Facts]
    paper: ClassVar[str] = ""  # slug of the paper this implements, if any

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the modules this method can change, in the order of the model."""
        raise NotImplementedError

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        """Change `model` in place; `layers` maps each module name to the settings for it."""
        raise NotImplementedError

    def apply(
        self,
        model: nn.Module,
        workload: Workload | None = None,
        layers: Mapping[str, Mapping[str, Any]] | Iterable[str] | None = None,
    ) -> nn.Module:
        """A changed copy of `model`.

        `layers` limits the change to some modules: names (may hold `*`), or a mapping of names to settings that
        differ from this object's. Raises UserError when nothing in the model can take the method.
        """
        return self.apply_(copy.deepcopy(model), workload, self.resolve(model, layers))

    def resolve(
        self, model: nn.Module, layers: Mapping[str, Mapping[str, Any]] | Iterable[str] | None = None
    ) -> dict[str, Self]:
        """Module name -> the settings for it, from names or patterns."""
        possible = list(self.targets(model))
        if not possible:
            raise UserError(f"{self.name()} finds no layer it can change in {type(model).__name__}")
        if layers is None:
            return dict.fromkeys(possible, self)
        wanted = dict(layers) if isinstance(layers, Mapping) else {name: {} for name in layers}
        found: dict[str, Self] = {}
        for pattern, settings in wanted.items():
            names = [n for n in possible if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")]
            if not names:
                raise UserError(f"{self.name()} cannot change {pattern!r}; it can change {_abbreviate(possible)}")
            found.update(dict.fromkeys(names, self.with_(**settings)))
        return {name: found[name] for name in possible if name in found}


@dataclass(frozen=True)
class CachePolicy(Settings):
    """What a decoder keeps of its keys and values: `model.generate(**inputs, past_key_values=policy.cache(model))`."""

    facts: ClassVar[Facts]
    paper: ClassVar[str] = ""

    def cache(self, model: nn.Module) -> Cache:
        """An empty cache for one text or one batch of texts. Raises UserError for a model that it does not fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Decoder(Settings):
    """A way to generate text: the object is the loop, `model.generate(ids, custom_generate=decoder)`."""

    facts: ClassVar[Facts]
    paper: ClassVar[str] = ""  # slug of the paper this implements, if any

    def __call__(self, model: Any, input_ids: Tensor, **call: Any) -> Tensor:
        """Token ids (1, length) of prompt and continuation; `call` is what transformers hands to its own loops."""
        raise NotImplementedError


@dataclass(frozen=True)
class Guard(Settings):
    """Stands around a model at run time and answers in its place."""

    facts: ClassVar[Facts]
    paper: ClassVar[str] = ""  # slug of the paper this implements, if any

    def wrap(self, model: nn.Module, workload: Workload) -> Any:
        """A module that is called as the model is and shares its weights, or a server of it for other processes.

        Raises UserError for a model that it does not fit, and for too little data; it never sees the test split.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Target(Settings):
    """Compiles a fitted model for something that is no processor: `target.emit(model, workload)` gives its sources."""

    facts: ClassVar[Facts]
    paper: ClassVar[str] = ""  # slug of the paper this implements, if any

    def emit(self, model: nn.Module, workload: Workload | None = None) -> Any:
        """A design with `sources()`: name -> text. Raises UserError, naming the layer, for what it does not have."""
        raise NotImplementedError


@dataclass(frozen=True)
class Change:
    """One quantity before and after; `low`..`high` is the interval of after - before, seen on `n` examples.

    The verdict is empty where the quantity only explains others.
    """

    name: str
    before: float
    after: float
    low: float
    high: float
    n: int
    verdict: str = ""


@dataclass(frozen=True)
class Findings:
    """What an audit found: a verdict, one sentence, the changes behind it (the worst first), and what explains them."""

    audit: str
    verdict: str
    summary: str
    changes: tuple[Change, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # plain data: tables, indices of examples

    def change(self, name: str) -> Change:
        """The change of one quantity."""
        return next(c for c in self.changes if c.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an interval without an end has None there."""
        found = dataclasses.asdict(self)
        for change in found["changes"]:
            change |= {end: value if math.isfinite(value := change[end]) else None for end in ("low", "high")}
        return found

    def __str__(self) -> str:
        return f"{self.audit}: {self.verdict}. {self.summary}"


@dataclass(frozen=True)
class Audit(Settings):
    """Looks for what a change did to a model beyond its score; it changes nothing."""

    facts: ClassVar[Facts]
    paper: ClassVar[str] = ""  # slug of the paper this implements, if any

    def supports(self, workload: Workload, model: Any) -> list[str]:
        """Why the audit cannot be made of such a model on this workload; empty when it can."""
        return []

    def require(self, workload: Workload, model: Any) -> None:
        """Raise UserError with the reasons when the audit cannot be made."""
        reasons = self.supports(workload, model)
        if reasons:
            raise UserError(f"{self.name()} cannot audit {workload.name!r}: {'; '.join(reasons)}")

    def check(self, workload: Workload, before: Any, after: Any) -> Findings:
        """Compare the changed model with the original. Raises UserError for what the audit does not support."""
        raise NotImplementedError


def _abbreviate(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- finding methods -------------------------------------------------------------------------------------------


def families() -> list[str]:
    """Names of the folders under `methods/`."""
    package = importlib.import_module("lilliput.methods")
    return [m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg]


def method_names(pattern: str = "*") -> list[str]:
    """Every `<family>.<method>` that matches the pattern, found by listing files; nothing heavy is imported."""
    names = [entry.name for entry in entry_points(group="lilliput.methods")]
    for family in families():
        package = importlib.import_module(f"lilliput.methods.{family}")
        modules = pkgutil.iter_modules(package.__path__)
        names += [f"{family}.{m.name}" for m in modules if not m.name.startswith("_")]
    return sorted(n for n in names if fnmatch.fnmatchcase(n, pattern) or pattern in n)


def find_method(name: str) -> type[Settings]:
    """The settings class of `family.method`: the one class defined in that file that declares facts."""
    for entry in entry_points(group="lilliput.methods"):
        if entry.name == name:
            return entry.load()
    if name not in method_names():
        raise UserError(f"there is no method {name!r}; there are: {', '.join(method_names())}")
    module = importlib.import_module(f"lilliput.methods.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    own = [c for c in classes if issubclass(c, Settings) and hasattr(c, "facts")]
    if len(own) != 1:
        raise UserError(f"{module.__name__} must define exactly one method with facts, it defines {len(own)}")
    return own[0]
