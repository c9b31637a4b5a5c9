"""Rows of a pass that stand ahead of the text, so that one pass checks a draft and makes the next one.

Behind some tokens of a pass stand k more rows, in the places of the tokens to come. They enter before one of the blocks
and leave after the last. Row j of a token sees what that token sees, the rows before it and itself; no token sees a
row. Low-rank adapters act on rows alone (gated LoRA), so what the model itself says keeps its bits, and the keys and
values of rows are dropped when the pass ends.

    y = W x + g up (down x),    g = 1 in a row, 0 in a token of the text
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.anatomy import anatomy, in_out, needs_blocks
from lilliput.errors import UserError
from lilliput.hooks import attached, watching
from lilliput.methods.decode._backends import TorchBackend, additive, check_masked, head_name
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._trained import Part
from lilliput.methods.train._adapting import LORA, layers_of

Choose = Callable[[Tensor, Draft], list[int]]  # (what the entry block reads (1 + n, d), draft) -> where rows stand


class Rows(Part):
    """k rows that enter before block `entry`, each from a vector of its own, and the adapters that they pass through.

    `sizes` holds (inputs, outputs) of every layer with an adapter, by its name in the model.
    """

    def __init__(self, count: int, width: int, entry: int, rank: int, sizes: Mapping[str, Sequence[int]]):
        super().__init__()
        self.count, self.width, self.entry, self.rank = count, width, entry, rank
        self.sizes = {name: list(size) for name, size in sizes.items()}
        self.first = nn.Parameter(torch.zeros(count, width))
        self.down = nn.ParameterList([nn.Parameter(torch.zeros(rank, i)) for i, _ in self.sizes.values()])
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(o, rank)) for _, o in self.sizes.values()])

    def rebuild_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("count", "width", "entry", "rank", "sizes")}

    def start(self, read: Tensor) -> Tensor:
        """What the entry block reads at tokens (B, G, d) -> what it reads in the rows behind them (B, G, k, d)."""
        raise NotImplementedError

    @torch.no_grad()
    def draw_downs_(self, draws: torch.Generator) -> None:
        """First values of adapters: their outputs begin as zero, and learn."""
        for down in self.down:
            down.copy_(torch.randn(down.shape, generator=draws) / down.shape[1] ** 0.5)

    @contextmanager
    def gated(self, model: nn.Module, tokens: int) -> Iterator[None]:
        """Inside, rows of a pass from number `tokens` on pass through the adapters, the ones before do not."""
        handles = []
        for name, down, up in zip(self.sizes, self.down, self.up):

            def hook(layer, args, y, down=down, up=up):
                more = F.linear(F.linear(args[0][:, tokens:].to(down.dtype), down), up)
                return torch.cat([y[:, :tokens], y[:, tokens:] + more.to(y.dtype)], 1)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        with attached(handles):
            yield


SomeRows = TypeVar("SomeRows", bound=Rows)

# --- who stands where, and sees whom -----------------------------------------------------------------------------


def with_rows(seen: Tensor, anchors: Tensor, count: int) -> Tensor:
    """Who sees whom when `count` rows stand behind each of the `anchors` (G,): (q, t) -> (q + G count, t + G count).

    The q tokens of the pass are the last of the t; so are the rows, behind them.
    """
    own = torch.kron(torch.eye(len(anchors)), torch.ones(count, count).tril()).bool().to(seen.device)
    tokens = torch.cat([seen, seen.new_zeros(len(seen), len(own))], 1)
    rows = torch.cat([seen[anchors].repeat_interleave(count, 0), own], 1)
    return torch.cat([tokens, rows])


def places_behind(places: Tensor, count: int) -> Tensor:
    """The `count` places after each of (G,), as (G count,)."""
    return (places[:, None] + torch.arange(1, count + 1, device=places.device)).flatten()


# --- decoding: rows ride along in the pass that checks the draft -------------------------------------------------


class RowsBackend(TorchBackend):
    """`hidden[i]` (k, d) is what the head would read in the rows behind answer i, None where `choose` put none."""

    def __init__(self, model: Any, cache: Any, part: Rows, choose: Choose):
        super().__init__(model, cache)
        self.part, self.choose = part, choose
        self.blocks, self.norm = blocks_of(model), final_norm(model)

    @torch.no_grad()
    def extend(self, fresh: Tensor, draft: Draft = NOTHING) -> Tensor:
        tokens, answers = torch.cat([fresh, fresh.new_tensor(draft.tokens)]), len(draft.tokens) + 1
        seen, places = self.view(len(fresh), draft)
        ends = torch.arange(len(tokens) - answers, len(tokens), device=places.device)
        options = self.options | ({self.keeps: answers} if self.keeps else {})
        options["attention_mask"] = additive(with_rows(seen, ends, self.part.count), self.model.dtype)
        options["position_ids"] = torch.cat([places, places_behind(places[ends], self.part.count)])[None]
        ride = _Ride(self.part, len(tokens), ends, lambda read: self.choose(read[0, -answers:], draft))
        held = self.filled
        with ride.under_way(self.blocks), self.part.gated(self.model, len(tokens)):
            logits = self.model(input_ids=tokens[None], **options).logits[0, -answers:]
        for layer in self.cache.layers:
            layer.crop(min(0, held + len(tokens) - layer.get_seq_length()))
        groups = dict(zip(ride.chosen, self.norm(ride.rows)[0].unflatten(0, (-1, self.part.count))))
        self.hidden = [groups.get(i) for i in range(answers)]
        return logits


class _Ride:
    """One pass: the hooks by which rows behind some of the `ends` (1 + n,) enter and leave it.

    The model is told the places and the mask of all rows that there could be, and its blocks get those that they have.
    """

    def __init__(self, part: Rows, tokens: int, ends: Tensor, choose: Callable[[Tensor], list[int]]):
        self.part, self.tokens, self.ends, self.choose = part, tokens, ends, choose
        self.chosen: list[int] = []
        self.rows = torch.empty(0)  # (1, G k, d), behind the last block
        self.below: dict[str, Any] | None = None  # arguments of blocks below the entry
        self.above: dict[str, Any] = {}  # and above it

    @contextmanager
    def under_way(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        entry = self.part.entry
        hooks = [self._pass_below] * entry + [self._enter] + [self._pass_above] * (len(blocks) - entry - 1)
        handles = [b.register_forward_pre_hook(h, with_kwargs=True) for b, h in zip(blocks, hooks)]
        handles.append(blocks[-1].register_forward_hook(self._leave))
        with attached(handles):
            yield

    def _pass_below(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.below is None:
            self.below = _only(kwargs, torch.arange(self.tokens, device=self.ends.device))
        return args, kwargs | self.below

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        read = args[0]
        self.chosen = self.choose(read)
        if len(self.chosen) < len(self.ends):
            groups = torch.arange(len(self.ends) * self.part.count).view(-1, self.part.count)[self.chosen]
            kept = torch.cat([torch.arange(self.tokens), self.tokens + groups.flatten()])
            self.above = _only(kwargs, kept.to(self.ends.device))
        rows = self.part.start(read[:, self.ends[self.chosen]]).flatten(1, 2)
        return (torch.cat([read, rows.to(read.dtype)], 1), *args[1:]), kwargs | self.above

    def _pass_above(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | self.above

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> Any:
        whole = _hidden_of(output)
        self.rows = whole[:, self.tokens :]
        text = whole[:, : self.tokens]
        return (text, *output[1:]) if isinstance(output, tuple) else text


def _only(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The mask and places that a block gets for some of the rows of a pass."""
    mask = kwargs["attention_mask"]
    held = mask.shape[-1] - mask.shape[-2]
    columns = torch.cat([torch.arange(held, device=rows.device), held + rows])
    return {"attention_mask": mask[:, :, rows][..., columns]} | _placed(kwargs, rows)


