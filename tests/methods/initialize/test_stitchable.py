import copy

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.methods.initialize._sewing import Sewn
from lilliput.methods.initialize.stitchable import Route, Stitchable, paired
from lilliput.workload import Workload, windows
from lilliput.zoo import nets

FITTED = Stitchable(steps=0)
IDS = torch.arange(3, 43).view(2, 20)


def llama(dim, layers, heads, seed=0):
    torch.manual_seed(seed)
    model = nets.llama(dim=dim, layers=layers, heads=heads, kv_heads=1, hidden=2 * dim, vocab=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def anchors():
    return llama(16, 2, 2, seed=1), llama(32, 4, 4)


@pytest.fixture
def work(anchors):
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    return Workload.causal_lm(anchors[1], *splits[:3], training=windows(splits[3]))


@pytest.fixture
def vit_anchors():
    torch.manual_seed(0)
    return [nets.vit(dim=dim, layers=layers, heads=2).eval() for dim, layers in ((16, 3), (32, 3))]


def vit_work(model):
    batches = [{"input": torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(s)),
                "label": torch.zeros(16, dtype=torch.long)} for s in (0, 1)]  # fmt: skip
    return Workload.classifier(model, batches, batches, batches)


# --- routes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "depths", "expected"),
    [
        (Stitchable(), (4, 4), [(1, 1), (2, 2), (3, 3)]),
        (Stitchable(every=2), (6, 3), [(2, 1), (4, 2)]),
        (Stitchable(reach=1), (2, 4), [(1, 1), (1, 2), (1, 3)]),
        (Stitchable(reach=1), (3, 3), [(1, 1), (1, 2), (2, 1), (2, 2)]),
        (Stitchable(), (2, 6), [(1, 3)]),
    ],
)
def test_routes_lead_to_the_blocks_at_the_same_place(settings, depths, expected):
    assert [tuple(route) for route in settings.between(*depths)] == expected


def test_places_stay_inside_the_large_model():
    assert [paired(i, 5, 3) for i in range(1, 5)] == [1, 1, 2, 2]
    assert paired(1, 9, 3) == 1


def test_routes_are_sorted_by_what_they_cost(anchors, work):
    net = FITTED.with_(reach=1).join(*anchors, work)
    costs = [net.weights(route) for route in net.routes]
    assert costs == sorted(costs, reverse=True)
    assert net.routes[0] == Route(0, 0)
    assert net.routes[-1] == Route(2, None)
    blocks = [sum(p.numel() for p in model.model.layers.parameters()) for model in anchors]
    assert costs[0] == blocks[1]
    assert costs[-1] == blocks[0]
    assert net.weights(Route(1, 2)) == blocks[0] // 2 + blocks[1] // 2 + 17 * 32


# --- what a route computes -------------------------------------------------------------------------------------------


def test_anchors_answer_as_before(anchors, work):
    net = FITTED.join(*anchors, work)
    for route, model in ((Route(2, None), anchors[0]), (Route(0, 0), anchors[1])):
        net.choose(route)
        assert torch.equal(net(IDS).logits, model(IDS).logits)


def test_a_route_is_the_blocks_one_after_another(vit_anchors):
    small, large = vit_anchors
    net = FITTED.join(small, large, vit_work(large))
    net.choose(Route(1, 1))
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        y = small.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat((small.cls.expand(3, -1, -1), y), 1) + small.pos
        y = net.stitches["1"](small.blocks[0](y))
        expected = large.head(large.norm(large.blocks[2](large.blocks[1](y)))[:, 0])
        torch.testing.assert_close(net(x), expected)


def test_stitches_are_numpys_least_squares(vit_anchors):
    small, large = vit_anchors
    work = vit_work(large)
    net = FITTED.join(small, large, work)
    with torch.no_grad():
        inputs = []
        for model in (small, large):
            x = torch.cat([batch["input"] for batch in work.calibration])
            y = model.patch(x).flatten(2).transpose(1, 2)
            y = torch.cat((model.cls.expand(len(x), -1, -1), y), 1) + model.pos
            inputs.append(model.blocks[0](y).flatten(0, 1).double().numpy())
    x = np.c_[inputs[0], np.ones(len(inputs[0]))]
    best = np.linalg.lstsq(x, inputs[1], rcond=None)[0]
    stitch = net.stitches["1"]
    found = np.r_[stitch.weight.detach().T.numpy(), stitch.bias.detach()[None].numpy()]
    errors = [np.square(x @ solution - inputs[1]).sum() for solution in (best, found)]
    assert errors[0] <= errors[1] < 1.01 * errors[0]


