import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen2Config

from lilliput.anatomy import anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.layers.layer_wise_scaling import BlockShape, LayerWiseScaling, rounded, spread
from lilliput.plan import Plan, Step
from lilliput.serving import native_sampling
from lilliput.workload import Workload, windows
from lilliput.zoo import nets

SMALL = LayerWiseScaling(round_to=8)
SIZES = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 3, "intermediate_size": 128, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.fixture
def work():
    torch.manual_seed(0)
    model = nets.llama(dim=48, layers=3, heads=6, kv_heads=3, hidden=128, vocab=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]), source=source)


def shapes_of(model):
    blocks = anatomy(model).blocks
    widths = [model.get_submodule(b.mlp.down).in_features for b in blocks]
    return [BlockShape(b.attention.heads, b.attention.kv_heads, n) for b, n in zip(blocks, widths)]


# --- the rule --------------------------------------------------------------------------------------------------------


def test_shapes_of_the_papers_smallest_model():
    """OpenELM-270M: 16 layers of width 1280, heads of 64 in groups of 4, as its published configuration lists them."""
    shapes = LayerWiseScaling(round_to=256).shapes(1280, 16, 64, queries=4)
    assert [s.heads for s in shapes] == [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20]
    assert [s.kv_heads for s in shapes] == [3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5]
    multipliers = [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0]
    assert spread(0.5, 4.0, 16) == multipliers
    assert [s.neurons for s in shapes] == [rounded(m * 1280, 256) for m in multipliers]
    assert (shapes[0].neurons, shapes[-1].neurons) == (768, 5120)


@pytest.mark.parametrize(
    ("value", "multiple", "expected"),
    [(96, 32, 96), (106, 32, 96), (107, 32, 128), (112, 32, 128), (5, 32, 32), (47, 32, 64)],
)
def test_rounding_goes_to_the_nearest_but_never_far_below(value, multiple, expected):
    assert rounded(value, multiple) == expected


def test_one_block_has_the_first_factors_and_equal_factors_give_equal_blocks():
    assert spread(0.5, 1.0, 1) == [0.5]
    flat = LayerWiseScaling(alpha_first=1.0, alpha_last=1.0, beta_first=2.0, beta_last=2.0)
    assert set(flat.shapes(64, 5, 16)) == {BlockShape(4, 4, 128)}


def test_reversed_factors_give_the_shapes_in_reverse():
    turned = LayerWiseScaling(alpha_first=1.0, alpha_last=0.5, beta_first=4.0, beta_last=0.5)
    assert turned.shapes(64, 5, 16) == LayerWiseScaling().shapes(64, 5, 16)[::-1]


@pytest.mark.parametrize("target", [900_000, 1_200_000, 1_800_000])
def test_within_comes_close_to_the_number_of_weights_and_keeps_the_slope(target):
    found = LayerWiseScaling(round_to=16).within(target, 128, 6, head_dim=16, queries=2)
    assert found.weights(128, 6, 16, 2) == pytest.approx(target, rel=0.01)
    assert found.beta_last / found.beta_first == pytest.approx(8)
    assert (found.alpha_first, found.alpha_last) == (0.5, 1.0)


def test_a_number_of_weights_out_of_reach_is_refused():
    with pytest.raises(UserError, match="6 blocks of width 128 cannot have about 1000 weights"):
        LayerWiseScaling().within(1000, 128, 6, head_dim=16)
    with pytest.raises(UserError, match=r"round_to is 2\.5"):
        LayerWiseScaling(round_to=2.5)


# --- from scratch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_an_untrained_model_has_the_shapes_and_learns(kind):
    torch.manual_seed(0)
    config = kind(**SIZES)
    model = SMALL.untrained(config)
    shapes = SMALL.shapes(48, 3, 8, queries=2)
    assert shapes_of(model) == shapes
    assert len(set(shapes)) == 3
    assert config.intermediate_size == 128
    counted = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and "norm" not in n and p.ndim > 1)
    assert counted == SMALL.weights(48, 3, 8, 2)
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "bias" not in n)


