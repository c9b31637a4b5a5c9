"""From which of four times a piece of a State of the Union address is, for language models that answer with a token;
and pieces of Moby-Dick, which is from none of these addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.workload import Batch
from lilliput.zoo import nets, texts
from lilliput.zoo.texts import Corpus

BORDERS = (1850, 1900, 1950)  # years at which the next time begins
ANSWERS = (" A", " B", " C", " D")
BATCH = 8


@dataclass(frozen=True)
class Eras:
    """Batches of {"input" (B, length), "label" (B,)}; splits share no document, and `other` has no labels."""

    training: list[Batch]
    validation: list[Batch]
    test: list[Batch]
    other: list[Batch]


def era_of(name: str) -> int:
    """0 to 3, from a document's name that begins with its year."""
    return sum(int(name[:4]) >= border for border in BORDERS)


def eras(counts: Mapping[str, int], length: int, seed: int) -> Eras:
    """As many windows of each time as `counts` says for a split; the seed draws them."""
    tokenizer, address = nets.load_tokenizer(), texts.state_of_the_union()

    def windows(documents: list[str], count: int) -> Tensor:
        return texts.token_windows(tokenizer, documents, length, count, seed)

    found = {name: mixed(windows_of(address, name, windows, counts[name]), seed) for name in ("training", "validation")}
    test = mixed(windows_of(address, "test", windows, counts["test"]), seed)
    other = windows(list(texts.moby_dick().documents.values()), len(BORDERS) * counts["test"] + counts["test"])
    return Eras(found["training"], found["validation"], test, [{"input": part} for part in other.split(BATCH)])


def windows_of(corpus: Corpus, split: str, windows, count: int) -> list[Tensor]:
    """Per time the windows (count, length) of a split."""
    documents = corpus.split(split)
    times = range(len(BORDERS) + 1)
    return [windows([text for name, text in documents.items() if era_of(name) == time], count) for time in times]


def mixed(by_time: list[Tensor], seed: int) -> list[Batch]:
    """Windows of all times in one order."""
    ids, labels = torch.cat(by_time), torch.arange(len(by_time)).repeat_interleave(len(by_time[0]))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [{"input": ids[part], "label": labels[part]} for part in order.split(BATCH)]


def answer_tokens() -> list[int]:
    """The last token of each answer."""
    return [nets.load_tokenizer()(answer)["input_ids"][-1] for answer in ANSWERS]
