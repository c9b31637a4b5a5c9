"""An attention implementation for caches that must see the queries or that hold other tokens in every head.

transformers hands a cache keys and values but no queries, and makes one mask for all heads. `lilliput_cache` is its
`sdpa` with two additions, only for keys that come from a `SeenLayer`: the layer gives the mask, and sees the queries
afterwards. Any other cache gets plain sdpa. The model never needs to run `eager` for a policy that wants probabilities:
they are computed beside the attention, from one more product of queries and keys, BLOCK queries at a time, so that
there are never more than BLOCK x keys of them a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lilliput.errors import UserError
from lilliput.methods.cache._cache import PolicyLayer

NAME = "lilliput_cache"
BLOCK = 256  # queries whose probabilities are computed at a time


class SeenLayer(PolicyLayer):
    """A layer whose keys go through `lilliput_cache`."""

    def shown(self, keys: Tensor) -> Tensor:
        """The keys, marked as this layer's for the attention that follows."""
        self.waiting, keys.policy_layer = True, self  # pyright: ignore[reportAttributeAccessIssue]
        return keys

    @abstractmethod
    def mask(self, given: Tensor | None, queries: int) -> Tensor | None:
        """Which keys may be seen, (B, 1 or key heads, queries, keys); None for all of the past. `given` is the
        model's own mask of the new tokens among themselves, (B, 1, queries, queries) or None when it is causal."""

    @abstractmethod
    def attended(self, query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Called after the attention: the moment to score and to evict."""


def watched_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, with the mask and under the eyes of the layer that the keys came from."""
    layer: SeenLayer | None = vars(key).pop("policy_layer", None)  # popped, or keys and layer would hold each other
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    mask = layer.mask(attention_mask, query.shape[2])
    expanded = mask
    if mask is not None and mask.shape[1] > 1:
        expanded = mask.repeat_interleave(query.shape[1] // mask.shape[1], 1)
    output = sdpa_attention_forward(module, query, key, value, expanded, scaling=scaling, **options)
    layer.attended(query, key, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output


def probabilities(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> Iterator[Tensor]:
    """Attention probabilities (B, key heads, up to BLOCK queries, keys) in float32, the mean over the query heads that
    share a key head. query (B, heads, queries, d), keys (B, key heads, keys, d). Queries that see nothing give 0."""
    (batch, _, count, width), heads, past = query.shape, keys.shape[1], keys.shape[2] - query.shape[2]
    grouped = query.reshape(batch, heads, -1, count, width)
    turned = keys[:, :, None].transpose(-1, -2)
    for first in range(0, count, BLOCK):
        scores = (grouped[..., first : first + BLOCK, :] @ turned).float() * scaling
        if mask is not None:
            hidden = ~mask[:, :, None, first : first + BLOCK]
        else:
            last = torch.arange(first, first + scores.shape[-2], device=keys.device)[:, None] + past
            hidden = torch.arange(keys.shape[2], device=keys.device) > last
        yield scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0).mean(2)


def watch_(model: Any, policy: str) -> None:
    """Make `lilliput_cache` the model's attention. Raises UserError when it was another than sdpa."""
    current = model.config._attn_implementation
    if current == NAME:
        return
    if current != "sdpa" or not model._can_set_attn_implementation():
        raise UserError(
            f"{policy} needs the attention 'sdpa', {type(model).__name__} has {current!r}; "
            "call model.set_attn_implementation('sdpa') if it has one"
        )
    model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, watched_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
