"""A grown model computes what the small one does, is an ordinary model of its new config, and can learn."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lilliput as lp
from lilliput.errors import UserError
from lilliput.methods.initialize import hypercloning
from lilliput.methods.initialize.hypercloning import HyperCloning, blocks
from lilliput.methods.prune.heads import Heads
from lilliput.zoo import nets

VARIANTS = [
    HyperCloning(noisy=False),
    HyperCloning(snr_db=0.0),
    HyperCloning(variant="diagonal", noisy=False),
    HyperCloning(width=3, ffn=2, variant="diagonal"),
    HyperCloning(width=2, ffn=4, variant="diagonal", noisy=False),
    HyperCloning(width=1, ffn=3),
    HyperCloning(width=4, ffn=1),
]


def logits(work, model):
    with torch.inference_mode():
        return work.forward(model, work.calibration[0])


# --- the matrices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 3), (3, 1), (2, 2), (4, 2), (2, 4), (3, 2), (5, 5)])
def test_copies_of_an_input_give_copies_of_the_output(method, n_out, n_in):
    weight, x = torch.randn(3, 5), torch.randn(5)
    grown = method.linear(weight, n_out, n_in, torch.Generator().manual_seed(0))
    assert grown.shape == (3 * n_out, 5 * n_in)
    torch.testing.assert_close(grown @ x.repeat(n_in), (weight @ x).repeat(n_out), rtol=1e-4, atol=1e-5)


def test_blocks_are_those_of_the_definition():
    w = torch.randn(2, 3)
    assert torch.equal(blocks(w, 2, 4, False), (w / 4).expand(2, 4, 2, 3))
    whole = blocks(w, 3, 3, True).transpose(1, 2).flatten(2).flatten(0, 1)
    assert torch.equal(whole, torch.block_diag(w, w, w))
    torch.testing.assert_close(blocks(w, 1, 3, True), (w / 3).expand(1, 3, 2, 3))  # an output layer reads every copy


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_lies_so_many_decibels_below_the_weights_and_skips_an_odd_last_copy(snr_db):
    weight, generator = torch.randn(200, 200), torch.Generator().manual_seed(0)
    grown = HyperCloning(snr_db=snr_db).linear(weight, 2, 3, generator).view(2, 200, 3, 200)
    noise = grown - (weight / 3)[None, :, None]
    assert noise[:, :, 2].abs().max() < 1e-6
    ratio = float((weight / 3).square().mean() / noise[:, :, 0].square().mean())
    assert ratio == pytest.approx(10 ** (snr_db / 10), rel=0.05)
    torch.testing.assert_close(noise[:, :, 0], -noise[:, :, 1], rtol=0, atol=1e-5)
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [HyperCloning(), HyperCloning(width=3, ffn=2, variant="diagonal")])
def test_every_kind_of_model_keeps_its_function(any_work, method):
    grown = method.apply(any_work.model)
    expected = logits(any_work, any_work.model)
    torch.testing.assert_close(logits(any_work, grown), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert type(grown) is type(any_work.model)


@pytest.mark.parametrize("method", VARIANTS)
def test_every_variant_keeps_the_function(work, method):
    torch.testing.assert_close(logits(work, method.apply(work.model)), logits(work, work.model), rtol=1e-4, atol=1e-4)


def test_the_config_says_the_new_sizes_and_the_old_one_stays(work):
    config = HyperCloning(width=2, ffn=3).apply(work.model).config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 8, 4)
    assert (config.intermediate_size, config.head_dim, config.num_hidden_layers) == (144, 8, 4)
    assert work.model.config.hidden_size == 32


def test_a_single_key_value_head_stays_single(make_work):
    config = HyperCloning().apply(make_work("single key-value head").model).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 1)


def test_tied_stays_tied_and_untied_untied(make_work):
    for kind, tied in (("tied llama", True), ("llama", False)):
        grown = HyperCloning().apply(make_work(kind).model)
        assert (grown.lm_head.weight is grown.model.embed_tokens.weight) is tied
        grown.tie_weights()
        assert (grown.lm_head.weight is grown.model.embed_tokens.weight) is tied


def test_transformers_and_lilliput_load_what_they_saved(make_work, tmp_path):
    work = make_work("tied llama")
    grown = HyperCloning().apply(work.model)
    expected = logits(work, grown)
    grown.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(work, again), expected)
    plan = lp.Plan([lp.Step(HyperCloning())])
    folder = lp.save(plan.apply(work), tmp_path / "ours", work, plan)
    assert torch.equal(logits(work, lp.load(folder)), expected)


def test_it_generates_what_the_small_one_does(work):
    ids = torch.tensor([[5, 9, 11]])
    work.model.generation_config.eos_token_id = None
    texts = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (work.model, HyperCloning().apply(work.model))]
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_stays(work, dtype):
    grown = HyperCloning().apply(work.model.to(dtype))
    assert {p.dtype for p in grown.parameters()} == {dtype}
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-6
    expected = logits(work, work.model)
    error = float((logits(work, grown) - expected).abs().max() / expected.abs().max())
    assert error < tolerance


@pytest.mark.parametrize("noisy", [False, True])
def test_only_noise_lets_the_copies_part(work, noisy):
    """Copies of an output get equal gradients as long as all that reads them is equal."""
    model = HyperCloning(noisy=noisy).apply(work.model)
    work.loss(model, work.calibration[0]).backward()
    halves = [m.weight.grad.chunk(2, 0) for n, m in model.named_modules() if n.endswith(("o_proj", "down_proj"))]
    same = [torch.allclose(a, b, rtol=1e-2, atol=1e-6) for a, b in halves]
    assert len(same) == 8
    assert not any(same) if noisy else all(same)


def test_a_model_without_an_output_layer_gives_copies(work):
    ids, model = work.calibration[0]["input_ids"], work.model.model
    with torch.inference_mode():
        expected = model(ids).last_hidden_state.repeat(1, 1, 2)
        found = HyperCloning().apply(model)(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_llama_tiny_keeps_its_function():
    model = nets.load("llama-tiny")
    ids = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(0))
    grown = HyperCloning().apply(model)
    with torch.inference_mode():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert grown.config.hidden_size == 2 * model.config.hidden_size


def test_smollm2_keeps_its_function():
    """0.5 billion parameters for two seconds."""
    work = lp.Workload.from_name("smollm2-135m", length=32)
    grown = HyperCloning().apply_(work.model, None, {"": HyperCloning()})  # apply would copy the model first
    ids = work.test[0]["input_ids"][:1]
    with torch.inference_mode():
        torch.testing.assert_close(grown(ids).logits, work.model(ids).logits, rtol=1e-3, atol=1e-3)


# --- what cannot grow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "value"), [("width", 1.5), ("ffn", 2.5), ("seed", 0.5)])
def test_copies_are_whole(wrong, value):
    with pytest.raises(UserError, match=f"{wrong} is {value}"):
        HyperCloning(**{wrong: value})


def test_a_model_without_a_config_is_refused():
    with pytest.raises(UserError, match=r"VisionTransformer has none"):
        HyperCloning().apply(nets.build("vit-small"))


def test_a_model_of_two_stacks_is_refused():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(UserError, match="has an encoder too"):
        HyperCloning().apply(T5ForConditionalGeneration(config))


def test_a_mixture_is_refused():
    config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    with pytest.raises(UserError, match=r"model\.layers\.0"):
        HyperCloning().apply(MixtralForCausalLM(config))


def test_layers_that_were_replaced_cut_or_untied_are_refused_by_name(make_work):
    work = make_work("tied llama")
    cut = Heads(ratio=0.5).apply(work.model, work, layers=["model.layers.1.self_attn"])
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn"):
        HyperCloning().apply(cut)
    packed = lp.methods.quantize.Int8().apply(work.model, work, layers=["model.layers.2.mlp.up_proj"])
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj"):
        HyperCloning().apply(packed)
    work.model.lm_head.weight = nn.Parameter(work.model.lm_head.weight.detach().clone())
    with pytest.raises(UserError, match=r"lm_head\.weight.* tied or untied"):
        HyperCloning().apply(work.model)


def test_a_tied_head_without_a_norm_before_it_is_refused():
    config = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48,
                       max_position_embeddings=64, _remove_final_layer_norm=True)  # fmt: skip
    with pytest.raises(UserError, match=r"OPTForCausalLM is its embedding and no norm"):
        HyperCloning().apply(OPTForCausalLM(config).eval())


def test_another_function_is_noticed(work, monkeypatch):
    monkeypatch.setattr(hypercloning.HyperCloning, "repeated", lambda self, tensor, place, *rest: 1.5 * REPEATED(
        self, tensor, place, *rest))  # fmt: skip
    with pytest.raises(UserError, match="answers differently"):
        HyperCloning().apply(work.model)


REPEATED = HyperCloning.repeated
