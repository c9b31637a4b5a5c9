"""One route is the plain model to the bit; the cache holds the usual route alone; noise and averages by formula."""

import numpy as np
import pytest
import torch
from foreign_mixtures import foreign
from torch import nn
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from lilliput.errors import UserError
from lilliput.methods.experts._routing import Routed, at_routers, routers_of
from lilliput.methods.experts.roe import NAME, RoE, Routes, averaged, clean_cache, next_token_loss, weighing
from lilliput.methods.experts.upcycle import Upcycle

LOUD = RoE(samples=4, tau=1.0, ends=True)


@pytest.fixture(params=["upcycled", "olmoe", "mixtral"])
def model(request, mixture):
    return mixture if request.param == "upcycled" else foreign(request.param)


def written(model, ids, decoder=None, seed=1, **options):
    torch.manual_seed(seed)
    return model.generate(ids[None], max_new_tokens=14, custom_generate=decoder, **options)


@torch.no_grad()
def plain_logits(model, ids):
    return model(ids, use_cache=True).logits


# --- one route, and no noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}])
def test_one_route_is_the_plain_model_to_the_bit(model, ids, options):
    assert torch.equal(written(model, ids, RoE(samples=1), **options), written(model, ids, **options))
    batch = torch.stack([ids, ids.flip(0)])
    assert torch.equal(RoE(samples=1).logits(model, batch), plain_logits(model, batch))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_without_noise_any_number_of_routes_is_the_plain_model(model, ids, average):
    quiet = RoE(samples=5, tau=0.0, average=average)
    batch = torch.stack([ids, ids.flip(0)])
    torch.testing.assert_close(quiet.logits(model, batch), plain_logits(model, batch), rtol=1e-3, atol=1e-3)
    assert torch.equal(written(model, ids, quiet, do_sample=False), written(model, ids, do_sample=False))


def test_noise_changes_the_answer_and_its_seed_is_kept(model, ids):
    first, again, other = (decoder.logits(model, ids[None]) for decoder in (LOUD, LOUD, LOUD.with_(seed=1)))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert not torch.allclose(first, plain_logits(model, ids[None]), atol=1e-3)
    assert written(model, ids, LOUD, do_sample=False).shape == (1, 38)


# --- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_holds_the_usual_route_of_each_text_alone(model, ids):
    batch = torch.stack([ids, ids.flip(0)])
    clean, usual = clean_cache(model), DynamicCache(config=model.config)
    LOUD.routes(model)(batch, clean)
    with torch.no_grad():
        model(batch, past_key_values=usual, use_cache=True)
    for mine, theirs in zip(clean.layers, usual.layers):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=1e-4)


class Forced(Routes):
    """The second route takes experts 0 and 1 everywhere: the same however a text is cut."""

    def _see(self, layer, x, routed):
        usual = (torch.arange(len(routed.logits)) // self.tokens % self.samples == 0)[:, None]
        return Routed(routed.logits, routed.weights, torch.where(usual, routed.chosen, torch.tensor([0, 1])))


def test_a_token_reads_the_usual_route_of_those_before_it_however_the_text_is_cut(model, ids):
    def last(cuts, plain_first):
        routes, cache = Forced(model, routers_of(model, NAME), 2, (1.0,) * 4, 0), clean_cache(model)
        *before, end = ids[None].split(cuts, 1)
        for piece in before:
            routes.plain(piece, cache) if plain_first else routes(piece, cache)
        return routes(end, cache)[0, :, -1]

    whole = last([24], False)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    for cuts, plain_first in (([1] * 24, False), ([23, 1], True), ([10, 13, 1], False)):
        torch.testing.assert_close(last(cuts, plain_first), whole, rtol=1e-3, atol=1e-3)


# --- noise, weights, averages ----------------------------------------------------------------------------------------


class Shares(nn.Module):
    """Probabilities as they are, of the two likeliest of eight."""

    def __init__(self, weigh=torch.softmax):
        super().__init__()
        self.weight, self.weigh = nn.Parameter(torch.ones(8, 3)), weigh

    def forward(self, x):
        logits = x @ self.weight.T
        return logits, *self.weigh(logits, -1).topk(2)


def test_the_usual_route_stays_and_others_choose_by_gumbel_noise():
    tokens, tau = 20_000, 0.7
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0]).repeat(2 * tokens, 1)
    best = logits.softmax(-1).topk(1)
    routes = Routes(None, [Shares()], 2, (tau,), seed=0)
    routes.tokens = tokens
    found = routes._see(0, logits, Routed(logits, best.values, best.indices))
    assert torch.equal(found.chosen[:tokens], best.indices[:tokens])
    assert torch.equal(found.weights[:tokens], best.values[:tokens])
    shares = torch.bincount(found.chosen[tokens:].flatten(), minlength=4) / tokens
    np.testing.assert_allclose(shares, (logits[0] / tau).softmax(-1), atol=0.012)
    torch.testing.assert_close(found.weights[tokens:], logits[tokens:].softmax(-1).gather(1, found.chosen[tokens:]))


