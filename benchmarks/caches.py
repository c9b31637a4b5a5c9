"""Cache policies: perplexity, recall of a fact and tokens per second, against the bytes their caches hold.

    python benchmarks/caches.py                  # writes results/caches.csv and docs/caches.svg
    python benchmarks/caches.py --task quality   # one half, which takes its place in the file
    python benchmarks/caches.py --quick          # the same with one budget and few texts, some minutes

All contenders read the same texts in pieces, so that none sees a text whole but the full cache. Rows
`quality`: perplexity of the second half of windows of test text, with the paired difference to the full cache in nats
per token; and recall: a sentence with a number stands in real text at several depths, its beginning comes again at the
end, and the number must follow digit by digit. Spreads are standard errors. Rows `decode`: greedy steps in eager torch
after a context, contenders in turn (ABAB), median over rounds with the interquartile range; attention that a policy
computes twice is in it. Bytes are those of the tensors a cache holds for one text after reading it. A context beyond
the positions that the model learned says nothing of its answers; its time and bytes are what they would be.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
import torch.nn.functional as F
from _chart import Line, Panel, chart
from tables import write_rows
from torch import Tensor
from transformers import Cache, DynamicCache

from lilliput.cache import write_atomically
from lilliput.methods.cache import H2O, InfiniPot, LowBit, RoCo, Sliding
from lilliput.methods.cache._cache import held_bytes
from lilliput.metrics.latency import wait_until_quiet
from lilliput.workload import Workload
from lilliput.zoo.texts import state_of_the_union, token_windows

BUDGETS = (64, 128, 256)
LENGTH = 1024  # tokens of a text whose quality is looked at
CONTEXTS = (1024, 4096, 16384)  # before the steps that are timed
PIECE, LONG_PIECE = (
    32,
    128,
)  # tokens read at a time: what a pot takes between two distillations, the smallest, the largest
WINDOWS, BATCH = 12, 6  # texts for the perplexity, and how many are read together
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Vienna")
ROUNDS, STEPS = 7, 4  # of timing
CATALYST = "\n\nSummarize the facts and numbers given above:"
FULL = ("full", "float32")

Make = Callable[[], Cache]
Name = tuple[str, str]


def contenders(model: Any, tokenizer: Any, budgets: tuple[int, ...], piece: int = PIECE) -> dict[Name, Make]:
    """(policy, setting) -> a function that makes an empty cache for texts that are read in such pieces."""
    prompt = tokenizer(CATALYST, return_tensors="pt")["input_ids"]
    found: dict[Name, Make] = {FULL: DynamicCache}
    for bits in (8, 4, 2):
        found["low_bit", f"{bits} bits"] = lambda bits=bits: LowBit(bits=bits, residual=piece).cache(model)
    for budget in budgets:
        for policy in (Sliding(budget=budget), H2O(budget=budget), RoCo(budget=budget)):
            found[policy.name().partition(".")[2], f"{budget} tokens"] = lambda p=policy: p.cache(model)
        found["infinipot", f"{budget} tokens"] = lambda b=budget: InfiniPot(budget=b).cache(model, prompt)
    return found


def read(model: Any, ids: Tensor, cache: Cache, first: int, size: int = PIECE) -> Tensor:
    """Logits (B, tokens - first, V) of the tokens from `first` on, all read in pieces of `size`."""
    pieces, place = [], 0
    for piece in ids.split(size, 1):
        logits = model(piece, past_key_values=cache, use_cache=True).logits
        pieces.append(logits[:, max(0, first - place) :])
        place += piece.shape[1]
    return torch.cat(pieces, 1)


def surprise(model: Any, windows: Tensor, make: Make) -> tuple[Tensor, float]:
    """Nats per token of the second half of each window, and the bytes of a cache for one."""
    half, values, size = windows.shape[1] // 2, [], 0.0
    for ids in windows.split(BATCH):
        cache = make()
        logits = read(model, ids[:, :-1], cache, half - 1)
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, half:], reduction="none")
        values.append(nats.mean(1))
        size = held_bytes(cache) / len(ids)
    return torch.cat(values), size


def needles(tokenizer: Any, text: Tensor, depths: tuple[float, ...], cities: tuple[str, ...]) -> tuple[Tensor, int]:
    """Texts (n, tokens) with a fact inside and again at the end, and how many tokens at the end are the answer."""
    numbers = torch.randint(1000, 9999, (len(depths) * len(cities),), generator=torch.Generator().manual_seed(0))
    cases, answers = [], set()
    for i, (depth, city) in enumerate((depth, city) for depth in depths for city in cities):
        begin, number = f"The secret number of {city} is", f" {numbers[i]}"
        fact = tokenizer(f" {begin}{number}.", add_special_tokens=False)["input_ids"]
        question = tokenizer(f"\n\n{begin}", add_special_tokens=False)["input_ids"]
        answer = tokenizer(number, add_special_tokens=False)["input_ids"]
        around = text[i % len(text)].tolist()[: text.shape[1] - len(fact) - len(question)]
        place = after_sentence(tokenizer, around, int(depth * len(around)))
        cases.append(around[:place] + fact + around[place:] + question + answer)
        answers.add(len(answer))
    if len(answers) != 1:
        raise ValueError(f"answers of {sorted(answers)} tokens; all must have the same number")
    return torch.tensor(cases), answers.pop()


def after_sentence(tokenizer: Any, ids: list[int], place: int) -> int:
    """The first place from `place` on that a sentence ends before."""
    ends = (i + 1 for i in range(place, len(ids)) if tokenizer.decode(ids[i]).strip().endswith("."))
    return next(ends, place)


def recalled(model: Any, cases: Tensor, answer: int, make: Make) -> Tensor:
    """1.0 for each text (n,) after which every token of the answer is the likeliest."""
    found = []
    for ids in cases.split(BATCH):
        likeliest = read(model, ids[:, :-1], make(), ids.shape[1] - 1 - answer).argmax(-1)
        found.append((likeliest == ids[:, -answer:]).all(1).double())
    return torch.cat(found)


def quality(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every contender."""
    documents = list(state_of_the_union().split("test").values())
    windows = token_windows(tokenizer, documents, options.length, options.windows)
    cases, answer = needles(tokenizer, windows, options.depths, options.cities)
    rows, full, full_size = [], torch.zeros(0), 1.0
    for name, make in contenders(model, tokenizer, options.budgets).items():
        nats, size = surprise(model, windows, make)
        if name == FULL:
            full, full_size = nats, size
        more, hits = (nats - full).double(), recalled(model, cases, answer, make)
        row = base_row("quality", name, options.length, size, full_size)
        row |= {"perplexity": f"{nats.double().mean().exp():.2f}", "nats_over_full": f"{more.mean():.4f}"}
        row |= {"nats_se": f"{more.std() / len(more) ** 0.5:.4f}", "recall_percent": f"{100 * hits.mean():.1f}"}
        row |= {"recall_se": f"{100 * hits.std() / len(hits) ** 0.5:.1f}"}
        rows.append(shown(row))
    return rows


