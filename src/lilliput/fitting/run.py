"""The main job. `fit` reads top to bottom: measure, aim, probe, search and build, serve, recover, verify, hand over."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput.artifact import load, save
from lilliput.budget import Budget, format_quantity
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.fitting.aim import aim
from lilliput.fitting.build import Bench, key_of
from lilliput.fitting.circuit import FittedCircuit, asked_fpga, fit_circuit
from lilliput.fitting.judge import Judge
from lilliput.fitting.outcome import Fitted, outcome
from lilliput.fitting.predict import Predictor, Sample, violation
from lilliput.fitting.progress import Progress
from lilliput.fitting.record import Run, fresh_folder
from lilliput.fitting.recover import all_cores, recovered
from lilliput.fitting.report.page import write_report
from lilliput.fitting.request import Options, facts_of, read_options, remembered
from lilliput.fitting.search import lagrangian_seeds, ranked, search
from lilliput.fitting.serve import check_context, choices, freed_bytes, may_use_policies, reserve_s, serving_rows
from lilliput.fitting.space import Genome, Space
from lilliput.fitting.spaces import build_space, rivals
from lilliput.fitting.student import compare_students, wants_student
from lilliput.fitting.verify import prove, verify
from lilliput.measuring import Measured, measure, model_times, pick_runtime
from lilliput.plan import Plan, read_serving
from lilliput.workload import Workload

DEFAULT_BUDGET = "memory<=50%, time_per_token<=50%"
HEAL_STEPS = 60  # of distillation before a feed-forward candidate is judged: without, pruning never pays
SAFETY = 0.06  # share of a limit kept free while searching: a quick measurement errs by some percent
PROOFS = 3  # candidates tried at most until one meets the budget in a fresh process
RESERVE = 2.6  # times what measuring took: kept for verification and the report, at most a quarter of the time
RECOVERY = 0.5  # share kept for recovery by distillation where candidates change structure
FRONT = (0.75, 0.5, 0.35, 1.25)  # shares of the budget whose optima are built too: they show the front, teach the costs
TRIES = 6  # genomes timed in a round before one is healed and judged, where that takes long
PATIENCE = 3  # rounds without a better candidate that end the search


def fit(workload: Workload, budget: Budget | str = DEFAULT_BUDGET, **options: Any) -> Fitted | FittedCircuit:
    """Fit `workload` into `budget` on this machine (or a modelled `device`, or an FPGA); see `Options` for the rest.

    Writes `runs/<name>/` as it goes: with `resume=True` a killed fit goes on. Raises UserError when the budget is out
    of reach, with the distance. Ctrl-C keeps the best so far.
    """
    o = read_options(options)
    workload = workload if o.context is None else workload.at_context(o.context)
    budget = Budget(budget) if isinstance(budget, str) else budget
    start = time.monotonic()
    torch.manual_seed(o.seed)
    if fpga := asked_fpga(o.device, budget):
        return fit_circuit(workload, budget, fpga, o)
    device = Device.load(o.device) if o.device else Device.here()
    folder = o.out or fresh_folder(Path("runs"), workload.name)
    run = Run(folder, remembered(workload, budget, device, o), o.resume)
    with Progress(o.minutes * 60, quiet=o.quiet) as progress:
        job = Job(workload, budget, device, o, run, progress, start)
        return job.work()


class Job:
    """One fit under way."""

    def __init__(
        self, workload: Workload, budget: Budget, device: Device, o: Options, run: Run, progress, start: float
    ):
        self.workload, self.device, self.options, self.run = workload, device, o, run
        self.progress, self.start = progress, start
        self.timings: dict[str, float] = {}
        self.trials: list[Genome] = []
        self.asked = budget
        self.memory_offset = 0.0
        self.freed = 0.0  # bytes that a smaller cache gives back
        self.timed: dict[Genome, dict[str, float]] = {}
        self.serving_rows: list[dict[str, Any]] = []  # what was tried
        self.served: list[dict[str, Any]] = []  # what of it helps, as candidates
        self.made: dict[int, tuple[Plan, nn.Module]] = {}  # number of a candidate -> what it became after recovery

    def work(self) -> Fitted:
        """All nine steps."""
        self.measure_original()
        aim(self.workload, self.budget, self.original.values, self.device, self.threads)
        try:
            self.probe()
            self.search_and_build()
            if compare_students(self):
                self._timed("students")
            self.serve()
        except KeyboardInterrupt:
            self.progress.say("stopped by Ctrl-C; keeping the best so far")
            if not self.run.candidates():
                raise UserError("stopped before the first candidate was measured; go on with --resume") from None
        return self.hand_over()

    def measure_original(self) -> None:
        """Step 1: every number of the model as it is."""
        self.progress.step("measuring the original")
        self.runtime = pick_runtime(self.options.runtime, self.workload.model, self.workload)
        self.threads = self.options.threads or torch.get_num_threads()
        check_context(self)

        def compute() -> dict[str, Any]:
            found = measure(self.workload, runtime=self.runtime, threads=self.threads, split=None)
            if not self.device.measured:
                model_times(found, self.workload, self.device, self.threads)
            return found.to_json()

        self.original = Measured.from_json(self.run.step("original", compute))
        with all_cores():
            self.judge = Judge(self.workload)
        self.original.score = self.judge.score
        self._timed("measure")

    def probe(self) -> None:
        """Step 3: the latency of shapes and formats, the damage of every option."""
        self.progress.step("probing layers")
        self.space: Space = build_space(
            self.workload,
            self.options.families,
            self.original.values,
            self.threads,
            self.device,
            self.runtime,
            self.progress.say,
            self.reference.cache_bytes if self.reference is not None else 0.0,
        )
        self.timed |= self.space.timed
        self.predictor = Predictor(self.space, timed=self.timed)
        if "memory_bytes" in self.budget.limits and self.workload.source:
            self.memory_offset = self.run.step("memory_offset", self._memory_offset)
            if may_use_policies(self):
                self.freed = self.run.step("freed", lambda: freed_bytes(self))
        self._timed("probe")

    def _memory_offset(self) -> float:
        """Bytes that a fresh process needs beyond the original's less the weights saved: what unpacking takes."""
        self.progress.say("memory in a fresh process")
        plan = self.space.plan(lagrangian_seeds(self.predictor, self.budget, SAFETY)[0])
        return self.bench.memory_offset_of(plan.apply(self.light))

    def search_and_build(self) -> None:
        """Steps 4 and 5, in turn until the time is up or nothing better comes: search on the predictors, build the
        best and an optimum of another budget, correct."""
        for name, genome in (rivals(self.space) if self.options.rivals else {}).items():
            if self._left() > 0:
                self._build(name, genome)
        stale = 0
        for round_ in range(20):
            self.learn()
            before = self.best() if self.run.candidates() else None
            for name, found in (("joint", self._aimed(round_)), ("front", self._front_of(round_))):
                if found and (self._left() > 0 or not self.run.candidates()):
                    self._build(f"{name} {round_ + 1}", found[0])
            stale = 0 if self._improved_on(before) else stale + 1
            if self._left() <= 0 or stale >= PATIENCE:
                break
        self._timed("search and build")

    def _improved_on(self, before: dict[str, Any] | None) -> bool:
        """Whether the best candidate is better than `before` by more than the noise of judging."""
        best = self.best()
        if before is None or self.budget.met(best["measured"]) > self.budget.met(before["measured"]):
            return True
        return best["damage"] < before["damage"] - best["damage_error"]

    def _aimed(self, round_: int) -> list[Genome]:
        """What a search finds. Where candidates are healed the best are timed and judged unhealed first, and the search
        goes on with that until its best is one that is known: what was timed competes, uniform settings included. After
        a miss it aims as much lower, because an optimum of predictions gains from their errors."""
        margin = SAFETY
        for attempt in range(TRIES):
            found = self._unbuilt(self._search(round_, attempt, margin))
            if not self.bench.heal_steps or not found:
                return found
            if found[0] in self.timed or self._left() <= 0:
                break
            self.progress.say("timing what was found")
            with all_cores():
                model, damage = self.space.tried(found[0])
            self.timed[found[0]] = self.bench.speed(model)[0] | {"damage": damage}
            margin = SAFETY + min(violation(self.budget, self.timed[found[0]], SAFETY), SAFETY)
            self.learn()
        return ranked(self.predictor, self.budget, SAFETY / 2, self._unbuilt(list(self.timed)))  # no guesses any more

    def _unbuilt(self, genomes: list[Genome]) -> list[Genome]:
        built = [[0] * len(self.space.units), *(c["genome"] for c in self.run.candidates())]
        return [g for g in genomes if list(g) not in built]

    def _search(self, round_: int, attempt: int, margin: float) -> list[Genome]:
        self.progress.step("searching")
        rounds = 4 * (TRIES if self.bench.heal_steps else 1)
        seconds = max(1.0, min(40.0, self._left() / rounds))
        start = [tuple(c["genome"]) for c in self._by_quality() if c["genome"]][:5]
        found = search(
            self.predictor,
            self.budget,
            sampler=self.options.sampler,
            trials=self.options.trials,
            seconds=seconds,
            seed=self.options.seed + round_,
            margin=margin,
            storage=self.options.storage or self.run.folder / "search.db",
            name=f"round-{round_ + 1}.{attempt + 1}",
            start=start,
            ray_address=self.options.ray,
        )
        self.trials += found
        return found

    def _front_of(self, round_: int) -> list[Genome]:
        """The optimum of another budget, for the front; of those that are healed every other one."""
        if self.bench.heal_steps and round_ % 2 == 0:
            return []
        budget = self.budget.scaled(FRONT[round_ % len(FRONT)])
        if round_ % 2 == 0 and self.freed > 0:  # what a smaller cache would allow
            budget = self.budget.raised("memory_bytes", self.freed)
        return self._unbuilt(lagrangian_seeds(self.predictor, budget, SAFETY)[:1])

    def _build(self, name: str, genome: Genome) -> None:
        plan = self.space.plan(genome)
        if any(c["genome"] == list(genome) for c in self.run.candidates()):
            return
        self.progress.step(f"building {name}")
        number = len(self.run.candidates()) + 1
        predicted = self.predictor.costs(genome) | {"damage": self.predictor.damage(genome)}
        candidate = self.bench.candidate(number, name, plan, self.space, genome, predicted)
        self.run.write(f"candidates/{key_of(plan)}", candidate)
        self.progress.best(self._best_line())

    def samples(self) -> list[Sample]:
        """Every built candidate, and the original, as the predictor learns from them."""
        none = (0,) * len(self.space.units)
        built = [(tuple(c["genome"]), c["measured"], c["damage"]) for c in self.run.candidates() if c["genome"]]
        return [(none, self.original.values, 0.0), *built]

    def learn(self) -> None:
        self.predictor.learn(self.samples())

    def best(self) -> dict[str, Any]:
        """The candidate that meets the budget with the least damage, else the one nearest to it."""
        return self._by_quality()[0]

    def _by_quality(self) -> list[dict[str, Any]]:
        """Candidates that stay half of `SAFETY` inside every limit by damage, then others by how far they are out; of
        two that are alike the one that is served in a way of its own."""

        def key(c: dict[str, Any]) -> tuple[float, float]:
            slack = self.budget.slack(c["measured"])
            damage = c.get("recovered", c)["damage"]
            return sum(max(0.0, SAFETY / 2 * (k != "drop") - s) for k, s in slack.items()), damage

        return sorted([*self.served, *self.run.candidates()], key=key)

    def serve(self) -> None:
        """Step 6: the best plans in other ways to serve them."""
        self.progress.step("trying ways to serve")
        self.serving_rows = serving_rows(self)
        self.served = choices(self, self.serving_rows)
        self._timed("serve")

    def recover(self, best: dict[str, Any], seconds: float = math.inf) -> tuple[Plan, nn.Module]:
        """Step 7: distil the best for the time that is left or `seconds`, and make good the errors of its rounding.

        Each is kept only when the validation says it is better. What had its time already is only built.
        """
        if best["number"] in self.made:
            return self.made[best["number"]]
        done = best.get("recovered")
        plan, model = Plan.from_yaml((done or best)["plan"]), None
        if self.options.recover and not done:
            end, damage = self.seconds_left() - seconds, best.get("weights_damage", best["damage"])
            plan, model = recovered(self, plan, damage, lambda: self.seconds_left() - max(0.0, end))
            self._timed("recover")
        with all_cores():
            return plan, model or plan.apply(self.workload)

    def damage_of(self, model: nn.Module) -> float:
        """Of a model, as it serves, on the validation data."""
        served = self.workload.kind != "causal_lm"
        return self.judge.judge(self.runtime.prepare(model, self.workload, self.threads) if served else model).damage

    def hand_over(self) -> Fitted:
        """Steps 8 and 9: prove the best candidate in a fresh process, verify on untouched data, save, report.

        A candidate that misses a limit there although it met it while searching gives way to the next, twice at most.
        """
        for best in self._by_quality()[:PROOFS]:
            plan, model = self.recover(best)
            setting = read_serving(best.get("serving"))
            plan = dataclasses.replace(plan, serving=setting)
            self.progress.step("proving in a fresh process")
            facts = facts_of(self.run.read("request"))
            artifact = save(model, self.run.folder / "fitted", self.workload, plan, facts)
            proof = prove(self.bench, model, artifact, best["measured"], setting)
            if self.budget.met(proof["measured"]) or not self.budget.met(best["measured"]):
                break
        self.progress.step("verifying on untouched data")
        checked = verify(self.bench, model, proof, self.budget, setting)
        self._timed("verify")
        record = outcome(self, best, plan, checked, model)
        self.run.write("record", record)
        (self.run.folder / "plan.yaml").write_text(plan.to_yaml())
        write_report(record, self.run.folder / "report.html")
        return Fitted(model, plan, self.workload, self.run.folder, record)

    @property
    def budget(self) -> Budget:
        """The budget with relative limits made absolute."""
        return self.asked.resolve(self.original.values)

    @property
    def bench(self) -> Bench:
        modelled = () if self.device.measured else ("latency_ms", "token_ms", "first_token_ms", "energy_j")
        heal = HEAL_STEPS if self.workload.kind != "causal_lm" and self.workload.training is not None else 0
        original = self.original.values
        return Bench(
            self.light,
            self.runtime,
            self.threads,
            self.judge,
            original,
            self.device,
            modelled,
            heal,
            self.memory_offset,
            self.reference,
        )

    @cached_property
    def reference(self) -> Any:
        """The original's session, which keeps the context that all are timed behind; None without one."""
        return self.runtime.prepare(self.workload.model, self.workload, self.threads) if self.options.context else None

    @property
    def light(self) -> Workload:
        """The workload with at most two batches of calibration: enough for statistics, quick to run."""
        return dataclasses.replace(self.workload, calibration=self.workload.calibration[:2])

    def _left(self) -> float:
        """Seconds left for searching and building; what distilling candidates or students takes is kept."""
        distils = self.bench.heal_steps > 0 or wants_student(self)
        return self.seconds_left() - distils * RECOVERY * self.options.minutes * 60 - reserve_s(self)

    def seconds_left(self) -> float:
        """Seconds left for all but verification and report."""
        limit = self.options.minutes * 60
        reserve = min(RESERVE * self.timings.get("measure", 0.0), limit / 4)
        return limit - reserve - (time.monotonic() - self.start)

    def _timed(self, name: str) -> None:
        since = time.monotonic() - self.start - sum(self.timings.values())
        self.timings[name] = self.timings.get(name, 0.0) + since

    def _best_line(self) -> str:
        best = self.best()
        limits = ", ".join(format_quantity(k, best["measured"][k]) for k in self.budget.limits)
        state = "meets" if self.budget.met(best["measured"]) else "misses"
        return f"best so far {state} the budget: {limits}, {format_quantity('drop', best['measured']['drop'])} worse"


def reopen(folder: Path, workload: Workload) -> Fitted:
    """The result of a finished run, from its folder."""
    run = Run(folder, {}, resume=True)
    record = run.read("record")
    if record is None:
        raise UserError(f"the run in {str(folder)!r} is not finished; go on with --resume")
    return Fitted(load(folder / "fitted"), Plan.from_yaml(record["plan"]), workload, folder, record)
