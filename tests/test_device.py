import contextlib
import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput import _probe
from lilliput.device import LEVELS, Device
from lilliput.errors import UserError

MIB = 2**20
TOY = Device(
    name="toy",
    cores=4,
    isa=("neon",),
    caches_bytes={"L1d": 1000, "L2": 10_000},
    memory_bytes=10**9,
    bandwidth_gbps={"L2": (10.0, 40.0), "memory": (2.0, 3.0)},
    peak_gops={"fp32": 8.0, "int8": 32.0},
    disk_read_mbps=None,
    idle_w=1.0,
    energy_per_byte_j=1e-10,
    energy_per_op_j=1e-11,
    source={},
)
FACTS = dataclasses.asdict(TOY)


def test_names_are_the_files():
    assert Device.names() == ["cortex-m7", "jetson-orin-nano", "laptop", "raspberry-pi-4", "raspberry-pi-5"]


@pytest.mark.parametrize("name", Device.names())
def test_every_figure_of_a_file_has_a_source(name):
    device = Device.load(name)
    assert device.name == name
    assert not device.measured
    figures = {"cores", "memory_bytes", "caches_bytes", "disk_read_mbps"}
    figures |= {"idle_w", "energy_per_byte_j", "energy_per_op_j"}
    figures |= {f"bandwidth_gbps.{level}" for level in device.bandwidth_gbps}
    figures |= {f"peak_gops.{dtype}" for dtype in device.peak_gops}
    assert figures | {"device"} == set(device.source)
    kinds = ("vendor:", "public benchmark:", "derived:")
    assert all(text.startswith(kinds) for figure, text in device.source.items() if figure != "device")


@pytest.mark.parametrize("name", Device.names())
def test_larger_levels_are_slower_and_all_threads_not_slower_than_one(name):
    device = Device.load(name)
    rates = [device.bandwidth_gbps[level] for level in LEVELS if level in device.bandwidth_gbps]
    assert all(fast >= slow for near, far in itertools.pairwise(rates) for fast, slow in zip(near, far))
    assert all(every >= one for one, every in rates)


def test_derived_peaks_follow_from_their_description():
    peaks = {name: Device.load(name).peak_gops for name in Device.names()}
    assert peaks["raspberry-pi-4"]["fp32"] == pytest.approx(4 * 1.8 * 8)
    assert peaks["raspberry-pi-5"]["int8"] == pytest.approx(4 * 2.4 * 64)
    assert peaks["jetson-orin-nano"]["fp16"] == pytest.approx(6 * 1.5 * 32)
    assert peaks["laptop"]["fp32"] == pytest.approx(4 * 3.4 * 32)
    assert Device.load("raspberry-pi-5").bandwidth_gbps["memory"][1] == pytest.approx(4267e6 * 4 / 1e9, rel=0.01)


def test_load_refuses_an_unknown_name_and_a_bad_file(tmp_path):
    with pytest.raises(UserError, match=r"'raspberry-pi-9'.*raspberry-pi-5"):
        Device.load("raspberry-pi-9")
    with pytest.raises(UserError, match="there is no device"):
        Device.load("../devices/laptop")
    bad = tmp_path / "board.toml"
    bad.write_text("name = ")
    with pytest.raises(UserError, match="not a TOML file"):
        Device.load(str(bad))
    bad.write_text("name = 'board'")
    with pytest.raises(UserError, match="lack"):
        Device.load(str(bad))


def test_level_is_the_smallest_known_cache_that_fits():
    assert TOY.level(10) == "L2"  # the bandwidth of L1 is not known
    assert TOY.level(10_000) == "L2"
    assert TOY.level(10_001) == "memory"


def test_bandwidth_of_threads():
    assert [TOY.bandwidth(10, t) / 1e9 for t in (1, 2, 4, 99, None)] == [10, 20, 40, 40, 40]
    assert [TOY.bandwidth(1e6, t) / 1e9 for t in (1, 2, 4)] == [2, 3, 3]
    with pytest.raises(UserError, match="threads is 0"):
        TOY.bandwidth(10, 0)


