import json
import shutil

import pytest
import torch

from lilliput import cache, zoo
from lilliput.errors import UserError
from lilliput.zoo import language, texts

WORDS = ["<|endoftext|>", "!", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "ab"]


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def rotary_order(weight, heads):
    """llama.cpp keeps the two halves of each head's rotary pairs side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    """The model as llama.cpp's own converter would write it, in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*WORDS, *(f"<{i}>" for i in range(32 - len(WORDS)))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    tensors |= {f"blk.{i}.{new}": f"model.layers.{i}.{old}" for i in range(2) for old, new in names.items()}
    for new, old in tensors.items():
        weight = state[f"{old}.weight"]
        heads = {"attn_q": 4, "attn_k": 2}.get(new.split(".")[-1])
        writer.add_tensor(f"{new}.weight", (rotary_order(weight, heads) if heads else weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tiny GGUF file and the folder made of it, in a cache of their own."""
    place = tmp_path_factory.mktemp("language")
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILLIPUT_CACHE", str(place / "cache"))
        gguf = write_gguf(place / "tiny.gguf", model)
        language.from_gguf(gguf)
    return place, model


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    """A copy of it that a test may damage."""
    shutil.copytree(shared[0], tmp_path / "copy")
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "copy" / "cache"))
    return tmp_path / "copy"


@pytest.fixture
def book(tmp_path):
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (60_000,), generator=generator).tolist()
    (tmp_path / "book.txt").write_text(
        "".join(chr(97 + x) + (" " if i % 5 == 4 else "") for i, x in enumerate(letters))
    )
    return tmp_path / "book.txt"


# --- GGUF ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_converted_model_computes_what_the_original_does(shared, place):
    folder = language.from_gguf(place / "tiny.gguf")
    ids = torch.arange(20).view(2, 10)
    model = language.load_model(folder)
    torch.testing.assert_close(model(input_ids=ids).logits, shared[1](input_ids=ids).logits, atol=1e-6, rtol=1e-6)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert language.load_tokenizer(folder)("abc!")["input_ids"] == [29, 5, 1]


def test_a_file_is_converted_once(place, monkeypatch):
    folder = language.from_gguf(place / "tiny.gguf")
    monkeypatch.setattr(language, "_convert", None)
    assert language.from_gguf(place / "tiny.gguf") == folder
    assert language.from_gguf(place / "tiny.gguf", cache.sha256(place / "tiny.gguf"), "cure") == folder


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone"])
def test_a_damaged_folder_is_refused_with_the_cure_and_made_again_without_one(place, harm):
    folder = language.from_gguf(place / "tiny.gguf")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_bytes(whole[:-1] + (b"" if harm == "shorter" else bytes([whole[-1] ^ 1])))
    with pytest.raises(UserError, match=r"model\.safetensors.*run: lilliput zoo fetch tiny"):
        language.from_gguf(place / "tiny.gguf", cure="lilliput zoo fetch tiny")
    assert language.from_gguf(place / "tiny.gguf") == folder
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\x03\x04" + bytes(100), "half"])
def test_a_file_that_is_no_gguf_is_a_plain_error(place, content):
    whole = (place / "tiny.gguf").read_bytes()
    (place / "bad.gguf").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UserError, match=r"bad\.gguf"):
        language.from_gguf(place / "bad.gguf")
    assert len(list((place / "cache" / "converted").iterdir())) == 1


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_gives_the_install_line(place, monkeypatch, package):
    shutil.rmtree(place / "cache")
    find = language.importlib.util.find_spec
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=rf"{package} is not installed.*lilliput\[zoo\]"):
        language.from_gguf(place / "tiny.gguf")


# --- workloads around folders and files ------------------------------------------------------------------------


def test_a_gguf_file_and_its_folder_are_the_same_workload(place, book):
    options = {"data": book, "length": 16, "windows": {"validation": 6}}
    work = zoo.load(place / "tiny.gguf", **options)
    again = zoo.load(str(language.from_gguf(place / "tiny.gguf")), **options)
    assert (work.name, work.kind) == ("tiny", "causal_lm")
    assert work.source == {"kind": "hf", "config": "config.json"}
    assert work.example["input_ids"].shape == (1, 16)
    scores = [w.score(w.model) for w in (work, again)]
    assert scores[0] == scores[1]
    assert scores[0].n == 6
    assert 25 < scores[0].value < 45  # an untrained model of 32 tokens
    assert float(work.loss(work.model, next(iter(work.training)))) < 4


def test_no_window_is_in_two_splits(place, book):
    work = zoo.load(place / "tiny.gguf", data=book, length=16)
    splits = [
        {tuple(row) for batch in split for row in batch["input_ids"].tolist()}
        for split in (work.training, work.calibration, work.validation, work.test)
    ]
    assert sum(map(len, splits)) == len(set.union(*splits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 65}, "reads 64 at most"),
        ({"length": 1}, "length is 1"),
        ({"windows": {"test": 10**6}}, "test split of 'book'"),
        ({"windows": {"tests": 1}}, "training, calibration, validation, test"),
        ({"data": "none.txt"}, "none.txt' does not exist"),
        ({"batch_size": 3}, "has no option batch_size"),
    ],
)
def test_wrong_options_are_refused(place, book, options, message):
    with pytest.raises(UserError, match=message):
        zoo.load(place / "tiny.gguf", **{"data": book, "length": 16, **options})


def test_folders_that_hold_no_model_are_refused(place, book, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        zoo.load(tmp_path, data=book)
    folder = language.from_gguf(place / "tiny.gguf")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="no causal language model that loads"):
        language.load_model(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer that loads"):
        language.load_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="no causal language model that loads"):
        language.load_model(folder)


def test_a_tokenizer_of_another_model_is_refused(place, book):
    folder = language.from_gguf(place / "tiny.gguf")
    tokenizer = language.load_tokenizer(folder)
    model = tiny_model()
    model.resize_token_embeddings(20)
    with pytest.raises(UserError, match="knows 20"):
        language.model_workload(model, tokenizer, "digest", texts.own_corpus(book), "tiny", length=16)


def test_the_digest_of_a_tokenizer_sees_its_files_alone(place):
    folder = language.from_gguf(place / "tiny.gguf")
    before = language.tokenizer_digest(folder)
    (folder / "README.md").write_text("words")
    assert language.tokenizer_digest(folder) == before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert language.tokenizer_digest(folder) != before


# --- the default model -----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_smollm2_knows_english():
    work = zoo.load("smollm2-135m")
    assert [len(split) for split in (work.training, work.calibration, work.validation, work.test)] == [128, 4, 4, 16]
    assert work.example["input_ids"].shape == (1, 64)
    work.validation = [{"input_ids": work.validation[0]["input_ids"][:1]}]
    (nll,) = work.values(work.model).tolist()
    assert nll == pytest.approx(3.7196, abs=2e-3)  # as measured when the loading was checked against the GGUF file
    ids = work.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert work.tokenizer.decode(work.model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
