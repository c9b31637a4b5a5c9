"""A Llama-type language model as one GGUF file for llama.cpp, read back and compared before it appears.

llama.cpp rotates neighbouring values (2i, 2i+1) of a head, transformers the values (i, i + d/2): the rows of q and k
are reordered, except for its `qwen2`, which rotates as transformers does. Its `llama` and `qwen2` read one size for all
layers; a model whose layers differ, as after pruning, is written as `deci`: Llama with sizes per layer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput._gguf_matrices import (
    ACCEPTABLE_ERROR,
    decode,
    dense,
    describe,
    encode,
    gguf_package,
    is_matrix,
    relative_error,
)
from lilliput._gguf_tokenizer import add_tokenizer
from lilliput.errors import UserError

FLOAT_TYPES = ("F16", "BF16", "F32")
LIMITS = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3}  # relative errors allowed when the file is read back
ROTATIONS = ("default", "linear", "llama3")  # those that only scale the frequencies
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def export_gguf(
    model: Any, path: str | Path, tokenizer: Any = None, name: str = "model", matrices: str = "F16"
) -> dict[str, Any]:
    """Write a Llama or Qwen2 model of transformers to a GGUF file and return what each tensor became.

    Without a tokenizer the file has no vocabulary: for programs that give token ids, as llama.cpp's own tools do not.
    `matrices` is the type of matrices that are not quantized: F16, BF16 or F32. The file appears only after every
    tensor was read back and compared. Raises UserError when llama.cpp could not take the model.
    """
    if matrices not in FLOAT_TYPES:
        raise UserError(f"matrices is {matrices!r}; choose one of {', '.join(FLOAT_TYPES)}")
    sizes = read_sizes(model)
    factors = rotary_factors(model)
    architecture = choose_architecture(model, sizes, factors)
    entries = list(_entries(model, sizes, factors, architecture))
    writer = gguf_package().GGUFWriter(None, architecture)
    _add_settings(writer, model, sizes, name)
    pre = add_tokenizer(writer, tokenizer, model.model.embed_tokens.num_embeddings)
    stored, kinds = _add_tensors(writer, entries, matrices)
    path = Path(path)
    errors = _write(writer, path, entries)
    return {
        "path": str(path),
        "size_bytes": path.stat().st_size,
        "architecture": architecture,
        "tokenizer": pre,
        "tensors": dict(kinds),
        "stored": dict(stored),
        "largest_relative_error": errors,
        "checked_with": "gguf.GGUFReader",
    }


def rotary_order(heads: int, head_dim: int) -> np.ndarray:
    """For each row of q or k in the file its row in transformers: (i, i + d/2) of a head become neighbours."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: the matrix of a layer, or a vector, with its rows in the file's order."""

    name: str
    source: nn.Module | Tensor
    order: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """What the tensor stands for, float32."""
        return self.ordered((dense(self.source) if isinstance(self.source, nn.Module) else self.source).numpy())

    def ordered(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.order is None else rows[self.order]


# --- the model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Counts per layer, and the one size of a head."""

    heads: list[int]
    kv_heads: list[int]
    neurons: list[int]
    head_dim: int

    @property
    def uniform(self) -> bool:
        return all(len(set(counts)) == 1 for counts in (self.heads, self.kv_heads, self.neurons))


def read_sizes(model: Any) -> Sizes:
    """The sizes of a Llama or Qwen2 model. Raises UserError naming the layer that llama.cpp could not take."""
    _check_config(model)
    layers = _layers(model)
    for name, layer in layers:
        for part in (*(f"self_attn.{n}" for n in ATTENTION), *(f"mlp.{n}" for n in MLP)):
            _check_matrix(f"{name}.{part}", layer.get_submodule(part))
    _check_matrix("model.embed_tokens", model.model.embed_tokens)
    _check_matrix("lm_head", model.lm_head)
    head_dim = layers[0][1].self_attn.head_dim
    rows = [[_outputs(m) for m in (x.self_attn.q_proj, x.self_attn.k_proj, x.mlp.up_proj)] for _, x in layers]
    for (name, layer), (q, k, _) in zip(layers, rows):
        if layer.self_attn.head_dim != head_dim:
            raise UserError(f"{name} has heads of {layer.self_attn.head_dim} values, others of {head_dim}; {_ONE_SIZE}")
        if q % head_dim or k % head_dim or not k or (q // head_dim) % (k // head_dim):
            raise UserError(
                f"{name} has {q} query and {k} key outputs, not heads of {head_dim} that are shared evenly; {_ONE_SIZE}"
            )
    q, k, up = zip(*rows)
    return Sizes([n // head_dim for n in q], [n // head_dim for n in k], list(up), head_dim)


_ONE_SIZE = "llama.cpp needs one head size, and query heads that are a multiple of the key heads"


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]


def _check_config(model: Any) -> None:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if config is None or kind not in ("llama", "qwen2"):
        raise UserError(f"cannot write {kind!r} as GGUF; models of type llama and qwen2 of transformers can be written")
    if config.hidden_act != "silu":
        raise UserError(f"the model's activation is {config.hidden_act!r}; llama.cpp has only silu in Llama models")
    changed = (m for m in model.modules() if hasattr(m, "rebuild_config") and not hasattr(type(m), "weight_bytes"))
    if (module := next(changed, None)) is not None:
        raise UserError(f"the model holds a {type(module).__name__}, which llama.cpp does not have")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError("the model has sliding-window layers, which llama.cpp does not have in its qwen2 models")
    rotation = (config.rope_parameters or {}).get("rope_type", "default")
    if rotation not in ROTATIONS:
        raise UserError(f"the rotary type is {rotation!r}; only {', '.join(ROTATIONS)} can be written as GGUF")


def _check_matrix(name: str, layer: nn.Module) -> None:
    if not is_matrix(layer):
        raise UserError(
            f"layer {name} is a {type(layer).__name__}, which GGUF has no form for; leave that layer out of the method "
            "that made it"
        )


def rotary_factors(model: Any) -> Tensor | None:
    """By what the model divides each rotary frequency base^(-2i/d), (d/2,); None when by nothing."""
    frequencies = model.model.rotary_emb.inv_freq.double()
    base = float(model.config.rope_parameters["rope_theta"])
    head_dim = model.model.layers[0].self_attn.head_dim
    if len(frequencies) != head_dim // 2:
        raise UserError(f"only {2 * len(frequencies)} of {head_dim} values of a head are rotated; llama.cpp needs all")
    factors = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / frequencies
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def choose_architecture(model: Any, sizes: Sizes, factors: Tensor | None) -> str:
    """llama.cpp's name: `deci` for sizes per layer, `qwen2` for a Qwen2 model as it was built, else `llama`."""
    if not sizes.uniform:
        return "deci"
    biased = {n for n in (*ATTENTION, *MLP) for _, x in _layers(model) if _bias(_part(x, n)) is not None}
    whole = sizes.heads[0] * sizes.head_dim == model.config.hidden_size
    plain = model.config.model_type == "qwen2" and biased == {"q_proj", "k_proj", "v_proj"}
    return "qwen2" if plain and whole and factors is None else "llama"


def _part(layer: Any, name: str) -> nn.Module:
    return layer.get_submodule(f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}")


def _outputs(layer: nn.Module) -> int:
    last: Any = layer[-1] if isinstance(layer, nn.Sequential) else layer
    return last.out_features


def _bias(layer: nn.Module) -> Tensor | None:
    last = layer[-1] if isinstance(layer, nn.Sequential) else layer
    bias = getattr(last, "bias", None)
    return None if bias is None else bias.detach().float()


def _entries(model: Any, sizes: Sizes, factors: Tensor | None, architecture: str) -> Iterator[Entry]:
    embedding, head = model.model.embed_tokens, model.lm_head
    yield Entry("token_embd.weight", embedding)
    if factors is not None:
        yield Entry("rope_freqs.weight", factors)
    for i, (_, layer) in enumerate(_layers(model)):
        heads = {"q_proj": sizes.heads[i], "k_proj": sizes.kv_heads[i]} if architecture != "qwen2" else {}
        yield Entry(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight.detach().float())
        yield Entry(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight.detach().float())
        for name, short in (ATTENTION | MLP).items():
            order = rotary_order(heads[name], sizes.head_dim) if name in heads else None
            part = _part(layer, name)
            yield Entry(f"blk.{i}.{short}.weight", part, order)
            bias = _bias(part)
            if bias is not None:
                yield Entry(f"blk.{i}.{short}.bias", bias, order)
    yield Entry("output_norm.weight", model.model.norm.weight.detach().float())
    if not torch.equal(dense(embedding), dense(head)):
        yield Entry("output.weight", head)


# --- the file --------------------------------------------------------------------------------------------------


def _add_settings(writer: Any, model: Any, sizes: Sizes, name: str) -> None:
    config = model.config

    def one_or_all(counts: list[int]) -> int | list[int]:
        return counts[0] if len(set(counts)) == 1 else counts

    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes.heads))
    writer.add_feed_forward_length(one_or_all(sizes.neurons))
    writer.add_head_count(one_or_all(sizes.heads))
    writer.add_head_count_kv(one_or_all(sizes.kv_heads))
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.model.embed_tokens.num_embeddings)
    writer.add_quantization_version(gguf_package().GGML_QUANT_VERSION)


