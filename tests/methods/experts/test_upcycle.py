"""Splits against the dense part they came from, routers against chance, healing, artifacts, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lilliput as lp
from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.kernels.decoder_parts import refusals
from lilliput.methods.experts._mixture import Mixture, copied_mixture, split_mixture
from lilliput.methods.experts._neurons import contributions, dealt, equal_clusters, firing_together, fitted_router
from lilliput.methods.experts._routing import Routed, at_routers, balance_loss, mixtures_of, routers_of
from lilliput.methods.experts.upcycle import Upcycle
from lilliput.methods.quantize.group import Group
from lilliput.plan import Plan, Step

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def part(deep_work):
    return deep_work.model.model.layers[0].mlp


def layers_of(part):
    return [part.gate_proj, part.up_proj, part.down_proj]


def tokens(count=400, seed=3):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


# --- the layer ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_all_experts_of_a_split_together_are_the_dense_part(part):
    owner = torch.randperm(96, generator=torch.Generator().manual_seed(0)) % 8
    whole = split_mixture(layers_of(part), owner, 8, "silu", (torch.zeros(8, 32), torch.zeros(8)))
    x = tokens(10)
    torch.testing.assert_close(whole(x.view(2, 5, 32)), part(x).view(2, 5, 32), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_chosen_experts_alone_add_up_by_their_weights(part):
    owner = torch.arange(96) % 8
    router = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 8)
    made = split_mixture(layers_of(part), owner, 3, "silu", router)
    x = tokens(6)
    expected = torch.zeros(6, 32)
    for row in range(6):
        logits = router[0] @ x[row] + router[1]
        chosen = logits.sort(descending=True).indices[:3].tolist()
        shares = logits[chosen].exp() / logits[chosen].exp().sum()
        for expert, share in zip(chosen, shares):
            mine = owner == expert
            hidden = nn.functional.silu(part.gate_proj.weight[mine] @ x[row]) * (part.up_proj.weight[mine] @ x[row])
            expected[row] += 3 * share * (part.down_proj.weight[:, mine] @ hidden)
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_without_noise_are_the_dense_part_whatever_is_chosen(part):
    x = tokens(9)
    made = copied_mixture(layers_of(part), 4, 2, "silu", noise=0.0, seed=0)
    torch.testing.assert_close(made(x), part(x), rtol=1e-4, atol=1e-4)
    assert len(made.gate(x)[2].unique()) == 4
    noisy = copied_mixture(layers_of(part), 4, 2, "silu", noise=0.1, seed=0)
    w = part.gate_proj.weight
    changes = [e.gate_proj.weight - w for e in noisy.experts]
    for change in changes:
        assert float(change.std() / w.std()) == pytest.approx(0.1, rel=0.1)
    assert abs(float((changes[0] * changes[1]).mean())) < 0.1 * float(changes[0].var())


def test_gradients_reach_router_and_chosen_experts(part):
    made = split_mixture(layers_of(part), torch.arange(96) % 8, 2, "silu", (torch.randn(8, 32), torch.zeros(8)))
    x = tokens(1)
    made(x).square().sum().backward()
    chosen = set(made.gate(x)[2].flatten().tolist())
    assert made.gate.weight.grad.abs().sum() > 0
    for number, expert in enumerate(made.experts):
        assert (expert.up_proj.weight.grad is not None) == (number in chosen)


# --- which neurons -------------------------------------------------------------------------------------------------


def test_groups_that_fire_together_are_found():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(40) % 4
    shared = (torch.rand(300, 4, generator=generator) < 0.3).float()
    size = shared[:, group] + 0.2 * torch.rand(300, 40, generator=generator)
    found = equal_clusters(firing_together(size), 4, seed=1)
    assert torch.bincount(found).tolist() == [10] * 4
    assert all(len(found[group == g].unique()) == 1 for g in range(4))


def test_rows_are_dealt_in_equal_parts_the_cheapest_first():
    cost = torch.tensor([[0.1, 5.0], [0.2, 9.0], [0.3, 0.4], [0.35, 0.5]])
    assert dealt(cost).tolist() == [0, 0, 1, 1]


@torch.no_grad()
def test_contributions_are_what_a_neuron_adds_to_the_output(part):
    x = tokens(5)
    size = contributions(layers_of(part), nn.SiLU(), x)
    without = copy.deepcopy(part)
    without.down_proj.weight[:, 7] = 0
    torch.testing.assert_close((part(x) - without(x)).norm(dim=-1), size[:, 7], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_router_finds_more_of_the_output_than_chance(part):
    x, fresh = tokens(2000, seed=4), tokens(500, seed=5)
    owner = torch.arange(96) % 8
    weight, bias = fitted_router(x, contributions(layers_of(part), nn.SiLU(), x), owner)
    logits = x @ weight.T + bias
    assert float(logits.std()) == pytest.approx(0.5, rel=1e-3)
    size = contributions(layers_of(part), nn.SiLU(), fresh).square()
    energy = torch.zeros(500, 8).index_add_(1, owner, size)
    chosen = (fresh @ weight.T + bias).topk(2, -1).indices
    assert float(energy.gather(1, chosen).sum() / energy.sum()) > 1.15 * 2 / 8


# --- the method ----------------------------------------------------------------------------------------------------


def test_healing_brings_the_answers_nearer_and_moves_the_mixtures_alone(deep_work):
    raw, healed = (Upcycle(experts=8, top_k=4, steps=n, lr=3e-3).apply(deep_work.model, deep_work) for n in (0, 60))

    def distance(model):
        batches = list(deep_work.training)
        with torch.no_grad():
            both = [(deep_work.forward(m, b).log_softmax(-1) for m in (model, deep_work.model)) for b in batches]
            return sum(float(nn.functional.kl_div(a, b, log_target=True, reduction="sum")) for a, b in both)

    assert distance(healed) < 0.7 * distance(raw)
    before, after = deep_work.model.state_dict(), healed.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if ".mlp." not in k)
    assert not torch.equal(healed.model.layers[0].mlp.gate.weight, raw.model.layers[0].mlp.gate.weight)


def test_balance_is_one_when_experts_are_used_alike():
    even = Routed(torch.zeros(4, 4), torch.ones(4, 1), torch.arange(4)[:, None])
    assert float(balance_loss(even)) == pytest.approx(1)
    one = Routed(torch.tensor([[20.0, 0, 0, 0]] * 4), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long))
    assert float(balance_loss(one)) == pytest.approx(4, rel=1e-4)


def test_it_generates_saves_and_loads_also_with_packed_experts(deep_work, tmp_path):
    plan = Plan([Step(Upcycle(experts=4, top_k=2, steps=2)), Step(Group(bits=4, group=32))])
    model = plan.apply(deep_work)
    assert not any(type(m) is nn.Linear for m in model.model.layers[0].mlp.experts.modules())
    again = lp.load(lp.save(model, tmp_path / "packed", deep_work, plan))
    prompt = deep_work.test[0]["input_ids"][:1]
    texts = [m.generate(prompt, max_new_tokens=12, do_sample=False) for m in (model, again)]
    assert torch.equal(*texts)
    assert isinstance(again.model.layers[3].mlp, Mixture)


def test_the_anatomy_shows_mixtures_and_not_their_experts(mixture, deep_work):
    found = anatomy(mixture)
    assert found.kind == "llama"
    assert [b.mlp for b in found.blocks] == [None] * 4
    assert found.blocks[2].mixture.experts == "model.layers.2.mlp.experts"
    assert "no feed-forward part" in refusals(mixture)[0]
    assert all(b.mixture is None for b in anatomy(deep_work.model).blocks)
    with pytest.raises(UserError, match="all tokens run through"):
        Upcycle().apply(mixture, deep_work)


def test_fit_says_that_it_has_no_space_for_mixtures(mixture, deep_work):
    from dataclasses import replace

    from lilliput.fitting.spaces import build_space

    with pytest.raises(UserError, match="no search space"):
        build_space(replace(deep_work, model=mixture), ["quantize"], {}, 1, None, None, print)


def test_routers_are_watched_and_overruled(mixture, ids):
    seen = []

    def see(layer, x, routed):
        seen.append((layer, x.shape, routed.chosen.shape))
        return Routed(routed.logits, torch.zeros_like(routed.weights), routed.chosen)

    with torch.no_grad():
        plain = mixture(ids[None]).logits
        with at_routers(routers_of(mixture, "a test"), see):
            silent = mixture(ids[None]).logits
        assert torch.equal(mixture(ids[None]).logits, plain)
    assert seen == [(layer, (24, 32), (24, 2)) for layer in range(4)]
    assert not torch.allclose(silent, plain)
    assert len(mixtures_of(mixture, "a test")) == 4


@pytest.mark.parametrize(
    "model",
    [
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8)),
    ],
)
def test_other_decoders_are_upcycled_too(model, deep_work):
    work = copy.copy(deep_work)
    work.model = model().eval()
    made = Upcycle(experts=4, top_k=4, steps=0).apply(work.model, work)
    ids = deep_work.test[0]["input_ids"]
    for block in made.model.layers:
        block.mlp.gate.weight.data.zero_()
        block.mlp.gate.bias.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, work.model(ids).logits, rtol=1e-3, atol=1e-3)


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_a_mixture_is_refused_with_the_way_out(deep_work, tiny_cnn):
    with pytest.raises(UserError, match="top_k is 5, above the 4 experts"):
        Upcycle(experts=4, top_k=5)
    with pytest.raises(UserError, match=r"experts is 4\.5"):
        Upcycle(experts=4.5)
    with pytest.raises(UserError, match=r"96 neurons.*divide by 7"):
        Upcycle(experts=7, top_k=2, steps=0).apply(deep_work.model, deep_work)
    with pytest.raises(UserError, match="fire together"):
        Upcycle(experts=8).apply(deep_work.model)
    with pytest.raises(UserError, match="heal"):
        Upcycle(experts=2, top_k=1, how="copy").apply(deep_work.model)
    with pytest.raises(UserError, match="biases"):
        Upcycle().apply(LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)), deep_work)
    with pytest.raises(UserError, match="TinyCnn"):
        Upcycle().apply(tiny_cnn)
    with pytest.raises(UserError, match=r"experts\.upcycle"):
        mixtures_of(deep_work.model, "a test")


def test_a_replaced_activation_is_refused(deep_work):
    model = copy.deepcopy(deep_work.model)
    for block in model.model.layers:
        block.mlp.act_fn = nn.Tanh()
    with pytest.raises(UserError, match="upcycle before relufy"):
        Upcycle().apply(model, deep_work)
