"""Small convolutional nets in OpenVINO at batch 1: a joint fit against int8 alone (and NNCF's) and uniform pruning.

    python benchmarks/cnn_openvino.py                  # writes results/cnn_openvino.csv

Everything is executed by OpenVINO; latencies are taken in turn (ABAB) against NNCF's int8 in one process, each net
compiled anew three times; accuracy is on the 10,000 test pictures. Each of three seeds has its own calibration
pictures, search and distillation. Uniform pruning, and int8 without any, learn as the fit did and for as many steps.
What is built is kept in runs/cnn_openvino, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import openvino as ov
import torch
from tables import write_rows
from torch import nn

import lilliput as lp
from lilliput import Plan, Step, Workload
from lilliput.fitting.recover import all_cores
from lilliput.measuring import compare_copies
from lilliput.methods.distill.logits import Logits
from lilliput.methods.prune.channels import Channels
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.metrics import latency
from lilliput.metrics.quality import paired_difference
from lilliput.runtimes import Session, find_runtime

FOLDER = Path("runs/cnn_openvino")
MINUTES = {"resnet-medium": 5, "mobilenet-medium": 5, "resnet-small": 3, "mobilenet-small": 3}  # of each fit
SHARES = {"resnet-medium": 0.8, "mobilenet-medium": 0.83, "resnet-small": 0.85, "mobilenet-small": 0.85}  # of int8
PRUNED = {  # uniformly, so that the latency is near that of the fit
    "resnet-medium": 0.25,
    "mobilenet-medium": 0.25,
    "resnet-small": 0.25,
    "mobilenet-small": 0.25,
}
COMPILED = 3  # times: one compiled copy of a net can be some percent slower than the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet-medium", "mobilenet-medium"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--stage", choices=("fits", "rivals", "times", "all"), default="all")
    parser.add_argument("--threads", type=int, default=1, help="of the nets; building uses all cores")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for seed in options.seeds:
            case = _Case(name, seed, options.threads)
            if options.stage in ("fits", "all"):
                case.fit()
            if options.stage in ("rivals", "all"):
                case.build_rivals()
            if options.stage in ("times", "all"):
                rows += case.rows()
    if rows:
        write_rows(Path("results") / "cnn_openvino.csv", over_seeds(rows), threads=options.threads, runtime="openvino")


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each net and contender: medians of times, means of accuracies, and the widest intervals."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["contender"]), []).append(row)
    join = {"low": min, "high": max, "accuracy": mean, "nncf": median, "ms": median}
    found = []
    for (model, contender), seeds in groups.items():
        row = {"model": model, "contender": contender}
        for key in (k for k in seeds[0] if k not in ("model", "contender", "seed")):
            how = mean if key == "points_over_nncf" else join[key.rpartition("_")[2]]
            row[key] = round(how([r[key] for r in seeds]), 4)
        found.append(row | {"accuracy_of_seeds": " ".join(f"{r['test_accuracy']:.2f}" for r in seeds)})
    return found


class _Case:
    """One net and one seed."""

    def __init__(self, name: str, seed: int, threads: int):
        self.name, self.seed, self.threads = name, seed, threads
        self.folder = FOLDER / f"{name}-{seed}"
        workload = Workload.from_name(name)
        order = np.random.default_rng(seed).permutation(len(workload.calibration)).tolist()
        self.workload = dataclasses.replace(workload, calibration=[workload.calibration[i] for i in order])
        self.runtime = find_runtime("openvino")

    def prepared(self, model: nn.Module) -> Session:
        return self.runtime.prepare(model, self.workload, self.threads)

    def int8(self) -> nn.Module:
        return Plan([Step(Int8Static())]).apply(self.workload)

    def fit(self) -> None:
        if (self.folder / "fit" / "record.json").exists():
            return
        torch.set_num_threads(self.threads)
        float32, int8 = self.prepared(self.workload.model), self.prepared(self.int8())
        gain = compare_copies(self.workload, float32, int8, copies=5)
        lp.fit(
            self.workload,
            f"latency<={100 * SHARES[self.name] / gain.ratio}%",
            minutes=MINUTES[self.name],
            seed=self.seed,
            threads=self.threads,
            runtime="openvino",
            families=("quantize", "prune", "factorize"),
            rivals=False,
            out=self.folder / "fit",
            resume=(self.folder / "fit").exists(),
        )

    @property
    def uniform(self) -> Path:
        return self.folder / "uniform"

    @property
    def trained(self) -> Path:
        return self.folder / "trained"

    def build_rivals(self) -> None:
        """Uniform pruning and int8, and int8 alone, both trained as the fit was and as long."""
        plan = Plan.from_yaml((self.folder / "fit" / "plan.yaml").read_text())
        learn = [Step(s.method) for s in plan.steps if isinstance(s.method, Logits)]
        pruned = Step(Channels(ratio=PRUNED[self.name], round_to=16))
        for folder, before in ((self.uniform, [pruned]), (self.trained, [])):
            if not folder.exists():
                whole = Plan([*before, *learn, Step(Int8Static())])
                with all_cores():
                    lp.save(whole.apply(self.workload), folder, self.workload, whole)

    def rows(self) -> list[dict[str, Any]]:
        """Every contender timed against NNCF's int8 and scored on the test pictures."""
        torch.set_num_threads(self.threads)
        models = {"float32": self.workload.model, "int8 (ours)": self.int8()}
        built = {
            "int8 (ours), trained as long": self.trained,
            f"uniform -{PRUNED[self.name]:.1%} channels + int8": self.uniform,
            f"joint fit to {SHARES[self.name]:.0%} of int8": self.folder / "fit" / "fitted",
        }
        models |= {label: lp.load(folder) for label, folder in built.items() if folder.exists()}
        peer = Nncf(self.workload, self.threads)
        before = self.workload.values(peer, "test")
        rows = [self._row("int8 (NNCF)", [peer], peer, before)]
        for label, model in models.items():
            rows.append(self._row(label, [self.prepared(model) for _ in range(COMPILED)], peer, before))
        return rows

    def _row(self, label: str, sessions: list[Any], peer: Any, before: torch.Tensor) -> dict[str, Any]:
        example = self.workload.example
        taken = [latency.measure(lambda s=s: s(example)) for s in sessions]
        against = [latency.compare(lambda: peer(example), lambda s=s: s(example), min_seconds=1) for s in sessions]
        values = self.workload.values(sessions[0], "test")
        change = paired_difference(before, values)
        row = {
            "model": self.name,
            "seed": self.seed,
            "contender": label,
            "latency_ms": round(median(t.median_ms for t in taken), 4),
            "iqr_ms": round(median(t.iqr_ms for t in taken), 4),
            "speedup_over_nncf": round(median(c.ratio for c in against), 3),
            "speedup_low": round(min(c.low for c in against), 3),
            "speedup_high": round(max(c.high for c in against), 3),
            "test_accuracy": round(self.workload.summarize(values).value, 2),
            "points_over_nncf": round(change.mean, 2),
            "points_low": round(change.low, 2),
            "points_high": round(change.high, 2),
        }
        print(row, flush=True)
        return row


class Nncf:
    """NNCF's post-training int8 of a model, executed by OpenVINO like all others."""

    def __init__(self, workload: Workload, threads: int):
        import nncf

        from lilliput.onnx_export import workload_onnx

        core = ov.Core()
        graph = core.read_model(workload_onnx(workload.model, workload))
        data = nncf.Dataset([b["input"][i : i + 1].numpy() for b in workload.calibration for i in range(100)][:300])
        quantized = nncf.quantize(graph, data)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = core.compile_model(quantized, "CPU", options)
        quantized.reshape([1, *workload.example["input"].shape[1:]])
        self.single = core.compile_model(quantized, "CPU", options)

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        x = batch["input"].numpy()
        compiled = self.single if len(x) == 1 else self.compiled
        return torch.from_numpy(next(iter(compiled(x).values())).copy())


if __name__ == "__main__":
    main()
