"""A lean decode path for Llama-type models in plain torch: no mask building, no cache objects, about twenty operators a
block. It runs whatever modules stand at the projections, so formats may differ per layer.

The keys and values of a token are written into preallocated tensors; one query attends by two batched products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.runtimes import Runtime, Session
from lilliput.workload import Batch, Workload

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM")  # pre-norm blocks without extra norms or windows
POSITIONS = ("default", "linear", "llama3", "yarn")  # rotary embeddings that do not depend on the length of the text
ROOM = 64  # tokens that fit behind the longest window of the data


@dataclass
class _Block:
    """One decoder block: the modules it calls and its cache, keys and values (kv_heads, length, head_dim)."""

    attention_norm: tuple[Tensor, float]
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: tuple[Tensor, float]
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    kv_heads: int
    keys: Tensor
    values: Tensor


class LeanSession(Session):
    """A prepared decoder. `session(batch)` gives logits (B, T, V); `generate` yields greedy tokens one by one."""

    def __init__(self, model: nn.Module, max_length: int):
        parts: Any = model
        inner = parts.model
        self.max_length = max_length
        self.embedding, self.head = inner.embed_tokens, parts.lm_head
        self.norm = _norm(inner.norm)
        self.head_dim: int = inner.layers[0].self_attn.head_dim
        self.blocks = [self._block(layer) for layer in inner.layers]
        self.scaling = self.head_dim**-0.5
        positions = torch.arange(max_length).unsqueeze(0)
        cos, sin = inner.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        half = self.head_dim // 2
        sign = torch.cat([-torch.ones(half), torch.ones(half)])
        self.cos, self.signed_sin = cos[0].unsqueeze(1), (sin[0] * sign).unsqueeze(1)  # (length, 1, head_dim)

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        kv_heads = _outputs(attention.k_proj) // self.head_dim
        return _Block(
            _norm(layer.input_layernorm),
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            _norm(layer.post_attention_layernorm),
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            kv_heads,
            keys=torch.zeros(kv_heads, self.max_length, self.head_dim),
            values=torch.zeros(kv_heads, self.max_length, self.head_dim),
        )

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        return torch.stack([self._logits(self._forward(row, 0)) for row in batch["input_ids"]])

    @torch.inference_mode()
    def generate(self, ids: Tensor, tokens: int) -> Iterator[int]:
        """Greedy tokens after the prompt ids (1, T); the first one costs the whole prompt.

        Raises UserError when prompt and tokens do not fit the cache; the last token needs no place in it.
        """
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            what = "empty" if ids.numel() == 0 else f"of the shape {tuple(ids.shape)}"
            raise UserError(f"the prompt is {what}; lean takes one prompt, token ids of the shape (1, length)")
        self._need_room(ids.shape[1] + max(tokens - 1, 0))
        row, position = ids[0], 0
        for _ in range(tokens):
            with torch.inference_mode():
                hidden = self._forward(row, position)
                token = self._logits(hidden[-1:]).argmax(-1)
            position += len(row)
            row = token
            yield int(token)

    def _need_room(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"{length} tokens do not fit the cache of {self.max_length}; prepare with max_length={length}"
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(_rms_norm(hidden, self.norm))

    def _forward(self, ids: Tensor, start: int) -> Tensor:
        """Hidden states (T, d) of tokens `ids` (T,) at positions start .. start + T - 1."""
        self._need_room(start + len(ids))
        span = slice(start, start + len(ids))
        hidden, cos, sin = self.embedding(ids), self.cos[span], self.signed_sin[span]
        for block in self.blocks:
            hidden = hidden + block.o(self._attend(block, _rms_norm(hidden, block.attention_norm), cos, sin, start))
            x = _rms_norm(hidden, block.mlp_norm)
            hidden = hidden + block.down(F.silu(block.gate(x)) * block.up(x))
        return hidden

    def _attend(self, block: _Block, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        length, dim, end = x.shape[0], self.head_dim, start + x.shape[0]
        q = _rotate(block.q(x).view(length, -1, dim), cos, sin)
        block.keys[:, start:end] = _rotate(block.k(x).view(length, -1, dim), cos, sin).transpose(0, 1)
        block.values[:, start:end] = block.v(x).view(length, -1, dim).transpose(0, 1)
        keys, values = block.keys[:, :end], block.values[:, :end]
        if length == 1:
            grouped = q.view(block.kv_heads, -1, dim) * self.scaling
            weights = torch.bmm(grouped, keys.transpose(1, 2)).softmax(-1)
            return torch.bmm(weights, values).view(1, -1)
        q, k, v = (t.unsqueeze(0) for t in (q.transpose(0, 1), keys, values))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(length, -1)


def _outputs(module: Any) -> int:
    """Outputs of a linear layer, also of one that is a sequence of factors."""
    last: Any = module[-1] if isinstance(module, nn.Sequential) else module
    return last.out_features


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon


def _rms_norm(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), *norm)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position on (T, heads, head_dim): x cos + (halves of x swapped) sin, the sign folded into sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class Lean(Runtime):
    """Llama-type decoders, one prompt at a time, float32 activations."""

    name = "lean"
    rank = 0

    def supports(self, model: nn.Module, workload: Workload | None = None) -> list[str]:
        """Why this model cannot run here; empty when it can."""
        if type(model).__name__ not in FAMILIES:
            return [f"lean runs {', '.join(FAMILIES)}, this is a {type(model).__name__}"]
        parts: Any = model
        config, dtype = parts.config, parts.model.norm.weight.dtype
        reasons, positions = [], _positions(config)
        if getattr(config, "hidden_act", "silu") != "silu":
            reasons.append(f"lean runs the activation silu, this model has {config.hidden_act}")
        if getattr(config, "use_sliding_window", False):
            reasons.append("lean has no sliding window")
        if positions not in POSITIONS:
            reasons.append(f"lean has rotary positions of the kinds {', '.join(POSITIONS)}, this model has {positions}")
        if dtype != torch.float32:
            reasons.append(f"lean computes in float32, this model is in {str(dtype).removeprefix('torch.')}")
        if not all(hasattr(b.self_attn, "q_proj") and hasattr(b.mlp, "gate_proj") for b in parts.model.layers):
            reasons.append("a block has no attention or no feed-forward part")
        return reasons

    def prepare(
        self, model: nn.Module, workload: Workload, threads: int | None = None, max_length: int = 512
    ) -> LeanSession:
        """A session over the model's own modules; nothing is copied but the cache is made. Raises UserError."""
        reasons = self.supports(model, workload)
        if reasons:
            raise UserError(f"lean cannot take this model: {'; '.join(reasons)}")
        if threads:
            torch.set_num_threads(threads)
        longest = max(b["input_ids"].shape[1] for b in (workload.example, workload.validation[0], workload.test[0]))
        return LeanSession(model.eval(), max(max_length, longest + ROOM))


def _positions(config: Any) -> str:
    """The kind of rotary embedding."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
