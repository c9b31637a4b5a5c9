"""Decoder-only language models token by token: all blocks and the head for some new tokens in one native call.

    h = h + norm?(W_o attention(rotary(norm?(W_q n)), rotary(norm?(W_k n)), W_v n)),     n = norm(h)
    h = h + norm?(W_down (activation(W_gate m) * W_up m)),                              m = norm(h)

`Decoder` is the native one, `Reference` the same in plain torch, which runs whatever modules stand at the projections.
Both borrow the model's weights: change those in place and the next token uses them; put another module in the place of
a layer and a new decoder is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.kernels import _native
from lilliput.kernels.decoder_parts import Block, Norm, Parts, normed, outputs, parts_of, refusals, rotated
from lilliput.kernels.native_weights import dense_weights, not_dense
from lilliput.kernels.sparse_ffn import NativePart, native_part

LONGEST_CHAIN = 2  # factors of a layer
Factor = tuple[str, int, int, int, int, int, int, int, int]  # as decoder_module.cpp lists them


class Cache:
    """Keys and values of one sequence: in each block (kv_heads, length, head_dim) float32, `filled` of them used."""

    def __init__(self, blocks: Sequence[Block], length: int):
        shapes = [(b.kv_heads, length, b.head_dim) for b in blocks]
        self.length, self.filled = length, 0
        self.keys = [torch.zeros(shape) for shape in shapes]
        self.values = [torch.zeros(shape) for shape in shapes]
        self.table = torch.tensor([[k.data_ptr(), v.data_ptr()] for k, v in zip(self.keys, self.values)])

    def need_room(self, tokens: int) -> None:
        """Raises UserError when `tokens` more do not fit."""
        if self.filled + tokens > self.length:
            needed = self.filled + tokens
            raise UserError(f"{needed} tokens do not fit the cache of {self.length}; prepare with max_length={needed}")


class _AnyDecoder:
    """What both have in common: the parts of the model, caches, checks."""

    def __init__(self, model: nn.Module):
        if reasons := refusals(model):
            raise UserError(f"no decoder runs this model: {'; '.join(reasons)}")
        self.parts = parts_of(model)
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self._reach = 0  # positions in the tables

    def cache(self, length: int) -> Cache:
        """An empty cache for `length` tokens."""
        if length < 1:
            raise UserError(f"the length of a cache is {length}; give at least 1")
        if length > self._reach:
            self._tables, self._reach = self.parts.rotary_tables(length), length
        return Cache(self.parts.blocks, length)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: Cache, every: bool = False) -> Tensor:
        """Logits (1, V) after the tokens `ids` (T,) that follow those in the cache; of `every` token (T, V)."""
        hidden = self._hidden(ids)
        cache.need_room(len(ids))
        places = torch.stack([torch.zeros_like(ids), torch.arange(cache.filled, cache.filled + len(ids))], 1)
        logits = self._run(hidden, [cache], places, 0 if every else len(ids) - 1)
        cache.filled += len(ids)
        return logits

    @torch.inference_mode()
    def step(self, ids: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Logits (R, V) after one more token `ids` (R,) of each sequence."""
        if ids.shape != (len(caches),):
            raise UserError(f"there are {len(caches)} caches for tokens of the shape {tuple(ids.shape)}; one each")
        hidden = self._hidden(ids)
        for cache in caches:
            cache.need_room(1)
        places = torch.tensor([[i, cache.filled] for i, cache in enumerate(caches)])
        logits = self._run(hidden, caches, places, 0)
        for cache in caches:
            cache.filled += 1
        return logits

    def _hidden(self, ids: Tensor) -> Tensor:
        if ids.ndim != 1 or not len(ids) or ids.dtype != torch.int64:
            raise UserError(f"tokens are {ids.dtype} {tuple(ids.shape)}; give at least one in a row, as int64")
        try:
            return self.parts.embedding(ids).float().contiguous()
        except IndexError:
            raise UserError(f"a token of {int(ids.min())} .. {int(ids.max())} is not in the vocabulary") from None

    def _run(self, hidden: Tensor, caches: Sequence[Cache], places: Tensor, first_logits: int) -> Tensor:
        """Logits of the tokens from `first_logits` on; places (T, 2) are the sequence and the position of each."""
        raise NotImplementedError