def test_layers_and_tokens_get_noise_of_their_own():
    same = Routed(torch.zeros(48, 8), torch.full((48, 2), 1 / 8), torch.tensor([[0, 1]] * 48))
    two = Routes(None, [Shares(), Shares()], 2, (1.0, 1.0), seed=0)
    two.tokens = 24
    first, second = (two._see(layer, same.logits, same).chosen[24:] for layer in range(2))
    assert not torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) > 5


def test_routers_are_weighed_as_they_weigh(model, ids):
    seen, routers = [], routers_of(model, NAME)
    with torch.no_grad(), at_routers(routers, lambda layer, x, routed: seen.append(routed)):
        model(ids[None])
    assert len(seen) == len(routers)
    for router, routed in zip(routers, seen):
        rule = weighing(router)
        torch.testing.assert_close(rule(routed.logits, routed.chosen), routed.weights, rtol=1e-4, atol=1e-5)
        swapped = rule(routed.logits, routed.chosen.flip(1))
        torch.testing.assert_close(swapped.flip(1), routed.weights, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="does not know how a Shares"):
        weighing(Shares(lambda logits, dim: logits.sigmoid()))


def test_averages_by_their_formulas():
    logits = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) * 3
    x = logits.numpy().astype(np.float64)
    shares = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    found = averaged(logits, "probabilities")
    np.testing.assert_allclose(found.softmax(-1), shares.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.exp().sum(-1), np.exp(x[:, 0]).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(averaged(logits, "logits"), x.mean(1), rtol=1e-4, atol=1e-5)


def test_noise_is_as_the_settings_say(mixture):
    assert RoE(tau=0.3).routes(mixture).taus == [0.0, 0.3, 0.3, 0.0]
    assert RoE(tau=0.3, ends=True).routes(mixture).taus == [0.3] * 4
    assert RoE(tau=0.3).routes(mixture, (1, 0, 0, 2)).taus == (1, 0, 0, 2)


def test_tuned_noise_is_never_worse_on_the_texts_it_was_tuned_on(mixture, deep_work):
    texts = [batch["input_ids"] for batch in deep_work.validation]
    settings = RoE(samples=3)
    taus = settings.tuned(mixture, texts, trials=6)
    assert len(taus) == 4

    def loss(taus):
        return sum(next_token_loss(settings.logits(mixture, ids, taus), ids) for ids in texts)

    assert loss(taus) <= loss((0.0,) * 4)


def test_what_a_token_costs(mixture, deep_work):
    attention, head, router = 32 * 32 * 2 + 32 * 16 * 2, 64 * 32, 8 * 32
    weights = 4 * (attention + router + 2 * 3 * 12 * 32) + head
    assert RoE(samples=1).cost(mixture, 10).flops == 2 * weights
    cost = RoE(samples=3).cost(mixture, 10)
    assert cost.flops == 6 * weights
    assert cost.kv_bytes == RoE(samples=1).cost(mixture, 10).kv_bytes == 4 * 2 * 10 * 16 * 4
    assert cost.experts == 6
    assert RoE(samples=9).cost(mixture, 10).experts == 8


# --- generate ------------------------------------------------------------------------------------------------------


def test_noise_by_layer_and_streamers_are_taken_by_generate(mixture, ids):
    from lilliput.serving import accelerated

    class Ear:
        def __init__(self):
            self.heard = []

        def put(self, tokens):
            self.heard += tokens.flatten().tolist()

        def end(self):
            self.heard.append("end")

    plain = written(mixture, ids, do_sample=False)
    quiet = written(mixture, ids, RoE(samples=3, tau=5.0), do_sample=False, taus=(0.0,) * 4)
    assert torch.equal(quiet, plain)
    ear = Ear()
    with accelerated(mixture, RoE(samples=1)):
        mixture.generate(ids[None], max_new_tokens=14, do_sample=False, streamer=ear)
    assert ear.heard[-15:] == [*plain[0, 24:].tolist(), "end"]


def test_what_it_cannot_do_is_refused_with_the_way_out(mixture, deep_work, ids):
    with pytest.raises(UserError, match=r"taus are.*give 4 numbers"):
        written(mixture, ids, RoE(), taus=(1.0,))
    with pytest.raises(UserError, match="taus are"):
        RoE().routes(mixture, (0, 0, 0, -1.0))
    with pytest.raises(UserError, match=r"experts\.upcycle"):
        written(deep_work.model, ids, RoE())
    with pytest.raises(UserError, match="this decoder takes one prompt"):
        mixture.generate(ids.repeat(2, 1), custom_generate=RoE(), max_new_tokens=2)
    with pytest.raises(UserError, match="keeps its own keys"):
        written(mixture, ids, RoE(), past_key_values=DynamicCache())
    with pytest.raises(UserError, match=r"model\.eval"):
        written(mixture.train(), ids, RoE())
    sliding = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=4, sliding_window=8)  # fmt: skip
    with pytest.raises(UserError, match="sliding_attention"):
        RoE().logits(MixtralForCausalLM(sliding).eval(), ids[None])


def test_upcycled_copies_have_routes_too(deep_work, ids):
    copies = Upcycle(experts=4, top_k=1, how="copy", noise=0.5, steps=0).apply(deep_work.model, deep_work)
    assert not torch.allclose(LOUD.logits(copies, ids[None]), plain_logits(copies, ids[None]), atol=1e-3)
