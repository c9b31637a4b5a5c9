"""Sparse feed-forward parts against the ordinary ones they replace, and what is refused."""

import pytest
import torch
from torch import nn

from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.kernels.decoder import Decoder, Reference, foreign_layers
from lilliput.kernels.decoder_parts import parts_of
from lilliput.methods.layers._rows import RowLinear, fitting_group
from lilliput.methods.layers.relufy import Relufy
from lilliput.methods.layers.sparse_ffn import SparseFeedForward, SparseFFN
from lilliput.methods.quantize.group import Group
from lilliput.plan import Plan, Step
from lilliput.runtimes.lean import LeanSession

TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03, "int4": 0.4}


@pytest.fixture
def relu_llama(llama_work):
    """The tiny Llama with shifted ReLUs, another shift in each block."""
    return Relufy(sparsity=0.8).apply(llama_work.model, llama_work)


@pytest.fixture
def relu_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, activation_function="relu")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, seed=5):
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("gate", TOLERANCES)
@pytest.mark.parametrize("rows", TOLERANCES)
def test_a_gated_model_answers_as_before(relu_llama, gate, rows):
    model = SparseFFN(gate=gate, rows=rows, group=32).apply(relu_llama)
    assert all(isinstance(layer.mlp, SparseFeedForward) for layer in model.model.layers)
    assert error(logits(model), logits(relu_llama)) < max(TOLERANCES[gate], TOLERANCES[rows])


@pytest.mark.parametrize("rows", TOLERANCES)
def test_behind_rectified_norms_the_gate_reads_the_inputs_that_are_not_zero(llama_work, rows, tmp_path):
    plan = Plan([Step(Relufy(stage=2, sparsity=0.8)), Step(SparseFFN(gate="inputs", rows=rows, group=32))])
    model, whole = plan.apply(llama_work), Relufy(stage=2, sparsity=0.8).apply(llama_work.model, llama_work)
    assert error(logits(model), logits(whole)) < TOLERANCES[rows]
    again = load(save(model, tmp_path / "sparse", llama_work, plan))
    assert torch.equal(logits(again), logits(model))


def test_a_gate_by_inputs_runs_on_the_plain_decoder(relu_llama):
    session = LeanSession(SparseFFN(gate="inputs").apply(relu_llama), 64)
    assert isinstance(session.decoder, Reference)
    ids = torch.arange(3, 23)[None]
    assert error(session({"input_ids": ids}), relu_llama(input_ids=ids, use_cache=False).logits.detach()) < 0.03


def test_a_plain_model_with_biases_answers_as_before(relu_gpt2):
    model = SparseFFN(gate="float32", rows="float32").apply(relu_gpt2)
    assert all(isinstance(block.mlp, SparseFeedForward) for block in model.transformer.h)
    assert error(logits(model), logits(relu_gpt2)) < 1e-5


