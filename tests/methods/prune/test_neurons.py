import copy

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.prune._surgery import select
from lilliput.methods.prune.neurons import Neurons, magnitude_scores, neuron_scores, refit
from lilliput.methods.quantize.int8 import Int8
from lilliput.workload import Workload
from lilliput.zoo import nets

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def hidden():
    """Neurons that depend on each other, (samples, n), and an output weight (out, n)."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 5, generator=generator) @ torch.randn(5, 8, generator=generator)
    return mixed + 0.1 * torch.randn(400, 8, generator=generator) + 1, torch.randn(3, 8, generator=generator)


def test_score_is_the_expected_error_of_removing_one_neuron(hidden):
    h, down = hidden
    scores = neuron_scores(down, h.square().mean(0))
    for j in range(8):
        without = down.clone()
        without[:, j] = 0
        error = (h.double() @ (down - without).double().T).square().sum(1).mean()
        assert float(scores[j]) == pytest.approx(float(error), rel=1e-5)


def test_magnitude_score_is_the_product_of_squared_norms():
    gate, up, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(5, 6)
    expected = [(gate[j].norm() * up[j].norm() * down[:, j].norm()) ** 2 for j in range(6)]
    torch.testing.assert_close(magnitude_scores([gate, up], down), torch.stack(expected))


def test_select_keeps_the_largest_in_order():
    assert select(torch.tensor([0.3, 0.9, 0.1, 0.9]), 2).tolist() == [1, 3]
    assert select(torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    with pytest.raises(UserError, match="cannot keep 0 of 3"):
        select(torch.zeros(3), 0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_refit_is_least_squares(hidden, has_bias):
    h, down = hidden
    bias = torch.tensor([0.5, -1.0, 2.0]) if has_bias else None
    kept = torch.tensor([0, 2, 3, 6])
    ones = torch.cat((h, torch.ones(len(h), 1)), 1)
    weight, new_bias = refit(down, bias, ones.T @ ones / len(h), kept)
    inputs, target = h[:, kept].double().numpy(), (h @ down.T).double().numpy()
    if bias is not None:
        inputs, target = np.c_[inputs, np.ones(len(h))], target + bias.numpy()
    expected = np.linalg.lstsq(inputs, target, rcond=None)[0].T
    ours = weight.numpy() if new_bias is None else np.c_[weight.numpy(), new_bias.numpy()]
    np.testing.assert_allclose(ours, expected, rtol=3e-3)  # damping moves the solution by about 1e-3


def masked(model, kept):
    """The dense model with the other neurons' down columns at zero."""
    model = copy.deepcopy(model)
    for block in anatomy(model).blocks:
        weight = model.get_submodule(block.mlp.down).weight.data
        gone = [j for j in range(weight.shape[1]) if j not in set(kept[block.index].tolist())]
        weight[:, gone] = 0
    return model


def expected_kept(model, work, keep):
    """Kept neurons by the score, from hooks of the test's own."""
    inputs = {}
    blocks = anatomy(model).blocks
    for block in blocks:
        down = model.get_submodule(block.mlp.down)
        down.register_forward_pre_hook(lambda m, args, i=block.index: inputs.setdefault(i, []).append(args[0]))
    with torch.no_grad():
        for batch in work.calibration:
            work.forward(model, batch)
    kept = []
    for block in blocks:
        h = torch.cat([x.flatten(0, -2) for x in inputs[block.index]]).double()
        down = model.get_submodule(block.mlp.down).weight.detach().double()
        scores = h.square().mean(0) * down.square().sum(0)
        kept.append(scores.topk(keep).indices)
    return kept


def test_llama_equals_masked_reference(tiny_llama, llama_work):
    small = Neurons(ratio=0.6).apply(tiny_llama, llama_work)
    kept = expected_kept(copy.deepcopy(tiny_llama), llama_work, 32)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, masked(tiny_llama, kept)(IDS).logits, atol=1e-5, rtol=1e-5)
    assert small.model.layers[1].mlp.down_proj.in_features == 32
    assert small.model.layers[1].mlp.gate_proj.out_features == 32
    assert tiny_llama.model.layers[1].mlp.down_proj.in_features == 96
    assert small.config.intermediate_size == 96


