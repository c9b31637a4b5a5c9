"""A Llama-type language model as one GGUF file for llama.cpp, read back and compared before it appears.

Packed weights keep their codes q where a block of 32 can hold them: 8 bits as Q8_0 (w = q d), 4 bits and fewer as Q4_1
(w = q d + m), or as Q4_0 (w = (q - 8) d) when the grid has no zero points; d and m are float16.

llama.cpp rotates neighbouring values (2i, 2i+1) of a head, transformers the values (i, i + d/2): the rows of q and k are
reordered, except for its `qwen2`, which rotates as transformers does. Its `llama` and `qwen2` read one size for all
layers; a model whose layers differ, as after pruning, is written as `deci`: Llama with sizes per layer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.errors import UserError, missing_extra
from lilliput.methods.quantize._packed import PackedEmbedding, PackedLinear, unpack_codes

BLOCK = 32  # weights that share a scale in the types below
SMALLEST_FIRST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FLOAT_TYPES = ("F16", "BF16", "F32")
ACCEPTABLE_ERROR = 0.01  # relative, of a matrix that is rounded anew
LIMITS = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3}  # relative errors allowed when the file is read back
ROTATIONS = ("default", "linear", "llama3")  # those that only scale the frequencies
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def export_gguf(
    model: nn.Module, path: str | Path, tokenizer: Any = None, name: str = "model", matrices: str = "F16"
) -> dict[str, Any]:
    """Write a Llama or Qwen2 model of transformers to a GGUF file and return what each tensor became.

    `matrices` is the type of matrices that are not quantized: F16, BF16 or F32. The file appears only after every
    tensor was read back and compared. Raises UserError when llama.cpp could not take the model.
    """
    if matrices not in FLOAT_TYPES:
        raise UserError(f"matrices is {matrices!r}; choose one of {', '.join(FLOAT_TYPES)}")
    sizes = read_sizes(model)
    factors = rotary_factors(model)
    architecture = choose_architecture(model, sizes, factors)
    entries = list(_entries(model, sizes, factors, architecture))
    writer = _gguf().GGUFWriter(None, architecture)
    _add_settings(writer, model, sizes, name)
    pre = _add_tokenizer(writer, tokenizer, model)
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


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf


# --- blocks ----------------------------------------------------------------------------------------------------


def q8_0_blocks(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (N, K) in -128 .. 127 and a scale per block (N, K / 32) -> bytes (N, K / 32 * 34)."""
    blocks = codes.astype(np.int8).reshape(*d.shape, BLOCK)
    return np.concatenate((_half(d), blocks.view(np.uint8)), -1).reshape(len(codes), -1)


