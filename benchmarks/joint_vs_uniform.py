"""Joint search against every uniform setting and against random search, at the same measured memory and time.

    python benchmarks/joint_vs_uniform.py smollm2-135m        # writes results/joint_vs_uniform.<model>.csv

For each uniform rival its measured memory and time per token become the budget of a joint search and of a random search
with equal trials and equally many chances to correct their predictions. The rounding of what they find, and of the
rival, is made good by GPTQ in the same formats where the validation data says that this is better. All are scored on
the test split, which no search has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from tables import write_rows

from lilliput import Budget, Workload
from lilliput.device import Device
from lilliput.fitting.build import Bench
from lilliput.fitting.judge import Judge
from lilliput.fitting.predict import Predictor, Sample, left_out, rank_correlation, violation
from lilliput.fitting.recover import compensate
from lilliput.fitting.search import search
from lilliput.fitting.space import Genome, Space
from lilliput.fitting.spaces import build_space
from lilliput.measuring import measure
from lilliput.metrics import quality
from lilliput.runtimes import choose

RIVALS = {"int8 everywhere": "int8", "int4 g32 everywhere": "int4 g32", "int4 g64 everywhere": "int4 g64"}
PRUNED = {"-25.0% neurons everywhere": "-25.0% neurons"}
RANKED = {"rank 75% everywhere": "rank 75%"}
ROUNDS = 3  # of searching, building and learning until the budget is met
NOISE = 0.02  # of a predicted cost: a rival's own settings must not seem to miss the budget made of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default="quantize,prune,factorize")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    start = time.monotonic()
    workload = Workload.from_name(options.model)
    families = options.families.split(",")
    runtime = choose(workload.model, workload)
    threads = torch.get_num_threads()
    original = measure(workload, runtime=runtime, threads=threads, split=None)
    space = build_space(workload, families, original.values, threads, Device.here(), runtime, lambda text: None)
    light = dataclasses.replace(workload, calibration=workload.calibration[:2])
    bench = Bench(light, runtime, threads, Judge(workload), original.values, Device.here())
    test = workload.values(workload.model, "test")
    rows = [_row("original", "", original.values, workload.summarize(test).value, None)]
    wanted = RIVALS | (PRUNED if "prune" in families else {}) | (RANKED if "factorize" in families else {})
    genomes = {name: space.uniform({"*": label}) for name, label in wanted.items()}
    rivals = {name: _built(bench, space, genome) for name, genome in genomes.items()}
    samples = [((0,) * len(space.units), original.values, 0.0), *(_sample(genomes[n], r) for n, r in rivals.items())]
    for name, rival in rivals.items():
        contenders = {name: rival, f"{name}, GPTQ": _compensated(bench, rival)}
        for kind, sampler, seeded in (("joint search", "genecai", True), ("random search", "random", False)):
            contenders[kind] = _searched(
                bench, space, samples, (genomes[name], rival), sampler=sampler, seeded=seeded, trials=options.trials,
                seed=options.seed,
            )  # fmt: skip
        for kind, built in contenders.items():
            if kind != name and built is rival:
                continue  # nothing was rounded to groups, or GPTQ made it no better
            after = workload.values(built["model"], "test")
            difference = quality.paired_difference(test, after)
            rows.append(_row(kind, name, built["measured"], workload.summarize(after).value, difference))
            print(rows[-1], flush=True)
        rival.pop("model")
    predicted = left_out(space, samples)
    latency = rank_correlation([c["token_ms"] for c, _ in predicted], [m["token_ms"] for _, m, _ in samples])
    damage = rank_correlation([d for _, d in predicted], [d for *_, d in samples])
    print(f"rank correlation: latency {latency}, damage {damage}; {time.monotonic() - start:.0f} s")
    write_rows(
        Path("results") / f"joint_vs_uniform.{options.model}.csv",
        rows,
        threads=threads,
        runtime=runtime.name,
        seed=options.seed,
        latency_rank_correlation=latency,
        damage_rank_correlation=damage,
    )


def _searched(bench: Bench, space: Space, samples: list[Sample], rival: tuple[Genome, dict], **options: Any) -> dict:
    """The best that a search finds within the rival's measured costs; one that misses them teaches the next round."""
    start, limits = rival[0], rival[1]["measured"]
    budget = Budget(f"time_per_token<={limits['token_ms']}ms, memory<={limits['memory_bytes']}B")
    seeded, found = options.pop("seeded"), []
    for _ in range(ROUNDS):
        predictor = Predictor(space)
        predictor.learn(samples)
        for key, value in predictor.costs(start).items():  # the rival is predicted as it was measured
            factors = predictor.coefficients.setdefault(key, {})
            for part in space.cost_parts(start)[key]:
                factors[part] = factors.get(part, 1.0) * limits[key] / value
        genome = search(
            predictor, budget, margin=-NOISE, seeded=seeded, start=[start] if seeded else None, **options
        )[0]  # fmt: skip
        found.append(_built(bench, space, genome))
        samples.append(_sample(genome, found[-1]))
        if violation(budget, found[-1]["measured"], -NOISE) == 0:
            break
    best = min(found, key=lambda b: (violation(budget, b["measured"], -NOISE), b["damage"]))
    return _compensated(bench, best)


def _sample(genome: Genome, built: dict) -> Sample:
    return genome, built["measured"], built["damage"]


def _built(bench: Bench, space: Space, genome: Genome) -> dict:
    """Build a genome, measure it (memory in a fresh process), judge it on validation."""
    plan = space.plan(genome)
    model = plan.apply(bench.workload)
    measured = bench.quantities(model)
    measured["memory_bytes"] += bench.memory_offset_of(model)
    return {"plan": plan, "model": model, "measured": measured, "damage": bench.judge.judge(model).damage}


def _compensated(bench: Bench, built: dict) -> dict:
    """What was built, with GPTQ in the place of rounding where that is better: formats, time and memory stay."""
    found = compensate(bench.judge.workload, built["plan"], float("inf"))
    if found is None:
        return built
    damage = bench.judge.judge(found[1]).damage
    return {**built, "plan": found[0], "model": found[1], "damage": damage} if damage < built["damage"] else built


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