def test_a_model_stitched_to_itself_stays_the_same(anchors, work):
    net = FITTED.join(anchors[1], anchors[1], work)
    for route in net.routes:
        net.choose(route)
        torch.testing.assert_close(net(IDS).logits, anchors[1](IDS).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("route", [Route(1, 2), Route(0, 0), Route(2, None)])
def test_an_extracted_net_stands_alone_and_generates(anchors, work, route):
    net = FITTED.join(*anchors, work)
    net.choose(route)
    model, expected = net.extract(route), net(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    depth = len(model.model.layers)
    assert depth == {Route(1, 2): 3, Route(0, 0): 4, Route(2, None): 2}[route]
    assert model.config.num_hidden_layers == len(anatomy(model).blocks) == depth
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(IDS[:, :6], use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(net(IDS).logits, expected)
    cached = net(IDS[:, :12], use_cache=True)
    later = net(IDS[:, 12:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(later, expected[:, 12:], rtol=1e-4, atol=1e-4)
    net.choose(Route(0, 0))
    assert [layer.self_attn.layer_idx for layer in net.large.model.layers] == [0, 1, 2, 3]
    assert net.large.config.num_hidden_layers == 4


def test_extracting_a_route_leaves_the_one_that_runs(anchors, work):
    net = FITTED.join(*anchors, work)
    net.choose(Route(2, None))
    model = net.extract(Route(1, 2))
    assert net.route == Route(2, None)
    assert torch.equal(net(IDS).logits, anchors[0](IDS).logits)
    assert [layer.self_attn.layer_idx for layer in net.small.model.layers] == [0, 1]
    indices = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]
    assert indices == [0, 1, 2]
    assert not model.config.tie_word_embeddings
    assert net.large.config.tie_word_embeddings


def test_a_trained_net_runs_the_slowest_route_first(anchors, work):
    net = Stitchable(steps=3).join(*anchors, work)
    assert net.route == net.routes[0] == Route(0, 0)
    assert [layer.self_attn.layer_idx for layer in net.large.model.layers] == [0, 1, 2, 3]


def test_models_in_half_precision_are_stitched_in_it(anchors, work):
    net = FITTED.join(*(copy.deepcopy(model).bfloat16() for model in anchors), work)
    net.choose(Route(1, 2))
    assert net.stitches["1"].weight.dtype == net(IDS).logits.dtype == torch.bfloat16


def test_qwen_is_a_family_too(work):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    small, large = (Qwen2ForCausalLM(Qwen2Config(hidden_size=h, num_hidden_layers=n, head_dim=8, **sizes)).eval()
                    for h, n in ((16, 2), (32, 3)))  # fmt: skip
    net = FITTED.join(small, large, work)
    model = net.extract(net.routes[1])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(IDS[:, :6], use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)
    assert sum(isinstance(layer, Sewn) for layer in model.model.layers) == 1


# --- training --------------------------------------------------------------------------------------------------------


def test_training_brings_every_route_nearer_to_the_teacher(anchors, work):
    def distances(net):
        found = []
        for route in net.routes:
            net.choose(route)
            with torch.no_grad():
                pairs = [(net(b["input_ids"]).logits, work.model(b["input_ids"]).logits) for b in work.training]
            found.append(float(torch.stack([(a - b).square().mean() for a, b in pairs]).mean()))
        return found

    before, after = (distances(Stitchable(steps=s, lr=3e-3).join(*anchors, work)) for s in (0, 80))
    assert before[0] == 0
    assert all(new < 0.9 * old for new, old in zip(after[1:], before[1:]))


def test_the_anchors_that_are_given_stay_and_all_parts_learn(anchors, work):
    old = [copy.deepcopy(model.state_dict()) for model in anchors]
    settings = Stitchable(steps=12, seed=3)
    net, again, start = settings.join(*anchors, work), settings.join(*anchors, work), FITTED.join(*anchors, work)
    for model, tensors in zip(anchors, old):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    for part in ("small.model.layers.0", "large.model.layers.3", "stitches.1"):
        assert any(name.startswith(part) for name in moved)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not any(module.training for module in net.modules())
    start.load_state_dict(net.state_dict())
    for route in net.routes:
        net.choose(route)
        start.choose(route)
        assert torch.equal(start(IDS).logits, net(IDS).logits)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_models_of_other_families_are_refused(anchors, work, vit_anchors, tiny_cnn):
    small, large = anchors
    with pytest.raises(UserError, match=r"two models of one class, .* not LlamaForCausalLM and VisionTransformer"):
        FITTED.join(small, vit_anchors[0], work)
    with pytest.raises(UserError, match=r"types of weights of the two models are torch\.bfloat16 and torch\.float32"):
        FITTED.join(copy.deepcopy(small).bfloat16(), large, work)
    with pytest.raises(UserError, match="head_dim of the two models are 16 and 8"):
        FITTED.join(llama(32, 2, 2), large, work)
    torch.manual_seed(0)
    with pytest.raises(UserError, match="outputs of the two models are 10 and 3"):
        FITTED.join(vit_anchors[0], nets.vit(dim=32, layers=2, heads=2, classes=3), vit_work(vit_anchors[1]))
    with pytest.raises(UserError, match=r"initialize\.stitchable works on transformer blocks"):
        FITTED.join(tiny_cnn, tiny_cnn, work)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
             "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"]))
    with pytest.raises(UserError, match="some of these have sliding_attention"):
        FITTED.join(gemma, gemma, work)


def test_a_workload_of_another_question_is_refused_before_anything_is_fitted(vit_anchors, monkeypatch):
    other = vit_work(nets.vit(dim=16, layers=2, heads=2, classes=3).eval())
    monkeypatch.setattr("lilliput.methods.initialize.stitchable.fitted_stitches", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="same question"):
        FITTED.join(*vit_anchors, other)


def test_models_without_a_place_for_a_stitch_and_unknown_routes_are_refused(anchors, work):
    with pytest.raises(UserError, match="every is 2, but the models have 2 and 4 blocks"):
        FITTED.with_(every=2).join(*anchors, work)
    with pytest.raises(UserError, match=r"there is no route \(1, 3\)"):
        FITTED.join(*anchors, work).choose(Route(1, 3))
