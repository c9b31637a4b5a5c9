"""A circuit in simulation: frames in, scores and cycles out, by Verilator or Icarus Verilog from the written Verilog.

The testbench is ours and the same for both. It sends frames without a pause, or with pauses at random on both sides,
and prints when the first word of a frame was taken and every word that came out.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.methods.circuits._tools import run, tool

SIMULATORS = ("verilator", "icarus")
PATIENCE = 20  # times the expected cycles after which a simulation is given up


@dataclass(frozen=True, eq=False)
class Simulated:
    """What a simulation saw. Cycles count from the clock edge that takes the first word of a frame."""

    scores: Tensor  # int64 (frames, classes)
    classes: Tensor  # int64 (frames,)
    latency_cycles: int  # of the first frame, into an idle circuit, to its last score
    interval_cycles: float  # from frame to frame when they come without a pause; NaN for a single one
    simulator: str


@dataclass(frozen=True)
class Ports:
    """Widths of the words of a circuit."""

    lanes: int  # bytes of a word in
    words: int  # of a frame
    classes: int
    class_bits: int
    score_bits: int


def testbench(ports: Ports, frames: int, limit_cycles: int, pauses: bool) -> str:
    """Verilog that plays `frames` frames from frames.hex and prints what happens."""
    out = 1 + ports.class_bits + ports.score_bits
    return TESTBENCH.format(
        lanes=8 * ports.lanes - 1,
        out=out - 1,
        words=ports.words,
        total=ports.words * frames - 1,
        results=ports.classes * frames,
        limit=limit_cycles,
        pauses=int(pauses),
    )


TESTBENCH = """\
`timescale 1ns / 1ps
// Sends the frames of frames.hex and prints: "in CYCLE" when a frame begins, "out CYCLE WORD" for each word out.
module testbench;
  reg clk = 0;
  reg rst = 1;
  reg [{lanes}:0] frames [0:{total}];
  reg [31:0] cycle = 0;
  reg [31:0] sent = 0;
  reg [31:0] received = 0;
  reg [15:0] noise = 16'hace1;
  wire give = !{pauses} || noise[0];
  wire o_ready = !{pauses} || noise[3];
  wire i_valid = !rst && give && sent <= {total};
  wire i_ready;
  wire o_valid;
  wire [{out}:0] o_payload;

  top dut (
    .clk(clk), .rst(rst),
    .i__payload(frames[sent <= {total} ? sent : 0]), .i__valid(i_valid), .i__ready(i_ready),
    .o__payload(o_payload), .o__valid(o_valid), .o__ready(o_ready)
  );

  initial begin
    $readmemh("frames.hex", frames);
    forever #5 clk = !clk;
  end

  always @(posedge clk) begin
    cycle <= cycle + 1;
    rst <= cycle < 4;
    noise <= {{noise[14:0], noise[15] ^ noise[13] ^ noise[12] ^ noise[10]}};
    if (i_valid && i_ready) begin
      if (sent % {words} == 0) $display("in %0d", cycle);
      sent <= sent + 1;
    end
    if (!rst && o_valid && o_ready) begin
      $display("out %0d %h", cycle, o_payload);
      received <= received + 1;
      if (received + 1 == {results}) $finish;
    end
    if (cycle > {limit}) begin
      $display("late");
      $finish;
    end
  end
endmodule
"""


def simulate(
    verilog: str, ports: Ports, q: Tensor, expected_cycles: int, simulator: str | None = None, pauses: bool = False
) -> Simulated:
    """Play frames q, uint8 (frames, C, H, W). `simulator` is "verilator" or "icarus", by default what is installed.

    Raises UserError when neither is, and when the circuit does not answer in time.
    """
    simulator = simulator or installed()
    if simulator not in SIMULATORS:
        raise UserError(f"the simulator is {simulator!r}; choose one of {', '.join(SIMULATORS)}")
    if not len(q):
        raise UserError("there are no frames to simulate; give at least one")
    limit = PATIENCE * expected_cycles * (len(q) + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "top.v").write_text(verilog)
        (folder / "testbench.v").write_text(testbench(ports, len(q), limit, pauses))
        (folder / "frames.hex").write_text(frames_hex(q, ports.lanes))
        return read_log(_play(simulator, folder), ports, len(q), simulator)


def installed() -> str:
    """The fastest simulator there is. Raises UserError when there is none."""
    if shutil.which("verilator"):
        return "verilator"
    if shutil.which("iverilog"):
        return "icarus"
    raise UserError("no simulator is installed; install the package 'verilator' or 'iverilog' of your distribution")


def _play(simulator: str, folder: Path) -> str:
    files = ["testbench.v", "top.v"]
    if simulator == "icarus":
        run([tool("iverilog"), "-g2005", "-o", "circuit", *files], folder)
        return run([tool("vvp"), "-n", "circuit"], folder)
    how = ["--binary", "--top-module", "testbench", "-Wno-fatal", "-Wno-lint", "-Wno-style", "-O3", "-CFLAGS", "-O1"]
    run([tool("verilator"), *how, *files], folder)
    return run([str(folder / "obj_dir" / "Vtestbench")], folder)


def frames_hex(q: Tensor, lanes: int) -> str:
    """Frames (frames, C, H, W) as lines of one word: by row, column and channel, the first byte in the lowest bits."""
    words = q.to(torch.uint8).permute(0, 2, 3, 1).reshape(-1, lanes).flip(1)
    return "\n".join(bytes(row).hex() for row in words.tolist()) + "\n"


def read_log(log: str, ports: Ports, frames: int, simulator: str) -> Simulated:
    """What the testbench printed. Raises UserError when words are missing."""
    lines = [line.split() for line in log.splitlines()]
    starts = [int(line[1]) for line in lines if line[:1] == ["in"]]
    outs = [(int(line[1]), int(line[2], 16)) for line in lines if line[:1] == ["out"] and "x" not in line[2].lower()]
    if len(outs) != frames * ports.classes or len(starts) != frames:
        raise UserError(
            f"{simulator} saw {len(starts)} of {frames} frames go in and {len(outs)} of {frames * ports.classes} words "
            "come out before it was given up"
        )
    words = torch.tensor([[w & 1, w >> 1 & (1 << ports.class_bits) - 1] for _, w in outs]).view(frames, -1, 2)
    last = torch.arange(ports.classes) == ports.classes - 1
    if not bool((words[:, :, 0].bool() == last).all()):
        raise UserError(f"{simulator}: the bit `last` does not stand at the last word of each frame")
    scores = torch.tensor([_signed(w >> 1 + ports.class_bits, ports.score_bits) for _, w in outs]).view(frames, -1)
    ends = [cycle for cycle, _ in outs][ports.classes - 1 :: ports.classes]
    interval = (ends[-1] - ends[0]) / (frames - 1) if frames > 1 else float("nan")
    return Simulated(scores, words[:, -1, 1].contiguous(), ends[0] - starts[0] + 1, interval, simulator)


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) & 1 else word
