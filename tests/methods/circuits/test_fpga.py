"""Chips: what comes with the package, what a file must hold, and what does not fit."""

import dataclasses

import pytest

from lilliput.errors import UserError
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits._synthesis import Resources

USED = Resources("ecp5", 20_000, 3000, 40, 20, 100, "Yosys", {})


@pytest.mark.parametrize("name", Fpga.names())
def test_every_figure_has_a_source(name):
    chip = Fpga.load(name)
    assert chip.name == name
    figures = {f.name for f in dataclasses.fields(chip)} - {"name", "family", "source"}
    assert set(chip.source) == figures | {"device"}
    assert all(text.startswith(("vendor:", "derived:")) for key, text in chip.source.items() if key != "device")


def test_what_does_not_fit_is_said():
    chip = Fpga.load("ecp5-25k")
    assert chip.lacks(USED) == []
    more = dataclasses.replace(USED, luts=24_289, multipliers=29)
    assert chip.lacks(more) == ["24289 luts, ecp5-25k has 24288", "29 multipliers, ecp5-25k has 28"]


def test_files(tmp_path):
    text = "name = 'x'\nfamily = 'ecp5'\nluts = 10\nflip_flops = 10\nblock_rams = 1\n"
    text += "multipliers = 0\nclock_mhz = 25.0\n[source]\ndevice = 'mine'\n"
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert Fpga.known(str(path))
    assert Fpga.load(str(path)).luts == 10
    assert Fpga.known("ice40-up5k")
    assert not Fpga.known("laptop")
    assert not Fpga.known(str(tmp_path / "missing.toml"))
    for old, new, words in (
        ("luts = 10\n", "", "luts"),
        ("luts = 10", "luts = -1", "luts must be"),
        ("luts = 10", "luts = 1.5", "luts must be"),
        ("clock_mhz = 25.0", "clock_mhz = 0", "clock_mhz must be"),
        ("'ecp5'", "'virtex'", "'virtex'; choose one of ice40, ecp5"),
        ("name", "=", "not a TOML file"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=words):
            Fpga.load(str(path))
    with pytest.raises(UserError, match=r"no FPGA 'zynq'.*ecp5-25k"):
        Fpga.load("zynq")
