"""What a cache policy costs: nats per token at the end of long texts, against the cache that keeps everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilliput.method import CachePolicy
from lilliput.served import PIECE, read
from lilliput.workload import ROOM, Workload

TAIL = 32  # tokens read at a time where they are judged: what a policy holds beyond its budget meanwhile
TEXT_TOKENS, FEWEST_TEXTS, MOST_TEXTS = 4096, 2, 16


def long_texts(work: Workload, split: str) -> tuple[Tensor, bool]:
    """Texts (n, context) of a split, and whether each is a piece of one text."""
    context = work.example["input_ids"].shape[1] + ROOM
    count = max(FEWEST_TEXTS, min(MOST_TEXTS, TEXT_TOKENS // context))
    return work.long_text(split, context, count)  # type: ignore[attr-defined]


def full_cache(model: Any) -> Any:
    """An empty cache that keeps everything."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.inference_mode()
def late_nats(model: Any, texts: Tensor, make: Callable[[Any], Any]) -> Tensor:
    """Nats per token over the last quarter of each text (n, length), where the cache that `make(model)` gives is as
    full as it gets; (n,) float64."""
    cache, last = make(model), texts.shape[1] - 1
    first = last - texts.shape[1] // 4
    read(model, texts[:, :first], cache, PIECE)
    nats = []
    for start in range(first, last, TAIL):
        end = min(start + TAIL, last)
        logits = read(model, texts[:, start:end], cache, TAIL, every=True)
        guesses = logits.float().transpose(1, 2)
        nats.append(F.cross_entropy(guesses, texts[:, start + 1 : end + 1], reduction="none"))
    return torch.cat(nats, 1).double().mean(1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of paired differences (n,) and its standard error, infinite for a single one."""
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return float(values.mean()), error


def worse(drop: float, nats: float) -> float:
    """A relative loss of perplexity with `nats` per token on top of it."""
    return (1 + drop) * math.exp(nats) - 1


def under_policy(found: Mapping[str, Any], work: Workload, model: Any, policy: CachePolicy) -> dict[str, Any]:
    """What was found of a model's answers on the test data, with what the policy adds on long test texts: perplexity
    after times exp(nats), and the drop and the paired difference that follow."""
    texts, _ = long_texts(work, "test")
    nats, error = mean_and_error(late_nats(model, texts, policy.cache) - late_nats(model, texts, full_cache))
    after = dict(found["score_after"])
    after |= {key: after[key] * math.exp(nats) for key in ("value", "low", "high")}
    return {
        **found,
        "score_after": after,
        "drop": worse(found["drop"], nats),
        "difference": {key: value + nats for key, value in found["difference"].items()},
        "policy": {"nats": nats, "error": error if math.isfinite(error) else None, "texts": len(texts)}
        | {"tokens": texts.shape[1]},
    }
