"""`fit` for an FPGA: the most accurate circuit that keeps the budget, counted by synthesis and timed by simulation.

A chain of layers is encoded in several ways (codebook tables, binary layers); each candidate is judged by the integers
that its circuit computes, and folded as far as the latency allows. Then the most accurate is synthesised, the next if
it misses, and so on: nothing about area is predicted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.artifact import save
from lilliput.budget import NAME_OF_KEY, Budget, format_quantity
from lilliput.errors import UserError
from lilliput.fitting.progress import Progress
from lilliput.fitting.record import Run, fresh_folder
from lilliput.fitting.request import Options, remembered
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits._simulate import installed
from lilliput.methods.circuits._synthesis import Resources
from lilliput.methods.circuits._tools import require_amaranth, yosys
from lilliput.methods.circuits.streaming import Design, Streaming
from lilliput.methods.quantize.binary import Binary
from lilliput.methods.quantize.lookup_tables import LookupTables
from lilliput.plan import Plan, Step
from lilliput.workload import Workload

LIMITED = ("luts", "latency_ms", "drop")
TABLES = ((16, 16), (8, 16), (16, 8), (8, 8), (4, 8), (4, 4))  # entries for weights and for inputs
LEVELS = (3, 2, 1)  # of signs
TRAINING = 0.5  # share of the time in which binary candidates learn
MOST_STEPS, TRIED_STEPS = 5000, 5
FRAMES = 20  # simulated in the end
SLOWEST = 10**8  # cycles of a stage: one channel at a time


class Answers(nn.Module):
    """The scores that a circuit gives for real inputs."""

    def __init__(self, design: Design):
        super().__init__()
        self.net = design.net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.net.read(x)).double()


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to encode the model, folded as far as the latency allows."""

    name: str
    plan: Plan
    model: nn.Module
    design: Design
    drop: float  # on the validation data


