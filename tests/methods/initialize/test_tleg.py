import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lilliput.anatomy import anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.initialize.tleg import Learngene, Tleg, line_through, places
from lilliput.methods.prune.neurons import Neurons
from lilliput.plan import Plan, Step
from lilliput.workload import Workload, windows
from lilliput.zoo import nets

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def work():
    torch.manual_seed(0)
    model = nets.llama(dim=32, layers=4, heads=4, kv_heads=2, hidden=48, vocab=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]), source=source)


def on_a_line(model):
    """Put the blocks of a model on the line A + l / L B; gives A and B of the first feed-forward weight."""
    blocks = model.model.layers
    with torch.no_grad():
        for tensors in zip(*(block.parameters() for block in blocks)):
            base, slope = tensors[0].clone(), tensors[1] - tensors[0]
            for i, tensor in enumerate(tensors):
                tensor.copy_(base + i / len(blocks) * slope)
    return model


def test_the_nearest_line_is_that_of_numpy():
    stacked = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    design = np.stack([np.ones(5), np.arange(5) / 5], 1)
    base, slope = np.linalg.lstsq(design, stacked.flatten(1).numpy(), rcond=None)[0]
    found = line_through(stacked)
    np.testing.assert_allclose(found[0].flatten().numpy(), base, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1].flatten().numpy(), slope, rtol=1e-4, atol=1e-5)
    assert places(4).tolist() == [0, 0.25, 0.5, 0.75]


