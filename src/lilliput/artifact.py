"""A fitted model on disk: `model.safetensors`, `architecture.json` (edits), `plan.yaml`, and for Hugging Face models
the configuration and tokenizer. Nothing is pickled; saving loads the result back and compares it to the bit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilliput.edits import describable, describe, replay
from lilliput.errors import UserError
from lilliput.method import CachePolicy, Decoder
from lilliput.plan import Plan, read_serving, serving_entry
from lilliput.workload import Batch, Workload

VERSION = 1
WEIGHTS, ARCHITECTURE, PLAN, EXAMPLE = "model.safetensors", "architecture.json", "plan.yaml", "example.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_JSON_BYTES = 64_000_000


def save(
    model: nn.Module,
    folder: str | Path,
    workload: Workload,
    plan: Plan | None = None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write `model` to `folder`, load it back and compare every tensor and the example's output to the bit.

    The folder appears only when it is complete; an older artifact of that name is replaced, anything else refused.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / ARCHITECTURE).exists() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} holds something that is not an artifact; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to {str(folder.parent)!r}: {error.strerror}") from None
    try:
        _write(model, beside, workload, plan or Plan(), facts or {})
        _check_reload(model, beside, workload)
        beside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot save to {str(folder)!r}: {error}; free some space or choose another folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write(model: nn.Module, folder: Path, workload: Workload, plan: Plan, facts: dict[str, Any]) -> None:
    if workload.source.get("kind") == "hf":
        _write_hf_files(model, folder, workload)
    tensors, aliases = _stored_tensors(model)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    source = source_of(workload)
    edits = describe(model, skeleton(source, folder, workload))
    architecture = {
        "version": VERSION,
        "name": workload.name,
        "kind": workload.kind,
        "source": source,
        "edits": edits,
        "aliases": aliases,
        "facts": facts,
        "serving": None if plan.serving is None else serving_entry(plan.serving),
    }
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=1))
    (folder / PLAN).write_text(plan.to_yaml())
    save_file({k: v.contiguous() for k, v in workload.example.items()}, folder / EXAMPLE)


def _write_hf_files(model: nn.Module, folder: Path, workload: Workload) -> None:
    model.config.save_pretrained(folder)  # type: ignore[union-attr]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "lilliput", "version": VERSION}
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    if workload.tokenizer is not None:
        workload.tokenizer.save_pretrained(folder)


def _stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once (parameters and all buffers, persistent or not), and name -> name for the shared ones.

    Buffers named with an underscore are a machine's own layout of tensors that are stored anyway.
    """
    everything = dict(model.state_dict())
    buffers = (
        (n, b) for n, b in model.named_buffers(remove_duplicate=False) if not n.rpartition(".")[2].startswith("_")
    )
    everything |= {n: b for n, b in buffers if n not in everything}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in everything.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _check_reload(model: nn.Module, folder: Path, workload: Workload) -> None:
    again = load(folder, model=_own_skeleton(workload))
    mine, theirs = model.state_dict(), again.state_dict()
    wrong = [n for n in mine if n not in theirs or not _same(mine[n], theirs[n])]
    if wrong or len(mine) != len(theirs):
        raise UserError(f"the saved model differs from the one in memory at {wrong[:3]}; nothing was written")
    with torch.inference_mode():
        was_training = model.training
        outputs = [workload.forward(m.eval(), workload.short_example) for m in (model, again)]
        model.train(was_training)
    if not torch.equal(*outputs):
        error = float((outputs[0] - outputs[1]).abs().max())
        raise UserError(f"the reloaded model answers differently (largest difference {error:.3g}); nothing was written")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def source_of(workload: Workload) -> dict[str, Any]:
    """How the unchanged architecture is built: a plain chain of known layers stands whole in the edits."""
    chain = not workload.source and type(workload.model) is nn.Sequential and describable(workload.model)
    return {"kind": "chain"} if chain else workload.source


def _own_skeleton(workload: Workload) -> nn.Module | None:
    return None if source_of(workload) else copy.deepcopy(workload.model)


def skeleton(source: dict[str, Any], folder: Path, workload: Workload | None = None) -> nn.Module:
    """The unchanged architecture an artifact starts from, without weights (on the meta device)."""
    kind = source.get("kind")
    if kind == "hf":
        return _hf_skeleton(folder)
    if kind == "chain":
        return nn.Sequential()
    if kind == "zoo":
        from lilliput import zoo

        with torch.device("meta"):
            return zoo.build(str(source.get("name")))
    if workload is not None:
        return copy.deepcopy(workload.model).to("meta")
    raise UserError(
        f"{str(folder)!r} holds a model of your own class; load it with lilliput.load(folder, model=YourModel())"
    )


