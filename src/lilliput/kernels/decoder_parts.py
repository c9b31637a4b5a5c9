"""The parts of a decoder-only language model of transformers that a decoder runs, and why it cannot run some models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
POSITIONS = ("default", "linear", "llama3", "yarn")  # rotary embeddings that do not depend on the length of the text
NO_WINDOW = 2**40  # keys: more than any text has


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + epsilon) * (offset + weight)"""

    weight: Tensor
    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True)
class Block:
    """One decoder block: the modules it calls and its shape; a norm that the family lacks is None."""

    attention_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    after_attention_norm: Norm | None
    mlp_norm: Norm
    after_mlp_norm: Norm | None
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float  # of queries
    window: int  # keys that a query may see
    positions: str  # the kind of layer whose rotary embedding it takes
    activation: str
    shift: float  # of a relu: max(0, x - shift)
    sparse: Any = None  # a feed-forward part that reads only the neurons that fire, in the place of the three layers


@dataclass(frozen=True)
class Parts:
    """What a decoder runs; `rotary` is the model's module of rotary embeddings."""

    embedding: nn.Module
    blocks: list[Block]
    norm: Norm
    head: nn.Module
    rotary: Any

    def positions(self) -> list[str]:
        """The kinds of layers that have rotary embeddings of their own; '' when all share one."""
        return sorted({block.positions for block in self.blocks})

    def rotary_tables(self, length: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines (length, head_dim) of each kind of layer."""
        places, like = torch.arange(length).unsqueeze(0), torch.zeros(1)
        kinds = {kind: (kind,) if kind else () for kind in self.positions()}
        tables = {kind: self.rotary(like, places, *arguments) for kind, arguments in kinds.items()}
        return {kind: (cos[0].contiguous(), sin[0].contiguous()) for kind, (cos, sin) in tables.items()}


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model that `refusals` finds nothing against."""
    whole: Any = model
    config, inner = whole.config, whole.model
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(inner.layers)
    blocks = [_block(layer, kind, config) for layer, kind in zip(inner.layers, kinds)]
    return Parts(inner.embed_tokens, blocks, _norm(inner.norm), whole.lm_head, inner.rotary_emb)


def refusals(model: nn.Module) -> list[str]:
    """Why no decoder runs this model; empty when it can."""
    if type(model).__name__ not in FAMILIES:
        return [f"lean runs {', '.join(FAMILIES)}, this is a {type(model).__name__}"]
    whole: Any = model
    config, dtype = whole.config, whole.model.norm.weight.dtype
    reasons = []
    if _activation(config) not in ACTIVATIONS:
        reasons.append(f"lean runs the activations {', '.join(ACTIVATIONS)}, this model has {_activation(config)}")
    if unknown := sorted(set(_position_kinds(config)) - set(POSITIONS)):
        reasons.append(f"lean has rotary positions of the kinds {', '.join(POSITIONS)}, this model has {unknown[0]}")
    if dtype != torch.float32:
        reasons.append(f"lean computes in float32, this model is in {str(dtype).removeprefix('torch.')}")
    if not all(_whole(b) for b in whole.model.layers):
        reasons.append("a block has no attention of its own or no feed-forward part")
    norms = (m for b in whole.model.layers for name, m in b.named_children() if "norm" in name)
    if any(hasattr(norm, "rebuild_config") for norm in norms):
        reasons.append("lean has no norm with a ReLU behind it")
    unlike = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    reasons += [f"lean has no {name.replace('_', ' ')}" for name in unlike if getattr(config, name, None)]
    return reasons


def _whole(layer: Any) -> bool:
    """Whether a block has every layer that a decoder calls, in the attention that its family has."""
    attention = all(hasattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    own = not hasattr(layer.self_attn, "rebuild_config")  # one of ours shares something, between heads or layers
    return attention and own and hasattr(layer.mlp, "gate_proj")


def _block(layer: Any, kind: str, config: Any) -> Block:
    attention, mlp, gemma = layer.self_attn, layer.mlp, hasattr(layer, "pre_feedforward_layernorm")
    dim, activation = attention.head_dim, getattr(mlp, "act_fn", None)
    rectified = hasattr(activation, "shift")  # in the place of the one that the config names
    return Block(
        _norm(layer.input_layernorm),
        _norm(attention.q_norm) if gemma else None,
        _norm(attention.k_norm) if gemma else None,
        _norm(layer.post_attention_layernorm) if gemma else None,
        _norm(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm),
        _norm(layer.post_feedforward_layernorm) if gemma else None,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
        heads=outputs(attention.q_proj) // dim,
        kv_heads=outputs(attention.k_proj) // dim,
        head_dim=dim,
        scaling=attention.scaling,
        window=config.sliding_window if kind == "sliding_attention" else NO_WINDOW,
        positions=kind if gemma else "",
        activation="relu" if rectified else ACTIVATIONS[_activation(config)],
        shift=float(activation.shift) if rectified else 0.0,  # pyright: ignore
        sparse=mlp if hasattr(mlp, "sparse_parts") else None,
    )


def _norm(module: Any) -> Norm:
    """Gemma's norms multiply by one more than their weight."""
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, module.variance_epsilon)
    return Norm(module.weight, module.eps, 1.0)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm over the last dimension of x; x itself when there is none."""
    if norm is None:
        return x
    weight = norm.weight + norm.offset if norm.offset else norm.weight
    return F.rms_norm(x, (x.shape[-1],), weight, norm.epsilon)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position of x (T, heads, dim), cos, sin (T, dim): x cos + (-second half, first half) sin"""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def outputs(module: Any) -> int:
    """Outputs of a linear layer, also of one that is a sequence of factors."""
    last: Any = module[-1] if isinstance(module, nn.Sequential) else module
    return last.out_features


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")


def _position_kinds(config: Any) -> list[str]:
    """The kinds of rotary embeddings, one for each kind of layer or one for all."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [p for p in found.values() if isinstance(p, dict)] or [found]
    return [p.get("rope_type", "default") for p in each]
