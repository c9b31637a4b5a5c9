"""SpecMD: with few experts in memory, is Least-Stale the right cache policy when experts are fetched ahead?"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lilliput.methods.experts._policies import BELADY, POLICIES
from lilliput.methods.experts._trace import NOTHING
from lilliput.methods.experts.specmd import ExpertTrace, Hardware, Report, SpecMD, expert_bytes, write_experts
from lilliput.paper import Evidence, Paper, Row
from lilliput.papers._mixtures import text_of, tiny_mixture
from lilliput.papers._paired import advantage

paper = Paper(
    title="SpecMD: A Comprehensive Study On Speculative Expert Prefetching",
    authors="Duc Hoang, Ajay Jaiswal, Mohammad Samragh, Minsik Cho",
    year=2026,
    arxiv="2602.03921",
    claim="With a few percent of a mixture's experts in memory and experts fetched ahead, evicting the least stale "
    "loses far fewer of the fetched experts before their use than LRU and hits more often than LRU, LFU and FIFO.",
    methods=("experts.specmd", "experts.upcycle"),
)

OURS, LRU = "least_stale", "lru"
RIVALS = tuple(name for name in POLICIES if name != OURS)
EXPERTS, TOP_K = 32, 4
SHARES = (0.05, 0.1, 0.2, 0.5)  # of all experts that fit into memory
JUDGED = 0.1  # room for 4.8 times what a layer uses; OLMoE's 5 % are 6.4 times
FEWER = 10  # times fewer collisions than LRU; the paper has up to 85
PROMPT = 32  # tokens read at once; the others of a window one by one
AHEAD, WIDTHS = (1, 2, 3), (2, 4, 8)
MACHINES = (
    Hardware("memory_card", 20e6, 1e-3, 5e-4),
    Hardware("disk", 1e9, 1e-4, 5e-4),
    Hardware("bus", 16e9, 1e-5, 5e-4),
)  # bytes and seconds, layers of half a millisecond: assumed, not measured


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int  # updates that heal the mixture
    windows: int  # of test text
    tuning: int  # windows of validation text


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """Traces of a mixture made of llama-tiny, replayed; how far and how much each policy fetches ahead is tuned for it
    on validation text.

    Holds when, in decoding with JUDGED of the experts in memory, Least-Stale's hit rate on test windows is above that
    of every one of RIVALS by more than two standard errors, and LRU has at least FEWER times its collisions.
    """
    effort = Effort(steps=600, windows=24, tuning=8) if full else Effort(steps=128, windows=6, tuning=3)
    work, model = tiny_mixture(EXPERTS, TOP_K, effort.steps, effort.windows, seed)
    tuning = traces(model, text_of(work, "validation", effort.tuning))
    test = traces(model, text_of(work, "test", effort.windows))
    size = expert_bytes(model)
    chosen = {policy: tuned(policy, tuning, size) for policy in POLICIES}
    found = contenders(chosen, test, size)
    margins, collisions = judged(found)
    decoded = sum(len(trace.tokens) - 1 for trace in test)
    rows = [row(name, reports, decoded) for name, reports in found.items()]
    rows += [modelled(policy, settings, test, size) for policy, settings in chosen.items()]
    rows.append(from_disk(model, chosen[OURS], text_of(work, "test", 1)[0], size))
    perplexity = {name: work.score(m, "test").value for name, m in (("mixture", model), ("dense", work.model))}
    rows.append(Row("perplexity on test text", perplexity))
    best = min(margins, key=lambda name: margins[name][0])
    return Evidence(
        setup=f"llama-tiny split into {EXPERTS} experts a layer, {TOP_K} used, {effort.steps} steps of healing, "
        f"{effort.windows} test windows, {PROMPT} tokens at once and {decoded // effort.windows} one by one, from an "
        f"empty cache, experts of {size} bytes, "
        f"{torch.get_num_threads()} threads, CPU, seed {seed}",
        rows=rows,
        holds=judge(margins, collisions),
        figure=f"at {JUDGED:.0%} of the experts {100 * margins[best][0]:+.1f} ± {100 * margins[best][1]:.1f} points of "
        f"hit rate over the best rival ({best}); {collisions[OURS]} collisions, LRU {collisions[LRU]}",
        limits="A mixture of 192 small experts split off a dense model and healed shortly, six layers. The rule of "
        "Least-Stale is reconstructed from its description. Times are modelled for assumed machines; reads from disk "
        "are counted, not timed. Experts that miss are waited for; substitutes and low-bit copies are not tried.",
    )


def judge(margins: dict[str, tuple[float, float]], collisions: dict[str, int]) -> bool:
    """The rule of `experiment`; margins are (mean, standard error) of our hit rate over each rival's."""
    ahead = all(margins[name][0] > 2 * margins[name][1] for name in RIVALS)
    return ahead and collisions[LRU] > 0 and collisions[LRU] >= FEWER * collisions[OURS]


def traces(model: Any, texts: Tensor) -> list[ExpertTrace]:
    """A trace of each window (n, T)."""
    return [ExpertTrace.record(model, ids, PROMPT, ahead=max(AHEAD)) for ids in texts]


def room(share: float, trace: ExpertTrace, size: int) -> int:
    """Bytes for a share of all experts."""
    _, layers, experts = trace.needed.shape
    return max(1, round(share * layers * experts)) * size