@dataclass
class FittedCircuit:
    """What `fit` returns for an FPGA: the model, its plan, its design, and everything that was measured."""

    model: nn.Module
    plan: Plan
    workload: Workload
    design: Design
    folder: Path
    record: dict[str, Any] = field(repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write the artifact somewhere else too; `design.write` writes the circuit."""
        return save(self.model, folder, self.workload, self.plan)

    @property
    def met(self) -> bool:
        """Whether the budget holds and the circuit fits into the chip."""
        return not self.record["violations"]

    def summary(self) -> str:
        """One line: what was asked, what came out, what it cost."""
        r = self.record
        state = "met" if self.met else "NOT met: " + "; ".join(r["violations"])
        values = ", ".join(f"{NAME_OF_KEY[k]} {format_quantity(k, v)}" for k, v in r["measured"].items())
        clock = f"cycles {r['cycles_by']}, clock of {r['clock_hz'] / 1e6:g} MHz not proved by placement"
        return f"{r['workload']} into {r['device']}, {r['budget']}: {state}. {values} ({r['chosen']}; {clock})"


def asked_fpga(device: str | None, budget: Budget) -> Fpga | None:
    """The FPGA of that name, if it is one. Raises UserError for a clock in the budget of another device."""
    if device and Fpga.known(device):
        return Fpga.load(device)
    if budget.clock_hz:
        raise UserError(f"the budget {str(budget)!r} has a clock, which only an FPGA has: {', '.join(Fpga.names())}")
    return None


def fit_circuit(workload: Workload, budget: Budget, chip: Fpga, o: Options) -> FittedCircuit:
    """Fit a classifier that is a chain of layers into a chip. Raises UserError when no circuit can be made of it."""
    clock_hz = _check(budget, chip, o)
    folder = o.out or fresh_folder(Path("runs"), workload.name)
    run = Run(folder, remembered(workload, budget, chip, o), resume=False)
    with Progress(o.minutes * 60, quiet=o.quiet) as progress:
        found = _candidates(workload, budget.limits.get("latency_ms"), clock_hz, o, progress)
        best, used, tried = _chosen(found, budget, chip, clock_hz, progress)
        progress.step("simulating")
        measured, how = _verified(workload, best, used, clock_hz)
    save(best.model, folder / "fitted", workload, best.plan)
    best.design.write(folder / "circuit")
    record = {
        "workload": workload.name,
        "device": chip.name,
        "budget": str(budget),
        "clock_hz": clock_hz,
        "chosen": best.name,
        "plan": best.plan.to_yaml(),
        "measured": measured,
        "resources": vars(used),
        "violations": [*budget.violations(measured), *chip.lacks(used)],
        "tried": tried,
        **how,
    }
    run.write("record", record)
    return FittedCircuit(best.model, best.plan, workload, best.design, folder, record)


def _check(budget: Budget, chip: Fpga, o: Options) -> float:
    """The clock, hertz. Raises UserError for what a circuit is not measured by, before any work."""
    wrong = sorted(
        NAME_OF_KEY[k] for k in {*budget.limits, *budget.relative} if k not in LIMITED or k in budget.relative
    )
    if wrong:
        names = ", ".join(NAME_OF_KEY[k] for k in LIMITED)
        raise UserError(f"the budget limits {wrong[0]}; for {chip.name} it can limit, in absolute numbers: {names}")
    if o.resume:
        raise UserError("a fit for an FPGA is not resumed; leave out --resume")
    require_amaranth()
    yosys()
    return budget.clock_hz or chip.clock_mhz * 1e6


# --- candidates ------------------------------------------------------------------------------------------------


def _candidates(
    workload: Workload, latency_ms: float | None, clock_hz: float, o: Options, progress: Progress
) -> list[Candidate]:
    """Every way to encode the model that gives a circuit within the latency, the most accurate first."""
    before = workload.score(workload.model).value
    limit = None if latency_ms is None else int(latency_ms * 1e-3 * clock_hz)
    found: list[Candidate] = []
    refused: list[str] = []
    deadline = time.monotonic() + o.minutes * 60
    for name, plan in _plans(workload, o):
        if found and time.monotonic() > deadline:
            break
        progress.step(f"encoding: {name}")
        try:
            torch.manual_seed(o.seed)
            model = plan.apply(workload)
            design = Streaming(cycles=SLOWEST).emit(model, workload).within(limit)
        except UserError as error:
            refused.append(f"{name}: {error}")
            continue
        drop = workload.metric.drop(before, workload.score(Answers(design)).value)
        found.append(Candidate(name, plan, model, design, drop))
    if not found:
        raise UserError(f"no circuit can be made of {workload.name!r}; {refused[0]}")
    return sorted(found, key=lambda c: c.drop)


def _plans(workload: Workload, o: Options) -> Iterator[tuple[str, Plan]]:
    for weights, inputs in TABLES:
        yield (
            f"tables of {weights} weights, {inputs} inputs",
            Plan([Step(LookupTables(weights=weights, inputs=inputs))]),
        )
    if workload.training is None:
        return
    steps = _affordable_steps(workload, TRAINING * o.minutes * 60 / len(LEVELS))
    for levels in LEVELS:
        yield f"binary weights, {levels} signs", _binary(workload, levels, steps, o.seed)


def _affordable_steps(workload: Workload, seconds: float) -> int:
    """Updates of a binary copy that fit into the time, from a few that are timed."""
    start = time.monotonic()
    try:
        _binary(workload, 1, TRIED_STEPS, 0).apply(workload)
    except UserError:
        return TRIED_STEPS  # the plan itself will say why
    each = (time.monotonic() - start) / TRIED_STEPS
    return max(TRIED_STEPS, min(MOST_STEPS, int(seconds / each)))


def _binary(workload: Workload, levels: int, steps: int, seed: int) -> Plan:
    """Every layer binary, the first one with real inputs."""
    method = Binary(levels=levels, scale="layer", ends=True, steps=steps, seed=seed)
    names = list(method.targets(workload.model))
    return Plan([Step(method, {name: {"activations": "sign" if i else "real"} for i, name in enumerate(names)})])


# --- choosing --------------------------------------------------------------------------------------------------


def _chosen(
    found: list[Candidate], budget: Budget, chip: Fpga, clock_hz: float, progress: Progress
) -> tuple[Candidate, Resources, list[dict[str, Any]]]:
    """The most accurate candidate that synthesis finds inside the budget and the chip, else the nearest to it."""
    tried: list[dict[str, Any]] = []
    misses: list[tuple[float, Candidate, Resources]] = []
    for candidate in found:
        progress.step(f"synthesising: {candidate.name}")
        used = candidate.design.synthesize(chip.family)
        if used.multipliers > chip.multipliers:
            used = candidate.design.synthesize(chip.family, multipliers=False)
        latency_ms = 1e3 * candidate.design.expected_latency / clock_hz
        measured = {"luts": float(used.luts), "latency_ms": latency_ms, "drop": candidate.drop}
        tried.append({"name": candidate.name, **measured, **vars(used)})
        lacks = chip.lacks(used)
        if budget.met(measured) and not lacks:
            return candidate, used, tried
        over = sum(max(0.0, -slack) for slack in budget.slack(measured).values()) + len(lacks)
        misses.append((over, candidate, used))
    _, candidate, used = min(misses, key=lambda miss: miss[0])
    return candidate, used, tried


def _verified(
    workload: Workload, best: Candidate, used: Resources, clock_hz: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Budget quantities with cycles from simulation and the drop on the test data, and how they were found."""
    design = best.design
    scores = [workload.score(m, "test").value for m in (workload.model, Answers(design))]
    cycles, how = design.expected_latency, "by arithmetic, since no simulator is installed"
    found: dict[str, Any] = {}
    if _simulator():
        frames = torch.cat([batch["input"] for batch in workload.test[:FRAMES]])[:FRAMES]
        q = design.net.read(frames)
        seen = design.simulate(q)
        wrong = int((seen.scores != design.net(q)).sum())
        if wrong:
            raise UserError(f"{wrong} scores of the simulated circuit differ from the integers; please report this net")
        cycles, how = seen.latency_cycles, f"by {seen.simulator}"
        found = {"frames_simulated": len(frames), "cycles_per_frame": seen.interval_cycles}
    measured = {"luts": float(used.luts), "latency_ms": 1e3 * cycles / clock_hz}
    measured["drop"] = workload.metric.drop(*scores)
    return measured, found | {
        "latency_cycles": cycles,
        "cycles_by": how,
        "score_before": scores[0],
        "score_after": scores[1],
    }


def _simulator() -> bool:
    try:
        return bool(installed())
    except UserError:
        return False
