"""Heads that share queries or states: against numpy and the ordinary attention that has them all, cached and saved."""

import copy

import numpy as np
import pytest
import span_models
import torch
from span_models import build, names, work_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lilliput.anatomy import Attention, anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.kernels.decoder_parts import refusals
from lilliput.methods.cache._cache import held_bytes
from lilliput.methods.cache.sliding import Sliding
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.layers._grouped_vision import GroupedSelfAttention
from lilliput.methods.layers._span_layers import GroupedAttention, spread
from lilliput.methods.layers.gqkva import Gqkva, possible
from lilliput.methods.layers.kv_heads import KvHeads
from lilliput.methods.prune.heads import Heads
from lilliput.methods.quantize.group import Group
from lilliput.training import train
from lilliput.workload import Workload
from lilliput.zoo import nets

OTHERS = [
    (Qwen2ForCausalLM, Qwen2Config, {}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    (GemmaForCausalLM, GemmaConfig, {}),
]


def many_heads(heads=4, kv_heads=4):
    return Attention("a", "a.q", "a.k", "a.v", "a.o", heads, kv_heads, 8)


@pytest.fixture
def work():
    return work_of(build(num_key_value_heads=4))


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return nets.vit(dim=32, layers=3, heads=4).eval()


def expanded(model, grouped):
    """The ordinary Llama whose heads repeat what heads of `grouped` share: the definition, written as loops."""
    full, d = copy.deepcopy(model), span_models.DIM
    for new, old in zip(full.model.layers, grouped.model.layers):
        rows = {n: getattr(old.self_attn, f"{n}_proj").weight.detach().split(d) for n in "qkv"}
        q = [rows["q"][n % len(rows["q"])] for n in range(4)]
        k, v = ([rows[x][n // (4 // len(rows[x]))] for n in range(4)] for x in "kv")
        for name, parts in (("q", q), ("k", k), ("v", v)):
            getattr(new.self_attn, f"{name}_proj").weight = nn.Parameter(torch.cat(parts))
    return full


@pytest.mark.parametrize(("queries", "states"), possible(many_heads()))
def test_heads_are_pairs_of_the_distinct_ones(work, queries, states):
    model = Gqkva(queries=queries, states=states).apply(work.model)
    attention = model.model.layers[0].self_attn
    assert [getattr(attention, f"{n}_proj").out_features // 8 for n in "qkvo"] == [queries, states, states, 4]
    ids, full = work.test[0]["input_ids"], expanded(work.model, model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
        expected = span_models.logits(full, ids[1], {}, "states")
    np.testing.assert_allclose(model(ids).logits[1].detach().numpy(), expected, rtol=1e-3, atol=2e-3)


def test_all_pairs_are_different_heads():
    for heads, kv_heads in ((8, 8), (6, 6), (12, 4), (6, 2)):
        for q, s in possible(many_heads(heads, kv_heads)):
            pairs = {(n % q, n // (heads // s)) for n in range(heads)}
            assert len(pairs) == heads
    asked = torch.arange(3.0).view(1, 3, 1, 1)
    assert spread(asked, 6).flatten().tolist() == [0, 1, 2, 0, 1, 2]


def test_multi_query_attention_is_the_familiar_one(work):
    """It stays an ordinary model, equal to that of layers.kv_heads, which takes the mean of the heads too."""
    model = Gqkva(queries=4, states=1).apply(work.model)
    other = KvHeads(heads=1, fit="mean", grouping="adjacent").apply(work.model)
    ids = work.test[0]["input_ids"]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    assert model.config.num_key_value_heads == 1
    assert refusals(model) == []


@pytest.mark.parametrize(("init", "expected"), [("mean", 0.5), ("first", 1.0)])
def test_untrained_heads_keep_their_width_only_when_one_is_taken(init, expected):
    model = nets.vit(dim=256, layers=1, heads=16)
    made = Gqkva(queries=4, states=4, init=init).apply(model)
    for name in "qkv":
        new, old = (getattr(m.blocks[0].attn, name).weight.std() for m in (made, model))
        assert float(new / old) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "best"),
    [(4, 4, (2, 2)), (4, 1, (4, 1)), (8, 8, (4, 2)), (6, 2, (3, 2)), (12, 12, (4, 3)), (7, 7, (7, 1))],
)
def test_by_default_the_pair_with_the_fewest_weights_is_taken(heads, kv_heads, best):
    assert Gqkva().groups(many_heads(heads, kv_heads)) == best
    assert Gqkva(states=1).groups(many_heads(heads, kv_heads)) == (heads, 1)


# --- vision transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "states"), possible(many_heads()))
def test_pictures_are_seen_by_pairs_too(vit, queries, states):
    x = torch.randn(2, 1, 28, 28)
    for block in vit.blocks:  # attention that is not uniform
        block.attn.q.weight.data.mul_(8)
    model, full = Gqkva(queries=queries, states=states).apply(vit), copy.deepcopy(vit)
    for new, old in zip(full.blocks, model.blocks):
        asked, seen = [n % queries for n in range(4)], [n // (4 // states) for n in range(4)]
        for name, order in (("q", asked), ("k", seen), ("v", seen)):
            source, target = getattr(old.attn, name), getattr(new.attn, name)
            for part in ("weight", "bias"):
                pieces = getattr(source, part).detach().split(8)
                setattr(target, part, nn.Parameter(torch.cat([pieces[i] for i in order])))
    torch.testing.assert_close(model(x), full(x), rtol=1e-4, atol=1e-4)


def test_a_vision_transformer_is_trained_and_saved(vit, tmp_path):
    x, label = torch.randn(8, 1, 28, 28), torch.arange(8)
    batches = [{"input": x, "label": label}]
    work = Workload.classifier(vit, batches, batches, batches, training=batches)
    model = Gqkva(init="first").apply(vit)
    history = train(model, batches, work.loss, steps=60, lr=3e-3)
    assert history.losses[-1] < 0.5 * history.losses[0]
    again = load(save(model, tmp_path / "grouped", work), model=nets.vit(dim=32, layers=3, heads=4))
    assert isinstance(again.blocks[0].attn, GroupedSelfAttention)
    assert torch.equal(again(x), model.eval()(x))
    assert len(anatomy(model).blocks) == 3
    assert anatomy(model).kind == "vit"


# --- generation and artifacts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config", "changes"), OTHERS)
def test_other_families_give_the_same_with_all_groups_of_one(kind, config, changes):
    """Biases, windows and scales go along: with all queries alike, sharing them changes nothing."""
    model = build(kind, config, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            q = layer.self_attn.q_proj
            q.weight.copy_(q.weight[:16].repeat(2, 1))
            if q.bias is not None:
                q.bias.copy_(q.bias[:16].repeat(2))
    ids = work_of(model).test[0]["input_ids"]
    grouped = Gqkva(queries=2, states=2).apply(model)
    assert isinstance(grouped.model.layers[0].self_attn, GroupedAttention)
    torch.testing.assert_close(grouped(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str
)
def test_cached_tokens_are_uncached_tokens(work, options):
    model = Gqkva().apply(work.model)
    ids = work.test[0]["input_ids"][:2, :10]
    plain = {"max_new_tokens": 12, "do_sample": False} | {k: v for k, v in options.items() if k == "num_beams"}
    expected = model.generate(ids, use_cache=False, **plain)
    assert torch.equal(model.generate(ids, **plain | options, disable_compile=True), expected)


def test_the_cache_holds_the_distinct_states(work):
    sizes = {}
    for states in (1, 2, 4):
        cache = DynamicCache(config=work.model.config)
        model = Gqkva(queries=4, states=states).apply(work.model)
        model(work.test[0]["input_ids"], past_key_values=cache, use_cache=True)
        sizes[states] = held_bytes(cache)
    assert sizes[4] == 2 * sizes[2] == 4 * sizes[1]


@pytest.mark.parametrize("other", [None, Group(group=32), LowRank(whiten="none")], ids=str)
def test_it_loads_as_it_was_saved(work, other, tmp_path):
    model = Gqkva().apply(work.model, layers=names(0, 2, 3))
    model = other.apply(model) if other else model
    folder = save(model, tmp_path / "grouped", work)
    ids = work.test[0]["input_ids"]
    for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(again(ids).logits, model(ids).logits)
        kinds = [type(layer.self_attn).__name__ for layer in again.model.layers]
        assert kinds == [type(layer.self_attn).__name__ for layer in model.model.layers]


def test_what_cannot_know_about_shared_queries_leaves_them_alone(work):
    model = Gqkva().apply(work.model)
    assert all(b.attention is None and b.mlp for b in anatomy(model).blocks)
    assert "no attention of its own" in refusals(model)[0]
    with pytest.raises(UserError, match="finds no layer"):
        Heads().apply(model, work)
    with pytest.raises(UserError, match="use transformers' cache"):
        model.generate(work.test[0]["input_ids"], past_key_values=Sliding(budget=8).cache(model), max_new_tokens=2)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_input(work, tiny_cnn):
    with pytest.raises(UserError, match=r"queries=2, states=1 do not give 4 different heads.*2 and 2"):
        Gqkva(queries=2, states=1).apply(work.model)
    with pytest.raises(UserError, match="queries=3"):
        Gqkva(queries=3).apply(work.model)
    with pytest.raises(UserError, match=r"queries is 2\.0; give a whole number"):
        Gqkva(queries=2.0).apply(work.model)
    with pytest.raises(UserError, match="works on transformer blocks"):
        Gqkva().apply(tiny_cnn)
    with pytest.raises(UserError, match="is a Gemma3Attention"):
        Gqkva().apply(build(Gemma3ForCausalLM, Gemma3TextConfig))
    with pytest.raises(UserError, match="has become low-rank factors"):
        Gqkva().apply(LowRank(whiten="none").apply(work.model))
