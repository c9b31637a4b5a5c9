"""Selected elements are evenly spaced, the same everywhere, and those of the first blocks."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.initialize.weight_selection import WeightSelection, first, spaced
from lilliput.zoo import nets


@pytest.mark.parametrize(
    ("count", "keep", "expected"),
    [(8, 4, [0, 2, 4, 6]), (6, 6, [0, 1, 2, 3, 4, 5]), (7, 3, [0, 2, 4]), (9, 2, [0, 4]), (5, 1, [0])],
)
def test_elements_are_evenly_spaced(count, keep, expected):
    assert spaced(count, keep).tolist() == expected
    assert first(count, keep).tolist() == list(range(keep))


def test_tensors_are_strided_and_whole_heads_kept(work):
    """4 heads of 8 on 2 key-value heads, 32 features, 48 neurons, half of each."""
    model = WeightSelection(depth=1.0).apply(work.model)
    old, new = work.model.model.layers[1], model.model.layers[1]
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[:16, ::2])
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[:8, ::2])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[::2, :16])
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[::2, ::2])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[::2, ::2])
    assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[::2])
    assert torch.equal(model.lm_head.weight, work.model.lm_head.weight[:, ::2])
    assert torch.equal(model.model.embed_tokens.weight, work.model.model.embed_tokens.weight[:, ::2])


def test_elements_whatever_their_head_as_in_the_paper(make_work):
    work = make_work("vit")
    model = WeightSelection(unit="elements").apply(work.model)
    old, new = (m.get_submodule("vit.layers.0.attention.q_proj") for m in (work.model, model))
    assert torch.equal(new.weight, old.weight[::2, ::2])
    assert torch.equal(new.bias, old.bias[::2])
    patches = [m.vit.embeddings.patch_embeddings.projection for m in (work.model, model)]
    assert torch.equal(patches[1].weight, patches[0].weight[::2])
    positions = [m.vit.embeddings.position_embeddings for m in (work.model, model)]
    assert torch.equal(positions[1], positions[0][..., ::2])


def test_a_fused_projection_is_cut_in_each_of_its_parts(make_work):
    work = make_work("gpt2")
    model = WeightSelection(pick="consecutive").apply(work.model)
    old, new = (m.transformer.h[0].attn.c_attn for m in (work.model, model))
    expected = torch.cat([part[:16, :16] for part in old.weight.split(32, 1)], 1)
    assert torch.equal(new.weight, expected)
    assert torch.equal(new.bias, old.bias.view(3, 32)[:, :16].flatten())


@pytest.mark.parametrize(("blocks", "kept"), [("first", [0, 1]), ("uniform", [0, 2])])
def test_the_first_blocks_or_evenly_spaced_ones(work, blocks, kept):
    model = WeightSelection(width=1.0, heads=1.0, ffn=1.0, blocks=blocks).apply(work.model)
    assert len(model.model.layers) == 2
    for new, old in zip(model.model.layers, kept):
        assert torch.equal(new.mlp.up_proj.weight, work.model.model.layers[old].mlp.up_proj.weight)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_settings_of_the_one_target_count(work):
    model = WeightSelection().apply(work.model, layers={"model.layers": {"depth": 0.25}})
    assert len(model.model.layers) == 1


def test_lilliputs_own_vision_transformer_has_no_config():
    with pytest.raises(UserError, match="transformers config"):
        WeightSelection().apply(nets.build("vit-small"))