def _placed(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Rotations, and position ids where a block is told them, of some rows."""
    found: dict[str, Any] = {"position_embeddings": tuple(e[:, rows] for e in kwargs["position_embeddings"])}
    if kwargs.get("position_ids") is not None:
        found["position_ids"] = kwargs["position_ids"][:, rows]
    return found


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# --- training: the text is read once, and rows behind its tokens learn from what was read ------------------------


class Reading:
    """A batch of texts (B, T) as the model reads it: what rows behind its tokens may see, and what they should say.

    `logits` (B, T, V), `hidden` (B, T, d) what the head reads, `read` (B, T, d) what the entry block reads. The cache
    is used up by one call of `ahead`.
    """

    def __init__(self, model: Any, ids: Tensor, entry: int):
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        check_masked(model, cache)
        self.blocks, self.norm = blocks_of(model)[entry:], final_norm(model)
        self.model, self.ids, found = model, ids, {}

        def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
            found.update(kwargs, read=args[0])

        handle = self.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
        heads = watching(model, [head_name(model)], lambda name, layer, x: found.update(hidden=x))
        with attached([handle]), torch.no_grad(), heads:
            self.logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        self.read, self.hidden, self.kwargs = found.pop("read"), found.pop("hidden"), found

    def ahead(self, part: Rows, anchors: Tensor) -> Tensor:
        """(B, G k, d): what the head would read in rows behind the tokens `anchors` (G,), with the part's gradients."""
        length = self.ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        mask = additive(with_rows(seen, anchors, part.count)[length:], self.model.dtype)
        options = self.kwargs | {"attention_mask": mask} | _placed(self.kwargs, places_behind(anchors, part.count))
        x = part.start(self.read[:, anchors]).flatten(1, 2).to(self.read.dtype)
        with part.gated(self.model, 0):
            for block in self.blocks:
                x = _hidden_of(block(x, **options))
        return self.norm(x)


def drawn_anchors(ids: Tensor, count: int, places: int, draws: torch.Generator) -> Tensor:
    """(G,): random tokens of windows (B, T), the same in each, about `places` in all, with `count` tokens behind them.

    Raises UserError for windows that are too short.
    """
    usable = ids.shape[1] - count
    if usable < 1:
        raise UserError(f"windows of {ids.shape[1]} tokens teach nothing {count} tokens ahead; give longer ones")
    picked = torch.randperm(usable, generator=draws)[: max(1, places // len(ids))]
    return picked.sort().values.to(ids.device)


# --- the model's side --------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A decoder's blocks. Raises UserError for a model whose blocks are not told their places in each call."""
    blocks = [model.get_submodule(block.name) for block in needs_blocks(model, "reading ahead").blocks]
    if not {"position_embeddings", "attention_mask"} <= inspect.signature(blocks[0].forward).parameters.keys():
        raise UserError(
            f"rows ahead of the text need blocks as Llama, Qwen2 and Gemma have them, with rotary positions, not those "
            f"of {type(model).__name__}; draft by decode.medusa, decode.ngram or decode.draft_model"
        )
    return blocks


def final_norm(model: nn.Module) -> nn.Module:
    """What stands between the last block and the head."""
    name = anatomy(model).final_norm
    return nn.Identity() if name is None else model.get_submodule(name)


def adapted_sizes(model: nn.Module, entry: int) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers in the blocks from number `entry` on."""
    blocks = needs_blocks(model, "reading ahead").blocks[entry:]
    names = [name for name in layers_of(model, LORA) if any(name.startswith(f"{block.name}.") for block in blocks)]
    sizes = {name: in_out(model.get_submodule(name)) for name in names}
    return {name: size for name, size in sizes.items() if size is not None}


def check_rows(part: SomeRows | None, model: nn.Module, decoder: str, key: str) -> SomeRows:
    """What is given to a decoder as `key`. Raises UserError when it is missing or learned beside another model."""
    if part is None:
        raise UserError(f"there are no {key}; call generate(..., custom_generate={decoder}(), {key}={key}) with those "
                        f"that {decoder}().train(workload) gives")  # fmt: skip
    for name, size in part.sizes.items():
        try:
            own = in_out(model.get_submodule(name))
        except AttributeError:
            own = None
        if own is None or list(own) != size:
            raise UserError(
                f"{type(part).__name__} has an adapter for {name!r} of {size[0]} inputs and {size[1]} outputs, which "
                f"this {type(model).__name__} does not have; train one for it"
            )
    return part
