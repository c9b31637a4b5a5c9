"""Exports of whole artifacts: what is written, what is refused, and ONNX Runtime as the reference."""

import numpy as np
import pytest
import torch

from lilliput.artifact import save
from lilliput.errors import UserError
from lilliput.exporting import export_artifact

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
