"""Text for language models: corpora, split by document, cut into windows of tokens.

The documents are put in the order of the SHA-256 of their names; shares of that order are the splits. So the splits
are the same everywhere, never share a document, and are as large as the shares say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilliput import cache
from lilliput.errors import UserError
from lilliput.zoo.fetch import folder_of

SHARES = {"training": 0.7, "calibration": 0.1, "validation": 0.1, "test": 0.1}  # of the documents
COUNTS = {"training": 512, "calibration": 16, "validation": 16, "test": 64}  # windows
FEWEST = 4  # windows a split of a user's own small corpus may have
FEWEST_DOCUMENTS = 10  # fewer could leave a split empty
GROUP_CHARS = 4096  # a single file is cut into documents of about this length
_VERSION = 1  # of the way windows are cut; raise it when that changes


@dataclass(frozen=True)
class Corpus:
    """Documents by name. `own` marks a user's text, of which smaller splits are accepted."""

    name: str
    documents: Mapping[str, str]
    own: bool = False

    def split(self, which: str) -> dict[str, str]:
        """The documents of one split."""
        names = sorted(self.documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        ends, total = {}, 0.0
        for split, share in SHARES.items():
            ends[split] = (round(total * len(names)), round((total + share) * len(names)))
            total += share
        first, last = ends[which]
        return {name: self.documents[name] for name in names[first:last]}

    def digest(self) -> str:
        """SHA-256 of all names and texts."""
        state = hashlib.sha256()
        for name in sorted(self.documents):
            state.update(f"{name}\0{len(self.documents[name])}\0{self.documents[name]}".encode())
        return state.hexdigest()


def state_of_the_union(fetch_name: str | None = None) -> Corpus:
    """The 233 addresses of 1790 to 2021. Raises UserError when they are not fetched."""
    return Corpus("sotu", read_documents(folder_of("sotu", fetch_name) / "sotu"))


def moby_dick() -> Corpus:
    """Moby-Dick by chapters: text of another kind, to see what a model loses away from its calibration data."""
    return Corpus("moby-dick", read_documents(folder_of("sotu") / "moby-dick"))


def own_corpus(path: str | Path) -> Corpus:
    """A user's .txt file, cut at its paragraphs, or a folder of .txt documents."""
    path = Path(path)
    if path.is_dir():
        documents = read_documents(path)
    elif path.is_file():
        documents = {f"{i:06d}": text for i, text in enumerate(_grouped(_read(path)))}
    else:
        raise UserError(f"the text {str(path)!r} does not exist; give a .txt file or a folder of .txt files")
    characters = sum(map(len, documents.values()))
    if len(documents) < FEWEST_DOCUMENTS:
        raise UserError(
            f"the text {str(path)!r} has {characters} characters in {len(documents)} documents; "
            f"give at least {FEWEST_DOCUMENTS} documents, or one file of {FEWEST_DOCUMENTS * GROUP_CHARS} characters"
        )
    return Corpus(path.stem, documents, own=True)


def read_documents(folder: Path) -> dict[str, str]:
    """Name -> text of every .txt file below a folder."""
    found = {str(p.relative_to(folder).with_suffix("")): _read(p) for p in sorted(folder.rglob("*.txt"))}
    if not found:
        raise UserError(f"the folder {str(folder)!r} holds no .txt file")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def _grouped(text: str) -> list[str]:
    """Consecutive paragraphs (else lines, else words) joined into documents of at least GROUP_CHARS characters."""
    separator = next((s for s in ("\n\n", "\n", " ") if text.count(s) * GROUP_CHARS >= len(text)), " ")
    groups, current, size = [], [], 0
    for piece in text.split(separator):
        current.append(piece)
        size += len(piece) + len(separator)
        if size >= GROUP_CHARS:
            groups.append(separator.join(current))
            current, size = [], 0
    if current and groups:
        groups[-1] += separator + separator.join(current)
    return groups or [text]


# --- windows ---------------------------------------------------------------------------------------------------


def token_windows(
    tokenizer: Any, documents: Sequence[str], length: int, count: int, seed: int = 0, fewest: int | None = None
) -> Tensor:
    """(n, length) token ids: `count` windows drawn without overlap from the documents, none across two of them.

    Of a large text only the first documents are read, enough for eight times `count` windows to draw from. Each window
    starts with the beginning-of-text token if the tokenizer sets one. Raises UserError when there are fewer than
    `fewest` (by default `count`) windows.
    """
    start = _start_tokens(tokenizer)
    body = length - len(start)
    found = _all_windows(tokenizer, documents, body, enough=8 * count)
    if len(found) < (count if fewest is None else fewest):
        characters = sum(map(len, documents))
        raise UserError(
            f"{len(documents)} documents of {characters} characters give {len(found)} windows of {length} tokens, but "
            f"{count if fewest is None else fewest} are needed; give more text, or ask for fewer or shorter windows"
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return torch.tensor([start + found[i] for i in order], dtype=torch.int64)


def _all_windows(tokenizer: Any, documents: Sequence[str], length: int, enough: int) -> list[list[int]]:
    """Consecutive windows of the documents, in order, until there are enough to draw from."""
    found: list[list[int]] = []
    for first in range(0, len(documents), 16):
        part = list(documents[first : first + 16])
        for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            found += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if len(found) >= enough:
            break
    return found


def _start_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-text token when the tokenizer puts it before a text (Gemma needs it), else nothing."""
    with_it, without = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    return with_it[:1] if with_it[:1] != without[:1] else []


def split_windows(
    tokenizer: Any, tokenizer_digest: str, corpus: Corpus, length: int = 256, counts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Split -> (n, length) token ids, kept in the cache by the digests of tokenizer and text.

    `counts` replaces some of COUNTS; a user's own corpus gives what it has down to FEWEST where `counts` is silent.
    """
    if type(length) is not int or length < 2:
        raise UserError(f"length is {length!r}; give a whole number of tokens, at least 2")
    wanted = {**COUNTS, **_checked_counts(counts or {})}
    exact = set(counts or ()) if corpus.own else set(COUNTS)
    key = json.dumps([_VERSION, tokenizer_digest, corpus.digest(), length, wanted, sorted(exact)], sort_keys=True)
    path = cache.folder("windows") / f"{corpus.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    found = _read_tensors(path)
    if set(found) != set(COUNTS):
        found = {}
        for seed, (split, count) in enumerate(wanted.items()):
            fewest = count if split in exact else min(FEWEST, count)
            documents = list(corpus.split(split).values())
            try:
                found[split] = token_windows(tokenizer, documents, length, count, seed, fewest)
            except UserError as error:
                raise UserError(f"the {split} split of {corpus.name!r} is too small: {error}") from None
        cache.write_atomically(path, lambda beside: save_file(found, beside))
    return found


def _checked_counts(counts: Mapping[str, int]) -> Mapping[str, int]:
    for split, count in counts.items():
        if split not in COUNTS or type(count) is not int or count < 1:
            raise UserError(f"windows {split!r}: {count!r} is wrong; give a number from 1 for {', '.join(COUNTS)}")
    return counts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or none when it is absent or broken: what it holds is then made again.

    Copies: what safetensors gives is mapped from the file and changes when that is overwritten.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}
