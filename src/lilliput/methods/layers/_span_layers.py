"""One attention with a sharing plan: heads of a layer share queries or keys and values, layers share what is computed.

The first layer of a span computes, and hands on to the others what they reuse. What is handed on travels with the table
of cosines that every layer of one pass gets: it lives as long as the pass, two passes never see each other's, and the
layers hold no state and no reference to each other.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import Attention, in_out, linear_parts
from lilliput.errors import UserError
from lilliput.methods.cache._cache import PolicyLayer


def hand_on(cos: Tensor, what: Any) -> None:
    """Leave something for the layers that come later in this pass."""
    cos.handed_on = what  # pyright: ignore[reportAttributeAccessIssue]


def handed_on(cos: Tensor, layer_idx: int) -> Any:
    """What the nearest layer before this one handed on. Raises UserError when none did."""
    if not hasattr(cos, "handed_on"):
        raise UserError(f"layer {layer_idx} reuses what an earlier layer computes, which did not run in this pass")
    return cos.handed_on  # pyright: ignore[reportAttributeAccessIssue]


def spread(query: Tensor, heads: int) -> Tensor:
    """Queries (B, q, T, d) of all heads (B, heads, T, d): head n has queries n mod q.

    As head n reads keys and values n div (heads / kv), two heads differ as long as q kv >= heads; when q kv = heads,
    every query meets every key.
    """
    return query if query.shape[1] == heads else query.repeat(1, heads // query.shape[1], 1, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, heads, T, d) at the positions of the tables (B, T, d), Llama's pairs."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def probabilities(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention (B, heads, T, S) of queries (B, heads, T, d) on keys (B, kv heads, S, d).

    The mask is transformers': True or 0 where a key is seen, (B, 1, T, S); None for a prompt is causal.
    """
    grouped = query.unflatten(1, (keys.shape[1], -1))
    scores = (grouped @ keys[:, :, None].transpose(-1, -2)).float() * scaling
    if mask is None and query.shape[2] > 1:
        places = torch.arange(keys.shape[2], device=keys.device)
        mask = (places <= places[: query.shape[2], None])[None, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[:, :, None]
    return scores.softmax(-1).to(query.dtype).flatten(1, 2)


def mixed(weights: Tensor, values: Tensor) -> Tensor:
    """Values (B, kv heads, S, d) weighted by (B, heads, T, S): (B, heads, T, d)."""
    return (weights.unflatten(1, (values.shape[1], -1)) @ values[:, :, None]).flatten(1, 2)


def attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The same as `mixed(probabilities(...), values)` in one call, without the probabilities."""
    count, causal = query.shape[2], mask is None and query.shape[2] > 1
    if causal:  # a prompt in a cache of fixed length, whose rest is empty
        keys, values = keys[:, :, :count], values[:, :, :count]
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True
    )


def past_seen(attention: Any) -> tuple[str | None, int | None]:
    """How much of the past an attention sees: its kind of layer and its window, None where it has none."""
    return getattr(attention, "layer_type", None), getattr(attention, "sliding_window", None)


class SpanAttention(nn.Module):
    """Sizes and projections of an attention of a span; `letters` are those that it has."""

    letters: ClassVar[str] = "qkvo"
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        layer_idx: int,
        scaling: float,
        biases: str = "",
        layer_type: str | None = None,
        sliding_window: int | None = None,
        query_heads: int | None = None,
    ):
        super().__init__()
        self.width, self.heads, self.kv_heads, self.head_dim = width, heads, kv_heads, head_dim
        self.layer_idx, self.scaling, self.biases = layer_idx, scaling, biases
        self.layer_type, self.sliding_window = layer_type, sliding_window  # what those of transformers say
        inner, kept, asked = heads * head_dim, kv_heads * head_dim, (query_heads or heads) * head_dim
        sizes = {"q": (width, asked), "k": (width, kept), "v": (width, kept), "o": (inner, width)}
        for letter in self.letters:
            self.add_module(f"{letter}_proj", nn.Linear(*sizes[letter], bias=letter in biases))

    @classmethod
    def of(cls, model: nn.Module, a: Attention, idle: bool = False) -> Self:
        """An attention in the place of an ordinary one, with the layers of it that are still needed.

        With `idle` it holds the others too, without calling them.
        """
        old: Any = model.get_submodule(a.name)
        layers = {letter: getattr(old, f"{letter}_proj") for letter in ("qkvo" if idle else cls.letters)}
        biases = "".join(x for x in cls.letters if getattr(linear_parts(layers[x])[-1], "bias", None) is not None)
        sizes = in_out(model.get_submodule(a.q))
        assert sizes is not None
        with torch.device("meta"):
            made = cls(sizes[0], a.heads, a.kv_heads, a.head_dim, old.layer_idx, old.scaling, biases, *past_seen(old))
        for letter, layer in layers.items():
            made.add_module(f"{letter}_proj", layer)
        return made

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        names = ("width", "heads", "kv_heads", "head_dim", "layer_idx", "scaling", "biases")
        config = {name: getattr(self, name) for name in (*names, "layer_type", "sliding_window")}
        if "q" in self.letters and (sizes := in_out(self.q_proj)) and sizes[1] != self.heads * self.head_dim:
            config["query_heads"] = sizes[1] // self.head_dim
        return config

    def split(self, layer: Any, x: Tensor) -> Tensor:
        """A projection of x (B, T, width) by heads: (B, heads, T, d)."""
        return layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Queries of all heads (B, heads, T, d), each turned to its position once."""
        return spread(rotated(self.split(self.q_proj, x), *position_embeddings), self.heads)

    def joined(self, heads: Tensor) -> Tensor:
        """The output (B, T, width) of heads (B, heads, T, d)."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def cached(self, past: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Both with what the cache holds of this layer. Raises UserError for a cache policy."""
        if past is None:
            return first, second
        if len(past.layers) > self.layer_idx and isinstance(past.layers[self.layer_idx], PolicyLayer):
            raise UserError("cache policies need the model's own attention in every layer; use transformers' cache")
        return past.update(first, second, self.layer_idx)


class GroupedAttention(SpanAttention):
    """Attention whose heads share queries, or keys and values; it hands on nothing."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        query = self.queries(hidden_states, position_embeddings)
        keys, values = (self.split(layer, hidden_states) for layer in (self.k_proj, self.v_proj))
        keys, values = self.cached(past_key_values, rotated(keys, *position_embeddings), values)
        return self.joined(self.attend(query, keys, values, attention_mask, position_embeddings[0])), None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, cos: Tensor) -> Tensor:
        """Attention (B, heads, T, d)."""
        return attended(query, keys, values, mask, self.scaling)


class LeadingAttention(GroupedAttention):
    """The first attention of a span: it attends as ever, and hands on its probabilities."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, cos: Tensor) -> Tensor:
        weights = probabilities(query, keys, mask, self.scaling)
        hand_on(cos, weights)
        return mixed(weights, values)


class LendingAttention(GroupedAttention):
    """The first attention of a span: it attends as ever, and hands on its keys and values."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, cos: Tensor) -> Tensor:
        hand_on(cos, (keys, values))
        return super().attend(query, keys, values, mask, cos)


class ReusingAttention(SpanAttention):
    """A later attention of a span: values of its own, weighted by the probabilities of the first."""

    letters = "vo"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        weights = handed_on(position_embeddings[0], self.layer_idx)
        values = self.split(self.v_proj, hidden_states)
        # In the place of the keys, by which a cache knows its length; in that of the values nothing, no bytes.
        values, _ = self.cached(past_key_values, values, values[..., :0])
        return self.joined(mixed(weights, values)), None


class BorrowingAttention(SpanAttention):
    """A later attention of a span: queries of its own, on the keys and values of the first. It caches nothing."""

    letters = "qo"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        keys, values = handed_on(position_embeddings[0], self.layer_idx)
        query = self.queries(hidden_states, position_embeddings)
        return self.joined(attended(query, keys, values, attention_mask, self.scaling)), None
