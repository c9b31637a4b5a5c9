"""Where a model's blocks, attention, MLPs, norms, embedding and head are; the one place that knows architectures.

Found by structure, not by class: a ModuleList or Sequential whose members hold an attention (children named like q, k,
v and an output projection) are the blocks. Sizes are read from the layers, so they stay right after surgery and when a
layer was replaced by another module with `in_features` and `out_features` (packed) or by a sequence of factors.

transformers' GPT-2 stores its linears as `Conv1D` (weight transposed). They are reported like any other projection;
`linears` lists plain `nn.Linear` only, and `to_linear_` turns every Conv1D into the equal Linear first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lilliput.errors import UserError

QUERY = ("q_proj", "q", "query", "q_lin", "to_q", "wq", "q_linear")
KEY = ("k_proj", "k", "key", "k_lin", "to_k", "wk", "k_linear")
VALUE = ("v_proj", "v", "value", "v_lin", "to_v", "wv", "v_linear")
FUSED = ("qkv", "c_attn", "qkv_proj", "in_proj", "to_qkv", "Wqkv")  # rows q | k | v
OUTPUT = ("o_proj", "out_proj", "out", "o", "proj", "c_proj", "out_lin", "to_out", "wo", "Wo", "dense")
GATED = (("gate_proj", "up_proj", "down_proj"), ("gate", "up", "down"), ("w1", "w3", "w2"))
ROUTER, EXPERTS = ("gate", "router"), "experts"
PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("lin1", "lin2"), ("linear1", "linear2"), ("up_proj", "down_proj"))
HEAD_DIM = ("head_dim", "attention_head_size", "dim_head", "d_head")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Attention:
    """Full names of the projections; with a fused projection (rows q | k | v) q == k == v."""

    name: str  # the module that holds q (for BERT `attention.self`, whose output projection is its neighbour's)
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def fused(self) -> bool:
        return self.q == self.k


@dataclass(frozen=True)
class Mlp:
    """A feed-forward part: `into` is (gate, up) or (fc1,) or a fused (gate_up,)."""

    name: str  # the module that holds `into` (for BERT `intermediate`)
    into: tuple[str, ...]
    down: str
    gated: bool


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: its router gives (logits, weights, chosen), `experts(x, chosen, weights)` the sum."""

    name: str
    router: str
    experts: str


@dataclass(frozen=True)
class Block:
    name: str
    index: int
    attention: Attention | None
    mlp: Mlp | None  # one that every token runs through, never an expert of a mixture
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model by their full names."""

    kind: str  # 'llama' (gated decoder), 'gpt2' (plain decoder), 'bert', 'vit', 'cnn', 'generic'
    block_list: str
    blocks: tuple[Block, ...]
    embedding: str | None  # of tokens
    head: str | None  # the last projection, to the vocabulary or the classes
    final_norm: str | None
    tied: bool  # head and embedding share one tensor


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of `model`; a model without transformer blocks has none and is 'cnn' or 'generic'."""
    name, blocks = _find_blocks(model)
    embedding, head = _embedding(model), _head(model, name, bool(blocks))
    tied = embedding is not None and head is not None and _weight(model, embedding) is _weight(model, head) is not None
    norm = _final_norm(model, name) if blocks else None
    return Anatomy(_kind(model, blocks, embedding), name, blocks, embedding, head, norm, tied)


