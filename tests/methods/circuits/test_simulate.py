"""What a testbench prints and how that is read; the simulators run in test_streaming.py."""

import shutil

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.circuits._simulate import Ports, frames_hex, installed, read_log, simulate, testbench

testbench.__test__ = False  # its name is that of a test
PORTS = Ports(lanes=2, words=3, classes=2, class_bits=1, score_bits=4)


def out(cycle, score, best, last):
    return f"out {cycle} {(score & 15) << 2 | best << 1 | last:x}"


LOG = ["in 10", out(20, -3, 0, 0), "in 13", out(21, 5, 1, 1), "noise", out(24, 7, 0, 0), out(26, -8, 0, 1)]


def test_scores_and_cycles_are_read():
    seen = read_log("\n".join(LOG), PORTS, 2, "icarus")
    assert seen.scores.tolist() == [[-3, 5], [7, -8]]
    assert seen.classes.tolist() == [1, 0]
    assert seen.latency_cycles == 12  # the edges 10 to 21
    assert seen.interval_cycles == 5
    assert read_log("\n".join(LOG[:4]).replace("in 13\n", ""), PORTS, 1, "icarus").interval_cycles != 0


def test_missing_words_and_a_misplaced_end_are_said():
    with pytest.raises(UserError, match="icarus saw 2 of 2 frames go in and 3 of 4 words"):
        read_log("\n".join([*LOG[:-1], "late"]), PORTS, 2, "icarus")
    with pytest.raises(UserError, match="3 of 4 words"):
        read_log("\n".join([*LOG[:-1], "out 26 xx"]), PORTS, 2, "icarus")
    with pytest.raises(UserError, match="`last`"):
        read_log("\n".join([*LOG[:-1], out(26, 1, 0, 0)]), PORTS, 2, "icarus")


def test_words_hold_channels_of_a_place_the_first_one_lowest():
    q = torch.arange(12, dtype=torch.uint8).view(1, 4, 1, 3)  # channel c of place x is 3 c + x
    assert frames_hex(q, 2).split() == ["0300", "0906", "0401", "0a07", "0502", "0b08"]


def test_wrong_calls(monkeypatch):
    q = torch.zeros(1, 2, 1, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="'modelsim'; choose one of verilator, icarus"):
        simulate("", PORTS, q, 10, "modelsim")
    with pytest.raises(UserError, match="no frames"):
        simulate("", PORTS, q[:0], 10, "icarus")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="'verilator' or 'iverilog'"):
        installed()
