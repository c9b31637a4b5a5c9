"""A model larger than memory: milliseconds per token with feed-forward weights read from the disk when neurons fire.

    python benchmarks/flash.py             # writes results/flash.csv and results/flash_disk.csv
    python benchmarks/flash.py --quick     # one cap, few tokens, some minutes

Every contender runs in a fresh process, in turn over several rounds. Those that are capped get what the imports take
and a share of the model's float32 weights, as a limit that the operating system enforces, pages of mapped files
included where it can (column `cap` says how). `mapped`: the weights are a map of the file, as safetensors gives it, and
pages come and go as the system likes. `in memory`: no cap. All read the same text token by token in eager torch, after
a prompt; a time is the median over tokens, then over rounds, with the range over rounds. `disk_kb_per_token` is what
the system counted. The model has shifted ReLUs that were not trained: its zeros are those that were asked for, and what
it says is not looked at here (papers/llm_in_a_flash.py does). flash_disk.csv is what a store reaches on this disk, read
past the page cache, by size of a record and number of readers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch
from safetensors.torch import load_file, save_file
from tables import write_rows
from transformers import DynamicCache

from lilliput import artifact
from lilliput.cache import folder
from lilliput.device import Device
from lilliput.methods.layers.relufy import Relufy
from lilliput.methods.layers.sparse_ffn import SparseFFN
from lilliput.methods.offload.flash_ffn import PREDICTED, FlashFFN, flash_parts, store_stats
from lilliput.metrics.latency import wait_until_quiet
from lilliput.metrics.memory import weight_bytes
from lilliput.paged_store import PagedStore, write_store
from lilliput.workload import Workload

SHARES = (0.5, 0.75)  # of the weights that capped processes get memory for
SPARSITY = 0.9
RESERVE = 24 * 2**20  # for activations, keys and values, and what a load needs for a moment
PROMPT, WARMUP = 16, 4  # tokens: read at once; not counted
RANK = 0.0625
RECORD_BYTES, READERS = (4096, 16384, 65536, 2**18, 2**20), (1, 4, 16)
PROFILE_BYTES = 2**26  # of each store that the disk is measured on
MAPPED, DENSE, SPARSE = "mapped", "in memory, dense", "in memory, sparse"
GATED, GUESSED = "flash, gate in memory", "flash, predicted"


# --- a process of its own ----------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Load a contender, read the text token by token, print what it took as JSON."""
    torch.set_num_threads(options.threads)
    place = Path(options.child)
    if options.contender == "imports":
        artifact.skeleton(artifact.read_architecture(place)["source"], place)
        print(json.dumps({"anonymous_bytes": resident("RssAnon")}))
        return
    if options.contender == MAPPED:
        artifact._read_tensors = lambda path: iter(load_file(path).items())
    model = artifact.load(place)
    ids = load_file(place.parent / "text.safetensors")["ids"]
    print(json.dumps(timed(model, ids[:, : PROMPT + WARMUP + options.tokens])))


