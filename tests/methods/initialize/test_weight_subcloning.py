"""What is kept is what matters on the data, by hand-made models where that is known."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.initialize.weight_subcloning import (
    WeightSubcloning,
    importance,
    mean_ranks,
    without_middle,
)
from lilliput.zoo import nets


@pytest.mark.parametrize(
    ("influences", "keep", "expected"),
    [
        ([0.9, 0.1, 0.2, 0.3, 0.9], 3, [0, 3, 4]),
        ([0.9, 0.3, 0.2, 0.1, 0.9], 3, [0, 1, 4]),
        ([0.0, 0.5, 0.5, 0.0], 2, [0, 3]),  # ends stay, however little they do
        ([0.0, 0.5, 0.4, 0.0], 3, [0, 1, 3]),
        ([0.1, 0.2, 0.3], 1, [0]),
        ([0.1, 0.2, 0.3], 3, [0, 1, 2]),
    ],
)
def test_a_run_in_the_middle_goes(influences, keep, expected):
    assert without_middle(influences, keep) == expected


def test_ranks_are_averaged_not_sizes():
    ranks = mean_ranks([torch.tensor([100.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])])
    assert ranks.tolist() == [1.0, 0.5, 1.5]


def test_importance_is_the_mean_size_of_activations(work):
    """Against hooks of its own."""
    seen = {}
    layer = work.model.model.layers[2]
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update(o=args[0]))
    found = importance(work.model, work)
    torch.testing.assert_close(found.neurons[2], seen["h"].abs().mean((0, 1)))
    groups = seen["o"].unflatten(-1, (2, 16)).abs().mean((0, 1, 3))  # two key-value heads of two queries of 8
    torch.testing.assert_close(found.groups[2], groups)
    assert found.features.shape == (32,)


@torch.no_grad()
def test_strong_features_neurons_and_heads_stay(work):
    model = work.model
    features, neurons = torch.arange(1, 32, 2), torch.arange(24, 48)
    model.model.embed_tokens.weight[:, features] *= 100
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[neurons] *= 100
        layer.mlp.down_proj.weight[:, neurons] /= 100
        layer.self_attn.v_proj.weight[8:] *= 100
        layer.self_attn.o_proj.weight[:, 16:] /= 100
    child = WeightSubcloning(depth=1.0, scale="none").apply(model, work)
    assert torch.equal(child.model.embed_tokens.weight, model.model.embed_tokens.weight[:, features])
    old, new = model.model.layers[0], child.model.layers[0]
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[neurons][:, features])
    assert torch.equal(new.self_attn.v_proj.weight, old.self_attn.v_proj.weight[8:, features])
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[16:, features])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[features][:, 16:])


def test_weights_are_larger_by_the_root_of_the_inputs_that_went(work):
    plain, scaled = (WeightSubcloning(ffn=0.25, scale=scale).apply(work.model, work) for scale in ("none", "root"))
    expected = {"q_proj": 2, "gate_proj": 2, "o_proj": 2, "down_proj": 4, "lm_head": 2}
    for name, module in plain.named_modules():
        leaf = name.rpartition(".")[2]
        factor = expected.get(leaf, 1) ** 0.5
        if leaf in expected or "norm" in leaf or leaf == "embed_tokens":
            torch.testing.assert_close(scaled.get_submodule(name).weight, factor * module.weight)


def test_a_tied_head_gets_its_factor_from_the_norm(make_work):
    work = make_work("tied llama")
    plain, scaled = (WeightSubcloning(scale=scale).apply(work.model, work) for scale in ("none", "root"))
    torch.testing.assert_close(scaled.model.norm.weight, 2**0.5 * plain.model.norm.weight)
    assert torch.equal(scaled.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert scaled.lm_head.weight is scaled.model.embed_tokens.weight


def test_rope_pairs_stay_together_so_the_attention_of_kept_heads_is_the_same(work):
    """With all features and neurons kept, a layer of half the heads is the layer with the others' output zeroed."""
    child = WeightSubcloning(width=1.0, ffn=1.0, depth=1.0, scale="none").apply(work.model, work)
    kept = importance(work.model, work).groups
    with torch.no_grad():
        for layer, scores in zip(work.model.model.layers, kept):
            weakest = int(scores.argmin())
            layer.self_attn.o_proj.weight[:, 16 * weakest : 16 * (weakest + 1)] = 0
        ids = work.calibration[0]["input_ids"]
        torch.testing.assert_close(child(ids).logits, work.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_blocks_that_go_are_in_the_middle(work):
    child = WeightSubcloning(width=1.0, heads=1.0, ffn=1.0, depth=0.5).apply(work.model, work)
    for new, old in zip(child.model.layers, (0, 3)):
        assert torch.equal(new.mlp.up_proj.weight, work.model.model.layers[old].mlp.up_proj.weight)


def test_it_wants_data(work):
    with pytest.raises(UserError, match="needs a workload to see which neurons matter"):
        WeightSubcloning().apply(work.model)


def test_llama_tiny_can_be_cut(llama_work):
    model = nets.load("llama-tiny")
    child = WeightSubcloning().apply(model, llama_work)
    config = child.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (96, 3, 1)
    assert (config.intermediate_size, config.num_hidden_layers) == (256, 3)