def linears(model: nn.Module) -> list[str]:
    """Names of the plain `nn.Linear` modules in model order (GPT-2's Conv1D only after `to_linear_`)."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name]


def convolutions(model: nn.Module) -> list[str]:
    """Names of the plain `nn.Conv2d` modules in model order."""
    return [name for name, module in model.named_modules() if type(module) is nn.Conv2d and name]


def shape_keeping_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of a convolutional net that give back the shape they take, as residual ones do: the innermost
    members of an nn.Sequential with two or more convolutions, none of which changes the resolution."""
    lists = [(name, module) for name, module in model.named_modules() if type(module) is nn.Sequential]
    members = [(f"{name}.{key}".lstrip("."), child) for name, module in lists for key, child in module.named_children()]
    found = [name for name, child in members if _keeps_shape(child)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _keeps_shape(block: nn.Module) -> bool:
    convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    if len(convs) < 2 or convs[0].in_channels != convs[-1].out_channels:
        return False
    axes = [axis for c in convs for axis in zip(c.kernel_size, c.stride, c.padding, c.dilation)]
    return all(stride == 1 and padding == dilation * (kernel - 1) / 2 for kernel, stride, padding, dilation in axes)


def needs_blocks(model: nn.Module, method_name: str) -> Anatomy:
    """The anatomy of a model with transformer blocks. Raises UserError with what else applies."""
    found = anatomy(model)
    if found.blocks:
        return found
    what = "a convolutional network" if found.kind == "cnn" else "a model without recognisable transformer blocks"
    other = "prune.channels, prune.magnitude" if found.kind == "cnn" else "prune.magnitude"
    raise UserError(
        f"{method_name} works on transformer blocks, but {type(model).__name__} is {what}; "
        f"use {other} or a method of the families quantize, factorize or distill"
    )


def in_out(module: nn.Module | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear-like module or of factors in its place, None for anything else."""
    parts = linear_parts(module)
    return (_sizes(parts[0])[0], _sizes(parts[-1])[1]) if parts else None  # pyright: ignore


def linear_parts(module: nn.Module | None) -> list[nn.Module]:
    """The layers that make a linear map, in their order: the module itself, or the members of an nn.Sequential (such as
    low-rank factors) that fit each other with at most identities between; none for anything else."""
    if type(module) is not nn.Sequential:
        return [module] if module is not None and _sizes(module) else []
    parts = [member for member in module if type(member) is not nn.Identity]
    sizes = [_sizes(part) for part in parts]
    fits = all(a and b and a[1] == b[0] for a, b in itertools.pairwise(sizes))
    return parts if fits and all(sizes) else []


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if is_conv1d(module):
        return int(module.nx), int(module.nf)  # pyright: ignore
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # pyright: ignore


def is_conv1d(module: Any) -> bool:
    """Whether this is transformers' Conv1D: a linear layer with its weight stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


@torch.no_grad()
def to_linear_(model: nn.Module) -> nn.Module:
    """Replace every transformers Conv1D by the nn.Linear with the same output."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if is_conv1d(child):
                parent.add_module(child_name, _linear_of(child))
    return model


def _linear_of(conv: Any) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf, device="meta", dtype=conv.weight.dtype)
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)


# --- blocks ----------------------------------------------------------------------------------------------------


def _find_blocks(model: nn.Module) -> tuple[str, tuple[Block, ...]]:
    """The container with the most blocks; among equals the innermost."""
    best: tuple[str, tuple[Block, ...]] = ("", ())
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        blocks = tuple(
            b for i, (key, child) in enumerate(module._modules.items()) if (b := _block(name, key, i, child))
        )
        if blocks and len(blocks) >= len(best[1]):
            best = name, blocks
    return best


def _block(list_name: str, key: str, index: int, module: nn.Module | None) -> Block | None:
    if module is None:
        return None
    name = f"{list_name}.{key}" if list_name else key
    inner = list(module.named_modules(prefix=name))
    attention = next((a for n, m in inner[1:] if (a := _attention(n, m, module, name))), None)
    if attention is None and not any("Attention" in type(m).__name__ for _, m in inner[1:]):
        return None
    return Block(name, index, attention, _mlp(inner, attention), _mixture(inner))


def _attention(name: str, module: nn.Module, block: nn.Module, block_name: str) -> Attention | None:
    fused = _child(module, FUSED)
    q, k, v = (fused,) * 3 if fused else (_child(module, names) for names in (QUERY, KEY, VALUE))
    if q is None or k is None or v is None:
        return None
    o = _child(module, OUTPUT)
    output = f"{name}.{o}" if o else _neighbour_output(name, block, block_name)
    if output is None:
        return None
    heads, kv_heads, head_dim = _heads(module, q, k, bool(fused))
    inputs, _ = in_out(_get(block, output.removeprefix(f"{block_name}.")))  # pyright: ignore
    if inputs != heads * head_dim:  # heads that share queries: what changes heads cannot know it
        return None
    return Attention(name, f"{name}.{q}", f"{name}.{k}", f"{name}.{v}", output, heads, kv_heads, head_dim)


def _neighbour_output(name: str, block: nn.Module, block_name: str) -> str | None:
    """BERT keeps the output projection beside the attention: attention.self and attention.output.dense."""
    parent = name.rpartition(".")[0]
    path = f"{parent}.output.dense".removeprefix(block_name + ".")
    return f"{block_name}.{path}" if in_out(_get(block, path)) else None


def _heads(module: nn.Module, q: str, k: str, fused: bool) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim) from the sizes of the layers and the module's own or its config's head size."""
    outputs = [in_out(getattr(module, n))[1] for n in (q, k)]  # pyright: ignore
    width = outputs[0] // 3 if fused else outputs[0]
    head_dim = _attribute(module, HEAD_DIM)
    if head_dim is None:
        heads = _attribute(module, HEADS)
        head_dim = width // heads if heads and width % heads == 0 else width
    if not fused:
        return width // head_dim, outputs[1] // head_dim, head_dim
    kv_heads = _attribute(module, KV_HEADS) or outputs[0] // (3 * head_dim)
    return outputs[0] // head_dim - 2 * kv_heads, kv_heads, head_dim


def _attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    owners = (module, getattr(module, "config", None))
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _mlp(inner: list[tuple[str, nn.Module]], attention: Attention | None) -> Mlp | None:
    """The first feed-forward part outside the attention: by its names, else by two linears that undo each other."""
    outside = [(n, m) for n, m in inner if attention is None or not f"{n}.".startswith(attention.name + ".")]
    outside = [(n, m) for n, m in outside if f".{EXPERTS}." not in n]
    for finder in (_named_mlp, _bert_mlp, _shaped_mlp):
        found = next((mlp for n, m in outside if (mlp := finder(n, m))), None)
        if found:
            return found
    return None


def _mixture(inner: list[tuple[str, nn.Module]]) -> Mixture | None:
    """The first module with experts and a router beside them."""
    for name, module in inner:
        router = next((r for r in ROUTER if _routes(module._modules.get(r))), None)
        if router and module._modules.get(EXPERTS) is not None:
            return Mixture(name, f"{name}.{router}", f"{name}.{EXPERTS}")
    return None


def _routes(module: nn.Module | None) -> bool:
    sizes = (getattr(module, name, None) for name in ("top_k", "num_experts"))
    return all(isinstance(size, int) for size in sizes)


def _named_mlp(name: str, module: nn.Module) -> Mlp | None:
    for names in (*GATED, ("gate_up_proj", "down_proj"), *PLAIN):
        if all(in_out(getattr(module, n, None)) for n in names):
            *into, down = (f"{name}.{n}" for n in names)
            return Mlp(name, tuple(into), down, len(into) == 2 or names[0] == "gate_up_proj")
    return None


def _bert_mlp(name: str, module: nn.Module) -> Mlp | None:
    if in_out(_get(module, "intermediate.dense")) and in_out(_get(module, "output.dense")):
        return Mlp(f"{name}.intermediate", (f"{name}.intermediate.dense",), f"{name}.output.dense", False)
    return None


def _shaped_mlp(name: str, module: nn.Module) -> Mlp | None:
    if in_out(module):  # two factors of one layer undo each other's sizes too
        return None
    layers = [(f"{name}.{n}", size) for n, m in module.named_children() if (size := in_out(m))]
    if len(layers) == 2 and layers[0][1] == layers[1][1][::-1]:
        return Mlp(name, (layers[0][0],), layers[1][0], False)
    return None


def _child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if n in module._modules and in_out(module._modules[n])), None)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


