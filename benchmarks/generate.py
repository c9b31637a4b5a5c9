"""Several tokens a step: every decoder on one model, by kind of text, against plain decoding on both runtimes.

    python benchmarks/generate.py               # writes results/generate.csv and docs/generate.svg
    python benchmarks/generate.py --quick       # six prompts, few tokens; writes nothing

Prompts are pieces of real text of three kinds: `code` (Python's standard library), `structured` (the metadata of the
installed packages) and `free` (State of the Union addresses that the model's heads were not trained on). A time is that
of a whole greedy `generate` call, the prompt included. For each prompt all decoders run in turn, so that each prompt
gives one ratio; `over_plain` is the median of these against plain decoding of the same form on the same runtime, with
its 95 % interval, and `over_transformers` against plain decoding in float32 by transformers. `same_text` counts the
prompts whose tokens are all those of plain decoding on the same runtime.

Drafts come from the text itself (n-gram), from the same model in 4 bits on the native decoder (draft model), and from
parts that were trained here for `--train` seconds each on State of the Union addresses (medusa, gated lora mtp,
speculative streaming).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from statistics import quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
from _bars import Bar, bars
from tables import write_rows
from torch import Tensor

from lilliput import Workload
from lilliput._probe import torch_threads
from lilliput.cache import write_atomically
from lilliput.device import Device
from lilliput.methods.decode import DraftModel, GatedLoraMtp, Medusa, Ngram, SpeculativeStreaming, Tally
from lilliput.methods.quantize.group import Group
from lilliput.metrics.latency import paired_ratio, wait_until_quiet
from lilliput.serving import native_sampling
from lilliput.zoo import text_corpus

COUNTS = {"code": 17, "structured": 17, "free": 16}  # prompts
PROMPT, NEW = 128, 64  # tokens
SETTLE_S = 0.05  # in which the threads of the run before go to sleep


@dataclass
class Contender:
    """One decoder on one form of the model; `decoder` None is transformers' own loop."""

    form: str
    runtime: str
    name: str
    model: Any
    decoder: Any = None
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether its steps can be counted; plain decoding makes one a token."""
        return self.name != "plain"

    def run(self, ids: Tensor, new: int) -> tuple[float, Tensor, Tally]:
        """Milliseconds, token ids and counts of one generation."""
        tally = Tally(steps=new, tokens=new)
        given = self.parts | ({"custom_generate": self.decoder} if self.decoder else {})
        if self.counts:
            tally = given["tally"] = Tally()
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        text = self.model.generate(ids, max_new_tokens=new, do_sample=False, **given)
        return (time.perf_counter() - start) * 1e3, text, tally


def contenders(workload: Workload, train_s: float) -> list[Contender]:
    """All decoders; the first one is what everything is compared with."""
    model: Any = workload.model
    model.generation_config.eos_token_id = None  # every text gets as long as it may
    small: Any = Group(bits=4, group=32).apply(model)
    long_enough: Any = {"seconds": train_s, "steps": 1_000_000}
    heads = Medusa(**long_enough).train(workload)
    adapters = GatedLoraMtp(**long_enough).train(workload)
    streams = SpeculativeStreaming(**long_enough).train(workload)
    drafted = {"draft_model": small}
    return [
        Contender("float32", "torch", "plain", model),
        Contender("float32", "torch", "n-gram", model, Ngram()),
        Contender("float32", "torch", "draft model", model, DraftModel(draft_runtime="lean"), drafted),
        Contender("float32", "torch", "medusa", model, Medusa(), {"heads": heads}),
        Contender("float32", "torch", "gated lora mtp", model, GatedLoraMtp(), {"adapters": adapters}),
        Contender("float32", "torch", "speculative streaming", model, SpeculativeStreaming(), {"streams": streams}),
        Contender("float32", "lean", "plain", model, native_sampling),
        Contender("float32", "lean", "n-gram", model, Ngram(runtime="lean")),
        Contender("float32", "lean", "draft model", model, DraftModel(runtime="lean", draft_runtime="lean"), drafted),
        Contender("int4", "lean", "plain", small, native_sampling),
        Contender("int4", "lean", "n-gram", small, Ngram(runtime="lean")),
    ]


# --- prompts -----------------------------------------------------------------------------------------------------


def texts() -> dict[str, Iterator[str]]:
    """Kind -> pieces of text; of a program or an address what follows its first third, from a new line or word on."""
    library = Path(sysconfig.get_path("stdlib"))
    code = (path.read_text(encoding="utf-8", errors="replace") for path in library.glob("*.py"))
    packages = (d.read_text("METADATA") or "" for d in distributions())
    return {
        "code": (_later(text) for text in code),
        "structured": (text.partition("\n\n")[0] for text in packages),
        "free": (_later(text) for text in text_corpus().split("test").values()),
    }


def _later(text: str) -> str:
    rest = text[len(text) // 3 :]
    return rest.partition("\n" if "\n" in rest else " ")[2]


def prompts(tokenizer: Any, count: Callable[[int], int]) -> dict[str, list[Tensor]]:
    """Kind -> token ids (1, PROMPT) of different texts, in the order of their hashes."""
    found: dict[str, list[Tensor]] = {}
    for kind, pieces in texts().items():
        ordered = sorted(set(pieces), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
        rows = (tokenizer(text, verbose=False)["input_ids"][:PROMPT] for text in ordered)
        long = (torch.tensor([row]) for row in rows if len(row) == PROMPT)
        found[kind] = [ids for _, ids in zip(range(count(COUNTS[kind])), long)]
    return found


# --- the race ----------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """What one contender did on one kind of text."""

    ms: list[float] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def add(self, ms: float, text: Tensor, tally: Tally) -> None:
        self.ms.append(ms)
        self.texts.append(text)
        self.tally.steps += tally.steps
        self.tally.drafted += tally.drafted
        self.tally.tokens += tally.tokens


def race(running: list[Contender], ids: list[Tensor], new: int) -> list[Runs]:
    """Every contender on every prompt, in turn; one short text each warms up."""
    found = [Runs() for _ in running]
    for contender in running:
        contender.run(ids[0], 8)
    for prompt in ids:
        for contender, runs in zip(running, found):
            runs.add(*contender.run(prompt, new))
    return found


def row_of(kind: str, contender: Contender, runs: Runs, plain: Runs, first: Runs, new: int) -> dict[str, Any]:
    low, middle, high = quantiles([1e3 * new / ms for ms in runs.ms], n=4)
    same = sum(torch.equal(a, b) for a, b in zip(runs.texts, plain.texts))
    tally = runs.tally
    held = (tally.tokens - tally.steps) / tally.drafted if tally.drafted else 0.0
    return {
        "text": kind,
        "form": contender.form,
        "runtime": contender.runtime,
        "decoder": contender.name,
        "tokens_per_s": f"{middle:.1f}",
        "iqr": f"{high - low:.1f}",
        "tokens_per_step": f"{tally.tokens_per_step:.2f}",
        "drafts_held": f"{held:.0%}" if tally.drafted else "",
        "same_text": f"{same} of {len(runs.texts)}",
        "over_plain": "" if runs is plain else str(paired_ratio(plain.ms, runs.ms)),
        "over_transformers": "" if runs is first else str(paired_ratio(first.ms, runs.ms)),
    }


def table(running: list[Contender], ids: dict[str, list[Tensor]], new: int) -> list[dict[str, Any]]:
    """A row for each kind of text and contender."""
    rows = []
    for kind, of_kind in ids.items():
        found = race(running, of_kind, new)
        plain = {(c.form, c.runtime): runs for c, runs in zip(running, found) if c.name == "plain"}
        for contender, runs in zip(running, found):
            rows.append(row_of(kind, contender, runs, plain[contender.form, contender.runtime], found[0], new))
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def picture(rows: list[dict[str, Any]]) -> str:
    """Tokens per second of every decoder, a panel for each kind of text, a group for each form and runtime."""
    groups = list(dict.fromkeys((row["form"], row["runtime"]) for row in rows))
    panels: dict[str, list[Bar]] = {}
    for row in rows:
        middle, half = float(row["tokens_per_s"]), float(row["iqr"]) / 2
        name = f"{row['form']} {row['runtime']}, {row['decoder']}"
        bar = Bar(name, middle, max(0.0, middle - half), middle + half, groups.index((row["form"], row["runtime"])))
        panels.setdefault(f"{row['text']}: tokens per second", []).append(bar)
    return bars(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=Device.here().cores)
    parser.add_argument("--train", type=float, default=120, help="seconds of training for each trained part")
    parser.add_argument("--quick", action="store_true", help="six prompts, few tokens; writes nothing")
    arguments = parser.parse_args()
    new, train_s = (24, 20.0) if arguments.quick else (NEW, arguments.train)
    with torch_threads(arguments.threads):
        workload = Workload.from_name(arguments.model)
        running = contenders(workload, train_s)
        ids = prompts(workload.tokenizer, lambda full: 2 if arguments.quick else full)
        busy = wait_until_quiet()
        rows = table(running, ids, new)
    facts = {"model": arguments.model, "threads": arguments.threads, "prompt_tokens": PROMPT, "new_tokens": new}
    if not arguments.quick:
        write_rows(Path("results") / "generate.csv", rows, **facts, train_s=train_s, busy_cores=f"{busy:.1f}")
        write_atomically(Path("docs") / "generate.svg", picture(rows))


if __name__ == "__main__":
    main()
