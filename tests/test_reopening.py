"""Artifacts become workloads again: the model that was saved, the input that was saved, data that can judge it."""

import random

import pytest
import torch
from safetensors.torch import save_file

from lilliput import zoo
from lilliput.artifact import save
from lilliput.errors import UserError
from lilliput.measuring import measure
from lilliput.methods.quantize.int8 import Int8
from lilliput.reopening import artifact_workload
from lilliput.workload import Workload
from lilliput.zoo import nets


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A text of the words that the tiny tokenizer was trained on, and a cache of its own."""
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    words, draw = ["the", "cat", "and", "the", "other", "cat", "sat", "on", "12", "mats"], random.Random(0)
    path = tmp_path / "book.txt"
    path.write_text(" ".join(draw.choice(words) for _ in range(14_000)))
    return path


@pytest.fixture
def language(llama_work, make_tokenizer, tmp_path):
    """The folder of a quantized language model of the user's own, with its tokenizer."""
    llama_work.tokenizer = make_tokenizer()
    return save(Int8().apply(llama_work.model), tmp_path / "fitted", llama_work)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The folder of a net that the zoo can build, under a name that it does not know, and a file of labelled inputs."""
    monkeypatch.setattr(zoo, "build", lambda name: nets.resnet(4, 8))
    torch.manual_seed(0)
    model = nets.resnet(4, 8).eval()
    x = torch.randn(40, 1, 28, 28)
    with torch.no_grad():
        y = model(x).argmax(-1)
    batch = [{"input": x[:2], "label": y[:2]}]
    work = Workload.classifier(model, batch, batch, batch, name="mine", source={"kind": "zoo", "name": "mine"})
    y[::4] = (y[::4] + 1) % 10
    save_file({"input": x, "label": y}, tmp_path / "data.safetensors")
    return save(model, tmp_path / "fitted", work), tmp_path / "data.safetensors"


def test_a_language_model_is_judged_by_a_text(language, llama_work, book):
    work, judged = artifact_workload(language, book)
    assert judged
    assert torch.equal(work.example["input_ids"], llama_work.example["input_ids"])
    assert type(work.model.lm_head).__name__ == "PackedLinear"
    window = work.validation[0]["input_ids"][0]
    assert len(window) == 128  # all that this model reads
    assert work.tokenizer.decode(window)[20:60] in book.read_text()
    assert work.score(work.model).value != work.score(llama_work.model).value
    found = measure(work, runtime="torch", threads=1)  # with its memory in a new process
    assert {"token_ms", "memory_bytes", "size_bytes"} <= set(found.values)
    assert found.score == work.score(work.model)


def test_without_a_tokenizer_there_is_nothing_to_judge_by(llama_work, tmp_path, book):
    folder = save(llama_work.model, tmp_path / "a", llama_work)
    work, judged = artifact_workload(folder)
    assert not judged
    assert measure(work, runtime="torch", threads=1, fresh_memory=False, split=None).score is None
    with pytest.raises(UserError, match=r"holds no tokenizer to read .*book\.txt"):
        artifact_workload(folder, book)


@pytest.mark.parametrize("name", ["llama-tiny", "resnet-small"])
def test_what_came_from_the_zoo_finds_its_data_there(name, tmp_path):
    original = Workload.from_name(name)
    folder = save(original.model, tmp_path / "a", original)
    again, judged = artifact_workload(folder)
    assert judged
    for mine, theirs in zip(again.validation, original.validation, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert all(torch.equal(again.example[key], value) for key, value in original.example.items())
    assert again.model is not original.model
    assert again.name == name


def test_a_classifier_is_judged_by_a_file(pictures):
    folder, data = pictures
    work, judged = artifact_workload(folder, data)
    assert judged
    score = work.score(work.model)
    assert (score.value, score.n) == (75.0, 40)
    work, judged = artifact_workload(folder)
    assert not judged
    assert work.example["input"].shape == (1, 1, 28, 28)


@pytest.mark.parametrize(
    "tensors",
    [
        {"input": torch.zeros(3, 2)},
        {"input": torch.zeros(3, 2), "label": torch.zeros(4)},
        {"input": torch.zeros(0, 2), "label": torch.zeros(0)},
        {"input": torch.tensor(1.0), "label": torch.tensor(1)},
    ],
    ids=["no labels", "other labels", "nothing", "numbers"],
)
def test_files_of_another_form_are_refused(tensors, pictures):
    folder, data = pictures
    save_file(tensors, data)
    with pytest.raises(UserError, match=r"data\.safetensors' holds .*`input` \(n, \.\.\.\) and `label` \(n,\)"):
        artifact_workload(folder, data)


def test_what_cannot_be_read_or_run_is_refused(pictures, cnn_work, llama_work, tmp_path):
    folder, data = pictures
    data.write_text("pixels")
    for wrong in (data, tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="cannot read"):
            artifact_workload(folder, wrong)
    own = save(cnn_work.model, tmp_path / "own", cnn_work)
    with pytest.raises(UserError, match="model=YourModel"):
        artifact_workload(own)
    llama_work.kind = "custom"
    with pytest.raises(UserError, match="kind 'custom'"):
        artifact_workload(save(llama_work.model, tmp_path / "custom", llama_work))
