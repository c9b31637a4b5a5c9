"""Train the nets of the zoo:  python -m lilliput.zoo.train NAME [--seed 0]

Writes the weights, their sha256 and what was measured to `checkpoints/`. Pictures are Fashion-MNIST, text is State of
the Union addresses; only their training splits are learned from, and the test split is scored once, at the end. A run
that is killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput import cache
from lilliput.errors import UserError
from lilliput.training import cosine, train
from lilliput.workload import Batch
from lilliput.zoo import images, nets, texts

VOCABULARY, WINDOW = 2048, 256
END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """How one net is trained; everything else is the same for all."""

    epochs: float
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.05
    shift: int = 2  # pixels that pictures are moved by, at most; patches learn slowly when they are
    start: str = ""  # net whose weights it begins with
    bfloat16: bool = False  # run the products of the training (not the net that is kept) in bfloat16


RECIPES = {
    "resnet-small": Recipe(epochs=6, bfloat16=True),
    "resnet-medium": Recipe(epochs=2.5, lr=1.5e-3, start="resnet-small", bfloat16=True),
    "bottleneck-resnet-small": Recipe(epochs=5, bfloat16=True),
    "mobilenet-small": Recipe(epochs=5),
    "mobilenet-medium": Recipe(epochs=6),
    "vit-small": Recipe(epochs=8, batch_size=64, lr=1e-3, shift=0),
    "llama-tiny": Recipe(epochs=1.75, batch_size=8, lr=3e-3, bfloat16=True),
}


def make(name: str, seed: int = 0) -> dict[str, Any]:
    """Train one net of the zoo, write its checkpoint and return what was measured."""
    if name not in RECIPES:
        raise UserError(f"there is no net {name!r}; there are: {', '.join(RECIPES)}")
    torch.manual_seed(seed)
    return _make_language(name, seed) if name == "llama-tiny" else _make_classifier(name, seed)


def _fit(name: str, model: nn.Module, batches: Sequence[Batch], loss: Callable, seed: int) -> float:
    """Train by the recipe; seconds used."""
    recipe = RECIPES[name]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            return loss(model, batch)

    file = cache.folder("training") / f"{name}-{seed}.safetensors"
    history = train(
        model,
        batches,
        loss_fn,
        steps=round(recipe.epochs * len(batches)),
        lr=recipe.lr,
        optimizer=partial(torch.optim.AdamW, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)),
        schedule=cosine(warmup=0.1),
        clip_norm=1.0,
        checkpoint=file,
        progress=name,
        seed=seed,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    file.unlink(missing_ok=True)
    return history.seconds


# --- pictures --------------------------------------------------------------------------------------------------


def augment(x: Tensor, reach: int = 2) -> Tensor:
    """(B, C, H, W) -> the same, half of them mirrored, the batch shifted by up to `reach` pixels over its darkest."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    padded = F.pad(x, [reach] * 4, value=float(x.min()))
    top, left = torch.randint(2 * reach + 1, (2,)).tolist()
    return padded[..., top : top + x.shape[-2], left : left + x.shape[-1]]


def _make_classifier(name: str, seed: int) -> dict[str, Any]:
    splits = images.fashion_mnist()
    model = nets.build(name).to(memory_format=torch.channels_last)
    recipe = RECIPES[name]
    if recipe.start:
        model.load_state_dict(nets.load(recipe.start).state_dict())
    batches = splits["training"].batches(recipe.batch_size)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        pictures = augment(batch["input"], recipe.shift).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(model(pictures).float(), batch["label"])

    seconds = _fit(name, model, batches, loss, seed)
    model = model.to(memory_format=torch.contiguous_format).eval()
    measured = {f"{s}_accuracy_percent": round(accuracy(model, splits[s]), 2) for s in ("validation", "test")}
    return _write(name, model.state_dict(), {**measured, "seconds": round(seconds), "seed": seed})


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: images.Pictures) -> float:
    """Percent of right answers."""
    right = sum(int((model(b["input"]).argmax(-1) == b["label"]).sum()) for b in pictures.batches(500))
    return 100 * right / len(pictures)


# --- text ------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer (of `tokenizers`) that can spell every text; token 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _make_language(name: str, seed: int) -> dict[str, Any]:
    corpus = texts.state_of_the_union()
    documents = {split: list(corpus.split(split).values()) for split in texts.SHARES}
    file = cache.write_atomically(
        nets.CHECKPOINTS / f"{name}.tokenizer.json", train_tokenizer(documents["training"]).to_str(pretty=False)
    )
    _note(file.name, {"sha256": cache.sha256(file)})
    tokenizer = nets.load_tokenizer()
    windows = {s: texts.token_windows(tokenizer, d, WINDOW, 10**9, seed, fewest=1) for s, d in documents.items()}
    batches = [{"input_ids": ids} for ids in windows["training"].split(RECIPES[name].batch_size)]
    model = nets.build(name)
    seconds = _fit(name, model, batches, _next_token_loss, seed)
    half = {k: t.half() for k, t in model.eval().state_dict().items() if k != "lm_head.weight"}
    model.load_state_dict({k: t.float() for k, t in half.items()}, strict=False)
    measured = {}
    for split in ("validation", "test"):
        perplexity, bits = text_scores(model, tokenizer, windows[split])
        measured |= {f"{split}_perplexity": round(perplexity, 3), f"{split}_bits_per_byte": round(bits, 4)}
    measured |= {"training_tokens": windows["training"].numel()}
    return _write(name, half, {**measured, "seconds": round(seconds), "seed": seed})


def _next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def text_scores(model: nn.Module, tokenizer: Any, windows: Tensor) -> tuple[float, float]:
    """(perplexity per token, bits per byte) of (n, length) windows; the first token of each is given."""
    nats = sum(float(_next_token_loss(model, {"input_ids": ids})) * len(ids) for ids in windows.split(16))
    predicted = windows[:, 1:]
    # one character of a byte-level token is one byte
    lengths = torch.tensor([len(t) for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    nats_per_token = nats / len(windows)
    bytes_per_token = float(lengths[predicted].float().mean())
    return math.exp(nats_per_token), nats_per_token / math.log(2) / bytes_per_token


# --- writing ---------------------------------------------------------------------------------------------------


def _write(name: str, tensors: dict[str, Tensor], measured: dict[str, Any]) -> dict[str, Any]:
    packed = {k: t.detach().contiguous() for k, t in tensors.items()}
    file = nets.CHECKPOINTS / f"{name}.safetensors"
    cache.write_atomically(file, lambda beside: save_file(packed, beside))
    facts = {"sha256": cache.sha256(file), "size_bytes": file.stat().st_size, **measured}
    _note(file.name, facts)
    return facts


def _note(file_name: str, facts: dict[str, Any]) -> None:
    """Put the facts of one file into hashes.toml."""
    table = {**nets.facts(), file_name: facts}
    lines = ["# Written by `python -m lilliput.zoo.train NAME`.\n"]
    for section in sorted(table):
        values = [f"{key} = {json.dumps(value)}\n" for key, value in table[section].items()]
        lines.append(f"\n[{json.dumps(section)}]\n{''.join(values)}")
    cache.write_atomically(nets.CHECKPOINTS / "hashes.toml", "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lilliput.zoo.train", description="Train a net of the zoo.")
    parser.add_argument("name", choices=nets.NAMES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    facts = make(arguments.name, arguments.seed)
    print(json.dumps({"name": arguments.name, "total_seconds": round(time.perf_counter() - start), **facts}, indent=1))


if __name__ == "__main__":
    main()