def test_own_vit_equals_masked_reference():
    torch.manual_seed(0)
    model = nets.vit(dim=16, layers=2, heads=2, size=8, patch=4).eval()
    data = [{"input": torch.randn(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.long)}]
    work = Workload.classifier(model, data, data, data)
    small = Neurons(ratio=0.5, round_to=8).apply(model, work)
    kept = expected_kept(copy.deepcopy(model), work, 32)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(small(x), masked(model, kept)(x), atol=1e-5, rtol=1e-5)


def test_refit_loses_less_than_plain_removal(tiny_llama, llama_work):
    def error(method):
        small = method.apply(tiny_llama, llama_work)
        ids = llama_work.calibration[0]["input_ids"]
        with torch.no_grad():
            return float((small(ids).logits - tiny_llama(ids).logits).square().mean())

    one = {"layers": ["model.layers.1.mlp"]}
    plain, fitted = (Neurons(ratio=0.6, refit=r).apply(tiny_llama, llama_work, **one) for r in (False, True))
    assert fitted.model.layers[0].mlp.down_proj.in_features == 96
    ids = llama_work.calibration[0]["input_ids"]
    with torch.no_grad():
        reference = tiny_llama(ids).logits
        assert (fitted(ids).logits - reference).norm() < 0.9 * (plain(ids).logits - reference).norm()
    assert error(Neurons(ratio=0.6, refit=True)) < error(Neurons(ratio=0.6))


def test_ratio_zero_changes_nothing_and_the_most_leaves_one_multiple(tiny_llama, llama_work):
    same = Neurons(ratio=0.0).apply(tiny_llama)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), tiny_llama.parameters(), strict=True))
    least = Neurons(ratio=0.95).apply(tiny_llama, llama_work)
    assert [b.mlp.down_proj.in_features for b in least.model.layers] == [32, 32]
    assert torch.isfinite(least(IDS).logits).all()


def test_layers_have_their_own_ratios(tiny_llama):
    method = Neurons(score="magnitude", round_to=8)
    small = method.apply(
        tiny_llama, layers={"model.layers.0.mlp": {"ratio": 0.5}, "model.layers.1.mlp": {"ratio": 0.75}}
    )
    assert [b.mlp.up_proj.out_features for b in small.model.layers] == [48, 24]


def test_gpt2_is_converted_and_cut():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    work = Workload.causal_lm(model, IDS, IDS, IDS)
    small = Neurons(ratio=0.5).apply(model, work)
    kept = expected_kept(Neurons(ratio=0.0).apply(model), work, 64)
    assert type(small.transformer.h[0].mlp.c_proj) is nn.Linear
    with torch.no_grad():
        expected = masked(Neurons(ratio=0.0).apply(model), kept)(IDS).logits
        torch.testing.assert_close(small(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ratio": 1.5}, "ratio is 1.5"), ({"score": "luck"}, "'luck'"), ({"round_to": 0}, "round_to is 0")],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Neurons(**settings)


def test_bad_models_and_missing_data(tiny_llama, tiny_cnn):
    with pytest.raises(UserError, match="score='magnitude'"):
        Neurons(ratio=0.5).apply(tiny_llama)
    with pytest.raises(UserError, match=r"TinyCnn is a convolutional network; use prune\.channels"):
        Neurons().apply(tiny_cnn)
    with pytest.raises(UserError, match=r"cannot change 'model\.layers\.7'"):
        Neurons().apply(tiny_llama, layers=["model.layers.7"])


@pytest.mark.parametrize("change", [LowRank(whiten="none"), Int8()], ids=["low-rank factors", "a PackedLinear"])
def test_layers_that_were_replaced_are_refused_with_the_order(change, llama_work, request):
    model = change.apply(llama_work.model)
    kind = request.node.callspec.id
    with pytest.raises(UserError, match=rf"prune\.neurons .*has become {kind}; prune first, then factorize"):
        Neurons().apply(model, llama_work)
    one = change.apply(llama_work.model, layers=["model.layers.0.*"])
    before = list(Neurons().targets(llama_work.model))
    assert list(Neurons().targets(one)) == [n for n in before if n.startswith("model.layers.1.")]
