import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.metrics.memory import artifact_memory, peak_memory_bytes, weight_bytes

MIB = 2**20


def test_peak_counts_what_the_code_holds_and_frees():
    code = "x = bytearray(96 * 2**20); del x; y = bytearray(16 * 2**20)"
    assert 95 * MIB < peak_memory_bytes(code, imports="") < 110 * MIB


def test_imports_are_not_counted():
    held = peak_memory_bytes("pass", imports="x = bytearray(96 * 2**20)")
    freed = peak_memory_bytes("pass", imports="x = bytearray(96 * 2**20); del x")
    assert max(held, freed) < 8 * MIB


def test_the_parent_is_not_counted():
    ballast = bytearray(200 * MIB)
    assert peak_memory_bytes("pass", imports="") < 8 * MIB
    assert len(ballast) == 200 * MIB


def test_code_sees_arguments_and_names_of_the_imports():
    code = "assert sys.argv[1:] == ['a b', '3'], sys.argv\nprint('lilliput is not the last line')\nx = f(1)"
    assert peak_memory_bytes(code, ["a b", "3"], imports="import sys\ndef f(x): return x") >= 0


def test_failures_name_their_reason():
    with pytest.raises(UserError, match="no such model"):
        peak_memory_bytes("raise SystemExit('no such model')", imports="")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        peak_memory_bytes("1 / 0", imports="")
    with pytest.raises(UserError, match="ended with code -9"):
        peak_memory_bytes("import os; os.kill(os.getpid(), 9)", imports="")
    with pytest.raises(UserError, match=r"longer than 0\.5 s"):
        peak_memory_bytes("import time; time.sleep(30)", imports="", timeout_seconds=0.5)


def test_artifact_memory_of_a_saved_model(llama_work, tmp_path):
    from lilliput.artifact import save

    folder = save(llama_work.model, tmp_path / "fitted", llama_work)
    assert 0 < artifact_memory(folder) < 200 * MIB


def test_artifact_memory_needs_an_artifact(tmp_path):
    with pytest.raises(UserError, match="not an artifact"):
        artifact_memory(tmp_path)


def test_weight_bytes_counts_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20)).to(torch.bfloat16)
    # weight 200 + bias 20, scale 20 + shift 20, running mean 20 + variance 20, all of two bytes, and one int64 count
    assert weight_bytes(model) == 2 * 300 + 8
    assert weight_bytes(nn.Identity()) == 0


def test_tied_weights_and_views_count_once():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    model.head.weight = model.embed.weight
    model.register_buffer("rows", model.embed.weight.detach()[:3])
    assert weight_bytes(model) == 4 * 50 * 8


def test_equal_values_in_two_storages_count_twice():
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    assert weight_bytes(model) == 2 * 64


def test_meta_tensors_count_as_what_they_stand_for():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert weight_bytes(model) == 2 * 4 * 72
