"""Whether two models mean the same by a token number: equal sizes do not say so, their tokenizers do."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from lilliput.errors import UserError
from lilliput.zoo.language import load_tokenizer

SPECIAL = ("bos_token_id", "eos_token_id")
FILE = "tokenizer_config.json"  # every saved tokenizer has one
UNKNOWN = (None, None)  # tokenizers of the model and of the small one: take what lies beside their weights


def check_vocabulary(model: Any, other: Any, whose: str, tokenizers: Any = UNKNOWN) -> None:
    """Raises UserError when `other`, called `whose`, has another vocabulary than the model.

    Sizes and special tokens are always compared; the tokens themselves where both tokenizers are given or lie beside
    the weights, in a folder or in the hub's cache on this machine.
    """
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, other)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{whose} has {sizes[1]} tokens, the model {sizes[0]}; take one of the model's tokenizer")
    for name in SPECIAL:
        ids = [getattr(m.config.get_text_config(), name, None) for m in (model, other)]
        if None not in ids and ids[0] != ids[1]:
            raise UserError(
                f"{name} is {ids[1]} for {whose} and {ids[0]} for the model; take one of the model's tokenizer"
            )
    if not isinstance(tokenizers, tuple) or len(tokenizers) != 2:
        raise UserError(f"tokenizers is a {type(tokenizers).__name__}; give a pair: the model's and that of {whose}")
    mine, theirs = (tokenizer_of(m, given) for m, given in zip((model, other), tokenizers))
    if mine is theirs or not all(hasattr(tokenizer, "get_vocab") for tokenizer in (mine, theirs)):
        return
    if clash := first_clash(mine, theirs):
        number, token, other_token = clash
        raise UserError(
            f"token {number} is {other_token!r} for {whose} and {token!r} for the model; "
            "take one of the model's tokenizer"
        )


def tokenizer_of(model: Any, given: Any = None) -> Any:
    """The tokenizer that is given, else the one beside the model's weights, None where there is none."""
    if given is not None:
        return given
    folder = _folder(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    return _stored(folder) if folder is not None and (folder / FILE).is_file() else None


@lru_cache(maxsize=16)  # a vocabulary of 50,000 tokens takes longer to compare than a token to generate
def first_clash(mine: Any, theirs: Any) -> tuple[int, str, str] | None:
    """The lowest number that stands for different tokens in two tokenizers, and both tokens."""
    a, b = ({number: token for token, number in t.get_vocab().items()} for t in (mine, theirs))
    number = min((n for n in a.keys() & b.keys() if a[n] != b[n]), default=None)
    return None if number is None else (number, a[number], b[number])


def _folder(name: str) -> Path | None:
    """Where the files of a model that was loaded by that name lie on this machine."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, FILE)
    except ValueError:  # no name that the hub allows
        return None
    return Path(found).parent if isinstance(found, str) else None


@lru_cache(maxsize=16)
def _stored(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except UserError:  # what cannot be read says nothing against the models
        return None