class Reference(_AnyDecoder):
    """The decoder in plain torch; `norm`, `gate`, `rotate`, `attend` and `linear` are its steps."""

    def _run(self, hidden: Tensor, caches: Sequence[Cache], places: Tensor, first_logits: int) -> Tensor:
        rows = [self._forward(hidden[places[:, 0] == i], cache) for i, cache in enumerate(caches)]
        return self.linear(self.parts.head, self.norm(torch.cat(rows)[first_logits:], self.parts.norm))

    def _forward(self, hidden: Tensor, cache: Cache) -> Tensor:
        """Hidden states (T, d) of one sequence after all blocks."""
        for i, b in enumerate(self.parts.blocks):
            attended = self._attention(b, self.norm(hidden, b.attention_norm), cache, i)
            hidden = hidden + self.norm(self.linear(b.o, attended), b.after_attention_norm)
            x = self.norm(hidden, b.mlp_norm)
            hidden = hidden + self.norm(self.feed_forward(b, x), b.after_mlp_norm)
        return hidden

    def feed_forward(self, b: Block, x: Tensor) -> Tensor:
        """The feed-forward part of normed x (T, d)."""
        if b.sparse is not None:
            return b.sparse(x)
        return self.linear(b.down, self.gate(b, self.linear(b.gate, x), self.linear(b.up, x)))

    def _attention(self, b: Block, x: Tensor, cache: Cache, index: int) -> Tensor:
        start, end = cache.filled, cache.filled + len(x)
        cos, sin = (table[start:end] for table in self._tables[b.positions])
        q, k, v = (self.linear(layer, x).view(len(x), -1, b.head_dim) for layer in (b.q, b.k, b.v))
        q = self.rotate(self.norm(q, b.query_norm), cos, sin, b.scaling)
        keys, values = cache.keys[index], cache.values[index]
        keys[:, start:end] = self.rotate(self.norm(k, b.key_norm), cos, sin).transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        return self.attend(q, keys, values, start, b.window).reshape(len(x), -1)

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A projection of x (T, inputs)."""
        return layer(x)

    def norm(self, x: Tensor, norm: Norm | None) -> Tensor:
        """The norm over the last dimension; x itself when there is none."""
        return normed(x, norm)

    def gate(self, b: Block, gate: Tensor, up: Tensor) -> Tensor:
        """activation(gate) * up"""
        if b.activation == "relu":
            return F.relu(gate - b.shift) * up
        return (F.silu(gate) if b.activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, scaling: float = 1.0) -> Tensor:
        """Rotary position of x (T, heads, dim), cos, sin (T, dim): (x cos + (-second half, first half) sin) scaling"""
        return rotated(x, cos, sin) * scaling

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, start: int, window: int) -> Tensor:
        """Scaled queries (T, heads, dim) at the positions from `start` on; keys, values (kv_heads, length, dim)."""
        end = start + len(q)
        ages = torch.arange(start, end).unsqueeze(1) - torch.arange(end)
        batch = (q.transpose(0, 1).unsqueeze(0), keys[:, :end].unsqueeze(0), values[:, :end].unsqueeze(0))
        seen = (ages >= 0) & (ages < window)
        return F.scaled_dot_product_attention(*batch, attn_mask=seen, scale=1.0, enable_gqa=True)[0].transpose(0, 1)


class Decoder(_AnyDecoder):
    """The native decoder, on `torch.get_num_threads()` threads; UserError for layers without a native product."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if layers := foreign_layers(self.parts):
            raise UserError(f"the native decoder has no product for {layers[0]}; use Reference")
        self._kept: list[Tensor] = []  # memory that the native side reads
        parts, self._kinds = self.parts, self.parts.positions()
        self._native = _native.Decoder(len(parts.norm.weight), self._norm_row(parts.norm), self._linear_row(parts.head))
        for block in parts.blocks:
            self._add(block)
        self._vocabulary = outputs(parts.head)

    def _add(self, b: Block) -> None:
        before = (b.attention_norm, b.query_norm, b.key_norm, b.after_attention_norm, b.mlp_norm, b.after_mlp_norm)
        norms = [self._norm_row(norm) for norm in before]
        linears = [self._linear_row(layer) for layer in (b.q, b.k, b.v, b.o)]
        linears.append(self._linear_row(b.gate, b.shift if b.sparse is None else 0.0))
        linears += [([], 0), ([], 0)] if b.sparse else [self._linear_row(layer) for layer in (b.up, b.down)]
        shape = b.heads, b.kv_heads, b.head_dim, b.scaling, b.window, self._kinds.index(b.positions)
        self._native.add_block(norms, linears, *shape, b.activation, self._sparse_row(b))

    def _sparse_row(self, b: Block) -> list[NativePart]:
        """What stands in the place of up and down, if anything does."""
        if b.sparse is None:
            return []
        up, up_bias, down, down_bias = b.sparse.sparse_parts()
        above = (None, None) if up is None else (up.values, up.grid)
        self._kept += [t for t in (*above, up_bias, down.values, down.grid, down_bias) if t is not None]
        sizes = b.sparse.inputs, b.sparse.neurons, down.columns
        return [native_part(sizes, b.sparse.shift, above, up_bias, (down.values, down.grid), down_bias)]

    def _norm_row(self, norm: Norm | None) -> tuple[int, float, float]:
        return (0, 0.0, 0.0) if norm is None else (self._address(norm.weight), norm.epsilon, norm.offset)

    def _linear_row(self, layer: nn.Module, shift: float = 0.0) -> tuple[list[Factor], int]:
        """Factors and bias, from which the shift of a ReLU behind the layer is taken away."""
        chain = _chain(layer)
        bias = getattr(chain[-1], "bias", None)
        if shift:
            bias = (torch.zeros(outputs(layer)) if bias is None else bias) - shift
        return [self._factor(part) for part in chain], 0 if bias is None else self._address(bias)

    def _factor(self, layer: Any) -> Factor:
        stored = layer.native_weights() if hasattr(layer, "native_weights") else dense_weights(layer)
        assert stored is not None
        addresses = [self._address(tensor) for tensor in (stored.codes, stored.grid, stored.tables)]
        return stored.format, *addresses, *stored.shape, stored.group, stored.bits, stored.offset  # type: ignore[return-value]

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _run(self, hidden: Tensor, caches: Sequence[Cache], places: Tensor, first_logits: int) -> Tensor:
        logits = torch.empty(len(hidden) - first_logits, self._vocabulary)
        tables = [self._tables[kind] for kind in self._kinds]
        self._native.run(
            places.data_ptr(),
            len(hidden),
            hidden.data_ptr(),
            [(cache.table.data_ptr(), cache.length) for cache in caches],
            [(cos.data_ptr(), sin.data_ptr()) for cos, sin in tables],
            logits.data_ptr(),
            first_logits,
            torch.get_num_threads(),
        )
        return logits