def test_a_single_block_is_its_own_line():
    base, slope = line_through(torch.ones(1, 3))
    assert base.tolist() == [1, 1, 1]
    assert slope.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_net_on_the_line_is_found_again_without_training(work, kind):
    torch.manual_seed(0)
    model = work.model
    if kind == "vit":
        model = nets.vit(dim=32, layers=4, heads=4).eval()
        blocks = list(model.blocks)
        with torch.no_grad():
            for tensors in zip(*(block.parameters() for block in blocks)):
                base, slope = tensors[0].clone(), tensors[1] - tensors[0]
                for i, tensor in enumerate(tensors):
                    tensor.copy_(base + i / 4 * slope)
        x = torch.randn(2, 1, 28, 28)
    else:
        x = IDS
        on_a_line(model)
    gene = Learngene(model)
    with torch.no_grad():
        expected, found, again = (getattr(out, "logits", out) for out in (model(x), gene(x), gene.expand(4)(x)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_every_depth_has_the_weights_of_the_line_and_generates(work, depth):
    gene = Learngene(work.model)
    small = gene.expand(depth)
    assert len(anatomy(small).blocks) == small.config.num_hidden_layers == depth
    at = gene.leaves.index("mlp.up_proj.weight")
    for i, layer in enumerate(small.model.layers):
        expected = gene.base[at] + i / depth * gene.slope[at]
        torch.testing.assert_close(layer.mlp.up_proj.weight, expected.detach())
        assert layer.self_attn.layer_idx == i
    assert all(p.requires_grad for p in small.parameters())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (small.generate(IDS[:, :6], use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)


def test_grown_blocks_are_apart_from_each_other(work):
    deep = Learngene(work.model).expand(6)
    pointers = [layer.mlp.up_proj.weight.data_ptr() for layer in deep.model.layers]
    assert len(set(pointers)) == 6
    assert {id(layer.self_attn.config) for layer in deep.model.layers} == {id(deep.config)}


def test_learning_moves_only_the_two_sets_and_what_is_no_block(work):
    gene = Tleg(steps=3, lr=1e-2).learn(work.model, work)
    start = Learngene(work.model)
    moved = [not torch.equal(a, b) for a, b in zip(gene.base, start.base)]
    assert all(moved)
    assert all(not torch.equal(a, b) for a, b in zip(gene.slope, start.slope))
    assert not torch.equal(gene.frame.model.embed_tokens.weight, work.model.model.embed_tokens.weight)
    first, theirs = (one.model.layers[0].mlp.up_proj.weight for one in (gene.frame, work.model))
    assert torch.equal(first, theirs)


def test_gradients_are_those_of_the_chain_rule(work):
    gene = Learngene(work.model)
    gene(IDS).logits.square().mean().backward()
    free = gene.expand(4)
    free(IDS).logits.square().mean().backward()
    at = gene.leaves.index("self_attn.v_proj.weight")
    of_blocks = [layer.self_attn.v_proj.weight.grad for layer in free.model.layers]
    torch.testing.assert_close(gene.base[at].grad, sum(of_blocks), rtol=1e-3, atol=1e-5)
    weighted = sum(i / 4 * gradient for i, gradient in enumerate(of_blocks))
    torch.testing.assert_close(gene.slope[at].grad, weighted, rtol=1e-3, atol=1e-5)


def test_distillation_brings_the_auxiliary_net_nearer(work):
    def distance(gene):
        with torch.no_grad():
            return float((gene(work.training[0]["input_ids"]).logits
                          - work.model(work.training[0]["input_ids"]).logits).square().mean())  # fmt: skip

    settings = Tleg(steps=0, start="random")
    before, after = (settings.with_(steps=s, lr=1e-2).learn(work.model, work) for s in (0, 60))
    assert distance(after) < 0.8 * distance(before)


def test_another_depth_of_the_auxiliary_net(work):
    gene = Tleg(steps=1, auxiliary=6).learn(work.model, work)
    assert gene.depth == len(gene.frame.model.layers) == 6
    assert len(gene.expand(3).model.layers) == 3
    shallow = Tleg(steps=1, auxiliary=2).learn(work.model, work)
    assert len(shallow.expand(5).model.layers) == 5


def test_random_starts_follow_the_seed_and_leave_the_global_generator_alone(work):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    genes = [Learngene(work.model, start="random", seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.randn(3), expected)
    at = genes[0].leaves.index("mlp.up_proj.weight")
    assert torch.equal(genes[0].base[at], genes[1].base[at])
    assert not torch.equal(genes[0].base[at], genes[2].base[at])
    assert float(genes[0].slope[at].abs().max()) == 0


@pytest.mark.parametrize("blocks", [2, 6])
def test_it_is_saved_and_loaded(work, tmp_path, blocks):
    plan = Plan([Step(Tleg(blocks=blocks, steps=1))])
    model = plan.apply(work)
    again = load(save(model, tmp_path / "gene", work, plan))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_blocks_in_a_sequence_become_fewer_but_not_more():
    torch.manual_seed(0)
    gene = Learngene(nets.vit(dim=32, layers=4, heads=4).eval(), depth=3)
    x = torch.randn(2, 1, 28, 28)
    assert gene(x).shape == gene.expand(2)(x).shape == (2, 10)
    assert [type(block).__name__ for block in gene.expand(2).blocks][2:] == ["Identity"] * 2
    with pytest.raises(UserError, match=r"blocks is 4, .* nn\.Sequential, which does not grow; give at most 3"):
        gene.expand(4)


def test_layers_of_two_kinds_keep_their_kinds(work):
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
             "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 8, "layer_types": kinds}  # fmt: skip
    gene = Learngene(Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval())
    assert torch.isfinite(gene(IDS).logits).all()
    deep = gene.expand(3)
    assert deep.config.layer_types == [*kinds, "full_attention"]
    assert torch.isfinite(deep(IDS).logits).all()


def test_other_models_and_unequal_blocks_are_refused(work, tiny_cnn):
    with pytest.raises(UserError, match=r"initialize\.tleg works on transformer blocks"):
        Tleg().apply(tiny_cnn)
    uneven = Neurons(ratio=0.5, round_to=8).apply(work.model, work, layers=["model.layers.1.mlp"])
    with pytest.raises(UserError, match="finds no layer"):
        Tleg().learn(uneven, work)
    with pytest.raises(UserError, match="needs a workload"):
        Tleg().apply(work.model)
    vit = nets.vit(dim=16, layers=3, heads=2)
    for settings, most in (({}, 3), ({"auxiliary": 2}, 2)):
        with pytest.raises(UserError, match=rf"blocks is 4, .* give at most {most}"):
            Tleg(blocks=4, **settings).apply(vit)  # before it asks for data
    with pytest.raises(UserError, match=r"blocks is 2\.0"):
        Tleg(blocks=2.0)
