"""Every number of one model on this machine: time, memory, size, energy, quality, distance from the roofline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.artifact import load as load_artifact
from lilliput.artifact import load_example, read_architecture, save, serving_of
from lilliput.budget import format_quantity
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.metrics import energy, latency, memory, roofline, size
from lilliput.plan import Plan
from lilliput.runtimes import Runtime, Session, check, choose, find_runtime
from lilliput.served import Drafting, Setting, label, prepare
from lilliput.workload import Score, Workload

NEW_TOKENS = 24
SHORT_PROMPT = 8  # tokens, to warm up
LONG_PROMPT = 512  # tokens from which on a prompt is read a few times only
DRAFT_PROMPT, DRAFTED_TOKENS = 128, 48  # of texts that drafts are timed on
PROMPTS, LONG_PROMPTS = 8, 4  # how many of them, and where they fill a context
SECONDS_PER_ROUND = 0.05  # of a comparison, for nets that take a fraction of a millisecond


@dataclass
class Measured:
    """Budget quantities in base units (`token_ms`, `memory_bytes`, ...) with their spread and how they were taken."""

    runtime: str
    threads: int
    values: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)  # interquartile ranges
    notes: list[str] = field(default_factory=list)
    score: Score | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        score = Score(**data["score"]) if data.get("score") else None
        return cls(**(data | {"score": score}))

    def __str__(self) -> str:
        lines = [f"{key:>15}  {format_quantity(key, value)}" for key, value in self.values.items()]
        if self.score:
            lines.append(f"{'quality':>15}  {self.score}")
        return "\n".join([*lines, f"runtime {self.runtime}, {self.threads} threads", *self.notes])


def measure(
    workload: Workload,
    model: nn.Module | None = None,
    *,
    runtime: Runtime | str | None = None,
    threads: int | None = None,
    fresh_memory: bool = True,
    split: str | None = "validation",
    serving: Setting = None,
) -> Measured:
    """Measure `model` (default: the workload's own) on the workload's example input and one data split.

    `fresh_memory` runs the model once more in a new process to see its peak; otherwise memory is the weights alone.
    `serving` is a decoder or a cache policy that times and memory are taken with; the score is that of the model.
    """
    model = (workload.model if model is None else model).eval()
    runtime = pick_runtime(runtime, model, workload)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    session = prepare(runtime, model, workload, threads, serving)
    check(session, model, workload, tolerance=0.05 if workload.kind == "causal_lm" else None)
    result = Measured(runtime.name, threads, {}, notes=[session.note] if session.note else [])
    if serving is not None:
        result.notes.append(f"served with {label(serving)}")
    load = latency.wait_until_quiet()
    if load > latency.QUIET:
        result.notes.append(f"other processes kept {load:.1f} cores busy: times are unreliable")
    measure_speed(workload, session, result)
    _measure_memory(workload, model, runtime.name, threads, fresh_memory, result, serving)
    _measure_energy(workload, model, session, result)
    if split is not None:
        scorer = session if workload.kind == "classifier" else model
        result.score = workload.score(scorer, split)
    return result


def pick_runtime(runtime: Runtime | str | None, model: nn.Module, workload: Workload) -> Runtime:
    """The named runtime, or the fastest that takes the model. Raises UserError with the reasons of a refusal."""
    if runtime is None:
        return choose(model, workload)
    runtime = find_runtime(runtime) if isinstance(runtime, str) else runtime
    reasons = runtime.supports(model, workload)
    if reasons:
        raise UserError(f"runtime {runtime.name} cannot take this model: {'; '.join(reasons)}")
    return runtime


def measure_speed(workload: Workload, session: Session, result: Measured, quick: bool = False) -> None:
    """Fill in the times: of the example's forward pass, or to the first token and per token."""
    if workload.kind != "causal_lm":
        seconds = 0.2 if quick else 1.0
        taken = latency.measure(lambda: session(workload.example), min_seconds=seconds)
        result.values["latency_ms"], result.spread["latency_ms"] = taken.median_ms, taken.iqr_ms
        return
    ids, generate = workload.example["input_ids"], generator(session)
    repeats = 3 if quick else 5
    if ids.shape[1] > LONG_PROMPT:
        repeats = 2
    taken = latency.measure_generation(lambda: generate(ids, NEW_TOKENS), tokens=NEW_TOKENS, repeats=repeats)
    result.values |= {"first_token_ms": taken.first_token_ms, "token_ms": taken.token_ms}
    result.spread |= {"first_token_ms": taken.first_token_iqr_ms, "token_ms": taken.token_iqr_ms}


def compare_speed(workload: Workload, a: Any, b: Any, rounds: int = 12) -> latency.Comparison:
    """Session `b` against `a`, in turn in this process: forward passes of the example, or the tokens after it."""
    if workload.kind != "causal_lm":
        runs = (lambda: a(workload.example)), (lambda: b(workload.example))
        return latency.compare(*runs, rounds=5 * rounds, min_seconds=SECONDS_PER_ROUND * rounds)
    ids, block = workload.example["input_ids"], NEW_TOKENS // 6
    streams = [generator(session)(ids, 1 + block * rounds) for session in (a, b)]
    for stream in streams:
        next(stream)  # the prompt
    return latency.compare_streams(streams[0], streams[1], block, rounds)


def compare_behind(workload: Workload, a: Any, b: Any, rounds: int = 6) -> tuple[latency.Comparison, float]:
    """Session `b` against `a` by the tokens behind the example, as `compare_speed`, and milliseconds to b's first one.

    Each reads the prompt once, and `a` not even that when it holds it from the last time.
    """
    ids, block = workload.example["input_ids"], NEW_TOKENS // 6
    list(generator(b)(ids[:, :SHORT_PROMPT], 2))  # lays out packed weights
    tokens = 1 + block * rounds
    streams = a.generate(ids, tokens, reuse=True), generator(b)(ids, tokens)
    next(streams[0])
    start = perf_counter()
    next(streams[1])
    first_ms = 1e3 * (perf_counter() - start)
    return latency.compare_streams(*streams, block, rounds), first_ms


def compare_drafting(workload: Workload, drafting: Drafting) -> tuple[latency.Comparison, int]:
    """A session that drafts against the one whose text it drafts, over whole texts behind prompts of the validation
    data, up to the end-of-text token; and how many of the texts are the same.

    Both begin behind a prompt that was read already. Without a text that is long enough there is no gain.
    """
    times, same = [], 0
    for prompt in _validation_prompts(workload):
        tokens = _until_end(workload.model, list(drafting.plain.generate(prompt, DRAFTED_TOKENS)))
        if tokens < DRAFTED_TOKENS // 4:
            continue
        runs = [_written(session, prompt, tokens) for session in (drafting.plain, drafting)]
        times.append([ms for ms, _ in runs])
        same += runs[0][1] == runs[1][1]
    if not times:
        return latency.Comparison(1.0, 1.0, 1.0, (0.0, 0.0), 0), 0
    return latency.paired_ratio([a for a, _ in times], [b for _, b in times]), same


def _validation_prompts(workload: Workload) -> list[Tensor]:
    """Prompts (1, T): as long as the example where that stands for a context, else the first halves of windows."""
    ids = workload.example["input_ids"]
    if ids.shape[1] > DRAFT_PROMPT:
        rows, whole = workload.long_text("validation", ids.shape[1], LONG_PROMPTS)  # type: ignore[attr-defined]
        if whole:
            return list(rows.split(1))
    rows = [row for batch in workload.validation for row in batch["input_ids"].split(1)][:PROMPTS]
    return [row[:, : min(DRAFT_PROMPT, max(1, row.shape[1] // 2))] for row in rows]


def _until_end(model: Any, tokens: list[int]) -> int:
    """How many tokens a text has up to its end-of-text token, that one included."""
    end = getattr(getattr(model, "config", None), "eos_token_id", None)
    ends = set(end if isinstance(end, list) else [end])
    return next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))


def _written(session: Any, prompt: Tensor, tokens: int) -> tuple[float, list[int]]:
    """Milliseconds to write behind a prompt that was read last, and what was written."""
    start = perf_counter()
    text = list(session.generate(prompt, tokens, reuse=True))
    return 1e3 * (perf_counter() - start), text


def compare_copies(workload: Workload, a: Any, b: Session, rounds: int = 6, copies: int = 3) -> latency.Comparison:
    """Session `b` against `a` by the median of `copies` pairs of preparations, where they differ."""
    pairs = [(a, b)]
    while len(pairs) < copies and (other := b.again()) is not b:
        pairs.append((a.again(), other))
    found = sorted((compare_speed(workload, *pair, rounds) for pair in pairs), key=lambda c: c.ratio)
    return found[len(found) // 2]


def generator(session: Session) -> Callable[[Tensor, int], Iterator[int]]:
    """`generate(ids, tokens)` of a session: greedy tokens after the prompt ids (1, T), one by one.

    A session without a cache runs the whole text again for each.
    """
    if hasattr(session, "generate"):
        return session.generate  # type: ignore[attr-defined]

    def generate(ids: Tensor, tokens: int) -> Iterator[int]:
        for _ in range(tokens):
            token = session({"input_ids": ids})[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)
            yield int(token)

    return generate


def _measure_memory(workload, model, runtime: str, threads: int, fresh: bool, result: Measured, serving) -> None:
    if not (fresh and workload.source):
        result.values["memory_bytes"] = float(memory.weight_bytes(model))
        result.values["size_bytes"] = float(size.state_bytes(model.state_dict()))
        result.notes.append("memory is the weights alone: the model was not run in a fresh process")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model", workload, Plan(serving=serving))
        result.values["memory_bytes"] = float(fresh_process_memory(path, runtime, threads))
        result.values["size_bytes"] = float(artifact_bytes(path))


def artifact_bytes(path: Path) -> int:
    """Bytes of an artifact's weights and architecture (the tokenizer, equal before and after, is left out)."""
    return sum((path / name).stat().st_size for name in ("model.safetensors", "architecture.json"))


def fresh_process_memory(path: Path, runtime: str, threads: int) -> int:
    """Peak bytes of a new process that loads the artifact and runs its example, less what the imports take."""
    kind = read_architecture(path)["kind"]
    imports = "import sys, torch, lilliput.measuring, lilliput.runtimes.openvino"
    if kind == "causal_lm":
        imports += ", transformers.models.llama.modeling_llama"
    code = "lilliput.measuring.run_artifact(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    return memory.peak_memory_bytes(code, [str(path), runtime, str(threads)], imports=imports)


def run_artifact(path: str, runtime: str, threads: int) -> None:
    """Load an artifact and run its example once, as it is served: for decoders a prompt and eight tokens."""
    torch.set_num_threads(threads)
    model, example = load_artifact(path), load_example(path)
    kind = read_architecture(path)["kind"]
    workload = bare_workload(model, example, kind)
    session = prepare(find_runtime(runtime), model, workload, threads, serving_of(path))
    if workload.kind == "causal_lm":
        list(generator(session)(example["input_ids"], 8))
    else:
        session(example)


def bare_workload(model: nn.Module, example: dict, kind: str) -> Workload:
    """A workload whose every split is the example: enough to run a model, not to judge it."""
    make = {"causal_lm": Workload.causal_lm, "classifier": Workload.classifier}.get(kind)
    if make is None:
        raise UserError(f"an artifact of kind {kind!r} cannot be run without its own Workload class")
    return make(model, [example], [example], [example], example=example)


def _measure_energy(workload: Workload, model: nn.Module, session: Any, result: Measured) -> None:
    """Energy of one token or one forward pass, and the share of the roofline that was reached."""
    device, costs = Device.here(), step_costs(workload, model)
    if workload.kind == "causal_lm":
        ids = workload.example["input_ids"]
        taken_ms, run, times = result.values["token_ms"], lambda: list(generator(session)(ids, NEW_TOKENS)), NEW_TOKENS
    else:
        taken_ms, run, times = result.values["latency_ms"], lambda: session(workload.example), 1
    reached = roofline.distance(costs, device, taken_ms, result.threads)
    result.notes.append(
        f"roofline: {reached.limit_ms:.3g} ms ({reached.level}), {reached.share_reached:.0%} of the limit reached"
    )
    moved, ops = sum(c.weight_bytes + c.activation_bytes for c in costs), sum(c.ops for c in costs)
    if energy.Rapl().readable:
        result.values["energy_j"] = energy.measure(run, device, moved, ops, min_runs=3).joules / times
        result.notes.append("energy is measured by RAPL")
    else:
        result.values["energy_j"] = energy.model(device, taken_ms / 1e3, moved, ops).joules
        result.notes.append("energy is modelled")


def step_costs(workload: Workload, model: nn.Module) -> list[roofline.LayerCost]:
    """What one token, or one forward pass of the example, moves and computes."""
    if workload.kind == "causal_lm":
        return roofline.layer_costs(model, input_ids=workload.example["input_ids"][:, :1], use_cache=False)
    return roofline.layer_costs(model, *(v for k, v in workload.example.items() if k != "label"))


def modelled_energy(workload: Workload, model: nn.Module, device: Device, ms: float) -> float:
    """Joules of one token or forward pass that takes `ms`, from the device's facts."""
    costs = step_costs(workload, model)
    moved, ops = sum(c.weight_bytes + c.activation_bytes for c in costs), sum(c.ops for c in costs)
    return energy.model(device, ms / 1e3, moved, ops).joules


def model_times(result: Measured, workload: Workload, device: Device, threads: int) -> None:
    """Replace times and energy by those modelled for a device that is not at hand."""
    costs = step_costs(workload, workload.model)
    ms, _ = roofline.limit_ms(costs, device, threads)
    result.values |= {k: ms for k in ("token_ms", "latency_ms") if k in result.values}
    result.values["energy_j"] = modelled_energy(workload, workload.model, device, ms)
    result.values.pop("first_token_ms", None)
    result.notes = [f"times and energy are modelled for {device.name}", *result.notes]