def test_its_weights_are_drawn_as_those_of_any_other():
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "hidden_size": 192, "intermediate_size": 512})
    model = LayerWiseScaling().untrained(config)
    for layer in (m for m in model.modules() if type(m) is nn.Linear):
        assert float(layer.weight.detach().std()) == pytest.approx(config.initializer_range, rel=0.05)


def test_more_heads_than_the_width_divides_into_are_allowed():
    wide = LayerWiseScaling(alpha_first=0.5, alpha_last=1.7, round_to=8)
    model = wide.untrained(LlamaConfig(**SIZES))
    assert max(s.heads for s in shapes_of(model)) == 10
    assert model.config.num_attention_heads == 12
    assert model.config.head_dim == 8


def test_models_without_key_value_heads_are_not_built():
    with pytest.raises(UserError, match="GPT2Config has no key-value heads"):
        LayerWiseScaling().untrained(GPT2Config())


# --- cut out of a parent ---------------------------------------------------------------------------------------------


def test_a_cut_keeps_what_hurts_least(work):
    """A parent in which half of each block is nearly nothing: what stays is the other half."""
    model = work.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-4
            layer.self_attn.o_proj.weight[:, 16:32] *= 1e-4  # the heads of the second key-value head
    flat = {"alpha_first": 0.6, "alpha_last": 0.6, "beta_first": 1.33, "beta_last": 1.33, "round_to": 8}
    for data in (work, None):
        small = LayerWiseScaling(**flat).apply(model, data)
        assert shapes_of(small) == [BlockShape(4, 2, 64)] * 3
        for old, new in zip(model.model.layers, small.model.layers):
            assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, 1::2])
            assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[[*range(8), *range(16, 24)]])
        ids = work.test[0]["input_ids"]
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


def test_a_parent_is_never_widened(work):
    same = LayerWiseScaling(alpha_first=2.0, alpha_last=2.0, beta_first=4.0, beta_last=8.0).apply(work.model, work)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), work.model.parameters(), strict=True))


def test_it_generates_with_caches_of_different_heads_and_loads_again(work, tmp_path):
    plan = Plan([Step(SMALL)])
    small = plan.apply(work)
    assert shapes_of(small) == [*SMALL.shapes(48, 3, 8, queries=2)[:2], BlockShape(6, 3, 128)]
    ids, options = work.test[0]["input_ids"][:2, :10], {"max_new_tokens": 12, "do_sample": False}
    with_cache, without = (small.generate(ids, use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)
    assert torch.equal(small.generate(ids, custom_generate=native_sampling, **options), with_cache)
    folder = save(small, tmp_path / "small", work, plan)
    for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(again(ids).logits, small(ids).logits)


def test_a_model_from_scratch_is_saved_and_loaded(work, tmp_path):
    torch.manual_seed(1)
    work.model = SMALL.untrained(work.model.config)
    again = load(save(work.model, tmp_path / "new", work))
    ids = work.test[0]["input_ids"]
    assert torch.equal(again(ids).logits, work.model(ids).logits)


def test_vision_transformers_are_cut_too():
    torch.manual_seed(0)
    model = nets.vit(dim=32, layers=3, heads=4).eval()
    small = SMALL.apply(model)
    assert [s.heads for s in shapes_of(small)] == [2, 3, 4]
    assert [s.neurons for s in shapes_of(small)] == [16, 72, 128]
    assert small(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_other_models_and_replaced_layers_are_refused(work, tiny_cnn):
    with pytest.raises(UserError, match=r"layers\.layer_wise_scaling works on transformer blocks"):
        LayerWiseScaling().apply(tiny_cnn)
    with pytest.raises(UserError, match="low-rank factors"):
        LayerWiseScaling().apply(LowRank(whiten="none").apply(work.model), work)
    half = LowRank(whiten="none").apply(work.model, layers=["model.layers.1.mlp.*"])
    with pytest.raises(UserError, match=r"'model\.layers\.1' of this LlamaForCausalLM is another kind"):
        LayerWiseScaling().apply(half, work)


def test_gpt2_is_cut_by_its_own_head_count(work):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    small = SMALL.apply(model)
    assert [s.heads for s in shapes_of(small)] == [2, 4]
    assert torch.isfinite(small(work.test[0]["input_ids"]).logits).all()