def _hf_skeleton(folder: Path) -> nn.Module:
    import transformers

    data = _read_json(folder / "config.json")
    data.pop("quantization_config", None)
    names = data.get("architectures") or ["LlamaForCausalLM"]
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UserError(f"{str(folder)!r} names the architecture {names[0]!r}, which transformers does not have")
    try:
        config = transformers.AutoConfig.for_model(**data)
        with torch.device("meta"):
            return cls(config)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"the configuration in {str(folder)!r} is broken: {str(error)[:200]}") from None


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The fitted model of an artifact, in eval mode, equal to the bit to the one saved.

    `model` is an instance of your own class for artifacts of models that neither transformers nor the zoo can build.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    if model is None:
        model = skeleton(architecture["source"], folder)
    with torch.device("meta"):  # new modules take no memory before their tensors are read
        model = replay(model, architecture["edits"])
    assign_tensors_(model, folder, architecture["aliases"])
    return model.eval()


def read_architecture(folder: str | Path) -> dict[str, Any]:
    """The checked content of architecture.json. Raises UserError when it is missing, broken or newer."""
    folder = Path(folder)
    if not (folder / ARCHITECTURE).is_file():
        raise UserError(f"{str(folder)!r} is not an artifact of lilliput: {ARCHITECTURE} is missing")
    data = _read_json(folder / ARCHITECTURE)
    wrong = [k for k, t in _FIELDS.items() if not isinstance(data.get(k), t)]
    if wrong:
        raise UserError(f"{ARCHITECTURE} in {str(folder)!r} is broken at {', '.join(wrong)}; save the model again")
    if data["version"] > VERSION:
        raise UserError(f"{str(folder)!r} has version {data['version']}, made by a newer lilliput; update it")
    if not all(isinstance(e, dict) for e in data["edits"]):
        raise UserError(f"{ARCHITECTURE} in {str(folder)!r} holds edits that are no mappings; save the model again")
    return data


def serving_of(folder: str | Path) -> Decoder | CachePolicy | None:
    """How an artifact is served; None is plainly, as in those of before there was a choice."""
    return read_serving(read_architecture(folder).get("serving"))


def write_serving(folder: str | Path, serving: Decoder | CachePolicy | None) -> None:
    """Have an artifact served in another way."""
    data = read_architecture(folder) | {"serving": None if serving is None else serving_entry(serving)}
    (Path(folder) / ARCHITECTURE).write_text(json.dumps(data, indent=1))


_FIELDS = {"version": int, "source": dict, "edits": list, "aliases": dict}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{str(path)!r} is larger than {MAX_JSON_BYTES} bytes; it is refused")
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {str(path)!r}: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{str(path)!r} does not hold a JSON object")
    return data


def assign_tensors_(model: nn.Module, folder: Path, aliases: dict[str, str], any_dtype: bool = False) -> None:
    """Put the saved tensors into the model: every one must fit and none may be missing.

    Floating-point tensors keep the type they were saved in: skeletons are built in float32, the model may be in
    bfloat16. `any_dtype` is for a model that transformers has filled and cast already.
    """
    shared: dict[str, list[str]] = {}
    for name, target in aliases.items():
        shared.setdefault(str(target), []).append(name)
    for name, tensor in _read_tensors(folder / WEIGHTS):
        for place in (name, *shared.pop(name, ())):
            _assign(model, place, tensor, any_dtype)
    if shared:
        raise UserError(f"{ARCHITECTURE} in {str(folder)!r} shares a tensor that {WEIGHTS} does not hold")
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        raise UserError(f"{WEIGHTS} in {str(folder)!r} lacks {', '.join(empty[:3])}; save the model again")


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file one after another, each in memory of its own.

    The library maps the file instead: its pages would count twice once packed weights are laid out, and misaligned
    tensors give products that differ in the last bit. It still checks the header.
    """
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, info in header.items():
                yield name, _read_tensor(file, 8 + size, info)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"cannot read {path.name} in {str(path.parent)!r}: {error}") from None


def _read_tensor(file: Any, start: int, info: dict[str, Any]) -> Tensor:
    begin, end = info["data_offsets"]
    data = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(start + begin)
    if end > begin:
        file.readinto(data.numpy())
    return data.view(DTYPES[info["dtype"]]).view(info["shape"])


def _assign(model: nn.Module, name: str, tensor: Tensor, any_dtype: bool) -> None:
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
    except AttributeError:
        raise UserError(f"{WEIGHTS} holds {name!r}, which the architecture does not have") from None
    old = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if old is None:
        raise UserError(f"{WEIGHTS} holds {name!r}, which the architecture does not have")
    same_kind = old.dtype == tensor.dtype or (old.is_floating_point() and tensor.is_floating_point())
    if old.shape != tensor.shape or not (same_kind or any_dtype):
        raise UserError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, expected {old.dtype} {list(old.shape)}")
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = tensor
    if hasattr(owner, "move_out_"):  # weights that live on the disk leave memory before the next ones come
        owner.move_out_()  # pyright: ignore


def load_example(folder: str | Path) -> Batch:
    """The input that latency and memory are measured on."""
    return load_file(Path(folder) / EXAMPLE)


def load_tokenizer(folder: str | Path):
    """The tokenizer saved beside a language model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