def tuned(policy: str, tuning: Sequence[ExpertTrace], size: int) -> SpecMD:
    """The settings of a policy with the highest hit rate in decoding; fewest loads among equals."""
    candidates = [SpecMD(policy=policy, ahead=ahead, width=width) for ahead, width in itertools.product(AHEAD, WIDTHS)]

    def worth(settings: SpecMD) -> tuple[float, int]:
        reports = run(settings, tuning, JUDGED, size)
        return float(hit_rates(reports).mean()), -sum(r.decode.loads for r in reports)

    return max(candidates, key=worth)


def run(settings: SpecMD, on: Sequence[ExpertTrace], share: float, size: int) -> list[Report]:
    """A replay of each trace."""
    return [settings.replay(trace, room(share, trace, size), size) for trace in on]


def hit_rates(reports: Sequence[Report]) -> Tensor:
    """In decoding, one for each trace."""
    return torch.tensor([report.decode.hit_rate for report in reports], dtype=torch.float64)


Found = dict[str, dict[float, list[Report]]]  # contender -> share in memory -> a report for each trace


def contenders(chosen: dict[str, SpecMD], test: Sequence[ExpertTrace], size: int) -> Found:
    """Every policy with and without fetching ahead, and what is best without it."""
    every = dict(chosen)
    every |= {f"{policy}, nothing fetched ahead": SpecMD(policy=policy, predictor=NOTHING) for policy in POLICIES}
    every["Belady, nothing fetched ahead"] = SpecMD(policy=BELADY, predictor=NOTHING)
    return {name: {share: run(settings, test, share, size) for share in SHARES} for name, settings in every.items()}


def judged(found: Found) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Margins of our hit rate over each rival's, and the collisions of all."""
    rates = {name: hit_rates(found[name][JUDGED]) for name in POLICIES}
    margins = {name: advantage(-rates[OURS], -rates[name]) for name in RIVALS}
    return margins, {name: sum(r.decode.collisions for r in found[name][JUDGED]) for name in POLICIES}


def row(name: str, by_share: dict[float, list[Report]], tokens: int) -> Row:
    """Means over traces at each share, and the standard errors of the hit rates."""
    values, spread = {}, {}
    for share, reports in by_share.items():
        end, rates = f"_at_{share:.0%}", hit_rates(reports)
        values[f"decode_hit_rate{end}"] = float(rates.mean())
        spread[f"decode_hit_rate{end}"] = float(rates.std() / len(rates) ** 0.5)
        values[f"prefill_hit_rate{end}"] = sum(r.prefill.hit_rate for r in reports) / len(reports)
        values[f"collisions_per_1000_tokens{end}"] = 1000 * sum(r.decode.collisions for r in reports) / tokens
        values[f"loads_per_token{end}"] = sum(r.decode.loads for r in reports) / tokens
    return Row(f"{name}, fetched ahead" if name in POLICIES else name, values, spread)


def modelled(policy: str, settings: SpecMD, test: Sequence[ExpertTrace], size: int) -> Row:
    """Modelled milliseconds of a policy with JUDGED of the experts in memory."""
    values = {"layers_ahead": float(settings.ahead), "experts_a_layer": float(settings.width)}
    for machine in MACHINES:
        reports = [settings.replay(trace, room(JUDGED, trace, size), size, machine) for trace in test]
        first, each = ([getattr(r, name) or 0.0 for r in reports] for name in ("first_token_ms", "token_ms"))
        values[f"modelled_first_token_ms_{machine.name}"] = sum(first) / len(first)
        values[f"modelled_token_ms_{machine.name}"] = sum(each) / len(each)
        hits = sum(r.prefill.hits + r.decode.hits for r in reports)
        values[f"late_share_of_hits_{machine.name}"] = sum(r.late for r in reports) / max(1, hits)
    return Row(f"{policy}, modelled times", values)


def from_disk(model: Any, settings: SpecMD, ids: Tensor, size: int) -> Row:
    """A window read with the experts on disk: what was counted there, beside the replay of its trace."""
    trace = ExpertTrace.record(model, ids, PROMPT, ahead=max(AHEAD))
    capacity = room(JUDGED, trace, size)
    expected, paged = settings.replay(trace, capacity, size), copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        path = write_experts(model, Path(folder) / "experts")
        with settings.attached_(paged, path, capacity) as pager, torch.no_grad():
            error = largest_difference(model, paged, ids)
            pager.settle()
            stats = pager.store.stats()  # pyright: ignore[reportAttributeAccessIssue]
    values = {
        "decode_hit_rate": pager.decode.hit_rate,
        "bytes_read": float(stats.bytes_read),
        "bytes_of_experts": float(size * (pager.prefill.loads + pager.decode.loads)),
        "replay_agrees": float((pager.prefill, pager.decode) == (expected.prefill, expected.decode)),
        "largest_difference_of_logits": error,
    }
    return Row(f"{settings.policy}, from disk at {JUDGED:.0%}", values)


def largest_difference(model: Any, other: Any, ids: Tensor) -> float:
    """Between the logits of two models that read a prompt at once and the other tokens one by one."""
    caches, worst = [DynamicCache(config=model.config) for _ in range(2)], 0.0
    for piece in ids.split([PROMPT, *[1] * (len(ids) - PROMPT)]):
        pairs = zip((model, other), caches)
        a, b = (m(input_ids=piece[None], past_key_values=cache, use_cache=True).logits for m, cache in pairs)
        worst = max(worst, float((a - b).abs().max()))
    return worst