def speed(model: Any, tokenizer: Any, context: int, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for every contender: steps after `context` tokens."""
    documents = list(state_of_the_union().split("test").values())
    ids = token_windows(tokenizer, documents, LENGTH, context // LENGTH).view(
        1, -1
    )  # no text is as long as some contexts
    caches = {name: make() for name, make in contenders(model, tokenizer, budgets, LONG_PIECE).items()}
    last = {name: read(model, ids, cache, context - 1, LONG_PIECE).argmax(-1) for name, cache in caches.items()}
    sizes = {name: held_bytes(cache) for name, cache in caches.items()}
    times: dict[Name, list[float]] = {name: [] for name in caches}
    wait_until_quiet()
    for _ in range(ROUNDS + 1):
        for name, cache in caches.items():
            start = perf_counter()
            for _ in range(STEPS):
                last[name] = model(last[name], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            times[name].append(STEPS / (perf_counter() - start))
    rows = []
    for name, found in times.items():
        low, _, high = quantiles(found[1:], n=4)  # the first round warms up
        row = base_row("decode", name, context, sizes[name], sizes[FULL])
        row |= {"tokens_per_s": f"{median(found[1:]):.2f}", "iqr_tokens_per_s": f"{high - low:.2f}"}
        rows.append(shown(row))
    return rows


def base_row(task: str, name: Name, context: int, size: float, full_size: float) -> dict[str, Any]:
    """What all rows have; figures that a task does not measure stay empty."""
    row: dict[str, Any] = {"task": task, "policy": name[0], "setting": name[1], "context_tokens": context}
    row |= {"cache_bytes": round(size), "share_of_full": f"{size / full_size:.3f}"}
    figures = ("perplexity", "nats_over_full", "nats_se", "recall_percent", "recall_se", "tokens_per_s")
    return row | dict.fromkeys((*figures, "iqr_tokens_per_s"), "")


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
    return row


def picture(rows: list[dict[str, Any]]) -> str:
    """Perplexity and recall against the bytes that a cache holds, and tokens per second against the context."""
    quality_rows, decode_rows = ([r for r in rows if r["task"] == task] for task in ("quality", "decode"))
    mib = {"cache_bytes": 2**-20, "context_tokens": 1.0}

    def panel(title: str, below: str, chosen: list[dict[str, Any]], x: str, y: str, error: str) -> Panel:
        def named(r: dict[str, Any]) -> str:
            return r["policy"] if x == "cache_bytes" else f"{r['policy']} {r['setting']}"

        points: dict[str, list[tuple[float, float, float]]] = {named(r): [] for r in chosen}
        for r in sorted(chosen, key=lambda r: float(r[x])):
            points[named(r)].append((float(r[x]) * mib[x], float(r[y]), float(r[error]) if error else 0.0))
        return Panel(
            title, below, [Line(n, p, strong=n.startswith("full")) for n, p in points.items()], y != "perplexity"
        )

    size = "MiB of the cache for one text"
    return chart(
        [
            panel("perplexity", size, quality_rows, "cache_bytes", "perplexity", ""),
            panel("facts recalled, %", size, quality_rows, "cache_bytes", "recall_percent", "recall_se"),
            panel("tokens per second", "tokens of context", decode_rows, "context_tokens", "tokens_per_s", ""),
        ],
        3,
    )


def kept_rows(path: Path, task: str) -> list[dict[str, Any]]:
    """The rows of the other half that the file has."""
    if not path.exists():
        return []
    columns = base_row("", ("", ""), 0, 0.0, 1.0)
    with path.open(newline="") as file:
        return [{key: row[key] for key in columns} for row in csv.DictReader(file) if row["task"] != task]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="one budget and few short texts")
    parser.add_argument("--task", choices=("quality", "decode"), help="one half of the rows")
    parser.add_argument("--out", type=Path, default=Path("results/caches.csv"))
    parser.add_argument("--picture", type=Path, default=Path("docs/caches.svg"))
    options = parser.parse_args()
    full = {"budgets": BUDGETS, "length": LENGTH, "windows": WINDOWS, "depths": DEPTHS, "cities": CITIES}
    quick = {"budgets": BUDGETS[1:2], "length": 512, "windows": 2, "depths": DEPTHS[1::2], "cities": CITIES[:2]}
    vars(options).update(quick if options.quick else full)
    work = Workload.from_name(options.model)
    model, tokenizer = work.model, work.tokenizer
    rows = kept_rows(options.out, options.task) if options.task else []
    with torch.inference_mode():
        if options.task != "decode":
            rows = quality(model, tokenizer, options) + rows
        if options.task != "quality":
            for context in CONTEXTS[:1] if options.quick else CONTEXTS:
                rows += speed(model, tokenizer, context, options.budgets[-1:])
    facts = {"model": work.name, "texts": options.windows, "facts": len(options.depths) * len(options.cities)}
    write_rows(options.out, rows, **facts, threads=torch.get_num_threads(), torch=torch.__version__)
    if {row["task"] for row in rows} == {"quality", "decode"} and not options.quick:
        write_atomically(options.picture, picture(rows))


if __name__ == "__main__":
    main()
