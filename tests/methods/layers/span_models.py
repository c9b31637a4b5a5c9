"""What the tests of spans share: a tiny model of five layers, and its plain attention written out in numpy."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lilliput.workload import Workload, windows

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEADS, DIM = 4, 8


def build(kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    """Random, with attention that is not uniform, biases that are not zero, and no end of text."""
    torch.manual_seed(0)
    model = kind(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def work_of(model):
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]), source=source)


def names(*layers):
    return [f"model.layers.{i}.self_attn" for i in layers]


def projected(layer, x):
    """(T, inputs) -> (T, outputs)."""
    bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
    return x @ layer.weight.detach().double().numpy().T + bias


def norm(module, x):
    weight = module.weight.detach().double().numpy()
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + module.variance_epsilon) * weight


def turned(x, theta):
    """Rotary positions for (T, heads, d)."""
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(0, DIM, 2) / DIM)
    z = (x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def logits(model, ids, source, reuses):
    """Logits (T, V) of the original `model` for ids (T,) when layer l takes from `source[l]` what `reuses` names:
    "probabilities" of the attention or "states", keys and values."""
    inner, seen = model.model, {}
    theta = model.config.rope_parameters["rope_theta"]
    hidden = inner.embed_tokens.weight.detach().double().numpy()[ids.numpy()]
    for index, layer in enumerate(inner.layers):
        attention, x = layer.self_attn, norm(layer.input_layernorm, hidden)
        q, k, v = (projected(getattr(attention, f"{n}_proj"), x).reshape(len(x), -1, DIM) for n in "qkv")
        q, k = turned(q, theta), turned(k, theta)
        if reuses == "states":
            k, v = seen[source[index]] if index in source else (k, v)
            seen[index] = k, v
        k, v = (np.repeat(part, HEADS // part.shape[1], 1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * DIM**-0.5
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        if reuses == "probabilities":
            weights = seen[source[index]] if index in source else weights
            seen[index] = weights
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1)
        hidden = hidden + projected(attention.o_proj, mixed)
        x = norm(layer.post_attention_layernorm, hidden)
        gate = projected(layer.mlp.gate_proj, x)
        hidden = hidden + projected(layer.mlp.down_proj, gate / (1 + np.exp(-gate)) * projected(layer.mlp.up_proj, x))
    return projected(model.lm_head, norm(inner.norm, hidden))
