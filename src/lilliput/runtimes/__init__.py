"""What executes a fitted model. A runtime is one file here, and the class in it that extends `Runtime` is found.

runtime = choose(model, workload)
session = runtime.prepare(model, workload, threads=2)
check(session, model, workload)      # before any timing
logits = session(batch)
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, ClassVar

from torch import Tensor, cat, nn, no_grad  # the name `torch` here is the runtime of that name

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.onnx_export import expected_error, relative_error
from lilliput.workload import Batch, Workload

CHECKED_BATCHES = 2


class Session:
    """A prepared model. `session(batch)` gives logits; keyword tensors instead of a batch do the same."""

    names: tuple[str, ...] = ()  # the inputs, in the order of the graph
    note: str = ""  # what one who reads its times should know

    def __call__(self, batch: Batch | None = None, **inputs: Tensor) -> Tensor:
        given = inputs if batch is None else batch
        missing = [name for name in self.names if name not in given]
        if missing:
            raise UserError(f"the batch lacks {', '.join(missing)}; it has {', '.join(given) or 'nothing'}")
        return self.run([given[name] for name in self.names])

    def again(self) -> Session:
        """The same model prepared once more, where two preparations may differ in speed; else this one."""
        return self

    def run(self, tensors: list[Tensor]) -> Tensor:
        """Logits from the tensors of `names`."""
        raise NotImplementedError


class Runtime:
    """How to execute models. Subclasses give a name and a rank, say what they refuse, and prepare the rest."""

    name: ClassVar[str]
    rank: ClassVar[int]  # of those that take a model the lowest is chosen
    keeps_text: ClassVar[bool] = False  # whether its sessions `generate` with a cache of keys and values

    def supports(self, model: nn.Module, workload: Workload) -> list[str]:
        """Why this runtime cannot run the model; empty when it can."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, workload: Workload, threads: int | None = None) -> Session:
        """A session over the model as it is now; `threads` None leaves the number to the runtime. Raises UserError."""
        raise NotImplementedError


def runtime_names() -> list[str]:
    """The runtimes, found by listing files."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))


def find_runtime(name: str) -> Runtime:
    """The runtime of the file `name`. Raises UserError with the names that exist."""
    if name not in runtime_names():
        raise UserError(f"there is no runtime {name!r}; there are: {', '.join(runtime_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    own: Any = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Runtime) and c.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise UserError(f"{module.__name__} must define exactly one Runtime, it defines {len(own)}")
    return own[0]()


def choose(model: nn.Module, workload: Workload) -> Runtime:
    """The installed runtime of lowest rank that takes the model. Raises UserError with every refusal."""
    refusals = []
    for runtime in sorted(map(find_runtime, runtime_names()), key=lambda r: r.rank):
        reasons = runtime.supports(model, workload)
        if not reasons:
            return runtime
        refusals.append(f"{runtime.name}: {'; '.join(reasons)}")
    raise UserError(f"no runtime takes {type(model).__name__}. {'. '.join(refusals)}")


def check(session: Session, model: nn.Module, workload: Workload, tolerance: float | None = None) -> float:
    """The relative error of the session's logits against the torch model's on calibration inputs.

    The error is the root of the summed squared differences over that of the logits. Raises UserError when it exceeds
    `tolerance`, by default what float rounding explains (`onnx_export.expected_error`).
    """
    batches = workload.calibration[:CHECKED_BATCHES]

    def logits(executor: nn.Module | Session) -> Tensor:
        return cat([workload.forward(executor, batch).flatten().float() for batch in batches])

    with no_grad(), evaluating(model):
        error = relative_error(logits(session), logits(model))
        allowed = expected_error(model, lambda: logits(model)) if tolerance is None else tolerance
    if not error <= allowed:
        raise UserError(
            f"the runtime's logits differ from the torch model's by {error:.3g} (relative), {allowed:.3g} is allowed; "
            "do not trust its timings: use another runtime or keep the layers at fault in float"
        )
    return error
