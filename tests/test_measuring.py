"""Every number of a model: which quantities appear, what they agree with, and what is refused. No timing is judged."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from lilliput import measuring
from lilliput.artifact import save
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.measuring import (
    Measured,
    artifact_bytes,
    bare_workload,
    generator,
    measure,
    model_times,
    pick_runtime,
    run_artifact,
    step_costs,
)
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.metrics import energy, latency, memory, size
from lilliput.runtimes import find_runtime
from lilliput.workload import Score


@pytest.fixture(autouse=True)
def calm_machine(monkeypatch):
    """No waiting for a quiet machine, one thread, and a device that needs no probing."""
    before, here = torch.get_num_threads(), Device.load("laptop")
    monkeypatch.setattr(latency, "wait_until_quiet", lambda: 0.0)
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: here))
    yield
    torch.set_num_threads(before)


def looked_at(work, model=None, **options):
    return measure(work, model, threads=1, fresh_memory=False, **options)


def test_a_classifier_has_latency_memory_size_energy_and_a_score(cnn_work):
    found = looked_at(cnn_work, runtime="torch")
    assert set(found.values) == {"latency_ms", "memory_bytes", "size_bytes", "energy_j"}
    assert set(found.spread) == {"latency_ms"}
    assert all(math.isfinite(v) and v > 0 for v in found.values.values())
    assert found.values["memory_bytes"] == memory.weight_bytes(cnn_work.model)
    assert found.values["size_bytes"] == size.state_bytes(cnn_work.model.state_dict())
    assert found.score.value == 100.0
    assert (found.runtime, found.threads) == ("torch", 1)
    assert any("not run in a fresh process" in note for note in found.notes)
    assert any(note.startswith("roofline") for note in found.notes)


@pytest.mark.parametrize("runtime", ["lean", "torch"])
def test_a_language_model_has_its_first_and_its_later_tokens_apart(llama_work, runtime):
    found = looked_at(llama_work, runtime=runtime)
    assert set(found.values) == {"first_token_ms", "token_ms", "memory_bytes", "size_bytes", "energy_j"}
    assert set(found.spread) == {"first_token_ms", "token_ms"}
    assert found.score == llama_work.score(llama_work.model)


def test_the_split_may_be_left_out(cnn_work):
    assert looked_at(cnn_work, runtime="torch", split=None).score is None
    assert looked_at(cnn_work, runtime="torch", split="test").score.n == sum(len(b["label"]) for b in cnn_work.test)


def test_weights_are_counted_as_they_are_held_even_after_they_ran(llama_work):
    model = Group(bits=4, group=32).apply(llama_work.model)
    before = memory.weight_bytes(model)
    found = looked_at(llama_work, model, runtime="lean", split=None)
    shared = model.lm_head.weight_bytes  # the head's layout for the operator stands beside the embedding's codes
    assert before <= found.values["memory_bytes"] <= before + shared
    assert found.values["size_bytes"] == size.state_bytes(model.state_dict())


def test_a_fresh_process_is_used_where_the_model_can_be_rebuilt(llama_work, cnn_work, monkeypatch):
    seen = []

    def fresh(path, runtime, threads):
        seen.append((artifact_bytes(path), runtime, threads))
        return 12345

    monkeypatch.setattr(measuring, "fresh_process_memory", fresh)
    found = measure(llama_work, threads=1, runtime="lean", split=None)
    assert found.values["memory_bytes"] == 12345
    assert seen == [(found.values["size_bytes"], "lean", 1)]
    assert not any("fresh process" in note for note in found.notes)
    measure(cnn_work, threads=1, runtime="torch", split=None)
    assert len(seen) == 1


def test_a_busy_machine_is_noted(cnn_work, monkeypatch):
    monkeypatch.setattr(latency, "wait_until_quiet", lambda: 1.7)
    assert any("1.7 cores busy" in note for note in looked_at(cnn_work, runtime="torch", split=None).notes)


@pytest.mark.parametrize("runtime", ["lean", "torch"])
def test_energy_is_counted_where_the_machine_counts_it(llama_work, monkeypatch, runtime):
    runs = []

    def counted(run, device, moved, ops, **_):
        runs.append(run())
        return SimpleNamespace(joules=24.0)

    monkeypatch.setattr(energy, "Rapl", lambda: SimpleNamespace(readable=True))
    monkeypatch.setattr(energy, "measure", counted)
    found = looked_at(llama_work, runtime=runtime, split=None)
    assert found.values["energy_j"] == 24.0 / len(runs[0])  # of one token
    assert "energy is measured by RAPL" in found.notes


def test_a_runtime_that_answers_wrongly_is_not_timed(llama_work, monkeypatch):
    wrong = copy.deepcopy(llama_work.model)
    with torch.no_grad():
        wrong.lm_head.weight.neg_()
    session = find_runtime("lean").prepare(wrong, llama_work)
    monkeypatch.setattr(type(find_runtime("lean")), "prepare", lambda *_, **__: session)
    with pytest.raises(UserError, match="differ from the torch model's"):
        looked_at(llama_work, runtime="lean")


@pytest.mark.parametrize("runtime", ["lean", "torch"])
def test_every_session_generates_greedily(llama_work, runtime):
    session = find_runtime(runtime).prepare(llama_work.model, llama_work)
    ids = llama_work.test[0]["input_ids"][:1, :6]
    expected = ids
    with torch.no_grad():
        for _ in range(7):
            expected = torch.cat([expected, llama_work.model(expected).logits[:, -1:].argmax(-1)], 1)
    assert list(generator(session)(ids, 7)) == expected[0, 6:].tolist()


def test_runtimes_are_picked_by_name_or_by_rank(llama_work, cnn_work):
    assert pick_runtime(None, llama_work.model, llama_work).name == "lean"
    assert pick_runtime("torch", llama_work.model, llama_work).name == "torch"
    chosen = find_runtime("torch")
    assert pick_runtime(chosen, llama_work.model, llama_work) is chosen
    with pytest.raises(UserError, match=r"runtime lean cannot take this model: .*TinyCnn"):
        pick_runtime("lean", cnn_work.model, cnn_work)
    with pytest.raises(UserError, match="abacus"):
        pick_runtime("abacus", cnn_work.model, cnn_work)


def test_a_step_of_a_language_model_is_one_token(llama_work):
    costs = {c.name: c for c in step_costs(llama_work, llama_work.model)}
    up = costs["model.layers.0.mlp.up_proj"]
    assert up.ops == 2 * 32 * 96
    assert up.weight_bytes == 4 * 32 * 96
    packed = {c.name: c for c in step_costs(llama_work, Int8().apply(llama_work.model))}
    assert packed["model.layers.0.mlp.up_proj"].weight_bytes == 32 * 96 + 2 * 96


def test_a_step_of_a_classifier_is_one_forward_pass(cnn_work):
    costs = {c.name: c for c in step_costs(cnn_work, cnn_work.model)}
    assert costs["conv1"].ops == 2 * 16 * 16 * 16 * 9
    assert costs["fc"].ops == 2 * 32 * 10


def test_times_of_a_device_that_is_not_here_are_modelled_and_say_so(llama_work):
    slow, fast = (Measured("lean", 1, {"token_ms": 1.0, "first_token_ms": 2.0, "size_bytes": 5.0}) for _ in range(2))
    model_times(slow, llama_work, Device.load("cortex-m7"), 1)
    model_times(fast, llama_work, Device.load("laptop"), 1)
    assert slow.values["token_ms"] > fast.values["token_ms"] > 0
    assert "first_token_ms" not in slow.values
    assert slow.values["size_bytes"] == 5.0
    assert slow.notes[0] == "times and energy are modelled for cortex-m7"


def test_the_numbers_survive_json():
    score = Score("accuracy", 90.0, 85.0, 95.0, 100, "%")
    found = Measured("torch", 2, {"latency_ms": 1.5, "size_bytes": 2e6}, {"latency_ms": 0.1}, ["a note"], score)
    assert Measured.from_json(json.loads(json.dumps(found.to_json()))) == found
    without = dataclasses.replace(found, score=None)
    assert Measured.from_json(json.loads(json.dumps(without.to_json()))) == without


def test_the_numbers_are_shown_with_their_units():
    text = str(Measured("torch", 2, {"latency_ms": 1.5, "size_bytes": 2e6}, notes=["a note"]))
    assert "latency_ms  1.5 ms" in text
    assert "size_bytes  2 MB" in text
    assert text.endswith("runtime torch, 2 threads\na note")


def test_an_artifact_runs_on_its_own_example(llama_work, tmp_path):
    save(Int8().apply(llama_work.model), tmp_path / "a", llama_work)
    for runtime in ("lean", "torch"):
        run_artifact(str(tmp_path / "a"), runtime, 1)
    weights = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert weights < artifact_bytes(tmp_path / "a") < weights + 20_000


def test_kinds_that_need_their_own_class_are_refused(cnn_work):
    assert bare_workload(cnn_work.model, cnn_work.example, "classifier").kind == "classifier"
    with pytest.raises(UserError, match="kind 'custom'"):
        bare_workload(cnn_work.model, cnn_work.example, "custom")
