"""What learns while a model answers: a choice of its own parameters, or low-rank adapters that peft puts in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import Block, needs_blocks
from lilliput.errors import UserError, missing_extra
from lilliput.methods.train._restored import restored
from lilliput.training import constant, train

LORA = "lora"
PARTS = ("ffn_out", "ffn_in", "attention", "all", LORA)
PARTS_HELP = "what learns: the last or the first layers of the feed-forward parts, attention, everything, or adapters"
plain_adamw = partial(torch.optim.AdamW, weight_decay=0.0)


@contextmanager
def adapting(model: nn.Module, part: str, rank: int = 8, seed: int = 0) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, only the parameters that are given by name learn; afterwards the model is what it was, to the bit.

    `part` is one of PARTS; for adapters `rank` is their width and `seed` draws their first values. Raises UserError for
    a model without transformer blocks or without float weights in them.
    """
    names = [] if part == LORA else _parameter_names(model, part)
    with restored(model, names):
        if part == LORA:
            _inject_adapters_(model, rank, seed)
        yield {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers_of(model: nn.Module, part: str) -> list[str]:
    """Names of the linear layers of a part in all blocks; of adapters and of everything, all that blocks have."""
    blocks = needs_blocks(model, f"learning of {part!r}").blocks
    return list(chain.from_iterable(_layers_of_block(block, part) for block in blocks))


def _layers_of_block(block: Block, part: str) -> list[str]:
    a, mlp = block.attention, block.mlp
    found = {
        "attention": list(dict.fromkeys((a.q, a.k, a.v, a.o))) if a else [],
        "ffn_in": list(mlp.into) if mlp else [],
        "ffn_out": [mlp.down] if mlp else [],
    }
    return found[part] if part in found else list(chain.from_iterable(found.values()))


def _parameter_names(model: nn.Module, part: str) -> list[str]:
    layers = [f"{layer}." for layer in layers_of(model, part)]
    floats = [name for name, p in model.named_parameters() if p.is_floating_point()]
    names = floats if part == "all" else [n for n in floats if any(n.startswith(layer) for layer in layers)]
    if not names:
        raise UserError(
            f"{type(model).__name__} has no float weights in {part!r} that could learn; give the model as it was "
            f"before it was packed, or choose another of {', '.join(PARTS)}"
        )
    return names


def _inject_adapters_(model: nn.Module, rank: int, seed: int) -> None:
    """Low-rank adapters of peft on every linear layer of the blocks; they begin as zero."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise missing_extra("peft", "peft") from None
    layers = layers_of(model, LORA)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name="lilliput")
        except ValueError as error:
            kinds = {type(model.get_submodule(layer)).__name__ for layer in layers}
            raise UserError(
                f"peft has no adapters for {', '.join(sorted(kinds))} ({str(error)[:80]}); give the model as it was "
                f"before it was packed, or let another part learn: {', '.join(PARTS[:-1])}"
            ) from None


def learn_(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    steps: int,
    lr: float,
    seed: int = 0,
) -> list[float]:
    """Train what requires a gradient at a constant rate; the losses. torch's random state stays as it is, and a Ctrl-C
    is raised after the step that is under way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        history = train(
            model, batches, loss_fn, steps=steps, lr=lr, optimizer=plain_adamw, schedule=constant, clip_norm=1.0,
            seed=seed,
        )  # fmt: skip
    if history.interrupted:
        raise KeyboardInterrupt
    return history.losses


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model knows. Raises UserError for what is no language model."""
    getter = getattr(model, "get_input_embeddings", None)
    table = getter() if getter else None
    if not isinstance(getattr(table, "num_embeddings", None), int):
        raise UserError(f"{type(model).__name__} is no language model of transformers: it embeds no tokens")
    return table.num_embeddings  # type: ignore[union-attr]


def token_ids(ids: Any, model: nn.Module, what: str) -> Tensor:
    """One text as ids (T,). Raises UserError for another shape, no tokens, or ids that the model does not know."""
    tensor = torch.as_tensor(ids)
    tensor = tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor
    if tensor.ndim != 1 or tensor.is_floating_point() or len(tensor) == 0:
        raise UserError(f"{what} has the shape {tuple(tensor.shape)} and type {tensor.dtype}; give token ids (T,)")
    known = vocabulary_of(model)
    if int(tensor.min()) < 0 or int(tensor.max()) >= known:
        worst = int(tensor.max()) if int(tensor.max()) >= known else int(tensor.min())
        raise UserError(f"{what} holds token {worst}, but the model knows {known}; use the model's own tokenizer")
    return tensor.long()
