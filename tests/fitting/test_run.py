"""The main job on a tiny model: limits, refusals, kill and resume, Ctrl-C, modelled devices."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lilliput as lp
from lilliput.fitting.aim import AlreadyInside
from lilliput.fitting.record import Run, fresh_folder

FAST = {"minutes": 0.4, "trials": 30, "threads": 1, "recover": False, "quiet": True}


def test_several_limits_at_once_are_all_verified(llama_work, tmp_path):
    fitted = lp.fit(llama_work, "size<=60%, memory<=10GB, drop<=90%", out=tmp_path / "run", **FAST)
    measured = fitted.record["verify"]["measured"]
    assert fitted.met
    assert measured["size_bytes"] <= fitted.record["limits"]["size_bytes"]
    assert {"memory_bytes", "drop"} <= set(measured)
    assert "met" in fitted.summary()


def test_out_of_reach_says_how_far(llama_work, tmp_path):
    with pytest.raises(lp.UserError, match=r"out of reach.*times the limit"):
        lp.fit(llama_work, "size<=100B", out=tmp_path / "run", **FAST)


def test_already_inside_says_so(llama_work, tmp_path):
    with pytest.raises(AlreadyInside, match="already"):
        lp.fit(llama_work, "size<=1GB", out=tmp_path / "run", **FAST)


def test_another_device_is_modelled_and_said(llama_work, tmp_path):
    fitted = lp.fit(llama_work, "time_per_token<=60%", device="raspberry-pi-4", out=tmp_path / "run", **FAST)
    assert "modelled" in fitted.summary()
    assert "token_ms" in fitted.record["modelled"]
    assert fitted.record["verify"]["measured"]["token_ms"] <= fitted.record["limits"]["token_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes is 0"),
        ({"families": ("quantise",)}, "quantise"),
        ({"families": ()}, "families"),
        ({"device": "raspberry-pi-9"}, "raspberry-pi-9"),
        ({"runtime": "openvino"}, "openvino"),
        ({"sampler": "guess"}, "guess"),
        ({"context": 64}, "context is 64"),
        ({"context": 4096}, "reads 128 at most"),
        ({"speed": 3}, "speed"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_wrong_options_are_named(options, message, llama_work, tmp_path):
    with pytest.raises(lp.UserError, match=message):
        lp.fit(llama_work, "size<=60%", out=tmp_path / "run", **(FAST | options))


def test_nan_in_calibration_is_told(llama_work, tmp_path):
    with torch.no_grad():
        llama_work.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(lp.UserError, match=r"finite|NaN|differ"):
        lp.fit(llama_work, "size<=60%", out=tmp_path / "run", **FAST)


def test_a_folder_in_use_and_a_different_request_are_refused(tmp_path):
    Run(tmp_path / "run", {"workload": "a", "budget": "size<=1MB"}, resume=False)
    with pytest.raises(lp.UserError, match="--resume"):
        Run(tmp_path / "run", {"workload": "a"}, resume=False)
    with pytest.raises(lp.UserError, match="budget"):
        Run(tmp_path / "run", {"workload": "a", "budget": "size<=2MB"}, resume=True)


def test_a_damaged_step_is_named(tmp_path):
    run = Run(tmp_path / "run", {}, resume=False)
    (tmp_path / "run" / "original.json").write_text("{")
    with pytest.raises(lp.UserError, match=r"original\.json"):
        run.step("original", dict)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {}, resume=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lilliput.fitting.record.write_atomically", full)
    with pytest.raises(lp.UserError, match="free some space"):
        run.write("original", {})


def test_fresh_folder_takes_the_first_free_name(tmp_path):
    assert fresh_folder(tmp_path, "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert fresh_folder(tmp_path, "a") == tmp_path / "a-2"


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import conftest
torch.set_num_threads(1)
model = conftest.tiny_llama.__wrapped__()
work = conftest.llama_work.__wrapped__(model)
import lilliput as lp
from lilliput.metrics import latency
latency.wait_until_quiet = lambda *args, **options: 0.0
fitted = lp.fit(work, "size<=60%", out={out!r}, resume={resume}, minutes={minutes}, trials=30, threads=1, recover=False)
print(fitted.summary())
"""


def start(out: Path, resume: bool, minutes: float) -> subprocess.Popen:
    tests = str(Path(__file__).parents[1])
    code = SCRIPT.format(tests=tests, out=str(out), resume=resume, minutes=minutes)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen, count: int = 1, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("pattern", ["original.json", "candidates/*.json"])
def test_kill_9_loses_no_finished_candidate(pattern, tmp_path):
    out = tmp_path / "run"
    process = start(out, resume=False, minutes=5)
    wait_for(out, pattern, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p.name: p.read_bytes() for p in out.glob("candidates/*.json")}
    original = (out / "original.json").read_bytes()
    resumed = start(out, resume=True, minutes=0.4)
    text, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert "met" in text
    assert (out / "original.json").read_bytes() == original
    assert all((out / "candidates" / name).read_bytes() == data for name, data in before.items())
    record = json.loads((out / "record.json").read_text())
    assert len(record["candidates"]) >= max(1, len(before))


def test_ctrl_c_keeps_the_best_so_far(tmp_path):
    out = tmp_path / "run"
    process = start(out, resume=False, minutes=5)
    wait_for(out, "candidates/*.json", process)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "met" in text
    assert (out / "fitted" / "model.safetensors").exists()
    assert (out / "report.html").exists()
