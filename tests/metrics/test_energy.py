import dataclasses

import pytest

from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.metrics import energy

DEVICE = dataclasses.replace(
    Device.load("laptop"), idle_w=2.0, energy_per_byte_j=1e-9, energy_per_op_j=1e-10, measured=True
)
WRAP = 10_000_000


class FakePowercap:
    """A sysfs folder with two packages, a DRAM and a core domain, the whole platform, and the mmio copy."""

    DOMAINS = (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    )

    def __init__(self, root):
        self.root = root
        for folder, name in self.DOMAINS:
            (root / folder).mkdir()
            (root / folder / "name").write_text(name + "\n")
            (root / folder / "max_energy_range_uj").write_text(f"{WRAP}\n")
            self.set(folder, 1000)

    def set(self, folder, microjoules):
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path):
    return FakePowercap(tmp_path)


def test_sums_packages_and_dram_only(powercap):
    rapl = energy.Rapl(powercap.root)
    for factor, (folder, _) in enumerate(powercap.DOMAINS):
        powercap.set(folder, 1000 + 10**factor)
    assert rapl.readable
    assert rapl.joules_since_last() == pytest.approx((1 + 100 + 1000) * 1e-6)
    assert rapl.joules_since_last() == 0


def test_counter_wraps_around(powercap):
    powercap.set("intel-rapl:0", WRAP - 99)
    rapl = energy.Rapl(powercap.root)
    powercap.set("intel-rapl:0", 400)
    assert rapl.joules_since_last() == pytest.approx(500e-6)  # 99 to the highest value, one to zero, 400 more


@pytest.mark.parametrize("damage", ["missing", "garbage", "no folder"])
def test_unreadable_counters(powercap, damage, tmp_path):
    for folder, _ in powercap.DOMAINS:
        path = powercap.root / folder / "energy_uj"
        path.unlink() if damage == "missing" else path.write_text("?")
    rapl = energy.Rapl(tmp_path / "none" if damage == "no folder" else powercap.root)
    assert not rapl.readable
    assert rapl.joules_since_last() == 0


def test_a_counter_that_vanishes_is_left_out(powercap):
    rapl = energy.Rapl(powercap.root)
    powercap.set("intel-rapl:0", 2000)
    (powercap.root / "intel-rapl:1" / "energy_uj").unlink()
    assert rapl.joules_since_last() == pytest.approx(1000e-6)


def test_measured_joules_a_run(powercap):
    spent = [1000]

    def run():
        spent[0] = (spent[0] + 3_000_000) % (WRAP + 1)  # wraps several times over the runs
        powercap.set("intel-rapl:0", spent[0])

    found = energy.measure(run, DEVICE, 0, 0, min_runs=12, min_seconds=0, folder=powercap.root)
    assert not found.modelled
    assert found.runs == 12
    assert found.joules == pytest.approx(3.0)
    assert "modelled" not in str(found)


def test_falls_back_to_the_model(tmp_path):
    found = energy.measure(lambda: None, DEVICE, 1e9, 1e9, min_runs=1, min_seconds=0, folder=tmp_path)
    assert found.modelled
    assert found.joules == pytest.approx(1.0 + 0.1, abs=0.05)
    assert "modelled" in str(found)


def test_another_device_is_modelled_even_where_counters_are_readable(powercap):
    other = dataclasses.replace(DEVICE, measured=False)
    assert energy.measure(lambda: None, other, 0, 0, min_runs=1, min_seconds=0, folder=powercap.root).modelled


def test_model():
    assert energy.model(DEVICE, 0.5, 1e6, 1e7).joules == pytest.approx(2.0 * 0.5 + 1e-3 + 1e-3)
    assert energy.model(DEVICE, 0, 0, 0).joules == 0


def test_refuses_nonsense():
    with pytest.raises(UserError, match="negative"):
        energy.model(DEVICE, -1, 0, 0)
    with pytest.raises(UserError, match="min_runs is 0"):
        energy.measure(lambda: None, DEVICE, 0, 0, min_runs=0)
