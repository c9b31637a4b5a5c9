"""Small convolutional nets in OpenVINO at batch 1: a joint fit against int8 alone (and NNCF's) and uniform pruning.

    python benchmarks/cnn_openvino.py resnet-small mobilenet-small     # writes results/cnn_openvino.csv

Everything is executed by OpenVINO, latencies are taken in turn (ABAB) in one process against NNCF's int8, accuracy is
on the 10,000 test pictures. Each of three seeds draws its own calibration pictures, search and distillation.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from tables import write_rows

import lilliput as lp
from lilliput import Plan, Step, Workload
from lilliput.methods.distill.logits import Logits
from lilliput.methods.prune.channels import Channels
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.metrics import latency
from lilliput.runtimes import find_runtime

SHARES = (0.6, 0.75, 0.9)  # of the latency of int8 alone: what the joint fit is asked for
PRUNED = (0.25, 0.5)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet-small", "mobilenet-small"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for name in options.models:
        for seed in range(options.seeds):
            rows += _compare(name, seed, options.minutes, options.threads)
    write_rows(Path("results") / "cnn_openvino.csv", rows, threads=options.threads, runtime="openvino")


def _compare(name: str, seed: int, minutes: float, threads: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    workload = Workload.from_name(name)
    order = np.random.default_rng(seed).permutation(len(workload.calibration)).tolist()
    workload = dataclasses.replace(workload, calibration=[workload.calibration[i] for i in order])
    runtime = find_runtime("openvino")

    def prepared(plan: Plan):
        return runtime.prepare(plan.apply(workload), workload, threads)

    contenders: dict[str, Any] = {
        "float32": prepared(Plan()),
        "int8 (NNCF)": Nncf(workload, threads),
        "int8 (ours)": prepared(Plan([Step(Int8Static())])),
    }
    for ratio in PRUNED:
        plan = Plan([Step(Channels(ratio=ratio, round_to=8)), Step(Logits(steps=400, seed=seed)), Step(Int8Static())])
        contenders[f"uniform -{ratio:.0%} channels + int8"] = prepared(plan)
    example = workload.example
    gain = latency.compare(
        lambda: contenders["float32"](example), lambda: contenders["int8 (ours)"](example), rounds=60
    )
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            fitted = lp.fit(
                workload,
                f"latency<={100 * share / gain.ratio}%",
                minutes=minutes,
                seed=seed,
                threads=threads,
                runtime="openvino",
                families=("quantize", "prune", "factorize"),
                out=Path(folder) / "run",
                quiet=True,
            )
        contenders[f"joint fit to {share:.0%} of int8"] = runtime.prepare(fitted.model, workload, threads)
    return [
        _row(name, seed, label, session, contenders["int8 (NNCF)"], workload) for label, session in contenders.items()
    ]


def _row(name: str, seed: int, label: str, session: Any, peer: Any, workload: Workload) -> dict[str, Any]:
    taken = latency.measure(lambda: session(workload.example))
    against = latency.compare(lambda: peer(workload.example), lambda: session(workload.example), rounds=60)
    row = {
        "model": name,
        "seed": seed,
        "contender": label,
        "latency_ms": round(taken.median_ms, 4),
        "iqr_ms": round(taken.iqr_ms, 4),
        "speedup_over_nncf": round(against.ratio, 3),
        "low": round(against.low, 3),
        "high": round(against.high, 3),
        "test_accuracy": round(workload.score(session, "test").value, 2),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
