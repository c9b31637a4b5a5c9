"""A transformers model in other sizes: its config, and what each dimension of each of its tensors runs over.

The dimensions of projections come from the anatomy. Every other tensor (embeddings, norms, positions, patches, heads)
is compared with the same tensor of a model twice as wide: a dimension that differs runs over the width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.anatomy import Anatomy, anatomy, in_out, is_conv1d, needs_blocks
from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import Method
from lilliput.methods.prune.depth import shorten_config_

WIDTH, HEADS, KV, FFN = "width", "rows of query heads", "rows of key-value heads", "feed-forward neurons"
CONFIG_NAMES = {
    "width": ("hidden_size", "word_embed_proj_dim"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a transformer whose blocks are all alike."""

    width: int  # of the residual stream
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # neurons
    blocks: int

    def total(self, kind: str) -> int:
        """What a dimension of this kind is long."""
        return {
            WIDTH: self.width,
            HEADS: self.heads * self.head_dim,
            KV: self.kv_heads * self.head_dim,
            FFN: self.ffn,
        }[kind]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


class Axis(NamedTuple):
    """One dimension of a tensor: the kinds that stand in it one behind the other (none: its length stays)."""

    kinds: tuple[str, ...] = ()
    reads: bool = False  # the input of a linear map, which sums over it


class Place(NamedTuple):
    """Where a tensor of the resized model comes from."""

    source: str  # the parent's tensor
    block: int | None  # of the parent; None outside the blocks
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Resizing(Method):
    """Base of the methods that make a model of other sizes."""

    def targets(self, model: nn.Module) -> Iterator[str]:
        """The list of blocks, which stands for the whole model. Raises UserError for models that cannot be resized."""
        parent_sizes(model, self.name())
        yield anatomy(model).block_list


# --- the parent ------------------------------------------------------------------------------------------------------


def parent_sizes(model: Any, method: str) -> Sizes:
    """The sizes of a model that can be resized. Raises UserError with the reason for one that cannot."""
    from transformers import PreTrainedModel

    found = needs_blocks(model, method)
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{method} writes the new sizes into a transformers config; a {type(model).__name__} has none, build it in "
            "its new size yourself"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{method} knows models of one stack of blocks; a {type(model).__name__} has an encoder too")
    _refuse_changed(model, method)
    return _sizes(model, found, method)


def _refuse_changed(model: Any, method: str) -> None:
    """Raises UserError when a layer is not what the model's own config says."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    kinds = [{name: type(module) for name, module in one.named_modules()} for one in (model, fresh)]
    shapes = [{name: tuple(p.shape) for name, p in one.named_parameters()} for one in (model, fresh)]
    for now, planned in (kinds, shapes):
        wrong = next((n for n in (*now, *planned) if now.get(n) != planned.get(n)), None)
        if wrong is not None:
            raise UserError(
                f"{method} starts from a {type(model).__name__} that is as its config says, but {wrong!r} was "
                "replaced, cut, tied or untied since; initialize first, compress afterwards"
            )


def _sizes(model: nn.Module, found: Anatomy, method: str) -> Sizes:
    each = {_block_sizes(model, block) for block in found.blocks}
    if None in each:
        missing = next(b.name for b in found.blocks if _block_sizes(model, b) is None)
        raise UserError(f"{method} knows blocks of one attention and one feed-forward part, which {missing!r} is not")
    if len(each) > 1:
        raise UserError(f"{method} knows models whose blocks are all of one size; here they are of {len(each)}")
    width, heads, kv_heads, head_dim, ffn = each.pop()  # pyright: ignore
    return Sizes(width, heads, kv_heads, head_dim, ffn, len(found.blocks))


def _block_sizes(model: nn.Module, block: Any) -> tuple[int, int, int, int, int] | None:
    a, mlp = block.attention, block.mlp
    if a is None or mlp is None or block.mixture is not None:
        return None
    ffn, width = in_out(model.get_submodule(mlp.down))  # pyright: ignore
    return width, a.heads, a.kv_heads, a.head_dim, ffn


def check_sizes(model: Any, method: str, before: Sizes, after: Sizes) -> None:
    """Raises UserError when there is no model of this kind of such sizes, or when it is not known what one of its
    tensors runs over. No tensor is made."""
    tensor_axes(model, method, before)
    with torch.device("meta"):
        _blank(model, method, before, after, range(after.blocks))


# --- the resized model -----------------------------------------------------------------------------------------------


def resized(
    model: Any,
    method: str,
    before: Sizes,
    after: Sizes,
    blocks: Sequence[int],
    make: Callable[[Tensor, Place], Tensor],
    head_scale: float,
) -> nn.Module:
    """A new model of `after` sizes with the blocks named by their indices; `make(tensor, place)` gives each tensor.

    `head_scale` is what `make` multiplies the weights of an output layer by: where that is the embedding, the norm
    before it takes the factor. Raises UserError when no model of this kind has such sizes.
    """
    axes, names = tensor_axes(model, method, before), anatomy(model).block_list
    child = _blank(model, method, before, after, blocks)
    old = model.state_dict()
    with torch.no_grad():
        for name, new in [*child.named_parameters(), *_stored_buffers(child)]:
            source, block = _source(name, names, blocks)
            place = Place(source, block, axes.get(source, ()))
            tensor = make(old[source].detach(), place).to(old[source].dtype)
            if tensor.shape != new.shape:
                shapes = f"{list(tensor.shape)}, the new model wants {list(new.shape)}"
                raise UserError(f"{method} cannot make {name!r} of a {type(model).__name__}: it got {shapes}")
            _assign_(child, name, tensor.clone(memory_format=torch.contiguous_format))
        child.tie_weights()
        _settle_scales_(model, child, method, head_scale)
    return child.train(model.training)


def _stored_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    stored = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def _source(name: str, block_list: str, blocks: Sequence[int]) -> tuple[str, int | None]:
    """The parent's name of a tensor of the new model, and the block that it is in."""
    if not name.startswith(f"{block_list}."):
        return name, None
    index, _, rest = name.removeprefix(f"{block_list}.").partition(".")
    block = blocks[int(index)]
    return f"{block_list}.{block}.{rest}", block