def test_gradients_flow_through_as_through_the_ordinary_part(relu_llama):
    part = SparseFFN(gate="float32", rows="float32").apply(relu_llama).model.layers[0].mlp
    x = torch.randn(2, 5, 32, requires_grad=True)
    slopes = [torch.autograd.grad(p(x).square().sum(), x)[0] for p in (part, relu_llama.model.layers[0].mlp)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_layers_keep_any_of_the_usual_names():
    layers = {"gate": nn.Linear(32, 64), "up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}
    part, x = SparseFeedForward.from_layers(layers, 0.1, "float32", "float32"), torch.randn(4, 32)
    with torch.no_grad():
        expected = layers["down"](torch.relu(layers["gate"](x) - 0.1) * layers["up"](x))
        torch.testing.assert_close(part(x), expected, rtol=1e-4, atol=1e-5)
    layers["forward"] = layers.pop("down")
    with pytest.raises(UserError, match="forward"):
        SparseFeedForward.from_layers(layers, 0.1, "float32", "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_still_runs(relu_llama, dtype):
    part = SparseFFN(rows="int4", group=32).apply(relu_llama).model.layers[0].mlp
    x = torch.randn(3, 32)
    before = part(x)
    assert error(part.to(dtype)(x.to(dtype)).float(), before) < 0.05
    assert error(part.float()(x), before) < 0.05


@pytest.mark.parametrize("rows", TOLERANCES)
def test_it_saves_and_loads_to_the_bit(relu_llama, llama_work, rows, tmp_path):
    plan = Plan([Step(Relufy(sparsity=0.8)), Step(SparseFFN(gate="int4", rows=rows))])
    model = plan.apply(llama_work)
    again = load(save(model, tmp_path / "sparse", llama_work, plan))
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[1].mlp.shift == model.model.layers[1].mlp.shift > 0


def test_it_exports(relu_llama):
    part = SparseFFN().apply(relu_llama).model.layers[0].mlp
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = part(x)
        assert torch.equal(torch.export.export(part, (x,)).module()(x), expected)


def test_smaller_formats_take_fewer_bytes(relu_llama):
    sizes = []
    for rows in ("float32", "bfloat16", "int8", "int4"):
        part = SparseFFN(gate="float32", rows=rows).apply(relu_llama).model.layers[0].mlp
        sizes.append(sum(layer.weight_bytes for layer in part.layers()))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


# --- the native decoder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", TOLERANCES)
@pytest.mark.parametrize("rows", ["float32", "int8", "int4"])
def test_the_native_decoder_runs_it(relu_llama, gate, rows):
    model = SparseFFN(gate=gate, rows=rows, group=32).apply(relu_llama, layers=["*layers.1.mlp"])
    assert isinstance(LeanSession(model, 64).decoder, Decoder)
    ids = torch.arange(3, 23)
    expected = model(input_ids=ids[None], use_cache=False).logits[0]
    for step in (1, 2, 20):
        decoder = Decoder(model)
        cache = decoder.cache(64)
        found = torch.cat([decoder(part, cache, every=True) for part in ids.split(step)])
        assert error(found, expected.detach()) < (1e-4 if gate in ("float32", "bfloat16") else 0.02)


def test_the_native_decoder_knows_the_rectifier_that_replaced_an_activation(relu_llama):
    assert foreign_layers(parts_of(relu_llama)) == []
    decoder, ids = Decoder(relu_llama), torch.arange(3, 23)
    found = decoder(ids, decoder.cache(32), every=True)
    assert error(found, relu_llama(input_ids=ids[None], use_cache=False).logits[0].detach()) < 1e-5


def test_other_layers_can_be_packed_beside_it(relu_llama, llama_work):
    model = Group(group=32).apply(SparseFFN().apply(relu_llama), layers=["*self_attn*"])
    assert isinstance(LeanSession(model, 64).decoder, Decoder)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_smooth_activation_is_refused_with_the_way_out(tiny_llama):
    with pytest.raises(UserError, match=r"SiLU.*layers\.relufy"):
        SparseFFN().apply(tiny_llama)


def test_packed_layers_are_refused(relu_llama):
    with pytest.raises(UserError, match="PackedLinear"):
        SparseFFN().apply(Group(group=32).apply(relu_llama))


def test_a_model_without_blocks_is_refused(tiny_cnn):
    with pytest.raises(UserError, match="transformer blocks"):
        SparseFFN().apply(tiny_cnn)


def test_a_part_that_computes_something_else_is_refused(relu_llama):
    class Scaled(type(relu_llama.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    relu_llama.model.layers[0].mlp.__class__ = Scaled
    with pytest.raises(UserError, match="computes something else"):
        SparseFFN().apply(relu_llama)


def test_layers_that_stand_beside_an_attention_are_refused():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    with pytest.raises(UserError, match="beside an attention"):
        SparseFFN().apply(OPTForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a"]}, "2 or 3 layers"),
        ({"rows": "int3"}, "int3"),
        ({"gate": "int3"}, "2 or 3 layers"),
        ({"groups": [32, 32, 5]}, "group 5"),
    ],
)
def test_a_hostile_description_is_refused(change, message):
    good = {"names": ["g", "u", "d"], "inputs": 32, "neurons": 64, "shift": 0.0, "gate": "int4", "rows": "int4"}
    good |= {"groups": [32, 32, 32], "biases": [False] * 3}
    SparseFeedForward(**good)
    with pytest.raises(UserError, match=message):
        SparseFeedForward(**(good | change))


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["outputs", "inputs"])
@pytest.mark.parametrize("format", TOLERANCES)
def test_a_row_layer_computes_its_product(by, format):
    torch.manual_seed(0)
    linear = nn.Linear(96, 64)
    layer = RowLinear.from_weight(linear.weight, linear.bias, by, format, 32)
    x = torch.randn(2, 3, 96) * (torch.rand(2, 3, 96) < 0.4)
    with torch.no_grad():
        assert error(layer.dequantized(), linear.weight) < TOLERANCES[format]
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantized(), linear.bias))


def test_groups_fill_whole_chunks():
    assert [fitting_group(64, columns) for columns in (576, 96, 100, 40)] == [64, 32, 100, 40]


def test_unknown_rows_are_refused():
    with pytest.raises(UserError, match="diagonals"):
        RowLinear(8, 8, "diagonals", "int8")
