"""The contract of every cache policy: with room for the text nothing changes; without, it forgets and holds less."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lilliput.errors import UserError
from lilliput.method import CachePolicy, find_method, method_names
from lilliput.methods.cache._cache import held_bytes

NAMES = [name for name in method_names() if issubclass(find_method(name), CachePolicy)]
SMALL = {
    "cache.h2o": {"budget": 8},
    "cache.infinipot": {"budget": 8, "window": 2},
    "cache.low_bit": {"residual": 4, "group": 16},
    "cache.roco": {"budget": 8},
    "cache.sliding": {"budget": 8},
}
EVICTING = [name for name in NAMES if "budget" in SMALL[name]]
REFUSED = {
    ("cache.infinipot", GPT2LMHeadModel): "no rotary positions",
    ("cache.infinipot", Gemma3ForCausalLM): "sliding_attention",
}
PIECE = 4  # tokens of a prompt at a time, which fits every small policy
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1}

every_policy = pytest.mark.parametrize("name", NAMES)


def roomy(name):
    return find_method(name)()


def small(name):
    return find_method(name)(**SMALL[name])


@pytest.fixture
def model(sharp_llama):
    """It never ends a text by itself."""
    sharp_llama.generation_config.eos_token_id = None
    sharp_llama.generation_config.pad_token_id = 0
    return sharp_llama


@pytest.fixture
def ids():
    return torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(3))


def generate(model, ids, cache=None, tokens=16, **options):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, past_key_values=cache, **options)


# --- with room for the text ------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 7}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_with_room_tokens_are_those_of_a_plain_cache(name, model, ids, options):
    expected = generate(model, ids, **{k: v for k, v in options.items() if k != "prefill_chunk_size"})
    assert torch.equal(generate(model, ids, roomy(name).cache(model), **options), expected)


@every_policy
def test_with_room_logits_are_those_of_a_plain_cache(name, model, ids):
    cache, plain = roomy(name).cache(model), DynamicCache()
    for piece in ids.split((9, 1, 1, 6, 3), 1):
        found, expected = (model(piece, past_key_values=used).logits for used in (cache, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20


@every_policy
def test_it_fits_other_decoders_or_says_why_not(name, ids):
    torch.manual_seed(0)
    mixed = Gemma3TextConfig(**LLAMA_LIKE, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    models = [
        Gemma3ForCausalLM(mixed),
        Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE)),
        GemmaForCausalLM(GemmaConfig(**LLAMA_LIKE)),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    ]
    for other in models:
        other.eval().generation_config.eos_token_id = None
        if why := REFUSED.get((name, type(other))):
            with pytest.raises(UserError, match=why):
                roomy(name).cache(other)
        else:
            assert torch.equal(generate(other, ids, roomy(name).cache(other)), generate(other, ids))


@every_policy
def test_a_plain_cache_works_as_before_on_the_same_model(name, model, ids, tmp_path):
    expected = generate(model, ids)
    generate(model, ids, roomy(name).cache(model))
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, DynamicCache(), prefill_chunk_size=7), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(generate(again, ids), expected)


# --- without room ----------------------------------------------------------------------------------------------


@every_policy
def test_without_room_it_holds_less_and_counts_what_it_holds(name, model):
    ids = torch.randint(3, 64, (2, 100), generator=torch.Generator().manual_seed(4))
    cache, plain = small(name).cache(model), DynamicCache()
    assert cache.nbytes == 0 or name == "cache.infinipot"  # frequencies of its own
    with torch.no_grad():
        for piece in ids.split(PIECE, 1):
            for used in (cache, plain):
                assert torch.isfinite(model(piece, past_key_values=used).logits).all()
    assert cache.get_seq_length() == 100
    assert cache.nbytes < 0.5 * held_bytes(plain)
    assert cache.nbytes >= sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t))
    cache.reset()
    assert cache.nbytes < 100
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", EVICTING)
def test_its_size_stays_within_the_budget(name, model, ids):
    cache = small(name).cache(model)
    sizes = []
    for piece in torch.cat([ids, ids], 1).split(PIECE, 1):
        model(piece, past_key_values=cache)
        sizes += [layer.keys.shape[2] for layer in cache.layers]
        assert all((layer.positions >= 0).sum(-1).max() <= 8 for layer in cache.layers)
    generate(model, torch.cat([ids, ids, ids], 1), cache.resumed(), prefill_chunk_size=PIECE)
    assert max(layer.keys.shape[2] for layer in cache.layers) <= 9
    assert max(sizes) <= 9


@pytest.mark.parametrize("name", [n for n in EVICTING if n != "cache.infinipot"])
def test_kept_keys_have_the_positions_they_had_in_the_text(name, model, ids):
    """The first layer's keys depend on a token and its position alone."""
    cache, plain = small(name).cache(model), DynamicCache()
    for piece in ids.split((11, 1, 1, 1, 6), 1):
        for used in (cache, plain):
            model(piece, past_key_values=used)
    held, whole = cache.layers[0], plain.layers[0]
    for head in range(2):
        for slot, position in enumerate(held.positions[0, head].tolist()):
            if position >= 0:
                torch.testing.assert_close(held.keys[0, head, slot], whole.keys[0, head, position])
                torch.testing.assert_close(held.values[0, head, slot], whole.values[0, head, position])


