"""Circuits of binary networks: cycles from simulation, cells from synthesis, errors against PyTorch, by folding.

    python benchmarks/circuits.py         # writes results/circuits.streaming.csv, about ten minutes

ReBNet's perceptron 784-256-256-256-10 with one to three signs per activation, trained on Fashion-MNIST for 800 steps,
as circuits whose slowest stage takes the asked cycles. `accuracy_percent` is that of PyTorch's packed network,
`circuit_accuracy_percent` and `same_answers_percent` are of the circuit's integers on the same test pictures. The
Verilog of the first folding runs all `frames_simulated` pictures; every score of them that differs is a wrong one.
Cells are counted by Yosys for the family of the chip, before placement: no clock is proved.

hls4ml, if it is installed, converts the float network (fixed point, 16 bits of which 6 whole) and runs its C simulation
of the same pictures; what it takes of a chip only a vendor's tool says, so those cells stay empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from tables import write_rows
from torch import Tensor, nn

from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits.streaming import Streaming
from lilliput.papers import rebnet
from lilliput.papers._binary_nets import Trained, trained
from lilliput.papers._circuits import hardware, lacking
from lilliput.papers._low_rank import Effort, pictures_work
from lilliput.workload import Workload

EFFORT = Effort(steps=800, test_pictures=4000, rounds=1, seeds=1)
CHIP, FOLDINGS = "ecp5-25k", (7000, 2000, 800)
FRAMES, FEW = 1000, 20  # simulated of the first folding, and of the others
COLUMNS = ("luts", "flip_flops", "block_rams", "multipliers", "latency_cycles", "cycles_per_frame", "chip_share")
COLUMNS += ("weight_bits", "activation_bits", "frames_simulated", "wrong_scores")


def rows_of(name: str, seed: int) -> list[dict[str, Any]]:
    """One network at every folding."""
    found = trained(lambda: rebnet.network(name), seed, EFFORT, rebnet.RATE)
    work = pictures_work(found.network, seed, EFFORT)
    x, labels = (torch.cat([batch[key] for batch in work.test]) for key in ("input", "label"))
    rows = []
    for cycles, frames in zip(FOLDINGS, (FRAMES, *[FEW] * len(FOLDINGS))):
        design = Streaming(cycles=cycles).emit(found.network, work)
        q = design.net.read(x)
        answers = design.net(q).argmax(1)
        measured = hardware(design, q[:frames], Fpga.load(CHIP))
        rows.append(
            accuracies(name, found, answers, labels, answers_of(found.network, x)) | {"cycles": cycles, **measured}
        )
        print(rows[-1])
    return rows


def accuracies(name: str, found: Trained, answers: Tensor, labels: Tensor, theirs: Tensor) -> dict[str, Any]:
    """How often the network, the circuit and both together are right."""
    return {
        "net": name,
        "accuracy_percent": found.accuracies[0],
        "circuit_accuracy_percent": 100 * float((answers == labels).float().mean()),
        "same_answers_percent": 100 * float((answers == theirs).float().mean()),
    }


@torch.inference_mode()
def answers_of(network: nn.Module, x: Tensor) -> Tensor:
    """The classes that PyTorch's network gives."""
    return torch.cat([network(part).argmax(1) for part in x.split(500)])


def hls4ml_row(seed: int) -> dict[str, Any]:
    """The float network in hls4ml's C simulation."""
    import hls4ml  # type: ignore[import-not-found]

    found = trained(lambda: rebnet.network("float32"), seed, EFFORT, rebnet.RATE)
    work: Workload = pictures_work(found.network, seed, EFFORT)
    x, labels = (torch.cat([batch[key] for batch in work.test])[:FRAMES] for key in ("input", "label"))
    network = nn.Sequential(*list(found.network)[1:]).eval()  # its inputs are flat already
    how = hls4ml.utils.config_from_pytorch_model(network, (784,), default_precision="ap_fixed<16,6>", backend="Vivado")
    with tempfile.TemporaryDirectory() as folder:
        converted = hls4ml.converters.convert_from_pytorch_model(
            network, hls_config=how, output_dir=folder, backend="Vivado", io_type="io_parallel"
        )
        converted.compile()
        answers = torch.from_numpy(converted.predict(x.flatten(1).numpy())).argmax(1)
    row = accuracies("float32 in hls4ml, 16 bits", found, answers, labels, answers_of(found.network, x))
    return row | dict.fromkeys(("cycles", *COLUMNS), "") | {"frames_simulated": FRAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/circuits.streaming.csv"))
    options = parser.parse_args()
    missing = lacking()
    if missing:
        raise missing
    rows = [row for m in (1, 2, 3) for row in rows_of(f"ReBNet M={m}", options.seed)]
    if importlib.util.find_spec("hls4ml"):
        rows.append(hls4ml_row(options.seed))
    keys = ("net", "cycles", "accuracy_percent", "circuit_accuracy_percent", "same_answers_percent", *COLUMNS)
    rows = [{key: round(row[key], 4) if isinstance(row[key], float) else row[key] for key in keys} for row in rows]
    write_rows(options.out, rows, chip=CHIP, seed=options.seed)


if __name__ == "__main__":
    main()
