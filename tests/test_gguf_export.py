"""GGUF files against a numpy engine that follows llama.cpp's rules, the gguf package, and bad input."""

import sys

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import lilliput.gguf_export
from lilliput._gguf_matrices import dense, encode, q4_blocks, q8_0_blocks
from lilliput._gguf_tokenizer import pre_tokenizer_name
from lilliput.artifact import save
from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.exporting import export_artifact
from lilliput.gguf_export import export_gguf, rotary_order
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.prune.heads import Heads
from lilliput.methods.prune.neurons import Neurons
from lilliput.methods.quantize._packed import PackedLinear
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8

IDS = torch.tensor([[5, 9, 33, 2, 17, 61, 8, 40]])


@pytest.fixture(autouse=True)
def with_a_tokenizer(llama_work, make_tokenizer):
    llama_work.tokenizer = make_tokenizer()


# --- an engine of the file's rules, in numpy ---------------------------------------------------------------------


class File:
    """A GGUF file's settings and dequantized tensors."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.settings = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        self.architecture = self.settings["general.architecture"]

    def setting(self, name):
        return self.settings[f"{self.architecture}.{name}"]

    def of_layer(self, name, i):
        value = self.setting(name)
        return value[i] if isinstance(value, list) else value


def interleaved_rope(x, base, factors=None):
    """llama.cpp's rotation of (T, heads, d): the pair (2i, 2i + 1) by position / base^(2i / d)."""
    steps, _, d = x.shape
    angles = np.arange(steps)[:, None] * base ** (-np.arange(0, d, 2) / d)[None]
    angles = angles / (1 if factors is None else factors)
    turned = x[..., 0::2] + 1j * x[..., 1::2]
    turned = turned * np.exp(1j * angles)[:, None]
    return np.stack((turned.real, turned.imag), -1).reshape(x.shape)