def q4_blocks(codes: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
    """Codes (N, K) in 0 .. 15, a scale and for Q4_1 a minimum per block (N, K / 32) -> bytes (N, K / 32 * 18 or 20).

    A byte holds weight j of a block in its low half and weight j + 16 in its high half.
    """
    halves = codes.astype(np.uint8).reshape(*d.shape, 2, BLOCK // 2)
    nibbles = halves[..., 0, :] | (halves[..., 1, :] << 4)
    grids = [_half(d)] if m is None else [_half(d), _half(m)]
    return np.concatenate((*grids, nibbles), -1).reshape(len(codes), -1)


def _half(values: np.ndarray) -> np.ndarray:
    """(N, B) -> the two bytes of each as float16, (N, B, 2)."""
    with np.errstate(over="ignore"):
        return values.astype("<f2")[..., None].view(np.uint8)


def rotary_order(heads: int, head_dim: int) -> np.ndarray:
    """For each row of q or k in the file its row in transformers: (i, i + d/2) of a head become neighbours."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def _packed_blocks(layer: PackedLinear | PackedEmbedding) -> tuple[str, np.ndarray]:
    """The layer's own codes in GGUF blocks; its group must be a multiple of 32."""
    stored = {key: tensor.float().numpy() for key, tensor in layer.tensors().items() if key != "codes"}
    d = stored["scale"].repeat(layer.group // BLOCK, 1)
    codes = layer.tensors()["codes"]
    if layer.bits == 8:
        return "Q8_0", q8_0_blocks(codes.numpy(), d)
    middle = 2 ** (layer.bits - 1)
    q = unpack_codes(codes, layer.bits, layer.columns).numpy()
    if not stored["zero"].any():
        return "Q4_0", q4_blocks(q + 8 - middle, d)
    return "Q4_1", q4_blocks(q, d, stored["zero"].repeat(layer.group // BLOCK, 1) - middle * d)


# --- layers ----------------------------------------------------------------------------------------------------


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


@torch.no_grad()
def dense(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear layer, an embedding, a packed one, or low-rank factors, float32."""
    if isinstance(layer, nn.Sequential):
        return reduce(lambda product, factor: dense(factor) @ product, layer[1:], dense(layer[0]))
    if type(layer) in (nn.Linear, nn.Embedding):
        return layer.weight.detach().float()  # type: ignore[union-attr, operator]
    return layer.dequantized()  # type: ignore[operator]


def _is_matrix(layer: nn.Module) -> bool:
    """Whether `dense` says all that the layer does but for its bias."""
    if type(layer) is nn.Sequential and len(layer):
        return all(map(_is_matrix, layer)) and all(getattr(f, "bias", None) is None for f in layer[:-1])
    return type(layer) in (nn.Linear, nn.Embedding) or hasattr(layer, "dequantized")


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Sequential):
        return "low-rank"
    bits = getattr(layer, "bits", None)
    return f"{bits}-bit" if bits else "float"


def encode(layer: nn.Module, matrices: str = "F16") -> tuple[str, np.ndarray]:
    """The layer's matrix as (type, rows of bytes or floats): the smallest type whose error is acceptable.

    The codes of a packed layer are kept; where they do not fit, and for low-rank factors merged, the types of the gguf
    package are tried from small to large, and `matrices` is the last. A float matrix gets `matrices` at once.
    """
    gguf, weight = _gguf(), dense(layer).numpy()
    own = isinstance(layer, PackedLinear | PackedEmbedding) and layer.group % BLOCK == 0
    if own:
        kind, data = _packed_blocks(layer)  # type: ignore[arg-type]
        if _error(_decode(data, kind), weight) <= ACCEPTABLE_ERROR:
            return kind, data
    if _describe(layer) != "float" and weight.shape[1] % BLOCK == 0:
        for kind in SMALLEST_FIRST:
            data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
            if _error(_decode(data, kind), weight) <= ACCEPTABLE_ERROR:
                return kind, data
    return matrices, gguf.quantize(weight, gguf.GGMLQuantizationType[matrices])


def _decode(data: np.ndarray, kind: str) -> np.ndarray:
    gguf = _gguf()
    return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


def _error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference; infinite for NaN or another shape."""
    if ours.shape != reference.shape or not np.isfinite(ours).all():
        return float("inf")
    size = float(np.linalg.norm(reference.ravel().astype(np.float64)))
    return float(np.linalg.norm((ours - reference).ravel().astype(np.float64))) / max(size, 1e-12)


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
    rows = [[len(dense(m)) for m in (x.self_attn.q_proj, x.self_attn.k_proj, x.mlp.up_proj)] for _, x in layers]
    for (name, layer), (q, k, _) in zip(layers, rows):
        if layer.self_attn.head_dim != head_dim:
            raise UserError(f"{name} has heads of {layer.self_attn.head_dim} values, others of {head_dim}; {_ONE_SIZE}")
        if q % head_dim or k % head_dim or not k or (q // head_dim) % (k // head_dim):
            raise UserError(
                f"{name} has {q} query and {k} key outputs, which are not heads of {head_dim} shared evenly; {_ONE_SIZE}"
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
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError("the model has sliding-window layers, which llama.cpp does not have in its qwen2 models")
    rotation = (config.rope_parameters or {}).get("rope_type", "default")
    if rotation not in ROTATIONS:
        raise UserError(f"the rotary type is {rotation!r}; only {', '.join(ROTATIONS)} can be written as GGUF")


def _check_matrix(name: str, layer: nn.Module) -> None:
    if not _is_matrix(layer):
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
    writer.add_quantization_version(_gguf().GGML_QUANT_VERSION)


def _add_tensors(writer: Any, entries: list[Entry], matrices: str) -> tuple[Counter, Counter]:
    """How many matrices became what, such as {'4-bit as Q4_1': 7}, and how many tensors have each type."""
    stored, kinds, weights = Counter(), Counter(), Counter()
    for entry in entries:
        if isinstance(entry.source, nn.Module):
            kind, data = encode(entry.source, matrices)
            stored[f"{_describe(entry.source)} as {kind}"] += 1
            weights[kind] += data.size
        else:
            kind, data = "F32", entry.source.numpy()
        kinds[kind] += 1
        data = np.ascontiguousarray(entry.ordered(data))
        writer.add_tensor(entry.name, data, raw_dtype=_gguf().GGMLQuantizationType[kind])
    most = weights.most_common(1)[0][0]
    file_types = _gguf().LlamaFileType
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
    found = {t.name: t for t in _gguf().GGUFReader(path).tensors}
    if set(found) != {entry.name for entry in entries}:
        raise UserError(f"the GGUF file holds other tensors than the model: {set(found) ^ {e.name for e in entries}}")
    errors: dict[str, float] = {}
    for entry in entries:
        tensor = found[entry.name]
        kind = tensor.tensor_type.name
        error = _error(_decode(tensor.data, kind), entry.values())
        if not error <= LIMITS.get(kind, ACCEPTABLE_ERROR):
            raise UserError(
                f"{entry.name} differs by {error:.3g} (relative) when read back as {kind}; its values do not fit that "
                "type: use matrices='F32'"
            )
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors


# --- the tokenizer ---------------------------------------------------------------------------------------------

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {LLAMA3_PATTERN: "llama-bpe", LLAMA3_PATTERN.replace("{1,3}", ""): "qwen2"}


def _add_tokenizer(writer: Any, tokenizer: Any, model: Any) -> str:
    """Write the vocabulary of a fast byte-level BPE tokenizer and return llama.cpp's name of how it splits text."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return "none: the file takes token ids only"
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(data)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens, types = _tokens(data, model.model.embed_tokens.num_embeddings)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    template = tokenizer.chat_template
    if template:
        writer.add_chat_template(template if isinstance(template, str) else template["default"])
    return pre


def _tokens(data: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids and llama.cpp's type of each, filled up to the rows of the embedding."""
    kinds = _gguf().TokenType
    found = {i: (text, kinds.NORMAL) for text, i in data["model"]["vocab"].items()}
    for added in data["added_tokens"]:
        found[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    if found and max(found) >= rows:
        raise UserError(
            f"the tokenizer makes token {max(found)}, but the embedding has {rows} rows; save them together"
        )
    filled = [found.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(rows)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text before it merges: gpt-2, smollm, llama-bpe or qwen2.

    A tokenizer that transformers rebuilt from a GGUF file has lost the rule that every digit stands alone; a vocabulary
    in which no digit touches another character tells that it was trained with it.
    """
    steps = data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if data["model"].get("type") == "BPE" and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "smollm" if _digits_stand_alone(data["model"]["vocab"]) else "gpt-2"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in PATTERNS:
            return PATTERNS[steps[0]["pattern"]["Regex"]]
    raise UserError(
        f"the tokenizer splits text by {kinds}, which is none of llama.cpp's known ways (byte-level gpt-2, smollm, "
        "llama-bpe, qwen2); export the model without its tokenizer.json"
    )


def _digits_stand_alone(vocabulary: dict[str, int]) -> bool:
    with_digit = [t for t in vocabulary if any("0" <= c <= "9" for c in t) and not t.startswith("<")]
    return bool(with_digit) and all(len(t) == 1 for t in with_digit)
