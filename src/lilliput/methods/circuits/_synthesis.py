"""What a circuit takes of an FPGA: cells counted by Yosys after synthesis for an open family, before placement."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lilliput.errors import UserError
from lilliput.methods.circuits._tools import run, synthesis_program, yosys

_CONTROLS = ("", "E", "SR", "R", "SS", "S", "ESR", "ER", "ESS", "ES")  # enable, and set or reset with the clock or not
# family -> kind of resource -> cell -> how many of it the cell takes
CELLS: dict[str, dict[str, dict[str, int]]] = {
    "ice40": {
        "luts": {"SB_LUT4": 1},
        "carries": {"SB_CARRY": 1},
        "flip_flops": {f"SB_DFF{edge}{kind}": 1 for edge in ("", "N") for kind in _CONTROLS},
        "block_rams": dict.fromkeys([f"SB_RAM40_4K{kind}" for kind in ("", "NR", "NW", "NRNW")], 1),
        "multipliers": {"SB_MAC16": 1},
    },
    "ecp5": {
        # A carry cell is two look-up tables; 16 x 4 bits of distributed memory take four, and two that address writes.
        "luts": {"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 6},
        "carries": {"CCU2C": 1},
        "flip_flops": {"TRELLIS_FF": 1},
        "block_rams": {"DP16KD": 1, "PDPW16KD": 1},
        "multipliers": {"MULT18X18D": 1, "MULT9X9D": 1},
    },
}
FREE = {"PFUMX", "L6MUX21", "GND", "VCC", "$scopeinfo"}  # multiplexers and constants inside the slices of the tables


@dataclass(frozen=True)
class Resources:
    """Cells of one family."""

    family: str
    luts: int  # look-up tables of four inputs
    flip_flops: int
    block_rams: int  # 16 kbit (ECP5: DP16KD), 4 kbit (iCE40)
    multipliers: int  # 18 x 18 bits (ECP5), 16 x 16 (iCE40)
    carries: int
    program: str  # that counted
    cells: dict[str, int]


def synthesize(verilog: str, family: str, multipliers: bool = True) -> Resources:
    """Count the cells of a circuit; without `multipliers` products become look-up tables. Raises UserError."""
    if family not in CELLS:
        raise UserError(f"the family is {family!r}; choose one of {', '.join(CELLS)}")
    how = {("ecp5", False): " -nodsp", ("ice40", True): " -dsp"}.get((family, multipliers), "")
    script = f"read_verilog top.v; synth_{family}{how} -top top; tee -q -o stat.json stat -json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "top.v").write_text(verilog)
        run([*yosys(), "-q", "-p", script], folder)
        counted = json.loads((folder / "stat.json").read_text())
    return _resources(family, counted["design"]["num_cells_by_type"], synthesis_program())


def _resources(family: str, cells: dict[str, int], program: str) -> Resources:
    kinds = CELLS[family]
    known = FREE.union(*kinds.values())
    strange = sorted(set(cells) - known)
    if strange:
        raise UserError(f"synthesis for {family} left cells that are not known here: {', '.join(strange)}")
    counts = {kind: sum(n * cells.get(cell, 0) for cell, n in per.items()) for kind, per in kinds.items()}
    return Resources(family, program=program, cells=dict(cells), **counts)


def to_verilog(rtlil: str) -> str:
    """Verilog of a circuit in Yosys' own language."""
    script = "read_rtlil top.il; proc -nomux -norom; memory_collect; write_verilog -noattr -norename top.v"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "top.il").write_text(rtlil)
        run([*yosys(), "-q", "-p", script], folder)
        return (folder / "top.v").read_text()
