"""An artifact for other engines: ONNX for classifiers, GGUF for language models, both checked; or a circuit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lilliput.artifact import load, load_example, load_tokenizer, read_architecture
from lilliput.errors import UserError
from lilliput.methods.circuits.streaming import Streaming, write_sources
from lilliput.onnx_export import evaluator, export_onnx, graph_error, inputs_of
from lilliput.reopening import artifact_workload
from lilliput.workload import Batch

KINDS = {".onnx": "classifier", ".gguf": "causal_lm"}
TARGETS = ("verilog", "cpp")
TOKENIZER = "tokenizer.json"
WORDS = {"classifier": "a classifier", "causal_lm": "a language model"}


def export_artifact(
    folder: str | Path, out: str | Path, model: nn.Module | None = None, matrices: str = "F16"
) -> dict[str, Any]:
    """Write the artifact in `folder` to `out`, a .onnx or .gguf file, and return what was written and its errors.

    `model` is an instance of your own class for artifacts that only it can load; `matrices` is the GGUF type of
    matrices that are not quantized: F16, BF16 or F32. Raises UserError when the file cannot hold the model.
    """
    folder, out = Path(folder), Path(out)
    kind = KINDS.get(out.suffix.lower())
    if kind is None:
        raise UserError(f"cannot export to {str(out)!r}: the name must end in .onnx (classifiers) or .gguf (language)")
    architecture = read_architecture(folder)
    _check_kind(folder, out, architecture.get("kind"), kind)
    try:
        if kind == "classifier":
            return _to_onnx(load(folder, model), inputs_of(load_example(folder)), out)
        return _to_gguf(folder, out, str(architecture.get("name", "model")), model, matrices)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error.strerror or error}; choose another place") from None


def export_circuit(
    folder: str | Path, out: str | Path, target: str = "verilog", cycles: int | None = None, data: Path | None = None
) -> dict[str, Any]:
    """Write the classifier in `folder` into the new folder `out`, as "verilog" with C++ beside it or as "cpp" alone.

    `data` is a .safetensors file whose `input` shows the range of the inputs; else the zoo's pictures or the example
    do. Returns what was written. Raises UserError, before anything is written, when the compiler lacks a layer.
    """
    if target not in TARGETS:
        raise UserError(f"the target is {target!r}; choose one of {', '.join(TARGETS)}, or none for .onnx and .gguf")
    work, known = artifact_workload(folder, data)
    if work.kind != "classifier":
        raise UserError(f"{str(folder)!r} holds {WORDS.get(work.kind, work.kind)}; circuits are made of classifiers")
    design = Streaming(**{} if cycles is None else {"cycles": cycles}).emit(work.model, work)
    files = design.sources() if target == "verilog" else {"net.cpp": design.cpp}
    write_sources(out, files)
    facts: dict[str, Any] = {"path": str(out), "files": ", ".join(files), "weight_bits": design.net.weight_bits}
    facts["input"] = (
        f"bytes q by row, column and channel, x = {design.net.grid.offset:.9g} + {design.net.grid.step:.9g} q"
    )
    if target == "verilog":
        facts |= {"bytes_per_word": design.folded[0].lanes, "expected_latency_cycles": design.expected_latency}
    return facts if known else facts | {"note": "the example alone says which range a byte covers; give --data"}


def _check_kind(folder: Path, out: Path, found: Any, wanted: str) -> None:
    if found == wanted:
        return
    other = next((suffix for suffix, kind in KINDS.items() if kind == found), None)
    way_out = f"write a {other} file" if other else "only classifiers (.onnx) and language models (.gguf) are exported"
    raise UserError(
        f"{str(folder)!r} holds {WORDS.get(str(found), f'a model of kind {found!r}')}, and {out.suffix} takes "
        f"{WORDS[wanted]}; {way_out}"
    )


def _to_onnx(model: nn.Module, example: Batch, out: Path) -> dict[str, Any]:
    x = example["input"]
    export_onnx(model, x, out)
    return {
        "path": str(out),
        "size_bytes": out.stat().st_size,
        "largest_relative_error": graph_error(out.read_bytes(), model, {"input": x}),
        "checked_with": evaluator(),
    }


def _to_gguf(folder: Path, out: Path, name: str, model: nn.Module | None, matrices: str) -> dict[str, Any]:
    from lilliput.gguf_export import export_gguf

    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"{str(folder)!r} holds no {TOKENIZER}, and llama.cpp does not open a file without a vocabulary; copy the "
            f"{TOKENIZER} of the original model into that folder, or save the artifact from a workload with a tokenizer"
        )
    return export_gguf(load(folder, model), out, load_tokenizer(folder), name, matrices)
