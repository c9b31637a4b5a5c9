"""Group-wise rounding: settings per layer, groups that fit, errors that fall with bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lilliput.errors import UserError
from lilliput.kernels.decoder import Decoder, decoder_for
from lilliput.methods.quantize._packed import PackedEmbedding, PackedLinear
from lilliput.methods.quantize.group import Group, fitting_group


def relative_error(model, original):
    return float((model[0].dequantized() - original[0].weight).norm() / original[0].weight.norm())


@pytest.fixture
def one_layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 32))


@pytest.mark.parametrize(("bits", "worst"), [(4, 0.11), (3, 0.22), (2, 0.5)])
def test_errors_are_those_of_uniform_noise(one_layer, bits, worst):
    """A uniform weight in 2**b - 1 steps has a relative error of about 1 / (2**b - 1), on the bounds a bit more."""
    nn.init.uniform_(one_layer[0].weight, -1, 1)
    found = relative_error(Group(bits=bits, group=64, search=0).apply(one_layer), one_layer)
    assert 0.85 / (2**bits - 1) < found < worst


def test_smaller_groups_and_the_search_lower_the_error(one_layer):
    nn.init.normal_(one_layer[0].weight)
    errors = [
        relative_error(Group(bits=3, group=g, search=s).apply(one_layer), one_layer)
        for g, s in ((128, 0), (64, 0), (32, 0), (32, 20))
    ]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4


@given(st.sampled_from([32, 64, 128]), st.integers(1, 5000))
def test_the_fitting_group_is_the_largest_divisor_of_both(group, columns):
    found = fitting_group(group, columns)
    assert columns % found == 0
    assert found == max(d for d in range(1, group + 1) if group % d == 0 and columns % d == 0)


def test_a_layer_takes_the_largest_group_that_fits():
    model = nn.Sequential(nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 24))
    packed = Group(group=128).apply(model)
    assert (packed[0].group, packed[2].group) == (32, 16)


def test_layers_whose_codes_fill_no_bytes_are_left_alone():
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 8))
    assert list(Group().targets(model)) == ["1"]
    packed = Group().apply(model)
    assert type(packed[0]) is nn.Linear
    with pytest.raises(UserError, match=r"cannot change '0'; it can change 1"):
        Group().apply(model, layers=["0"])


def test_settings_differ_per_layer(llama_work):
    layers = {"model.layers.0.*": {"bits": 2}, "model.layers.0.mlp.*": {"bits": 3, "group": 32}, "lm_head": {}}
    model = Group(bits=4).apply(llama_work.model, layers=layers)
    assert model.model.layers[0].self_attn.q_proj.bits == 2
    assert model.model.layers[0].mlp.up_proj.bits == 3
    assert model.lm_head.bits == model.model.embed_tokens.bits == 4
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.embed_tokens, PackedEmbedding)


def test_more_bits_keep_more_of_the_logits(llama_work):
    batch = llama_work.calibration[0]
    with torch.no_grad():
        before = llama_work.forward(llama_work.model, batch)
        moved = [
            float((llama_work.forward(Group(bits=bits).apply(llama_work.model), batch) - before).norm())
            for bits in (2, 3, 4)
        ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.3 * before.norm()


def test_bytes_are_those_of_the_bits():
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    for bits in (4, 3, 2):
        packed = Group(bits=bits, group=64).apply(model)[0]
        assert isinstance(packed, PackedLinear)
        assert packed.weight_bytes == 64 * 256 * bits // 8 + 64 * 4 * 2 * 2
        assert sum(t.nbytes for t in packed.state_dict().values()) == packed.weight_bytes


@pytest.mark.parametrize(("settings", "message"), [({"bits": 8}, "bits is 8"), ({"group": 48}, "group is 48")])
def test_settings_outside_their_choices_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Group(**settings)


def test_layers_choose_how_products_are_executed(llama_work):
    model = Group(bits=3, group=32).apply(
        llama_work.model, layers={"model.layers.0.*": {"product": "lookup"}, "lm_head": {}}
    )
    assert model.model.layers[0].mlp.up_proj.product == "lookup"
    assert model.lm_head.product == "integer"
    same = Group(bits=3, group=32).apply(llama_work.model, layers=["model.layers.0.*", "lm_head"])
    batch = llama_work.calibration[0]
    with torch.no_grad():
        a, b = (llama_work.forward(m, batch) for m in (model, same))
    assert 0 < (a - b).norm() < 0.05 * b.norm()


def test_lookups_run_in_the_native_decoder(llama_work):
    model = Group(group=32, product="lookup").apply(llama_work.model)
    decoder = decoder_for(model)
    assert isinstance(decoder, Decoder)
    ids = llama_work.calibration[0]["input_ids"][0]
    with torch.no_grad():
        expected = llama_work.forward(model, {"input_ids": ids.unsqueeze(0)})[0]
        torch.testing.assert_close(decoder(ids, decoder.cache(len(ids)), every=True), expected, rtol=1e-3, atol=1e-3)
