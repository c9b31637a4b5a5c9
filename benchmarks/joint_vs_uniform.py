"""Joint search against every uniform setting and against random search, at the same measured memory and time.

    python benchmarks/joint_vs_uniform.py smollm2-135m        # writes results/joint_vs_uniform.<model>.csv

For each uniform rival its measured memory and time per token become the budget of a joint search and of a random search
with equal trials; all three are then built, timed in turn, and scored on the test split, which no search has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from tables import write_rows

from lilliput import Budget, Workload
from lilliput.device import Device
from lilliput.fitting.build import Bench
from lilliput.fitting.judge import Judge
from lilliput.fitting.predict import Predictor, rank_correlation
from lilliput.fitting.search import search
from lilliput.fitting.space import Genome, Space
from lilliput.fitting.spaces import build_space
from lilliput.measuring import measure
from lilliput.metrics import quality
from lilliput.runtimes import choose

RIVALS = {"int8 everywhere": "int8", "int4 g32 everywhere": "int4 g32", "int4 g64 everywhere": "int4 g64"}
PRUNED = {"-25.0% neurons everywhere": "-25.0% neurons"}
RANKED = {"rank 75% everywhere": "rank 75%"}
KEYS = ("token_ms", "memory_bytes")
NOISE = 0.01  # of a predicted cost: a rival's own settings must not seem to miss the budget made of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default="quantize,prune")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    start = time.monotonic()
    workload = Workload.from_name(options.model)
    families = options.families.split(",")
    runtime = choose(workload.model, workload)
    threads = torch.get_num_threads()
    original = measure(workload, runtime=runtime, threads=threads, split=None)
    space = build_space(workload, families, KEYS, original.values, threads, Device.here(), runtime, lambda text: None)
    light = dataclasses.replace(workload, calibration=workload.calibration[:2])
    bench = Bench(light, runtime, threads, Judge(workload), original.values, Device.here())
    test = workload.values(workload.model, "test")
    rows = [_row("original", "", original.values, workload.summarize(test).value, None)]
    predictor, pairs = Predictor(space), []
    wanted = RIVALS | (PRUNED if "prune" in families else {}) | (RANKED if "factorize" in families else {})
    for name, label in wanted.items():
        genome = space.uniform({"*": label})
        rival = _built(bench, space, genome, test)
        rows.append(_row(name, name, rival["measured"], rival["score"], rival["difference"]))
        budget = Budget(
            f"time_per_token<={rival['measured']['token_ms']}ms, memory<={rival['measured']['memory_bytes']}B"
        )
        predictor.learn([(genome, rival["measured"], rival["damage"])])
        for kind, sampler, seeded in (("joint search", "genecai", True), ("random search", "random", False)):
            found = search(
                predictor, budget, sampler=sampler, trials=options.trials, seed=options.seed, margin=-NOISE,
                seeded=seeded, start=[genome] if seeded else None,
            )[0]  # fmt: skip
            result = _built(bench, space, found, test)
            pairs.append((predictor.costs(found)["token_ms"], result["measured"]["token_ms"],
                          predictor.damage(found), result["damage"]))  # fmt: skip
            rows.append(_row(kind, name, result["measured"], result["score"], result["difference"]))
            print(rows[-1], flush=True)
    latency, damage = (rank_correlation(*zip(*[p[i : i + 2] for p in pairs])) for i in (0, 2))
    print(f"rank correlation: latency {latency}, damage {damage}; {time.monotonic() - start:.0f} s")
    name = f"joint_vs_uniform.{options.model}" + ("" if "factorize" not in families else ".factorize")
    write_rows(Path("results") / f"{name}.csv", rows, threads=threads, runtime=runtime.name, seed=options.seed)


def _built(bench: Bench, space: Space, genome: Genome, before: torch.Tensor) -> dict:
    """Build a genome, measure it, judge it on validation, score it on test."""
    model = space.plan(genome).apply(bench.workload)
    measured = bench.quantities(model)
    measured["memory_bytes"] += bench.memory_offset_of(model)
    after = bench.workload.values(model, "test")
    return {
        "measured": measured,
        "damage": bench.judge.judge(model).damage,
        "score": bench.workload.summarize(after).value,
        "difference": quality.paired_difference(before, after),
    }


def _row(name: str, budget_of: str, measured: dict, perplexity: float, difference) -> dict:
    return {
        "contender": name,
        "budget_of": budget_of,
        "token_ms": round(measured["token_ms"], 3),
        "memory_mb": round(measured["memory_bytes"] / 1e6, 2),
        "test_perplexity": round(perplexity, 4),
        "nats_worse": "" if difference is None else round(difference.mean, 5),
        "nats_low": "" if difference is None else round(difference.low, 5),
        "nats_high": "" if difference is None else round(difference.high, 5),
    }


if __name__ == "__main__":
    main()