def half_rope(x, base, factors=None):
    """The rotation of `qwen2`: the pair (i, i + d / 2)."""
    d = x.shape[-1]
    order = np.arange(d).reshape(2, d // 2).T.ravel()
    turned = np.empty_like(x)
    turned[..., order] = interleaved_rope(x[..., order], base, factors)
    return turned


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def logits_of(path, ids):
    """(T,) ids -> (T, V): the forward of a Llama from nothing but what the file says."""
    file = File(path)
    t, eps = file.tensors, file.setting("attention.layer_norm_rms_epsilon")
    rope = half_rope if file.architecture == "qwen2" else interleaved_rope
    base, d = file.setting("rope.freq_base"), file.setting("attention.key_length")
    causal = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    x = t["token_embd.weight"][ids]
    for i in range(file.setting("block_count")):

        def linear(h, name, layer=i):
            return h @ t[f"blk.{layer}.{name}.weight"].T + t.get(f"blk.{layer}.{name}.bias", 0)

        heads, kv = file.of_layer("attention.head_count", i), file.of_layer("attention.head_count_kv", i)
        h = rms_norm(x, t[f"blk.{i}.attn_norm.weight"], eps)
        factors = t.get("rope_freqs.weight")
        q = rope(linear(h, "attn_q").reshape(len(ids), heads, d), base, factors)
        k = rope(linear(h, "attn_k").reshape(len(ids), kv, d), base, factors).repeat(heads // kv, 1)
        v = linear(h, "attn_v").reshape(len(ids), kv, d).repeat(heads // kv, 1)
        weights = np.exp(np.einsum("thd,shd->hts", q, k) / np.sqrt(d) + causal)
        weights = weights / weights.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hts,shd->thd", weights, v).reshape(len(ids), -1), "attn_output")
        h = rms_norm(x, t[f"blk.{i}.ffn_norm.weight"], eps)
        gate = linear(h, "ffn_gate")
        assert gate.shape[-1] == file.of_layer("feed_forward_length", i)
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "ffn_up"), "ffn_down")
    return rms_norm(x, t["output_norm.weight"], eps) @ t.get("output.weight", t["token_embd.weight"]).T


def plain(model):
    """The model with its packed layers as float32 Linear and Embedding: its answers without bfloat16 products."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("PackedLinear", "PackedEmbedding"):
            weight = dense(module)
            kind = nn.Linear if type(module) is PackedLinear else nn.Embedding
            size = (weight.shape[1], weight.shape[0]) if kind is nn.Linear else weight.shape
            new = kind(*size, **({"bias": False} if kind is nn.Linear else {}))
            new.weight.data = weight
            set_module(model, name, new)
    return model.eval()


def assert_same_answers(path, model, tolerance):
    with torch.inference_mode():
        expected = plain(model)(IDS).logits[0].double().numpy()
    found = logits_of(path, IDS[0].numpy())
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def qwen2(**changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, "tie_word_embeddings": False, **changes}))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def artifact(model, work, folder):
    return save(model, folder, work)


# --- rotation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "d"), [(1, 2), (4, 8), (3, 64)])
def test_interleaved_rotation_of_reordered_rows_equals_that_of_transformers(heads, d):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * d, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 16, generator=generator, dtype=torch.float64)
    angles = torch.arange(7.0, dtype=torch.float64)[:, None] * 1000.0 ** (
        -torch.arange(0.0, d, 2, dtype=torch.float64) / d
    )
    cos, sin = (torch.cat((f(angles), f(angles)), -1)[None] for f in (torch.cos, torch.sin))
    theirs = (x @ weight.T).view(1, 7, heads, d).transpose(1, 2)
    theirs = apply_rotary_pos_emb(theirs, theirs, cos, sin)[0][0].transpose(0, 1).numpy()
    order = rotary_order(heads, d)
    ours = interleaved_rope((x @ weight[order].T).view(7, heads, d).numpy(), 1000.0)
    np.testing.assert_allclose(ours.reshape(7, -1), theirs.reshape(7, -1)[:, order], atol=1e-6)
    assert sorted(order) == list(range(heads * d))


# --- blocks ------------------------------------------------------------------------------------------------------


def test_blocks_hold_the_values_the_gguf_package_reads():
    generator = np.random.default_rng(0)
    d, m = (generator.normal(size=(3, 2)).astype(np.float16).astype(np.float32) for _ in range(2))
    signed, codes = generator.integers(-128, 128, (3, 64)), generator.integers(0, 16, (3, 64))
    scale, low = d.repeat(32, 1), m.repeat(32, 1)
    kinds = gguf.GGMLQuantizationType
    np.testing.assert_array_equal(gguf.dequantize(q8_0_blocks(signed, d), kinds.Q8_0), signed * scale)
    np.testing.assert_array_equal(gguf.dequantize(q4_blocks(codes, d), kinds.Q4_0), (codes - 8) * scale)
    np.testing.assert_array_equal(gguf.dequantize(q4_blocks(codes, d, m), kinds.Q4_1), codes * scale + low)


@pytest.mark.parametrize(
    ("bits", "group", "zero", "kind", "limit"),
    [
        (8, 128, False, "Q8_0", 1e-7),
        (4, 64, True, "Q4_1", 1e-3),
        (4, 64, False, "Q4_0", 1e-7),
        (3, 32, True, "Q4_1", 1e-3),
        (2, 128, False, "Q4_0", 1e-7),
        (4, 8, True, "Q8_0", 0.01),  # groups that no block can follow are rounded anew
    ],
)
def test_packed_codes_are_kept(bits, group, zero, kind, limit):
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(1, 2**bits, (16, 128), generator=generator)
    scale = torch.rand(16, 128 // group, generator=generator) * 0.01 + 0.001
    offset = torch.randn(scale.shape, generator=generator) * 0.01 * zero
    layer = PackedLinear.from_codes(q, scale, offset if bits != 8 else None, bits, group)
    found, data = encode(layer)
    values = gguf.dequantize(data, gguf.GGMLQuantizationType[found])
    expected = layer.dequantized().numpy()
    assert found == kind
    assert np.linalg.norm(values - expected) <= limit * np.linalg.norm(expected)


def test_scales_too_small_for_float16_are_not_kept():
    layer = PackedLinear.from_codes(torch.randint(0, 255, (4, 32)), torch.full((4, 1), 1e-9), None, 8, 32)
    kind, data = encode(layer, "F32")
    assert kind == "F32"
    np.testing.assert_array_equal(data, layer.dequantized().numpy())


# --- whole files -------------------------------------------------------------------------------------------------


def test_float_model_round_trip(tiny_llama, llama_work, tmp_path):
    facts = export_artifact(artifact(tiny_llama, llama_work, tmp_path / "a"), tmp_path / "m.gguf", matrices="F32")
    assert facts["architecture"] == "llama"
    assert facts["size_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert facts["stored"] == {"float as F32": 15}
    assert facts["largest_relative_error"] == {"F32": 0.0}
    assert_same_answers(tmp_path / "m.gguf", tiny_llama, 1e-5)
    file = File(tmp_path / "m.gguf")
    assert "output.weight" not in file.tensors  # tied
    assert file.settings["general.name"] == "tiny-llama"
    assert file.setting("context_length") == 128
    assert file.setting("vocab_size") == 64


def test_matrices_are_float16_and_vectors_float32_by_default(tiny_llama, tmp_path):
    export_gguf(tiny_llama, tmp_path / "m.gguf")
    kinds = File(tmp_path / "m.gguf").kinds
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16"}


def test_mixed_bits_round_trip(tiny_llama, llama_work, tmp_path):
    model = Int8().apply(tiny_llama, layers=["model.layers.0", "lm_head"])
    model = Group(bits=4, group=32).apply(model, layers=["model.layers.1.mlp.*"])
    model = Group(bits=3, group=32).apply(model, layers=["model.layers.1.self_attn.*"])
    facts = export_artifact(artifact(model, llama_work, tmp_path / "a"), tmp_path / "m.gguf")
    assert facts["stored"] == {"8-bit as Q8_0": 8, "4-bit as Q4_1": 3, "3-bit as Q4_1": 4}
    assert facts["largest_relative_error"]["Q4_1"] < 1e-3
    assert_same_answers(tmp_path / "m.gguf", model, 2e-3)
    assert "output.weight" not in File(tmp_path / "m.gguf").tensors  # head and table still share their codes


def test_layers_of_different_sizes_become_deci(tiny_llama, llama_work, tmp_path):
    model = Neurons(ratio=0.34, score="magnitude").apply(tiny_llama, layers=["model.layers.1"])
    model = Heads(ratio=0.5).apply(model, layers=["model.layers.0"])
    facts = export_artifact(artifact(model, llama_work, tmp_path / "a"), tmp_path / "m.gguf", matrices="F32")
    file = File(tmp_path / "m.gguf")
    assert facts["architecture"] == "deci"
    assert file.setting("feed_forward_length") == [96, 64]
    assert file.setting("attention.head_count") == [2, 4]
    assert file.setting("attention.head_count_kv") == [1, 2]
    assert_same_answers(tmp_path / "m.gguf", model, 1e-5)


def test_low_rank_factors_are_merged(tiny_llama, tmp_path):
    model = LowRank(rank=0.6, whiten="none").apply(tiny_llama, layers=["*.q_proj", "*.down_proj"])
    facts = export_gguf(model, tmp_path / "m.gguf", matrices="F32")
    assert facts["stored"]["low-rank as Q8_0"] == 4
    assert facts["largest_relative_error"]["Q8_0"] < 0.01
    assert_same_answers(tmp_path / "m.gguf", model, 0.02)


def test_packed_factors_are_merged(tiny_llama, tmp_path):
    model = LowRank(rank=0.6, whiten="none").apply(tiny_llama)
    model = Int8().apply(model, layers=["model.layers.*"])
    facts = export_gguf(model, tmp_path / "m.gguf", matrices="F32")
    assert facts["stored"]["low-rank as Q8_0"] == 14
    assert facts["largest_relative_error"]["Q8_0"] < 0.01
    assert_same_answers(tmp_path / "m.gguf", model, 0.05)


@pytest.mark.parametrize(("pruned", "architecture"), [(False, "qwen2"), (True, "llama")])
def test_qwen2_round_trip(pruned, architecture, tmp_path):
    model = qwen2()
    if pruned:  # llama.cpp's qwen2 wants heads that fill the hidden size
        model = Heads(ratio=0.5).apply(model)
    facts = export_gguf(model, tmp_path / "m.gguf", matrices="F32")
    assert facts["architecture"] == architecture
    assert_same_answers(tmp_path / "m.gguf", model, 1e-5)
    assert "output.weight" in File(tmp_path / "m.gguf").tensors


def test_scaled_rotation_is_written_as_factors(tiny_llama, tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    config = type(tiny_llama.config)(
        **{
            **tiny_llama.config.to_dict(),
            "rope_parameters": {**scaled, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        }
    )
    model = type(tiny_llama)(config).eval()
    model.load_state_dict(tiny_llama.state_dict())
    export_gguf(model, tmp_path / "m.gguf", matrices="F32")
    factors = File(tmp_path / "m.gguf").tensors["rope_freqs.weight"]
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0, rel=1e-4)
    assert_same_answers(tmp_path / "m.gguf", model, 1e-5)


# --- tokenizer ---------------------------------------------------------------------------------------------------


def test_tokenizer_is_written(tiny_llama, llama_work, tmp_path):
    facts = export_artifact(artifact(tiny_llama, llama_work, tmp_path / "a"), tmp_path / "m.gguf")
    settings = File(tmp_path / "m.gguf").settings
    vocabulary = llama_work.tokenizer.get_vocab()
    tokens = settings["tokenizer.ggml.tokens"]
    assert facts["tokenizer"] == settings["tokenizer.ggml.pre"] == "smollm"
    assert len(tokens) == 64
    assert all(tokens[i] == text for text, i in vocabulary.items())
    assert settings["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert settings["tokenizer.ggml.token_type"][-1] == (5 if len(vocabulary) < 64 else 1)
    assert settings["tokenizer.ggml.merges"][0].count(" ") == 1
    assert settings["tokenizer.ggml.bos_token_id"] == 1
    assert settings["tokenizer.ggml.eos_token_id"] == 2
    assert settings["tokenizer.ggml.add_bos_token"] is False
    assert settings["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"


def bpe(steps, vocabulary=("a", "1")):
    return {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(vocabulary)}},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }


def test_names_of_pre_tokenizers():
    byte_level = {"type": "ByteLevel", "use_regex": True}
    assert pre_tokenizer_name(bpe([byte_level], ("a", "1", "12"))) == "gpt-2"
    assert pre_tokenizer_name(bpe([byte_level])) == "smollm"  # rebuilt from GGUF, trained on single digits
    assert pre_tokenizer_name(bpe([byte_level]) | {"pre_tokenizer": byte_level}) == "smollm"
    for pattern, name in (("{1,3}", "llama-bpe"), ("", "qwen2")):
        regex = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + pattern + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        assert pre_tokenizer_name(bpe([{"type": "Split", "pattern": {"Regex": regex}}, byte_level])) == name
    with pytest.raises(UserError, match="Metaspace"):
        pre_tokenizer_name(bpe([{"type": "Metaspace"}]))


# --- bad input ---------------------------------------------------------------------------------------------------


def test_missing_extra(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"lilliput\[gguf\]"):
        export_gguf(tiny_llama, tmp_path / "m.gguf")


def test_models_llama_cpp_cannot_take(tiny_llama, tiny_cnn, tmp_path):
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"TinyCnn.*llama and qwen2"):
        export_gguf(tiny_cnn, out)
    tiny_llama.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj is a Identity"):
        export_gguf(tiny_llama, out)
    with pytest.raises(UserError, match="sliding-window"):
        export_gguf(qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1), out)
    uneven = qwen2()
    uneven.model.layers[1].self_attn.k_proj = nn.Linear(32, 24)
    with pytest.raises(UserError, match=r"model\.layers\.1 has 32 query and 24 key"):
        export_gguf(uneven, out)


def test_values_too_large_for_float16_are_refused(tiny_llama, tmp_path):
    tiny_llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight.*F16.*matrices='F32'"):
        export_gguf(tiny_llama, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    assert export_gguf(tiny_llama, tmp_path / "m.gguf", matrices="F32")["tensors"] == {"F32": 20}


def test_the_file_is_compared_before_it_appears(tiny_llama, tmp_path, monkeypatch):
    wrong = lilliput.gguf_export.encode
    monkeypatch.setattr(lilliput.gguf_export, "encode", lambda *a: (wrong(*a)[0], wrong(*a)[1] * np.float16(1.1)))
    with pytest.raises(UserError, match=r"token_embd\.weight differs by 0\.09"):
        export_gguf(tiny_llama, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_tokenizer_larger_than_the_embedding(llama_work, make_tokenizer, tmp_path):
    llama_work.tokenizer = make_tokenizer(tokens=300)
    llama_work.tokenizer.add_tokens([f"<more{i}>" for i in range(64)])
    with pytest.raises(UserError, match="embedding has 64 rows"):
        export_gguf(llama_work.model, tmp_path / "m.gguf", llama_work.tokenizer)
