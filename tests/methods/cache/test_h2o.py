import pytest
import torch
from numpy_llama import assert_same_as_reference, heavy, kept_positions

from lilliput.methods.cache import H2O


@pytest.mark.parametrize(("budget", "recent", "newest"), [(8, 0.5, 4), (6, 0.0, 1)])
def test_it_keeps_the_heavy_hitters_of_every_head(sharp_llama, text, budget, recent, newest):
    cache = H2O(budget=budget, recent=recent).cache(sharp_llama)
    sizes = assert_same_as_reference(sharp_llama, cache, heavy(budget, newest), text)
    assert set(sizes) == {budget}
    kept = [head for layer in kept_positions(cache) for head in layer]
    assert any(head != kept[0] for head in kept)  # heads decide on their own


def test_its_sums_are_those_of_the_attention_that_transformers_returns(sharp_llama, text):
    """With padding on the left, which has no probability and gives none."""
    ids = torch.stack([text[:12], torch.cat([text.new_zeros(5), text[12:19]])])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = H2O().cache(sharp_llama)
    sharp_llama(ids, attention_mask=mask, past_key_values=cache)
    sharp_llama.set_attn_implementation("eager")
    weights = sharp_llama(ids, attention_mask=mask, output_attentions=True).attentions
    for layer, weight in zip(cache.layers, weights):
        expected = (weight * mask[:, None, :, None]).unflatten(1, (2, 2)).mean(2).sum(2)
        torch.testing.assert_close(layer.total, expected, rtol=1e-4, atol=1e-5)


def test_all_recent_is_a_window(sharp_llama, text):
    cache = H2O(budget=5, recent=1.0).cache(sharp_llama)
    sharp_llama(text[None, :20], past_key_values=cache)
    for token in text[20:]:
        sharp_llama(token[None, None], past_key_values=cache)
    assert kept_positions(cache) == [[list(range(30, 35))] * 2] * 2