def test_peak_of_types():
    assert TOY.peak("fp32") == TOY.peak("bf16") == 8e9
    assert TOY.peak("int8") == TOY.peak("int4") == 32e9
    assert TOY.peak("fp32", threads=1) == 2e9
    assert TOY.peak("binary") == 8 * TOY.peak("int8")
    with pytest.raises(UserError, match="'fp64'"):
        TOY.peak("fp64")


def test_roofline_is_the_slower_of_bytes_and_operations():
    assert TOY.roofline_ms(3e6, 0) == pytest.approx(1.0)  # 3 MB at 3 GB/s
    assert TOY.roofline_ms(3e6, 0, working_set_bytes=1) == pytest.approx(3e6 / 40e9 * 1e3)
    assert TOY.roofline_ms(0, 8e6) == pytest.approx(1.0)
    assert TOY.roofline_ms(3e6, 32e6, "fp32") == pytest.approx(4.0)
    assert TOY.roofline_ms(3e6, 32e6, "int8") == pytest.approx(1.0)
    with pytest.raises(UserError, match="negative"):
        TOY.roofline_ms(-1, 0)


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(1, 8))
def test_roofline_never_falls_with_more_work_or_fewer_threads(size, ops, threads):
    limit = TOY.roofline_ms(size, ops, threads=threads)
    assert TOY.roofline_ms(2 * size, ops, threads=threads) >= limit
    assert TOY.roofline_ms(size, 2 * ops, threads=threads) >= limit
    assert TOY.roofline_ms(size, ops, threads=threads + 1) <= limit


def test_predicted_latency_uses_the_working_set_of_all_layers():
    layers = [(6000, 0, "fp32"), (6000, 8e6, "fp32")]  # each alone would fit into L2
    assert TOY.predict_latency(iter(layers)) == pytest.approx(6000 / 3e9 * 1e3 + 1.0)
    assert TOY.predict_latency([]) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cores": 0}, "cores is 0"),
        ({"cores": "four"}, "cores is 'four'"),
        ({"memory_bytes": math.nan}, "memory_bytes is nan"),
        ({"idle_w": -1}, "idle_w is -1"),
        ({"idle_w": None}, "idle_w is None"),
        ({"disk_read_mbps": 0}, "disk_read_mbps is 0"),
        ({"caches_bytes": {"L4": 5}}, "level 'L4'"),
        ({"caches_bytes": []}, r"caches_bytes is \[\], not a table"),
        ({"bandwidth_gbps": {"L2": (1, 2)}}, "bandwidth_gbps.memory"),
        ({"bandwidth_gbps": {"memory": (1,)}}, r"bandwidth_gbps.memory is \(1,\), not two numbers"),
        ({"bandwidth_gbps": {"memory": (0, 1)}}, "bandwidth_gbps.memory is 0"),
        ({"peak_gops": {"int8": 1}}, "peak_gops.fp32"),
        ({"peak_gops": {"fp32": math.inf}}, "peak_gops.fp32 is inf"),
        ({"peak_gops": {"fp32": 1, "fp3": 1}}, "type 'fp3'"),
        ({"isa": 5}, "isa is 5, not a list of names"),
        ({"speed": 1}, "'speed'"),
    ],
)
def test_wrong_facts_are_named(change, named):
    with pytest.raises(UserError, match=named):
        Device.from_dict(FACTS | change)


@given(st.recursive(st.none() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_value_of_any_fact_is_taken_or_refused_politely(value):
    for fact in FACTS:
        try:
            taken = Device.from_dict(FACTS | {fact: value})
        except UserError:
            continue
        assert getattr(taken, fact) == (tuple(value) if fact == "isa" else value)


# --- this machine ----------------------------------------------------------------------------------------------


@pytest.fixture
def probes(tmp_path, monkeypatch):
    """A cache folder of its own, and a probe that counts instead of measuring."""
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    calls = []

    def probe():
        calls.append(1)
        return FACTS | {"idle_w": float(len(calls)), "source": {"load": calls.note}, "measured": True}

    class Calls(list):
        note = "quiet: 0"

    calls = Calls()
    monkeypatch.setattr(_probe, "probe", probe)
    return calls


def _kept(tmp_path):
    (path,) = (tmp_path / "device").glob("*.json")
    return path


def test_here_probes_once(probes):
    first = Device.here()
    assert Device.here() == first
    assert first.measured
    assert len(probes) == 1
    assert Device.here(refresh=True).idle_w == 2
    assert Device.here().idle_w == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "5", "\x00", '{"name": "here"}'])
