"""The generator against published numbers, scores and their gradients by hand, and what is stored."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lilliput as lp
from lilliput.errors import UserError
from lilliput.methods.prune._hidden import HiddenConv2d, HiddenLinear, hidden_layer, random_signs, split_mix
from lilliput.methods.prune.hidden_networks import HiddenNetworks
from lilliput.metrics.memory import weight_bytes


def scored(inputs=6, outputs=5, kept=0.3, seed=3):
    return hidden_layer(nn.Linear(inputs, outputs), kept, seed)


def hidden(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, HiddenLinear | HiddenConv2d)}


def test_the_generator_gives_the_published_numbers():
    """Of the reference implementation in C (Vigna), seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert split_mix(1234567, 5).tolist() == expected


def test_signs_are_the_bits_of_the_generator_from_the_lowest():
    words = split_mix(9, 2).tolist()
    expected = [2.0 * (words[i // 64] >> (i % 64) & 1) - 1 for i in range(90)]
    assert random_signs(9, (9, 10)).flatten().tolist() == expected
    many = random_signs(4, (1000, 100))
    assert abs(float(many.mean())) < 0.02
    assert not torch.equal(many, random_signs(5, (1000, 100)))


@pytest.mark.parametrize(("kept", "count"), [(0.3, 9), (0.01, 1), (1.0, 30)])
def test_exactly_the_largest_scores_of_a_layer_are_kept(kept, count):
    layer = scored(kept=kept)
    size = layer.scores.detach().abs().flatten()
    chosen = layer.choice().detach().flatten().bool()
    assert int(chosen.sum()) == count
    assert size[chosen].min() >= size[~chosen].max() if count < 30 else chosen.all()
    weights = layer.dequantized().detach().flatten()
    assert torch.equal(weights != 0, chosen)
    torch.testing.assert_close(weights[chosen].abs(), torch.full((count,), (2 / (6 * kept)) ** 0.5))


def test_scores_get_the_gradient_of_the_weights_times_what_they_keep():
    layer, x = scored(), torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    (layer(x) - 1).square().sum().backward()
    w = layer.dequantized().detach().requires_grad_()
    (x @ w.T - 1).square().sum().backward()
    gain = (2 / (6 * 0.3)) ** 0.5
    expected = w.grad * random_signs(3, (5, 6)) * gain * layer.scores.detach().sign()
    torch.testing.assert_close(layer.scores.grad, expected)
    assert (layer.scores.grad != 0).all()  # those of weights that are left out, too, so that they can come back


def test_what_is_stored_gives_the_same_outputs_to_the_bit():
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    for conv in (nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 8, (3, 1), padding=(2, 0), dilation=2, groups=4)):
        layer = hidden_layer(conv, 0.4, 11)
        before = layer(x).detach()
        weights, places = layer.dequantized().detach(), (conv.stride, conv.padding, conv.dilation, conv.groups)
        torch.testing.assert_close(before, F.conv2d(x, weights, None, *places))
        layer.settle_()
        assert torch.equal(layer(x), before)
        again = HiddenConv2d(**{k: tuple(v) if isinstance(v, list) else v for k, v in layer.rebuild_config().items()})
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), before)
        assert list(layer.state_dict()) == ["codes"]
        assert not list(layer.parameters())


def test_one_bit_per_weight_is_stored():
    layer = scored(64, 32)
    layer.settle_()
    assert layer.weight_bytes * 8 == 64 * 32


def test_nothing_but_the_choice_is_learned(cnn_work):
    model = HiddenNetworks(steps=3).apply(cnn_work.model, cnn_work)
    assert set(hidden(model)) == {"conv1", "conv2", "conv3", "fc"}
    assert not list(model.parameters())
    assert all(not m.affine for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert len({layer.seed for layer in hidden(model).values()}) == 4
    assert weight_bytes(model) < weight_bytes(cnn_work.model) / 10
    start = HiddenNetworks(steps=0).apply(cnn_work.model)
    assert [m.seed for m in hidden(start).values()] == [m.seed for m in hidden(model).values()]
    assert any(not torch.equal(a.codes, b.codes) for a, b in zip(hidden(start).values(), hidden(model).values()))


def test_one_layer_alone_leaves_the_others_and_the_norms(cnn_work):
    model = HiddenNetworks(steps=2, kept=0.2).apply(cnn_work.model, cnn_work, layers={"conv2": {"kept": 0.7}})
    assert set(hidden(model)) == {"conv2"}
    assert model.conv2.kept == 0.7
    whole = HiddenNetworks(steps=0).apply(cnn_work.model)
    assert model.conv2.seed == whole.conv2.seed
    for name, tensor in cnn_work.model.named_parameters():
        if not name.startswith("conv2."):
            assert torch.equal(model.get_parameter(name), tensor)
            assert model.get_parameter(name).requires_grad


def test_it_learns(cnn_work):
    """Labels that a trained network gives are found again by choosing among random weights."""

    def loss(model):
        return float(torch.stack([cnn_work.loss(model.train(), b).detach() for b in cnn_work.training]).mean())

    before, after = (HiddenNetworks(steps=n, kept=0.5).apply(cnn_work.model, cnn_work) for n in (0, 60))
    assert loss(after) < 0.5 * loss(before)


def test_a_tied_head_stays(llama_work):
    model = HiddenNetworks(steps=1).apply(llama_work.model, llama_work)
    assert len(hidden(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_artifact_holds_bits_and_seeds(cnn_work, tmp_path):
    plan = lp.Plan([lp.Step(HiddenNetworks(steps=2))])
    folder = lp.save(plan.apply(cnn_work), tmp_path / "hidden", cnn_work, plan)
    again = lp.load(folder, model=type(cnn_work.model)())
    weights = 16 * 9 + 16 * 16 * 9 + 32 * 16 * 9 + 32 * 10
    assert weights / 8 <= sum(m.weight_bytes for m in hidden(again).values()) < weights / 8 + 16
    assert (folder / "model.safetensors").stat().st_size < weights / 8 + 2500  # norms' statistics and the header


def test_bad_input_is_refused(cnn_work):
    with pytest.raises(UserError, match="kept"):
        HiddenNetworks(kept=0.0)
    with pytest.raises(UserError, match="steps=0"):
        HiddenNetworks().apply(cnn_work.model)
    with pytest.raises(UserError, match="seed"):
        HiddenLinear(4, 4, 0.5, -1)
    strange = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(UserError, match="finds no layer"):
        HiddenNetworks().apply(strange)