# --- batches ---------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("make", [roomy, small])
def test_rows_padded_on_the_left_give_what_they_give_alone(name, make, model):
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randint(3, 64, (n,), generator=generator) for n in (9, 14, 5)]
    ids = torch.stack([torch.cat([row.new_zeros(14 - len(row)), row]) for row in rows])
    mask = (ids != 0).long()
    if name == "cache.infinipot":
        with pytest.raises(UserError, match=r"padding|prefill_chunk_size"):
            generate(model, ids, make(name).cache(model), attention_mask=mask)
        return
    found = generate(model, ids, make(name).cache(model), attention_mask=mask)
    for row, got in zip(rows, found):
        alone = generate(model, row[None], make(name).cache(model))[0, len(row) :]
        if name == "cache.low_bit" and make is small:  # padding shifts the groups: close, not equal
            continue
        assert torch.equal(got[14:], alone)


def test_low_bits_with_padding_are_close_to_the_row_alone(model):
    row = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(7))
    padded = torch.cat([row.new_zeros(1, 5), row], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    last = []
    for make in (roomy, small):
        cache = make("cache.low_bit").cache(model)
        model(padded[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
        step = model(padded[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache)
        last.append(step.logits[0, -1].detach().numpy())
    alone = model(row).logits[0, -1].detach().numpy()
    np.testing.assert_allclose(last[0], alone, rtol=1e-3, atol=1e-3)
    assert np.corrcoef(last[1], alone)[0, 1] > 0.95


# --- mistakes --------------------------------------------------------------------------------------------------


@every_policy
def test_a_used_cache_is_refused_until_it_is_reset(name, model, ids):
    cache = small(name).cache(model)
    first = generate(model, ids, cache, prefill_chunk_size=PIECE)
    for prompt in (ids, ids[:, :3], first):
        with pytest.raises(UserError, match=r"35 tokens.*reset\(\)"):
            generate(model, prompt, cache, prefill_chunk_size=PIECE)
    cache.reset()
    assert torch.equal(generate(model, ids, cache, prefill_chunk_size=PIECE), first)


@every_policy
def test_a_resumed_cache_goes_on_with_its_text(name, model, ids):
    whole = generate(model, ids, small(name).cache(model), prefill_chunk_size=PIECE)
    cache = small(name).cache(model)
    half = generate(model, ids, cache, tokens=8, prefill_chunk_size=PIECE)
    assert torch.equal(half, whole[:, :28])
    assert torch.equal(generate(model, half, cache.resumed(), tokens=8), whole)
    with pytest.raises(UserError, match="35 tokens"):
        generate(model, whole, cache)


@pytest.mark.parametrize("name", EVICTING)
def test_another_number_of_rows_is_refused(name, model, ids):
    cache = roomy(name).cache(model)
    model(ids, past_key_values=cache)
    with pytest.raises(UserError, match="holds 1 rows, 2 were given"):
        model(ids.repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("name", EVICTING)
def test_a_mask_of_another_shape_than_padding_is_refused(name, model, ids):
    for mask in (torch.zeros(1, 1, 20, 20), torch.ones(1, 1, 20, 25, dtype=torch.bool)):
        with pytest.raises(UserError, match=r"give one of padding"):
            model(ids, attention_mask=mask, past_key_values=roomy(name).cache(model))


@pytest.mark.parametrize("name", EVICTING)
def test_another_attention_than_sdpa_is_refused(name, model, ids):
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"'eager'.*set_attn_implementation\('sdpa'\)"):
        roomy(name).cache(model)
    model.set_attn_implementation("sdpa")
    cache = roomy(name).cache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="attention was changed"):
        model(ids, past_key_values=cache)


@every_policy
def test_models_that_it_does_not_fit_are_refused(name, tiny_cnn):
    sliding = MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=8))
    encoder = BertLMHeadModel(BertConfig(**SIZES, intermediate_size=48))
    cases = {"TinyCnn": tiny_cnn, "sliding_attention": sliding, "MistralModel": sliding.model, "BertLMHead": encoder}
    for why, wrong in cases.items():
        with pytest.raises(UserError, match=why):
            roomy(name).cache(wrong)


@every_policy
def test_sizes_are_whole_numbers(name):
    for key, value in SMALL[name].items():
        with pytest.raises(UserError, match=f"{key} is {value + 0.5}"):
            find_method(name)(**{key: value + 0.5})


@every_policy
def test_streamers_get_every_token(name, model, ids):
    class Counter:
        def __init__(self):
            self.found = []

        def put(self, tokens):
            self.found.append(tokens)

        def end(self):
            self.found.append("end")

    counter = Counter()
    out = generate(model, ids, small(name).cache(model), streamer=counter, prefill_chunk_size=PIECE)
    assert torch.equal(torch.cat([t.flatten() for t in counter.found[1:-1]]), out[0, 20:])
    assert counter.found[-1] == "end"