@torch.inference_mode()
def timed(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Times and reads of the tokens after the prompt and the warm-up."""
    cache, times, disk = DynamicCache(), [], 0
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    for i in range(PROMPT, ids.shape[1]):
        if i == PROMPT + WARMUP:
            disk = read_from_disk()
            store_stats(model, reset=True)
        start = perf_counter()
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        times.append((perf_counter() - start) * 1e3)
    counted, stats = times[WARMUP:], store_stats(model)
    access = {part.store().access for part in flash_parts(model)}
    return {
        "token_ms": median(counted),
        "disk_kb_per_token": (read_from_disk() - disk) / len(counted) / 1e3,
        "hit_rate": stats.hit_rate if access else "",
        "reads_per_token": stats.reads / len(counted) if access else "",
        "access": ", ".join(access),
        "anonymous_bytes": resident("RssAnon"),
    }


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # pyright: ignore


def read_from_disk() -> int:
    """Bytes that this process made the system fetch from disks."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])  # pyright: ignore


# --- its cap -----------------------------------------------------------------------------------------------------


def run(place: Path, contender: str, options: argparse.Namespace, limit: int | None = None) -> dict[str, Any]:
    """What `child` printed, with the cap it ran under; a process that was killed has no times."""
    command = [sys.executable, __file__, "--child", str(place), "--contender", contender]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    cap, group = "none", None
    if limit is not None:
        command, cap, group = capped(command, limit)
    done = subprocess.run(command, capture_output=True, text=True)
    if group is not None:
        group.rmdir()
    if done.returncode:
        print(f"{contender}: ended with {done.returncode}: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return {"cap": cap}
    return {"cap": cap} | json.loads(done.stdout.strip().splitlines()[-1])


def capped(command: list[str], limit: int) -> tuple[list[str], str, Path | None]:
    """A command that runs under a memory limit, how it is enforced, and the control group to remove afterwards."""
    group = memory_group(limit)
    if group is not None:
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *command], "cgroup, mapped pages included", group
    if shutil.which("systemd-run") and Path("/run/systemd/system").exists():
        scope = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        return [*scope, *command], "systemd-run, mapped pages included", None
    return ["prlimit", f"--data={limit}", *command], "RLIMIT_DATA, mapped pages not counted", None


def memory_group(limit: int) -> Path | None:
    """A new control group (version 1) below the one of this process, None where none can be made."""
    own = re.search(r"^\d+:memory:(.*)$", Path("/proc/self/cgroup").read_text(), re.M)
    root = Path("/sys/fs/cgroup/memory")
    if own is None or not root.exists():
        return None
    group = root / own[1].lstrip("/") / f"flash-{os.getpid()}"
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        return None
    return group


# --- the contenders ----------------------------------------------------------------------------------------------


def prepare(work: Workload, place: Path, options: argparse.Namespace) -> tuple[dict[Any, Path], int]:
    """Artifacts of all contenders below `place`: (contender, share) -> folder; and the bytes of the weights."""
    model = Relufy(sparsity=SPARSITY).apply(work.model, work)
    save_file({"ids": work.test[0]["input_ids"][:1].contiguous()}, place / "text.safetensors")
    whole = weight_bytes(model)
    rows = sum(p.nbytes for n, p in model.named_parameters() if ".mlp." in n)
    made: dict[Any, Path] = {}

    def keep(key: Any, changed: torch.nn.Module) -> None:
        made[key] = artifact.save(changed, place / f"contender-{len(made)}", work)

    keep((DENSE, None), model)
    keep((SPARSE, None), SparseFFN(gate="float32", rows="float32").apply(model))
    gated = FlashFFN(gate="int8", rows="float32", memory=0.0)
    guessed = FlashFFN(gate=PREDICTED, rows="float32", memory=0.0, rank=RANK, steps=options.steps)
    for name, method, stored in ((GATED, gated, rows * 2 // 3), (GUESSED, guessed, rows)):
        changed = method.apply(model, work)
        kept = weight_bytes(changed)  # what stays in memory whatever the cap
        for share in options.shares:
            room = share * whole - kept - RESERVE
            for part in flash_parts(changed):
                part.memory, part._opened = max(0.0, min(1.0, room / stored)), None
            keep((name, share), changed)
    for share in options.shares:
        made[MAPPED, share] = made[DENSE, None]
    return made, whole


def compare(name: str, place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender and cap."""
    windows = {"training": 1, "calibration": 16, "validation": 1, "test": 1}
    work = Workload.from_name(name, windows=windows)
    os.environ["LILLIPUT_CACHE"] = str(place / "cache")  # its stores go when the benchmark ends
    made, whole = prepare(work, place, options)
    imports = run(made[DENSE, None], "imports", options)["anonymous_bytes"]
    found: dict[Any, list[dict[str, Any]]] = {key: [] for key in made}
    for _ in range(options.rounds):
        for (contender, share), saved in made.items():
            limit = None if share is None else imports + int(share * whole)
            found[contender, share].append(run(saved, contender, options, limit))
            print(contender, share, found[contender, share][-1], file=sys.stderr, flush=True)
    return [row_of(key, rounds, whole, imports) for key, rounds in found.items()]


def row_of(key: tuple[str, float | None], rounds: Sequence[dict[str, Any]], whole: int, imports: int) -> dict[str, Any]:
    """Medians over rounds, printed."""
    row: dict[str, Any] = {"contender": key[0], "share_of_weights": key[1] or "", "cap": rounds[0]["cap"]}
    row |= {"weights_mib": whole >> 20, "imports_mib": imports >> 20}
    times = [r["token_ms"] for r in rounds if "token_ms" in r]
    row |= {"token_ms": f"{median(times):.1f}" if times else "killed"}
    row |= {"range_ms": f"{max(times) - min(times):.1f}" if times else "", "rounds": len(times)}
    for field, digits in (("disk_kb_per_token", 0), ("reads_per_token", 0), ("hit_rate", 3)):
        values = [r[field] for r in rounds if r.get(field, "") != ""]
        row[field] = f"{median(values):.{digits}f}" if values else ""
    row["anonymous_mib"] = max((r.get("anonymous_bytes", 0) for r in rounds), default=0) >> 20
    row["access"] = rounds[0].get("access", "")
    print(*(f"{k}={v}" for k, v in row.items() if v != ""), flush=True)
    return row


# --- the disk ----------------------------------------------------------------------------------------------------


def profile(place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a store reads in a second: records in random order that never lie side by side, or all in one stretch."""
    rows = []
    for size in RECORD_BYTES[1::2] if options.quick else RECORD_BYTES:
        count = PROFILE_BYTES // size
        content = torch.randint(256, (size,), dtype=torch.uint8)
        path = write_store(place / "profile.pages", ({"x": content} for _ in range(count)))
        scattered = (torch.randperm(count // 2, generator=torch.Generator().manual_seed(0)) * 2).tolist()
        for readers in READERS:
            for name, keys in (("scattered", scattered), ("in one stretch", list(range(count)))):
                rates = [rate(path, keys, readers) for _ in range(3)]
                access, values = rates[0][0], [r[1] for r in rates]
                row = {"record_bytes": size, "readers": readers, "order": name, "access": access}
                row |= {"mb_per_s": f"{median(values):.0f}", "range_mb_per_s": f"{max(values) - min(values):.0f}"}
                print(*(f"{k}={v}" for k, v in row.items()), flush=True)
                rows.append(row)
    return rows


def rate(path: Path, keys: list[int], readers: int) -> tuple[str, float]:
    """How a store reads, and megabytes per second of these records, 64 asked for at a time."""
    with PagedStore(path, PROFILE_BYTES, readers=readers) as store:
        start = perf_counter()
        for i in range(0, len(keys), 64):
            store.hold(keys[i : i + 64])
        return store.access, store.stats().bytes_read / (perf_counter() - start) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="one cap, one round, few tokens, predictors not trained")
    parser.add_argument("--out", type=Path, default=Path("results/flash.csv"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=Device.here().cores if "--child" not in sys.argv else 1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    full, quick = {"shares": SHARES, "rounds": 5, "steps": 100}, {"shares": SHARES[1:], "rounds": 1, "steps": 0}
    vars(options).update(quick | {"tokens": 16} if options.quick else full)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=folder("stores")) as place:
        busy = wait_until_quiet()
        disk = profile(Path(place), options)
        rows = compare(options.model, Path(place), options)
    facts = {"model": options.model, "tokens": options.tokens, "threads": options.threads, "torch": torch.__version__}
    facts["busy_cores"] = f"{busy:.1f}"
    write_rows(options.out, rows, **facts)
    write_rows(options.out.with_name(f"{options.out.stem}_disk.csv"), disk, busy_cores=f"{busy:.1f}")


if __name__ == "__main__":
    main()