def test_a_damaged_cache_is_probed_again(probes, tmp_path, damage):
    Device.here()
    _kept(tmp_path).write_text(damage)
    assert Device.here().idle_w == 2
    assert json.loads(_kept(tmp_path).read_text())["idle_w"] == 2


def test_a_cache_that_is_not_text_is_probed_again(probes, tmp_path):
    Device.here()
    _kept(tmp_path).write_bytes(b"\xff\xfe\x80")
    assert Device.here().idle_w == 2


def test_another_machine_is_probed_apart(probes, monkeypatch):
    Device.here()
    monkeypatch.setattr(_probe, "core_count", lambda: 64)
    assert Device.here().idle_w == 2


def test_a_disturbed_probe_is_replaced_when_the_machine_is_quiet(probes, monkeypatch):
    probes.note = "busy: 1.5"
    load = 2.0
    monkeypatch.setattr(_probe, "busy_cores", lambda: load)
    assert [Device.here().idle_w, Device.here().idle_w] == [1, 1]
    load, probes.note = 0.0, "quiet: 0"
    assert [Device.here().idle_w, Device.here().idle_w] == [2, 2]


def test_the_probe_measures_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    small = {1: 5.0, 64 * MIB: 2.0}
    monkeypatch.setattr(_probe, "bandwidth_table", lambda threads: small)
    monkeypatch.setattr(_probe, "peak_gops", lambda threads: {"fp32": 10.0})
    device = Device.from_dict(_probe.probe())
    assert device.measured
    assert device.cores >= 1
    assert device.memory_bytes > 2**28
    assert device.bandwidth_gbps["memory"] == (2.0, 2.0)
    figures = set(FACTS) - {"name", "isa", "source", "measured"}
    assert figures <= set(device.source)


def test_measured_rates_are_finite():
    table = _probe.bandwidth_table(1, buffers_mib=(1, 2), spend_seconds=0)
    assert set(table) == {MIB, 2 * MIB}
    rates = [*table.values(), *_probe.peak_gops(1, n=64, spend_seconds=0).values()]
    assert all(0 < rate < math.inf for rate in rates)


def test_levels_of_a_bandwidth_table():
    table = {1 * MIB: 90.0, 4 * MIB: 70.0, 16 * MIB: 80.0, 64 * MIB: 40.0, 512 * MIB: 20.0}
    caches = {"L1d": 32768, "L2": 1 * MIB, "L3": 32 * MIB}
    assert _probe.by_level(table, caches) == {"L2": 90.0, "L3": 80.0, "memory": 20.0}
    assert _probe.by_level(table, {}) == {"memory": 20.0}


def test_cache_sizes_from_a_fake_system(tmp_path):
    kinds = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M")]
    for index, facts in enumerate(kinds):
        for name, value in zip(("level", "type", "size"), facts):
            (tmp_path / f"index{index}").mkdir(exist_ok=True)
            (tmp_path / f"index{index}" / name).write_text(value + "\n")
    assert _probe.cache_sizes(tmp_path) == {"L1d": 48 * 1024, "L2": MIB, "L3": 32 * MIB}
    assert _probe.cache_sizes(tmp_path / "none") == {}


def test_torch_threads_are_restored():
    import torch

    before = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), _probe.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_disk_rate_is_positive(tmp_path):
    assert 0 < (_probe.disk_read_mbps(tmp_path, size_mib=2) or 1) < math.inf
    assert list(tmp_path.iterdir()) == []