def _assign_(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def _blank(model: Any, method: str, before: Sizes, after: Sizes, blocks: Sequence[int]) -> Any:
    """A model of the new sizes whose parameters hold nothing yet."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    _set_sizes_(config, before, after, blocks)
    try:
        if hasattr(config, "validate"):
            config.validate()
        with no_init_weights():
            child = type(model)(config)
    except Exception as error:  # validators raise a class of their own
        why = " ".join(str(error).split())[-200:]
        raise UserError(f"{method}: there is no {type(model).__name__} of {after}: {why}") from None
    child.tie_weights()
    if model.can_generate():
        child.generation_config = copy.deepcopy(model.generation_config)
    got = _sizes(child, anatomy(child), method)
    if got != after:
        raise UserError(
            f"{method}: a {type(model).__name__} cannot have {after}; it would have {got} (if it takes no head_dim, "
            f"the width must be heads x {before.head_dim})"
        )
    return child


def _set_sizes_(config: Any, before: Sizes, after: Sizes, blocks: Sequence[int]) -> None:
    for size, names in CONFIG_NAMES.items():
        old, new = getattr(before, size), getattr(after, size)
        for name in names:
            if hasattr(config, name) and getattr(config, name) in (None, old):
                setattr(config, name, new)
    if getattr(config, "head_dim", None) or after.width != after.heads * after.head_dim:
        config.head_dim = after.head_dim
    shorten_config_(config, before.blocks, list(blocks))


# --- what the dimensions are -----------------------------------------------------------------------------------------


def tensor_axes(model: Any, method: str, before: Sizes) -> dict[str, tuple[Axis, ...]]:
    """Name of each tensor of a model -> what its dimensions run over."""
    other = dataclasses.replace(
        before, width=2 * before.width, heads=2 * before.heads, kv_heads=2 * before.kv_heads, ffn=3 * before.ffn
    )
    with torch.device("meta"):
        wider = _blank(model, method, before, other, range(before.blocks))
    found = anatomy(model)
    known = _projections(found)
    attentions = tuple(f"{block.attention.name}." for block in found.blocks if block.attention)
    axes = {}
    for name, old in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer, new = model.get_submodule(owner), wider.get_parameter(name).shape
        axes[name] = (
            _linear_axes(layer, leaf, *known[owner]) if owner in known else _free_axes(layer, leaf, old.shape, new)
        )
        lost = name.startswith(attentions) and owner not in known and old.shape != new
        if lost or not _fits(axes[name], old.shape, before) or not _fits(axes[name], new, other):
            raise UserError(f"{method} does not know what {name!r} {list(old.shape)} runs over")
    return axes


def _fits(axes: Sequence[Axis], shape: Sequence[int], sizes: Sizes) -> bool:
    """Whether the dimensions are as long as what they run over."""
    return all(not axis.kinds or sum(map(sizes.total, axis.kinds)) == n for axis, n in zip(axes, shape))


def _projections(found: Anatomy) -> Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Name of each projection -> kinds of its outputs and of its inputs."""
    known = {}
    for block in found.blocks:
        a, mlp = block.attention, block.mlp
        assert a is not None
        assert mlp is not None
        queries, keys = ((HEADS, KV, KV),) * 2 if a.fused else ((HEADS,), (KV,))
        known |= {a.q: (queries, (WIDTH,)), a.k: (keys, (WIDTH,)), a.v: (keys, (WIDTH,)), a.o: ((WIDTH,), (HEADS,))}
        into = (FFN, FFN) if mlp.gated and len(mlp.into) == 1 else (FFN,)
        known |= dict.fromkeys(mlp.into, (into, (WIDTH,))) | {mlp.down: ((WIDTH,), (FFN,))}
    return known


def _linear_axes(layer: nn.Module, leaf: str, outputs: tuple[str, ...], inputs: tuple[str, ...]) -> tuple[Axis, ...]:
    if leaf == "bias":
        return (Axis(outputs),)
    axes = Axis(outputs), Axis(inputs, reads=True)
    return axes[::-1] if is_conv1d(layer) else axes


def _free_axes(layer: nn.Module, leaf: str, old: Sequence[int], new: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of a tensor outside the projections: where the lengths differ it is the width."""
    linear = leaf == "weight" and (in_out(layer) is not None or isinstance(layer, nn.modules.conv._ConvNd))
    reads = (0 if is_conv1d(layer) else 1) if linear else None
    return tuple(Axis((WIDTH,), i == reads) if a != b else Axis() for i, (a, b) in enumerate(zip(old, new)))


# --- factors that no tensor of its own can take -----------------------------------------------------------------------


def _settle_scales_(model: Any, child: Any, method: str, head_scale: float) -> None:
    """Undo what the embedding multiplies by because of its width, and give a tied output layer its factor."""
    found = anatomy(child)
    embedded = _embed_scale(model, found.embedding) / _embed_scale(child, found.embedding)
    if embedded != 1:
        child.get_submodule(found.embedding).weight.mul_(embedded)
    if not found.tied or head_scale == embedded:
        return
    norm = _norm_before(model, found.head)
    if norm is None:
        raise UserError(
            f"{method}: the output layer of this {type(model).__name__} is its embedding and no norm with weights "
            "stands before it, so its inputs cannot be scaled; give the model an output layer of its own"
        )
    _scale_norm_(child.get_submodule(norm), head_scale / embedded)


def _embed_scale(model: nn.Module, embedding: str | None) -> float:
    """What an embedding multiplies its rows by (Gemma: the root of the width)."""
    return float(getattr(model.get_submodule(embedding), "embed_scale", 1.0)) if embedding else 1.0


def _norm_before(model: nn.Module, head: str | None) -> str | None:
    """Name of the module with a vector of weights whose output is what a layer reads."""
    outputs: dict[str, Tensor] = {}  # kept alive, so that no two share memory
    found: list[str] = []

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.extend(name for name, out in outputs.items() if out.data_ptr() == args[0].data_ptr())

    def note(name: str, layer: nn.Module, args: Any, out: Tensor) -> None:
        outputs[name] = out

    vectors = [n for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    handles = [model.get_submodule(head).register_forward_pre_hook(look)] if head else []
    for name in vectors:
        handles.append(model.get_submodule(name).register_forward_hook(partial(note, name)))
    with attached(handles), torch.no_grad(), evaluating(model):
        model(random_input(model))
    return found[-1] if found else None


def _scale_norm_(norm: Any, factor: float) -> None:
    """Make a norm give `factor` times as much. Gemma's norms multiply by 1 + weight."""
    offset = 0
    if not isinstance(norm, nn.LayerNorm):
        offset = round(float((norm(torch.ones_like(norm.weight)) - norm.weight).float().mean()))
    norm.weight.copy_((norm.weight + offset) * factor - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(factor)


def random_input(model: Any, tokens: int = 8) -> Tensor:
    """(1, tokens) random ids for a model of text, one random picture for one of pictures."""
    generator, config = torch.Generator().manual_seed(0), model.config
    if embedding := anatomy(model).embedding:
        vocabulary = model.get_submodule(embedding).num_embeddings
        return torch.randint(vocabulary, (1, tokens), generator=generator)
    size = getattr(config, "image_size", None)
    if size is None:
        raise UserError(f"{type(model).__name__} reads neither text nor pictures; its answers cannot be compared")
    picture = torch.randn(1, config.num_channels, *(size if isinstance(size, list | tuple) else (size, size)),
                          generator=generator)  # fmt: skip
    return picture.to(next(model.parameters()).dtype)