def foreign_layers(parts: Parts) -> list[str]:
    """What the native decoder has no product for; empty when it runs the model."""
    layers = {"the head": parts.head}
    for i, block in enumerate(parts.blocks):
        names = ("q", "k", "v", "o", "gate") if block.sparse else ("q", "k", "v", "o", "gate", "up", "down")
        layers |= {f"{name} of block {i}": getattr(block, name) for name in names}
    return [f"{name}: {why}" for name, layer in layers.items() if (why := _foreign(layer))]


def _foreign(layer: nn.Module) -> str:
    """Why there is no native product for a layer, '' when there is one."""
    chain = _chain(layer)
    if len(chain) > LONGEST_CHAIN or any(getattr(part, "bias", None) is not None for part in chain[:-1]):
        return f"{len(chain)} factors, or a bias between them"
    for part in chain:
        if not hasattr(part, "native_weights") and (why := not_dense(part)):
            return why
    bias = getattr(chain[-1], "bias", None)
    return "" if bias is None or bias.dtype == torch.float32 else f"a bias of {bias.dtype}"


def _chain(layer: Any) -> list[Any]:
    return list(layer) if isinstance(layer, nn.Sequential) else [layer]


def decoder_for(model: nn.Module) -> Decoder | Reference:
    """The native decoder where it has a product for every layer, else, with a warning, the plain one. UserError."""
    if reasons := refusals(model):
        raise UserError(f"lean cannot take this model: {'; '.join(reasons)}")
    if note := slow_because(model):
        warnings.warn(note, stacklevel=2)
        return Reference(model)
    return Decoder(model)


def slow_because(model: nn.Module) -> str:
    """Why a model that lean takes runs in plain torch there, '' when it does not."""
    foreign = foreign_layers(parts_of(model))
    rest = f" (and {len(foreign) - 1} more layers)" if len(foreign) > 1 else ""
    return f"decoding in plain torch: the native decoder has no product for {foreign[0]}{rest}" if foreign else ""
