"""Fewer key-value heads: exact where the old ones are related, the best fit elsewhere, and a cache that is smaller."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lilliput.anatomy import anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.cache._cache import held_bytes
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.layers.kv_heads import KvHeads, exchanged, mean_map, pair_moments, svd_map
from lilliput.plan import Plan, Step
from lilliput.serving import native_sampling
from lilliput.workload import Workload, windows

HEADS, KV_HEADS, DIM, WIDTH = 8, 4, 8, 32
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)]


def build(kind, config, **changes):
    torch.manual_seed(0)
    model = kind(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def work_of(model):
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]), source=source)


@pytest.fixture
def work():
    return work_of(build(*KINDS[0]))


def parts(layer):
    """(kv heads, d, inputs and bias) of a projection."""
    bias = [] if layer.bias is None else [layer.bias[:, None]]
    return torch.cat([layer.weight, *bias], 1).unflatten(0, (-1, DIM))


@torch.no_grad()
def relate_(model, pairs):
    """Make the second head of each pair a copy of the first but for what one head can stand for: turned and stretched
    rotary pairs of the keys, and a square matrix on the values."""
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        keys, values = layer.self_attn.k_proj, layer.self_attn.v_proj
        k, v = parts(keys), parts(values)
        for one, other in pairs:
            factor = torch.randn(DIM // 2, 1, 2, generator=generator)
            z = torch.complex(*k[one].chunk(2)) * torch.complex(factor[..., 0], factor[..., 1])
            k[other] = torch.cat([z.real, z.imag])
            v[other] = torch.randn(DIM, DIM, generator=generator) @ v[one]
        for projection, rows in ((keys, k.flatten(0, 1)), (values, v.flatten(0, 1))):
            projection.weight.copy_(rows[:, :WIDTH])
            if projection.bias is not None:
                projection.bias.copy_(rows[:, -1])


@pytest.mark.parametrize(("kind", "config"), KINDS)
@pytest.mark.parametrize("pairs", [((0, 1), (2, 3)), ((0, 2), (3, 1))], ids=["neighbours", "apart"])
def test_heads_that_one_can_stand_for_are_merged_without_loss(kind, config, pairs):
    model = build(kind, config)
    relate_(model, pairs)
    work = work_of(model)
    small = KvHeads(heads=2).apply(model, work)
    for batch in work.test:
        expected = work.forward(model, batch)
        torch.testing.assert_close(work.forward(small, batch), expected, rtol=1e-3, atol=1e-3)
    if pairs == ((0, 2), (3, 1)):
        blind = KvHeads(heads=2, grouping="adjacent").apply(model, work)
        assert (work.forward(blind, work.test[0]) - work.forward(model, work.test[0])).abs().max() > 0.1


def cached(model, work):
    """Keys, after RoPE, and values (kv heads, tokens, d) of the first layer on the calibration data."""
    keys, values = [], []
    for batch in work.calibration:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True)
        keys.append(cache.layers[0].keys.transpose(0, 1).flatten(1, 2))
        values.append(cache.layers[0].values.transpose(0, 1).flatten(1, 2))
    return torch.cat(keys, 1).double().numpy(), torch.cat(values, 1).double().numpy()


def test_what_is_cached_is_numpys_best_fit_of_what_was_cached(work):
    """Keys and values reconstructed from the smaller cache miss the old ones by the singular values left out alone."""
    small = KvHeads(heads=1).apply(work.model, work)
    (keys, values), (new_keys, new_values) = cached(work.model, work), cached(small, work)
    z, s = (x[..., : DIM // 2] + 1j * x[..., DIM // 2 :] for x in (keys, new_keys))
    for j in range(DIM // 2):
        left_out = np.linalg.svd(z[:, :, j])[1][1:]
        up = z[:, :, j] @ s[0, :, j].conj() / np.square(np.abs(s[0, :, j])).sum()
        missed = np.square(np.abs(z[:, :, j] - up[:, None] * s[0, :, j])).sum()
        assert missed == pytest.approx(np.square(left_out).sum(), rel=1e-4)
    stacked = np.concatenate(list(values), 1)
    back = np.linalg.lstsq(new_values[0], stacked, rcond=None)[0]
    missed = np.square(stacked - new_values[0] @ back).sum()
    assert missed == pytest.approx(np.square(np.linalg.svd(stacked)[1][DIM:]).sum(), rel=1e-4)


def test_the_mean_is_the_mean_and_leaves_queries_alone(work):
    small = KvHeads(heads=2, fit="mean", grouping="adjacent").apply(work.model)
    old, new = (model.model.layers[1].self_attn for model in (work.model, small))
    for name in ("k_proj", "v_proj"):
        expected = getattr(old, name).weight.unflatten(0, (2, 2, DIM)).mean(1).flatten(0, 1)
        torch.testing.assert_close(getattr(new, name).weight, expected)
    for name in ("q_proj", "o_proj"):
        torch.testing.assert_close(getattr(new, name).weight, getattr(old, name).weight)


def test_fitted_heads_miss_less_than_the_mean(work):
    rows = torch.randn(500, 3 * DIM, generator=torch.Generator().manual_seed(0)).double()
    gram = (rows.T @ rows / 500).view(3, DIM, 3, DIM)

    def missed(one):
        down = torch.cat(list(one.value_down), 1)
        up = torch.cat(list(one.value_up), 0)
        return float((rows - rows @ down.T @ up.T).square().sum())

    assert missed(svd_map(gram, gram)) < missed(mean_map(3, DIM))


def test_moments_of_rotary_pairs_are_those_of_complex_numbers():
    rows = torch.randn(50, 3, DIM, generator=torch.Generator().manual_seed(1)).double()
    z = torch.complex(rows[..., : DIM // 2], rows[..., DIM // 2 :])
    expected = torch.einsum("nij,nlj->jil", z, z.conj())
    flat = rows.flatten(1)
    torch.testing.assert_close(pair_moments((flat.T @ flat).view(3, DIM, 3, DIM)), expected)


def test_exchanges_find_the_best_pairs():
    weights = torch.rand(6, 6, generator=torch.Generator().manual_seed(3))

    def lost(group):
        return float(sum(weights[a, b] for a, b in itertools.combinations(group, 2)))

    found = exchanged([(0, 1), (2, 3), (4, 5)], lost)
    assert sorted(itertools.chain(*found)) == list(range(6))
    singles = [frozenset(map(frozenset, zip(p[::2], p[1::2]))) for p in itertools.permutations(range(6))]
    best = min(sum(lost(tuple(sorted(g))) for g in groups) for groups in set(singles))
    assert sum(map(lost, found)) == pytest.approx(best)


# --- as a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
def test_the_cache_is_as_much_smaller_and_the_config_says_so(work, heads):
    small = KvHeads(heads=heads).apply(work.model, work)
    sizes = []
    for model in (work.model, small):
        cache = DynamicCache(config=model.config)
        model(work.test[0]["input_ids"], past_key_values=cache, use_cache=True)
        sizes.append(held_bytes(cache))
    assert sizes[1] * KV_HEADS == sizes[0] * heads
    assert small.config.num_key_value_heads == heads
    assert work.model.config.num_key_value_heads == KV_HEADS


def test_cached_tokens_are_uncached_tokens_padded_or_not(work):
    small = KvHeads(heads=1).apply(work.model, work)
    ids = work.test[0]["input_ids"][:2, :10].clone()
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    options = {"max_new_tokens": 12, "do_sample": False}
    with_cache, without = (small.generate(ids, attention_mask=mask, use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache[:1, 4:], small.generate(ids[:1, 4:], **options))
    native = small.generate(ids, attention_mask=mask, custom_generate=native_sampling, **options)
    assert torch.equal(with_cache, native)


def test_it_loads_as_an_ordinary_model(work, tmp_path):
    plan = Plan([Step(KvHeads(heads=2))])
    small = plan.apply(work)
    folder = save(small, tmp_path / "small", work, plan)
    ids = work.test[0]["input_ids"]
    for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert again.config.num_key_value_heads == 2
        assert torch.equal(again(ids).logits, small(ids).logits)
    small.save_pretrained(tmp_path / "plain")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(ids).logits, small(ids).logits)


def test_layers_may_differ_and_then_the_config_stays(work, tmp_path):
    one = KvHeads(heads=2).apply(work.model, work, layers={"model.layers.1.self_attn": {"heads": 1}})
    assert [b.attention.kv_heads for b in anatomy(one).blocks] == [KV_HEADS, 1]
    assert one.config.num_key_value_heads == KV_HEADS
    ids = work.test[0]["input_ids"]
    again = load(save(one, tmp_path / "one", work))
    assert torch.equal(again(ids).logits, one(ids).logits)
    same = KvHeads(heads=KV_HEADS).apply(work.model, work)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), work.model.parameters(), strict=True))


def test_random_groups_follow_the_seed(work):
    found = [KvHeads(heads=2, grouping="random", seed=s).apply(work.model, work) for s in (0, 0, 1, 2, 3)]
    rows = [model.model.layers[0].self_attn.k_proj.weight for model in found]
    assert torch.equal(rows[0], rows[1])
    assert any(not torch.equal(rows[0], other) for other in rows[2:])


@pytest.mark.parametrize("heads", [3, 8])
def test_heads_that_do_not_divide_are_refused(work, heads):
    with pytest.raises(UserError, match=r"heads is .* has 4 key-value heads; give one of 1, 2, 4"):
        KvHeads(heads=heads).apply(work.model, work)


def test_other_models_and_replaced_layers_are_refused(work, tiny_cnn):
    torch.manual_seed(0)
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES))
    with pytest.raises(UserError, match="is a Gemma3Attention"):
        KvHeads().apply(gemma, work)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match="is a GPT2Attention"):
        KvHeads().apply(gpt2, work)
    with pytest.raises(UserError, match="works on transformer blocks"):
        KvHeads().apply(tiny_cnn)
    with pytest.raises(UserError, match="low-rank factors"):
        KvHeads().apply(LowRank(whiten="none").apply(work.model), work)
    with pytest.raises(UserError, match="needs a workload to see keys and values"):
        KvHeads().apply(work.model)
    with pytest.raises(UserError, match="finds no layer"):
        KvHeads().apply(KvHeads().apply(work.model, work), work)
