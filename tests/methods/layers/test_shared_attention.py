"""Layers that reuse attention: against numpy, cached as uncached, and spans that are the best there are."""

import copy
import itertools

import numpy as np
import pytest
import span_models
import torch
from span_models import build, names, work_of
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

from lilliput.anatomy import anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.kernels.decoder_parts import refusals
from lilliput.methods.cache._cache import held_bytes
from lilliput.methods.cache.sliding import Sliding
from lilliput.methods.distill.logits import Logits
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.layers._known import known_attentions
from lilliput.methods.layers._span_layers import LeadingAttention, ReusingAttention, handed_on, probabilities
from lilliput.methods.layers._spans import UNFIT, followers, similarities, spans
from lilliput.methods.layers.shared_attention import SharedAttention
from lilliput.methods.layers.shared_kv import SharedKv
from lilliput.methods.quantize.group import Group
from lilliput.serving import native_sampling

BOTH = [SharedAttention, SharedKv]
OTHERS = [
    (Qwen2ForCausalLM, Qwen2Config, {}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    (GemmaForCausalLM, GemmaConfig, {}),
]


@pytest.fixture
def work():
    return work_of(build())


@pytest.mark.parametrize("layers", [(1,), (4,), (2, 3), (1, 3, 4)])
@pytest.mark.parametrize(("method", "reuses"), [(SharedAttention, "probabilities"), (SharedKv, "states")])
def test_logits_are_those_of_numpy(work, method, reuses, layers):
    model = method().apply(work.model, layers=names(*layers))
    source = {i: max(j for j in range(i) if j not in layers) for i in layers}
    ids = work.test[0]["input_ids"]
    with torch.no_grad():
        found = model(ids).logits
    for row in (0, 3):
        expected = span_models.logits(work.model, ids[row], source, reuses)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(("kind", "config", "changes"), OTHERS)
def test_the_first_layer_of_a_span_attends_as_ever(method, kind, config, changes):
    """In other families too, whose biases, windows and scales go along."""
    model = build(kind, config, **changes)
    work, outputs = work_of(model), []
    for one in (model, method().apply(model, layers=names(3))):
        one.model.layers[2].register_forward_hook(lambda _, args, out: outputs.append(out))
        with torch.no_grad():
            one(work.test[0]["input_ids"])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str
)
def test_cached_tokens_are_uncached_tokens(work, method, options):
    model = method(share=0.6, choice="last").apply(work.model)
    ids = work.test[0]["input_ids"][:2, :10]
    plain = {"max_new_tokens": 12, "do_sample": False} | {k: v for k, v in options.items() if k == "num_beams"}
    expected = model.generate(ids, use_cache=False, **plain)
    assert torch.equal(model.generate(ids, **plain | options, disable_compile=True), expected)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(("kind", "config", "changes"), [OTHERS[0], OTHERS[1]])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_padded_on_the_left_give_the_tokens_they_give_alone(method, kind, config, changes, implementation):
    model = build(kind, config, **changes)
    model.set_attn_implementation(implementation)
    model = method(share=0.4, choice="last").apply(model)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    options = {"max_new_tokens": 10, "do_sample": False}
    with_cache, without = (model.generate(ids, attention_mask=mask, use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache[:1, 5:], model.generate(ids[:1, 5:], **options))


@pytest.mark.parametrize(("method", "kept"), [(SharedAttention, 10 - 2), (SharedKv, 10 - 4)])
def test_the_cache_holds_nothing_that_is_reused(work, method, kept):
    """Two of five layers lack their keys, or keys and values: that many of ten parts are left."""
    model = method().apply(work.model, layers=names(2, 3))
    sizes = []
    for one in (work.model, model):
        cache = DynamicCache(config=one.config)
        one(work.test[0]["input_ids"], past_key_values=cache, use_cache=True)
        sizes.append(held_bytes(cache))
    assert sizes[1] * 10 == sizes[0] * kept


@pytest.mark.parametrize("method", BOTH)
def test_the_native_decoder_leaves_it_to_transformers_with_a_warning(work, method):
    model = method().apply(work.model, work)
    assert "no attention of its own" in refusals(model)[0]
    ids = work.test[0]["input_ids"][:1, :8]
    options = {"max_new_tokens": 6, "do_sample": False}
    with pytest.warns(UserWarning, match="no attention of its own"):
        found = model.generate(ids, custom_generate=native_sampling, **options)
    assert torch.equal(found, model.generate(ids, **options))


# --- artifacts and other methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("other", [None, Group(group=32), LowRank(whiten="none")], ids=str)
def test_it_loads_as_it_was_saved_with_layers_replaced_before_and_after(work, method, other, tmp_path):
    model = copy.deepcopy(work.model)
    if isinstance(other, LowRank):
        model = other.apply(model)
    model = method(choice="last").apply(model)
    if isinstance(other, Group):
        model = other.apply(model)
    folder = save(model, tmp_path / "shared", work)
    ids = work.test[0]["input_ids"]
    for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(again(ids).logits, model(ids).logits)
        kinds = [type(layer.self_attn).__name__ for layer in again.model.layers]
        assert kinds == [type(layer.self_attn).__name__ for layer in model.model.layers]


@pytest.mark.parametrize("method", BOTH)
def test_gradients_reach_the_first_layer_through_what_it_hands_on(work, method):
    model = method().apply(work.model, layers=names(3))
    first = model.model.layers[2].self_attn
    with torch.no_grad():
        first.o_proj.weight.zero_()  # its own output is cut off
    work.loss(model, work.test[0]).backward()
    assert float(first.k_proj.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("method", BOTH)
def test_distillation_heals(work, method):
    model = method().apply(work.model, layers=names(3))
    work.training = work.calibration
    healed = Logits(steps=120, lr=3e-3).apply(model, work)
    batch = work.calibration[0]
    with torch.no_grad():
        far, near = (
            (work.forward(m, batch) - work.forward(work.model, batch)).square().mean() for m in (model, healed)
        )
    assert near < 0.8 * far


def test_blocks_stay_blocks(work):
    found = anatomy(SharedAttention(share=0.6).apply(work.model, work))
    assert len(found.blocks) == 5
    assert found.kind == "llama"
    assert sum(b.attention is None for b in found.blocks) == 3
    assert all(b.mlp for b in found.blocks)


@pytest.mark.parametrize("method", BOTH)
def test_a_conversion_may_go_layer_by_layer(work, method):
    """From the last layer down, which moves the first of the span: the same model as at once."""
    at_once = method().apply(work.model, layers=names(2, 3, 4))
    gradual = work.model
    for layer in (4, 3, 2):
        gradual = method().apply(gradual, layers=names(layer))
    ids = work.test[0]["input_ids"]
    assert torch.equal(gradual(ids).logits, at_once(ids).logits)
    with pytest.raises(UserError, match="name the layers"):
        method(choice="similar").apply(gradual, work)


# --- which layers ----------------------------------------------------------------------------------------------------


def best_by_trying(similarity, count):
    """The largest sum over every choice of `count` layers."""
    layers = len(similarity)
    found = []
    for chosen in itertools.combinations(range(1, layers), count):
        leads = [max(j for j in range(i) if j not in chosen) for i in chosen]
        found.append(sum(float(similarity[j, i]) for i, j in zip(chosen, leads)))
    return max(found)


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("seed", range(4))
def test_spans_are_the_best_of_all(count, seed):
    similarity = torch.rand(7, 7, generator=torch.Generator().manual_seed(seed))
    found = spans(similarity, count)
    assert len(found) == count
    assert set(found) == {i for i in found if found[i] == max(j for j in range(i) if j not in found)}
    total = sum(float(similarity[j, i]) for i, j in found.items())
    assert total == pytest.approx(best_by_trying(similarity, count))


def test_layers_that_cannot_serve_each_other_are_not_paired():
    similarity = torch.full((4, 4), UNFIT)
    similarity[2, 3] = 0.1
    assert spans(similarity, 1) == {3: 2}
    with pytest.raises(UserError, match="2 of 4 layers cannot reuse"):
        spans(similarity, 2)


def test_similarity_is_the_cosine_of_attention_matrices(work):
    """A layer with the queries and keys of the one before it attends alike only as far as its input is alike."""
    model = copy.deepcopy(work.model)
    found = similarities(model, work, known_attentions(model, "x"))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    expected = 0
    for batch in work.calibration:
        with torch.no_grad():
            attention = model(batch["input_ids"], output_attentions=True).attentions
        a, b = attention[1].flatten(2), attention[3].flatten(2)
        expected += float(((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()) / len(work.calibration)
    assert float(found[1, 3]) == pytest.approx(expected, rel=1e-5)
    assert torch.isinf(found.tril()[found.tril() != 0]).all()


def test_a_layer_that_attends_as_the_one_before_is_chosen(work):
    """Layer 2 adds nothing to the stream, so that layer 3, a copy of its queries and keys, sees the same."""
    model = work.model
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        for name in ("self_attn.q_proj", "self_attn.k_proj", "input_layernorm"):
            source, target = (model.model.layers[i].get_submodule(name) for i in (2, 3))
            target.load_state_dict(source.state_dict())
    shared = SharedAttention(share=0.2).apply(model, work)
    assert isinstance(shared.model.layers[2].self_attn, LeadingAttention)
    assert isinstance(shared.model.layers[3].self_attn, ReusingAttention)
    for batch in work.test:
        torch.testing.assert_close(work.forward(shared, batch), work.forward(model, batch), rtol=1e-3, atol=1e-3)


def test_followers_follow_the_nearest_that_does_not():
    assert followers(["a", "b", "c", "d", "e"], ["b", "d", "e"]) == {"b": "a", "d": "c", "e": "c"}


def test_masked_probabilities_are_zero_and_finite_without_any_key():
    query, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    mask = torch.rand(1, 1, 3, 5) > 0.5
    mask[..., 0], mask[0, 0, 1] = True, False
    found = probabilities(query, keys, mask, 0.3)
    assert (found[:, :, [0, 2]][~mask[:, :, [0, 2]].expand(1, 4, 2, 5)] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 4, 3))
    added = probabilities(query, keys, torch.where(mask, 0.0, torch.finfo(torch.float32).min), 0.3)
    torch.testing.assert_close(found[:, :, [0, 2]], added[:, :, [0, 2]])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
def test_bad_input(work, method, tiny_cnn):
    with pytest.raises(UserError, match=r"cannot change 'model\.layers\.0\.self_attn'"):
        method().apply(work.model, layers=names(0))
    with pytest.raises(UserError, match="needs a workload to compare"):
        method(choice="similar").apply(work.model)
    with pytest.raises(UserError, match="works on transformer blocks"):
        method().apply(tiny_cnn, work)
    with pytest.raises(UserError, match="is a Gemma3Attention"):
        method().apply(build(Gemma3ForCausalLM, Gemma3TextConfig), work)
    one = method().apply(work.model, work)
    other = SharedKv if method is SharedAttention else SharedAttention
    with pytest.raises(UserError, match=r"is a (Leading|Lending)Attention"):
        other().apply(one, work)


def test_layers_with_other_windows_do_not_share():
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    changes = {"layer_types": kinds, "sliding_window": 6, "use_sliding_window": True}
    model = build(Qwen2ForCausalLM, Qwen2Config, **changes)
    with pytest.raises(UserError, match="heads or windows differ"):
        SharedAttention().apply(model, layers=names(2))
    work = work_of(model)
    shared = SharedAttention(share=0.6).apply(model, work)
    assert [isinstance(layer.self_attn, ReusingAttention) for layer in shared.model.layers] == [
        False, True, False, True, True,
    ]  # fmt: skip
    ids = work.test[0]["input_ids"][:1, :10]
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(shared.generate(ids, **options), shared.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("method", BOTH)
def test_cache_policies_are_refused_with_what_to_use(work, method):
    model = method().apply(work.model, work)
    with pytest.raises(UserError, match="use transformers' cache"):
        model.generate(work.test[0]["input_ids"], past_key_values=Sliding(budget=8).cache(model), max_new_tokens=2)


def test_without_a_layer_that_hands_on_there_is_an_error():
    with pytest.raises(UserError, match="layer 3 reuses what an earlier layer computes"):
        handed_on(torch.zeros(1), 3)
