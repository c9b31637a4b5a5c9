"""An artifact as a workload again: its model, the input it is measured on, and data to judge it by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lilliput import zoo
from lilliput.artifact import load, load_example, load_tokenizer, read_architecture
from lilliput.errors import UserError
from lilliput.measuring import bare_workload
from lilliput.workload import Batch, Workload
from lilliput.zoo.language import model_workload, tokenizer_digest

PICTURES_BATCH = 16


def artifact_workload(folder: str | Path, data: str | Path | None = None) -> tuple[Workload, bool]:
    """The workload of any artifact around its fitted model, and whether its data can judge the model.

    `data` is text for a language model (a .txt file or a folder of them), for a classifier a .safetensors file with
    `input` (n, ...), `label` (n,) and perhaps `group` or `group.<name>` (n,). Without it a language model reads the
    text that the zoo has, and a classifier of the zoo its own pictures; any other has its example alone, which judges
    nothing. Raises UserError.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    kind, name = str(architecture.get("kind")), str(architecture.get("name", folder.name))
    model, example = load(folder), load_example(folder)
    if kind == "causal_lm":
        work = _language(folder, model, name, data)
    elif kind == "classifier":
        work = _classifier(model, name, data)
    else:
        work = None
    found = work or bare_workload(model, example, kind)
    return dataclasses.replace(found, example=example, source=architecture["source"], name=name), work is not None


def _language(folder: Path, model: nn.Module, name: str, data: str | Path | None) -> Workload | None:
    if not (folder / "tokenizer_config.json").is_file():
        if data is None:
            return None
        raise UserError(
            f"{str(folder)!r} holds no tokenizer to read {str(data)!r} with; copy the tokenizer files of the original "
            "model into it, or leave out --data"
        )
    corpus = zoo.text_corpus(data, name if name in zoo.workload_names("causal_lm") else "sotu")
    return model_workload(model, load_tokenizer(folder), tokenizer_digest(folder), corpus, name)


def _classifier(model: nn.Module, name: str, data: str | Path | None) -> Workload | None:
    if data is None:
        known = name in zoo.workload_names("classifier")
        return dataclasses.replace(Workload.from_name(name), model=model) if known else None
    batches = _labelled(Path(data))
    return Workload.classifier(model, batches[:2], batches, batches)


def _labelled(path: Path) -> list[Batch]:
    """The batches of a file of tensors `input` and `label`."""
    try:
        tensors: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}; {_FORM}") from None
    inputs, labels = tensors.get("input"), tensors.get("label")
    given = isinstance(inputs, Tensor) and isinstance(labels, Tensor)
    if not given or labels.ndim != 1 or labels.shape != inputs.shape[:1] or not len(labels):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        raise UserError(f"{str(path)!r} holds {shapes}; {_FORM}")
    groups = {key: tensor.long() for key, tensor in tensors.items() if key.partition(".")[0] == "group"}
    wrong = [key for key, tensor in groups.items() if tensor.shape != labels.shape]
    if wrong:
        raise UserError(f"{str(path)!r}: {wrong[0]!r} has the shape {tuple(groups[wrong[0]].shape)}; {_FORM}")
    columns = {"input": inputs, "label": labels.long()} | groups
    return [
        {key: tensor[i : i + PICTURES_BATCH] for key, tensor in columns.items()}
        for i in range(0, len(labels), PICTURES_BATCH)
    ]


_FORM = (
    "a classifier's data is a .safetensors file with `input` (n, ...) and `label` (n,), perhaps `group` or "
    "`group.<name>` (n,) for audits"
)
