"""What the policies share: counting bytes, the attention, keeping rows apart."""

import pytest
import torch
from transformers import DynamicCache

from lilliput.methods.cache._attention import BLOCK, probabilities
from lilliput.methods.cache._cache import held_bytes


def test_bytes_are_those_of_whole_storages_counted_once():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), 0)
    assert held_bytes(cache) == 2 * 80 * 4
    cache.layers[0].keys = cache.layers[0].keys[:, :, -1:]  # a view keeps everything alive
    assert held_bytes(cache) == 2 * 80 * 4
    cache.layers[0].values = cache.layers[0].keys
    assert held_bytes(cache) == 80 * 4
    cache.layers[0].keys = cache.layers[0].values = cache.layers[0].keys.clone()
    assert held_bytes(cache) == 8 * 4


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (4, 4), (3, 9), (BLOCK + 3, BLOCK + 5)])
def test_probabilities_are_the_mean_of_a_softmax_over_the_past(queries, keys):
    generator = torch.Generator().manual_seed(queries)
    q, k = torch.randn(2, 6, queries, 8, generator=generator), torch.randn(2, 3, keys, 8, generator=generator)
    found = torch.cat(list(probabilities(q, k, None, 0.3)), 2)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = scores.masked_fill(~causal, -1e9).softmax(-1).unflatten(1, (3, 2)).mean(2)
    torch.testing.assert_close(found, expected)
    mask = torch.rand(2, 3, queries, keys, generator=generator) > 0.5
    mask[..., 0] = True
    mask[0, 0, 0] = False  # a query that sees nothing
    found = torch.cat(list(probabilities(q, k, mask, 0.3)), 2)
    expected = scores.masked_fill(~mask.repeat_interleave(2, 1), -1e9).softmax(-1).unflatten(1, (3, 2)).mean(2)
    expected[0, 0, 0] = 0
    torch.testing.assert_close(found, expected)
