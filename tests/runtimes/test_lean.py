"""The lean decode path against transformers: logits, greedy tokens, after every kind of surgery, and its refusals."""

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.prune.depth import Depth
from lilliput.methods.prune.heads import Heads
from lilliput.methods.prune.neurons import Neurons
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.runtimes.lean import Lean, LeanSession
from lilliput.workload import Workload

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def build(kind, **changes):
    """A tiny language model of transformers with random weights and biases."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    prefix = kind.removesuffix("Text")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def work_of(model, length=24):
    ids = torch.randint(3, 64, (3, 4, length), generator=torch.Generator().manual_seed(1))
    return Workload.causal_lm(model, *ids)


MODELS = {
    "llama 2:1": ("Llama", {}),
    "llama 1:1": ("Llama", {"num_key_value_heads": 4}),
    "llama 4:1": ("Llama", {"num_key_value_heads": 1}),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3 positions": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, relu": ("Llama", {"hidden_act": "relu"}),
    "qwen2": ("Qwen2", {}),
    "qwen2 4:1, tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 12,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
}


@pytest.fixture(params=MODELS)
def any_model(request):
    kind, changes = MODELS[request.param]
    return build(kind, **changes)


def greedy(model, ids, tokens):
    """What transformers generates, whatever token would end the text."""
    model.generation_config.eos_token_id = None
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def check_like_transformers(model, tolerance=1e-4, tokens=12):
    work = work_of(model)
    assert Lean().supports(model, work) == []
    session = Lean().prepare(model, work)
    batch = work.test[0]
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert float((session(batch) - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
    for row in batch["input_ids"]:
        for length in (1, 7, 24):
            assert list(session.generate(row[None, :length], tokens)) == greedy(model, row[None, :length], tokens)


def test_it_answers_like_transformers(any_model):
    check_like_transformers(any_model)


SURGERY = {
    "neurons": [Neurons(ratio=0.5, round_to=8)],
    "one block's neurons": [Neurons(ratio=0.5, round_to=8)],
    "heads": [Heads(ratio=0.5, unit="group")],
    "query heads": [Heads(ratio=0.5, unit="query")],
    "a block": [Depth(blocks=1)],
    "low rank": [LowRank(rank=0.5)],
    "everything": [Depth(blocks=1), Heads(ratio=0.5, unit="group"), Neurons(ratio=0.5, round_to=8), LowRank(rank=0.7)],
}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("surgery", SURGERY)
def test_it_answers_like_transformers_after_surgery(kind, surgery):
    model = build(kind)
    layers = ["model.layers.1.*"] if surgery == "one block's neurons" else None
    for method in SURGERY[surgery]:
        model = method.apply(model, work_of(model), layers=layers)
    check_like_transformers(model)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("method", [Int8(), Group(bits=4, group=32), Group(bits=3, group=32)], ids=str)
def test_it_answers_like_transformers_with_packed_weights(kind, method):
    # a last bit that differs before a product may round the other way to bfloat16
    check_like_transformers(method.apply(build(kind)), tolerance=0.02, tokens=4)


def test_it_answers_like_transformers_with_packed_factors():
    model = LowRank(rank=0.8, whiten="none").apply(build("Llama"))
    check_like_transformers(Int8().apply(model), tolerance=0.02, tokens=4)


def test_it_answers_like_transformers_after_everything_at_once():
    model = build("Llama", num_hidden_layers=3, tie_word_embeddings=True)
    for method in (Depth(blocks=1), Heads(ratio=0.5, unit="group"), Neurons(ratio=0.25, round_to=32)):
        model = method.apply(model, work_of(model))
    model = Group(bits=4, group=32).apply(model, layers=["model.layers.0.*", "lm_head"])
    check_like_transformers(Int8().apply(model), tolerance=0.02, tokens=4)


def test_one_generation_does_not_disturb_the_next():
    model = build("Llama")
    session = LeanSession(model, 64)
    ids = work_of(model).test[0]["input_ids"]
    first = list(session.generate(ids[:1], 8))
    list(session.generate(ids[1:2, :5], 20))
    session({"input_ids": ids})
    assert list(session.generate(ids[:1], 8)) == first


def test_the_cache_may_be_filled_to_its_last_place():
    model = build("Llama")
    ids = work_of(model).test[0]["input_ids"][:1, :10]
    assert list(LeanSession(model, 17).generate(ids, 8)) == greedy(model, ids, 8)


def test_what_does_not_fit_the_cache_is_refused_with_the_numbers():
    model = build("Llama")
    ids = work_of(model).test[0]["input_ids"][:1]
    session = LeanSession(model, 16)
    with pytest.raises(UserError, match=r"27 .*16.*max_length=27"):
        list(session.generate(ids, 4))
    with pytest.raises(UserError, match=r"24 .*16.*max_length=24"):
        session({"input_ids": ids})
    with pytest.raises(UserError, match=r"17 .*16.*max_length=17"):
        list(session.generate(ids[:, :10], 8))


@pytest.mark.parametrize(("shape", "message"), [((1, 0), "empty"), ((2, 5), "one prompt")])
def test_prompts_it_cannot_read_are_refused(shape, message):
    session = LeanSession(build("Llama"), 16)
    with pytest.raises(UserError, match=message):
        list(session.generate(torch.zeros(shape, dtype=torch.long), 2))


def test_preparing_makes_room_for_text_behind_the_longest_window():
    model = build("Llama")
    work = work_of(model, length=100)
    session = Lean().prepare(model, work, max_length=16)
    assert len(list(session.generate(work.example["input_ids"], 24))) == 24
    assert session.cache.keys[0].shape[1] == session.max_length


def test_nothing_is_copied_but_the_cache():
    model = build("Llama")
    session = LeanSession(model, 32)
    assert session.blocks[0].q is model.model.layers[0].self_attn.q_proj
    assert session.head is model.lm_head


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()


REFUSED = {
    "gpt2": (gpt2, "this is a GPT2LMHeadModel"),
    "capped": (
        lambda: build("Gemma3Text", head_dim=8, final_logit_softcapping=30.0),
        "no final logit softcapping",
    ),
    "gelu": (lambda: build("Llama", hidden_act="gelu"), "this model has gelu"),
    "half precision": (lambda: build("Llama").bfloat16(), "float32.*bfloat16"),
    "moving positions": (
        lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        "dynamic",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_run_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    model = make()
    work = work_of(model)
    (found,) = Lean().supports(model, work)
    with pytest.raises(UserError, match=reason):
        raise UserError(found)
    with pytest.raises(UserError, match=reason):
        Lean().prepare(model, work)


def test_a_block_without_attention_is_refused():
    model = build("Llama")
    model.model.layers[0].self_attn = nn.Identity()
    assert Lean().supports(model, work_of(build("Llama")))
