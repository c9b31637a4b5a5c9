"""Decoding and prefill of small language models beside llama.cpp, torch and torchao, all in one run.

    pip install llama-cpp-python torchao          # CMAKE_ARGS="-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON" builds the first
    npm install --prefix peers node-llama-cpp
    python benchmarks/peers.py --node peers       # writes results/peers.<model>.csv

Every engine is a process of its own. In each round all of them, in turn, decode the same number of tokens after the
same prompt and read the same long prompt, each alone; a figure is the median over rounds with its interquartile range.
A peer that is not installed is left out, and the output says so. Peers with OpenMP wait actively for some tens of
milliseconds: by default their threads may fall asleep between two steps, and llama.cpp on two threads then decodes
several times slower than on one. Ours has threads of its own, which those of OpenMP would only disturb.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tables import write_rows

from lilliput import Workload, cache
from lilliput.device import Device
from lilliput.zoo.fetch import folder_of

HERE = Path(__file__).parent
GGUF = {"smollm2-135m": "smollm2-gguf", "gemma3-270m": "gemma3-gguf"}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}  # llama.cpp's numbers
PROMPT, NEW, LONG_PROMPT = 128, 64, 512
SETTLE_S = 0.5
SPINS = 5_000_000  # of a waiting OpenMP thread: some tens of milliseconds
WINDOWS = 12  # of the test text that perplexity is taken on
OURS = ("int4-64", "int4-32", "int8", "float32")


@dataclass
class Contender:
    """A running engine. `rival_of` says which of our forms has its bits."""

    name: str
    form: str
    process: subprocess.Popen
    facts: dict[str, Any]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer, after a pause in which the threads of the engine before stop waiting actively."""
        assert self.process.stdin
        assert self.process.stdout
        time.sleep(SETTLE_S)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} {self.form} ended with code {self.process.wait()}; its error stands above")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(GGUF))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--node", type=Path, help="folder with node_modules/node-llama-cpp")
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out")
    options = parser.parse_args()
    if options.node and not (options.node / "node_modules" / "node-llama-cpp").exists():
        parser.error(
            f"{options.node} has no node_modules/node-llama-cpp; npm install --prefix {options.node} node-llama-cpp"
        )
    for name in options.models:
        write_rows(Path("results") / f"peers.{name}.csv", compare(name, options))


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    workload = Workload.from_name(name)
    text = [row.tolist() for batch in workload.test for row in batch["input_ids"]]
    running = start_all(name, options)
    ids = [token for row in text for token in row]
    rows = []
    for threads in options.threads:
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds + 1):
            for c in running:
                decoded = c.ask(do="run", threads=threads, prompt=ids[:PROMPT], new=NEW)
                read = c.ask(do="run", threads=threads, prompt=ids[:LONG_PROMPT], new=1)
                times.setdefault(f"{c.name} {c.form}", []).append((decoded["token_ms"], read["first_ms"]))
        times = {key: found[1:] for key, found in times.items()}  # the first round warms up
        for c in running:
            c.facts = c.facts or c.ask(do="facts", windows=text[:WINDOWS])
            rows.append(row_of(name, threads, c, times))
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    for c in running:
        c.process.kill()
    return rows


def row_of(name: str, threads: int, c: Contender, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    own, device = times[f"{c.name} {c.form}"], Device.here()
    tokens_per_s = [1e3 / token for token, _ in own]
    prefill_per_s = [1e3 * LONG_PROMPT / first for _, first in own]
    limit = device.bandwidth(c.facts["read_bytes"], threads) / c.facts["read_bytes"]
    row = {"model": name, "threads": threads, "engine": c.name, "form": c.form}
    row |= {"read_mb": f"{c.facts['read_bytes'] / 1e6:.1f}"}
    for key, values in (("decode", tokens_per_s), ("prefill", prefill_per_s)):
        low, middle, high = quantiles(values, n=4)
        row |= {f"{key}_tokens_per_s": f"{middle:.1f}", f"{key}_iqr": f"{high - low:.1f}"}
    row |= {"limit_share": f"{median(tokens_per_s) / limit:.2f}"}
    row |= {
        "decode_over_llama_cpp": over_best(c.form, own, times, 0),
        "prefill_over_llama_cpp": over_best(c.form, own, times, 1),
    }
    nats = c.facts["nats"]
    return row | {
        "perplexity": "" if nats is None else f"{math.exp(nats):.3f}",
        "compile_s": f"{c.facts['seconds']:.0f}",
    }


def over_best(form: str, own: list[tuple[float, float]], times: dict[str, list], which: int) -> str:
    """How many times faster than the faster llama.cpp with the same bits, by rounds: median [least, most]."""
    bits = {"int4-64": "Q4_0", "int8": "Q8_0"}.get(form, form)
    rivals = [found for key, found in times.items() if key.endswith(f" {bits}") and "cpp" in key]
    if not rivals:
        return ""
    best = min(rivals, key=lambda found: median(f[which] for f in found))
    ratios = sorted(b[which] / o[which] for b, o in zip(best, own))
    return f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


# --- starting the engines ----------------------------------------------------------------------------------------


def start_all(name: str, options: argparse.Namespace) -> list[Contender]:
    found = [_python("lilliput", name, form) for form in OURS] + [_python("torch", name, "float32")]
    if "torchao" not in options.without and _installed("torchao"):
        found.append(_python("torchao", name, "int8"))
    files = quantized_files(name) if _installed("llama_cpp") else {}
    for kind, path in files.items():
        found.append(_python("llama.cpp", name, kind, str(path)))
        if options.node:
            command = ["node", str((HERE / "peer_node.mjs").resolve()), str(path)]
            found.append(Contender("node-llama-cpp", kind, _start(command, options.node), {}))
    return found


def _installed(module: str) -> bool:
    there = importlib.util.find_spec(module) is not None
    if not there:
        print(f"{module} is not installed and left out")
    return there


def _python(engine: str, model: str, form: str, path: str = "") -> Contender:
    command = [sys.executable, str(HERE / "_peer_workers.py"), engine, model, path or form]
    return Contender(engine, form, _start(command, None, engine != "lilliput"), {})


def _start(command: list[str], folder: Path | None, spins: bool = False) -> subprocess.Popen:
    given = {**os.environ, "TQDM_DISABLE": "1"} | ({"GOMP_SPINCOUNT": str(SPINS)} if spins else {})
    return subprocess.Popen(
        command, cwd=folder, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def quantized_files(name: str) -> dict[str, Path]:
    """The packaged model in llama.cpp's own formats, every matrix in the same one; made once."""
    import llama_cpp

    source = next(folder_of(GGUF[name]).glob("*.gguf"))
    found = {}
    for kind, number in FILE_TYPES.items():
        target = cache.folder("peers") / f"{name}.{kind}.gguf"
        if not target.exists():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize, settings.pure = number, True, True
            beside = target.with_suffix(".partial")
            failed = llama_cpp.llama_model_quantize(str(source).encode(), str(beside).encode(), settings)
            if failed:
                raise SystemExit(f"llama.cpp cannot make {kind} of {source}")
            beside.rename(target)
        found[kind] = target
    return found


if __name__ == "__main__":
    main()
