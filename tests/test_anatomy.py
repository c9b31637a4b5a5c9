import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lilliput.anatomy import anatomy, convolutions, in_out, linear_parts, linears, needs_blocks, to_linear_
from lilliput.errors import UserError
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.quantize.int8 import Int8

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **options}))


def qwen():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))


def gemma():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=8))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, bos_token_id=1, eos_token_id=2)
    )


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES))


def vit():
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size",) and "token" not in k}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4))


# build, kind, block list, kv heads, head size, gated, embedding, head, final norm, tied
MODELS = [
    (llama, "llama", "model.layers", 2, 8, True, "model.embed_tokens", "lm_head", "model.norm", False),
    (qwen, "llama", "model.layers", 2, 8, True, "model.embed_tokens", "lm_head", "model.norm", True),
    (gemma, "llama", "model.layers", 1, 16, True, "model.embed_tokens", "lm_head", "model.norm", True),
    (gpt2, "gpt2", "transformer.h", 4, 8, False, "transformer.wte", "lm_head", "transformer.ln_f", True),
    (bert, "bert", "bert.encoder.layer", 4, 8, False, "bert.embeddings.word_embeddings", "classifier", None, False),
    (vit, "vit", "vit.layers", 4, 8, False, None, "classifier", "vit.layernorm", False),
]


@pytest.mark.parametrize("expected", MODELS, ids=lambda m: m[0].__name__)
def test_parts_of_every_architecture(expected):
    build, kind, block_list, kv_heads, head_dim, gated, embedding, head, norm, tied = expected
    model = build()
    found = anatomy(model)
    assert (found.kind, found.block_list) == (kind, block_list)
    assert (found.embedding, found.head, found.final_norm, found.tied) == (embedding, head, norm, tied)
    assert [b.index for b in found.blocks] == [0, 1]
    for block in found.blocks:
        attention, mlp = block.attention, block.mlp
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, kv_heads, head_dim)
        assert in_out(model.get_submodule(attention.o)) == (4 * head_dim, 32)
        assert mlp.gated is gated
        assert len(mlp.into) == 1 + gated
        assert all(in_out(model.get_submodule(n)) == (32, 48) for n in mlp.into)
        assert in_out(model.get_submodule(mlp.down)) == (48, 32)
        assert model.get_submodule(attention.name) is not None
        assert model.get_submodule(mlp.name) is not None


def test_gpt2_is_fused_and_others_are_not():
    assert anatomy(gpt2()).blocks[0].attention.fused
    assert not anatomy(llama()).blocks[0].attention.fused


def test_base_model_and_mlm_head():
    assert anatomy(LlamaModel(llama().config)).head is None
    masked = anatomy(BertForMaskedLM(bert().config))
    assert (masked.head, masked.tied, masked.final_norm) == ("cls.predictions.decoder", True, None)


class OwnAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))


class OwnBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = OwnAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class OwnVit(nn.Module):
    def __init__(self, width=24, heads=3, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.Sequential(*(OwnBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)


@pytest.mark.parametrize("quantized", [False, True], ids=["factors", "packed factors"])
@pytest.mark.parametrize("build", [*(m[0] for m in MODELS), lambda: OwnVit()], ids=lambda m: m.__name__)
def test_factored_layers_are_seen_through(build, quantized):
    model = to_linear_(build())
    before = anatomy(model)
    factored = LowRank(rank=0.6, whiten="none").apply(model)
    after = anatomy(Int8().apply(factored) if quantized else factored)
    assert type(factored.get_submodule(before.blocks[0].attention.q)) is nn.Sequential
    assert (after.kind, after.blocks, after.head, after.final_norm) == (
        before.kind,
        before.blocks,
        before.head,
        before.final_norm,
    )


def test_what_is_a_linear_map_and_what_is_not():
    thin, wide = nn.Linear(8, 2, bias=False), nn.Linear(2, 6)
    assert in_out(nn.Sequential(thin, wide)) == (8, 6)
    assert linear_parts(nn.Sequential(thin, nn.Identity(), wide)) == [thin, wide]
    assert in_out(nn.Sequential(nn.Linear(8, 6), nn.Identity())) == (8, 6)  # what a merge leaves
    for other in (nn.Sequential(), nn.Sequential(thin, nn.ReLU(), wide), nn.Sequential(wide, wide), nn.ReLU(), None):
        assert in_out(other) is None
        assert linear_parts(other) == []


def test_factors_of_a_projection_are_no_mlp():
    """They undo each other's sizes, as the two layers of a feed-forward part do."""
    block = OwnBlock(24, 3)
    block.mlp = nn.Identity()
    block.extra = nn.Sequential(nn.Linear(24, 4, bias=False), nn.Linear(4, 24))
    assert anatomy(nn.ModuleList([block])).blocks[0].mlp is None


@pytest.mark.parametrize("depth", [1, 3])
def test_own_vit_is_found_by_structure(depth):
    found = anatomy(OwnVit(depth=depth))
    assert (found.kind, found.block_list, found.head, found.final_norm) == ("vit", "blocks", "head", "norm")
    assert len(found.blocks) == depth
    assert (found.blocks[0].attention.heads, found.blocks[0].attention.head_dim) == (3, 8)
    assert found.blocks[-1].mlp.into == (f"blocks.{depth - 1}.mlp.0",)
    assert found.blocks[-1].mlp.down == f"blocks.{depth - 1}.mlp.2"


def test_fused_projection_that_only_knows_its_number_of_heads():
    attention = nn.Module()
    attention.num_heads, attention.qkv, attention.proj = 3, nn.Linear(24, 72), nn.Linear(24, 24)
    block = nn.Module()
    block.attn = attention
    found = anatomy(nn.Sequential(nn.Linear(4, 24), nn.Sequential(block, block))).blocks[1].attention
    assert (found.name, found.q, found.o) == ("1.1.attn", "1.1.attn.qkv", "1.1.attn.proj")
    assert (found.fused, found.heads, found.kv_heads, found.head_dim) == (True, 3, 3, 8)


def test_torch_encoder_has_mlps_and_no_readable_attention():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    found = anatomy(model)
    assert [b.attention for b in found.blocks] == [None, None]
    assert found.blocks[1].mlp.down == "layers.1.linear2"


class Packed(nn.Module):
    """Stands for any module that replaced a linear one."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.thin = nn.Linear(in_features, 2)


def test_sizes_are_read_from_the_layers_after_surgery_and_packing():
    model = llama()
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj, attention.k_proj, attention.v_proj = Packed(32, 16), nn.Linear(32, 8), nn.Linear(32, 8)
    attention.o_proj, mlp.down_proj = nn.Linear(16, 32), Packed(40, 32)
    untouched, changed = anatomy(model).blocks
    assert (untouched.attention.heads, untouched.attention.kv_heads) == (4, 2)
    assert (changed.attention.heads, changed.attention.kv_heads, changed.attention.head_dim) == (2, 1, 8)
    assert changed.mlp.down == "model.layers.1.mlp.down_proj"


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = llama()
    assert len(anatomy(model).blocks) == 2


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), "cnn"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), "generic"),
        (nn.Linear(2, 3), "generic"),
        (nn.Identity(), "generic"),
        (nn.ModuleList(), "generic"),
        (nn.LSTM(2, 3), "generic"),
    ],
)
def test_models_without_blocks_are_described_and_refused(model, kind):
    found = anatomy(model)
    assert (found.kind, found.blocks) == (kind, ())
    with pytest.raises(UserError, match=r"prune.depth works on transformer blocks.*prune.magnitude"):
        needs_blocks(model, "prune.depth")


def test_linears_and_convolutions_in_model_order():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2), nn.Conv2d(2, 2, 1)))
    assert linears(model) == ["1", "2.0"]
    assert convolutions(model) == ["0", "2.1"]


def test_to_linear_keeps_gpt2_outputs():
    model = gpt2().eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        assert linears(model) == ["lm_head"]
        after = to_linear_(model)(ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert len(linears(model)) == 9
    assert anatomy(model).blocks[0].attention.heads == 4