# --- the rest --------------------------------------------------------------------------------------------------


def _kind(model: nn.Module, blocks: tuple[Block, ...], embedding: str | None) -> str:
    has_convolution = bool(convolutions(model))
    if not blocks:
        return "cnn" if has_convolution else "generic"
    if has_convolution or embedding is None:
        return "vit"
    if any(b.mixture or (b.mlp and b.mlp.gated) for b in blocks):
        return "llama"
    return "gpt2" if _causal(model, blocks) else "bert"


def _causal(model: nn.Module, blocks: tuple[Block, ...]) -> bool:
    attentions = [model.get_submodule(b.attention.name) for b in blocks if b.attention]
    return any(getattr(a, "is_causal", getattr(a, "causal", False)) is True for a in attentions)


def _embedding(model: nn.Module) -> str | None:
    names = {id(m): n for n, m in model.named_modules()}
    getter = getattr(model, "get_input_embeddings", None)
    own = names.get(id(getter())) if getter else None
    if own and _table(model.get_submodule(own)):
        return own
    return next((n for n, m in model.named_modules() if _table(m)), None)


def _table(module: nn.Module) -> bool:
    return isinstance(getattr(module, "num_embeddings", None), int) and hasattr(module, "embedding_dim")


def _head(model: nn.Module, block_list: str, has_blocks: bool) -> str | None:
    names = {id(m): n for n, m in model.named_modules()}
    getter = getattr(model, "get_output_embeddings", None)
    own = names.get(id(getter())) if getter and getter() is not None else None
    if own:
        return own
    outside = _outside(model, block_list if has_blocks else None)
    found = [n for n, m in outside if n and "pooler" not in n and in_out(m)]
    whole = [n for n in found if n.rpartition(".")[0] not in found]  # a factored head, not its last factor
    return whole[-1] if whole else None


def _final_norm(model: nn.Module, block_list: str) -> str | None:
    """The first norm after the blocks, unless a linear layer comes before it (that norm belongs to a head)."""
    order = [n for n, _ in model.named_modules()]
    after = [(n, m) for n, m in _outside(model, block_list) if order.index(n) > order.index(block_list)]
    for name, module in after:
        if in_out(module):
            return None
        if "norm" in type(module).__name__.lower() and not list(module.children()):
            return name
    return None


def _outside(model: nn.Module, block_list: str | None) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if block_list is None or not f"{name}.".startswith(f"{block_list}." if block_list else "\0"):
            yield name, module


def _weight(model: nn.Module, name: str) -> Any:
    return getattr(model.get_submodule(name), "weight", None)