def _add_tensors(writer: Any, entries: list[Entry], matrices: str) -> tuple[Counter, Counter]:
    """How many matrices became what, such as {'4-bit as Q4_1': 7}, and how many tensors have each type."""
    stored, kinds, weights = Counter(), Counter(), Counter()
    for entry in entries:
        if isinstance(entry.source, nn.Module):
            kind, data = encode(entry.source, matrices)
            stored[f"{describe(entry.source)} as {kind}"] += 1
            weights[kind] += data.size
        else:
            kind, data = "F32", entry.source.numpy()
        kinds[kind] += 1
        data = np.ascontiguousarray(entry.ordered(data))
        writer.add_tensor(entry.name, data, raw_dtype=gguf_package().GGMLQuantizationType[kind])
    most = weights.most_common(1)[0][0]
    file_types = gguf_package().LlamaFileType
    writer.add_file_type(file_types[{"F32": "ALL_F32"}.get(most, f"MOSTLY_{most}")])
    return stored, kinds


def _write(writer: Any, path: Path, entries: list[Entry]) -> dict[str, float]:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    try:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        errors = read_back(unfinished, entries)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return errors


def read_back(path: Path, entries: list[Entry]) -> dict[str, float]:
    """The largest relative error per type of the file's tensors. Raises UserError when one differs too much."""
    found = {t.name: t for t in gguf_package().GGUFReader(path).tensors}
    if set(found) != {entry.name for entry in entries}:
        raise UserError(f"the GGUF file holds other tensors than the model: {set(found) ^ {e.name for e in entries}}")
    errors: dict[str, float] = {}
    for entry in entries:
        tensor = found[entry.name]
        kind = tensor.tensor_type.name
        error = relative_error(decode(tensor.data, kind), entry.values())
        if not error <= LIMITS.get(kind, ACCEPTABLE_ERROR):
            raise UserError(
                f"{entry.name} differs by {error:.3g} (relative) when read back as {kind}; its values do not fit that "
                "type: use matrices='F32'"
            )
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors
