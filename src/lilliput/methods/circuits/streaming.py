"""A chain of binary layers or tables as a circuit, Verilog and C++.   S_n = sum_k w_nk v(a_k),  code = steps(S_n)

Every product is a stage of its own with its weights beside it; frames stream through all stages at once, as small
codes, and nothing leaves the chip. BatchNorm, activations and rounding between two products become thresholds of
integers. The circuit, the C++ and the PyTorch reference `design.net` agree to the bit; from the fitted model they
differ where its float32 sums round, or where coefficients were rounded to `bits`.

    design = Streaming(cycles=2000).emit(fitted, workload)
    design.simulate(design.net.read(pictures))      # Verilator or Icarus: scores, cycles
    design.synthesize("ecp5")                       # Yosys: look-up tables, flip-flops, memories, multipliers
    design.write("circuit")

Compiled: nn.Sequential of binary layers (`quantize.binary`, real inputs or signs; "alpha_K" excepted) and tables
(`quantize.lookup_tables`, up to 16 input codes, or evenly spaced ones), linear or convolutions with one group, with
BatchNorm, ReLU, ReLU6, Hardtanh, Sigmoid, Tanh, MaxPool2d, Flatten between. Anything else is refused by its name.

Papers: Samragh, Javaheripi & Koushanfar, "CodeX: Bit-Flexible Encoding for Streaming-based FPGA Acceleration of DNNs",
2019 (arXiv 1901.05582); Ghasemzadeh, Samragh & Koushanfar, "ReBNet", 2017 (arXiv 1711.01243), whose residual signs are
counted plane by plane. The folding of units and lanes follows Umuroglu et al., "FINN", 2017 (arXiv 1612.07119).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import PACKED_WEIGHTS, UNLABELLED, Facts, Target, knob
from lilliput.methods.circuits._compile import compile_net
from lilliput.methods.circuits._cpp import to_cpp
from lilliput.methods.circuits._fold import Folded, expected_latency, fold
from lilliput.methods.circuits._net import IntegerNet
from lilliput.methods.circuits._run_cpp import run_cpp
from lilliput.methods.circuits._simulate import PATIENCE, Ports, Simulated, frames_hex, simulate, testbench
from lilliput.methods.circuits._synthesis import Resources, synthesize, to_verilog
from lilliput.methods.circuits._tools import require_amaranth
from lilliput.workload import Workload, need_workload

if TYPE_CHECKING:
    from lilliput.methods.circuits._top import Top

__all__ = ["Design", "Streaming", "write_sources"]
FASTER = 1.25  # steps in which the cycles of the slowest stage fall
FILES = ("top.v", "net.cpp", "testbench.v", "frames.hex")


@dataclass(frozen=True, eq=False)
class Design:
    """A compiled network: its integers, its sources, and what simulation and synthesis say of it."""

    net: IntegerNet
    folded: list[Folded]
    example: Tensor  # uint8 (1, C, H, W): the frame of the written testbench

    @cached_property
    def top(self) -> Top:
        """The circuit in Amaranth. Raises UserError when that is not installed."""
        require_amaranth()
        from lilliput.methods.circuits._top import Top

        return Top(self.net, self.folded)

    @cached_property
    def verilog(self) -> str:
        """Synthesisable Verilog of the module `top`."""
        top = self.top
        from lilliput.methods.circuits._top import to_rtlil

        return to_verilog(to_rtlil(top))

    @cached_property
    def cpp(self) -> str:
        """C++17 with the function `classify`."""
        return to_cpp(self.net)

    @property
    def ports(self) -> Ports:
        """Words in and out."""
        a, b, c = self.folded[0].words
        winner = self.top.winner
        return Ports(self.folded[0].lanes, a * b * c, self.net.classes, winner.class_bits, winner.score_bits)

    @property
    def expected_latency(self) -> int:
        """Cycles of one frame by the arithmetic of the folding; `simulate` measures them."""
        return expected_latency(self.net, self.folded)

    def within(self, latency_cycles: int | None) -> Design:
        """The same network with the fewest units whose expected latency is within so many cycles. Raises UserError."""
        design = self
        while latency_cycles is not None and design.expected_latency > latency_cycles:
            least, slowest = design.expected_latency, max(f.cycles for f in design.folded)
            try:
                folded = fold(self.net, min(slowest - 1, int(slowest / FASTER)), self.folded[0].lanes)
            except UserError:
                raise UserError(f"a frame takes {least} cycles at least; the latency allows {latency_cycles}") from None
            design = dataclasses.replace(self, folded=folded)
        return design

    def simulate(self, q: Tensor, simulator: str | None = None, pauses: bool = False) -> Simulated:
        """Scores and cycles of frames q, uint8 (frames, C, H, W), from the Verilog; see `_simulate.simulate`."""
        return simulate(self.verilog, self.ports, q, self.expected_latency, simulator, pauses)

    def synthesize(self, family: str, multipliers: bool = True) -> Resources:
        """Cells for "ecp5" or "ice40", from the Verilog."""
        return synthesize(self.verilog, family, multipliers)

    def run_cpp(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (frames, classes) and classes (frames,) of frames q, uint8 (frames, C, H, W), from the C++."""
        return run_cpp(self.cpp, q, self.net.classes)

    def sources(self) -> dict[str, str]:
        """Name -> text of every file."""
        ports = self.ports
        bench = testbench(ports, len(self.example), 2 * PATIENCE * self.expected_latency, pauses=False)
        texts = self.verilog, self.cpp, bench, frames_hex(self.example, ports.lanes)
        return dict(zip(FILES, texts))

    def write(self, folder: str | Path) -> Path:
        """Write all files into a folder, which must be new or empty; nothing is written before all texts are made."""
        return write_sources(folder, self.sources())


def write_sources(folder: str | Path, texts: Mapping[str, str]) -> Path:
    """Write files into a folder that is new or empty. Raises UserError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{str(folder)!r} is not empty; choose another folder")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another place") from None
    return folder


@dataclass(frozen=True)
class Streaming(Target):
    """Compile a chain of binary layers or tables into one stage of hardware for each product."""

    paper: ClassVar[str] = "codex"
    cycles: int = knob(4096, low=1, high=10**9, log=True, help="most cycles a frame keeps any stage busy")
    lanes: int = knob(8, low=1, high=4096, log=True, help="bytes of the input in one word, at most")
    bits: int = knob(8, low=2, high=8, help="of weights and values that are no signs")
    facts: ClassVar = Facts(
        stage="serve", needs={PACKED_WEIGHTS}, data=UNLABELLED, effect="a circuit; its cycles and area are measured"
    )

    def emit(self, model: nn.Module, workload: Workload | None = None) -> Design:
        """The design of a fitted chain; calibration inputs say which reals the 256 values of a byte stand for."""
        work = need_workload(workload, self.name(), "whose calibration inputs say what range a byte stands for")
        inputs = [batch["input"].float() for batch in work.calibration if "input" in batch]
        if not inputs:
            raise UserError(f"workload {work.name!r} has no input of numbers; circuits are for classifiers")
        low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
        net = compile_net(model, inputs[0].shape[1:], low, high, self.bits)
        example = net.read(work.example.get("input", inputs[0])[:1])
        return Design(net, fold(net, self.cycles, self.lanes), example.to(torch.uint8))
