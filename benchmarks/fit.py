"""The candidates of a finished fit as a table: the original, the uniform rivals, and the chosen model as verified.

make demo && python benchmarks/fit.py runs/smollm2-135m     # writes results/fit.smollm2-135m.csv
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tables import write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    record = json.loads((parser.parse_args().run / "record.json").read_text())
    verify, original = record["verify"], record["original"]
    rows = [_row("original", "test", original["values"], verify["score_before"], 0.0)]
    for candidate in record["candidates"]:
        if not candidate["name"].startswith(("joint", "front")):
            measured = candidate["measured"]
            rows.append(_row(candidate["name"], "validation", measured, candidate["score"], measured["drop"]))
    rows.append(_row("joint fit", "test", verify["measured"], verify["score_after"], verify["drop"]))
    facts = {"budget": record["request"]["budget"], "threads": record["threads"], "runtime": record["runtime"]}
    seconds = round(sum(record["seconds"].values()))
    write_rows(Path("results") / f"fit.{record['request']['workload']}.csv", rows, **facts, fit_seconds=seconds)


def _row(name: str, split: str, measured: dict[str, float], score: dict[str, Any], drop: float) -> dict[str, Any]:
    key = "token_ms" if "token_ms" in measured else "latency_ms"
    return {
        "contender": name,
        key: round(measured[key], 3),
        "memory_mb": round(measured["memory_bytes"] / 1e6, 1),
        "size_mb": round(measured["size_bytes"] / 1e6, 2),
        score["name"]: round(score["value"], 3),
        "split": split,
        "worse_percent": round(100 * drop, 3),
    }


if __name__ == "__main__":
    main()
