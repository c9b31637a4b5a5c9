"""Language models: GGUF files made into Hugging Face folders once, and workloads around any such folder."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput import cache
from lilliput.errors import UserError, missing_extra
from lilliput.workload import CausalLM, Workload
from lilliput.zoo.texts import Corpus, split_windows, token_windows

_VERSION = 1  # of the conversion; raise it when that changes
LENGTH = 256  # tokens of a window, if the model reads as many
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "*.model")


# --- GGUF ------------------------------------------------------------------------------------------------------


def from_gguf(gguf: Path, sha256: str | None = None, cure: str | None = None) -> Path:
    """The Hugging Face folder made from a GGUF file: float32 safetensors and the tokenizer, in the cache.

    The weights of the file stay what they were, such as 4-bit values, now written as float32. `sha256` saves hashing
    the file. A damaged folder is made anew, or with `cure` is a UserError that says to run that.
    """
    digest = sha256 or cache.sha256(gguf)
    folder = cache.folder("converted") / digest[:24]
    problem = cache.damage(folder, gguf=digest, version=_VERSION)
    if problem and folder.exists() and cure:
        raise UserError(f"{problem}; run: {cure}")
    if problem:
        with cache.new_folder(folder, gguf=digest, version=_VERSION) as target:
            _convert(gguf, target)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    with open(gguf, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{str(gguf)!r} is not a GGUF file: it does not start with the letters GGUF")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "zoo")
    try:
        _dequantize(gguf, target)
    except Exception as error:  # of any kind: `tokenizers` raises the bare class
        raise UserError(f"{str(gguf)!r} cannot be converted: {_first_line(error)}") from error


def _dequantize(gguf: Path, target: Path) -> None:
    """Write the model anew without its quantization, since transformers refuses to save one that came from GGUF."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **place)
        config = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        model.load_state_dict(quantized.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = quantized.generation_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


# --- loading ---------------------------------------------------------------------------------------------------


def load_model(folder: Path) -> nn.Module:
    """A causal language model of a Hugging Face folder, float32, eval mode; nothing is fetched or executed."""
    from transformers import AutoModelForCausalLM

    _check_folder(folder)
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # of any kind: `tokenizers` raises the bare class
        raise UserError(f"{str(folder)!r} holds no causal language model that loads: {_first_line(error)}") from error
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any kind: `tokenizers` raises the bare class
        raise UserError(f"{str(folder)!r} holds no tokenizer that loads: {_first_line(error)}") from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} holds no config.json; give a Hugging Face folder or a .gguf file")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of the files of a tokenizer."""
    files = sorted({p for pattern in _TOKENIZER_FILES for p in folder.glob(pattern) if p.is_file()})
    return hashlib.sha256("".join(p.name + cache.sha256(p) for p in files).encode()).hexdigest()


# --- workloads -------------------------------------------------------------------------------------------------


def language_workload(
    folder: Path, corpus: Corpus, name: str, length: int | None = None, windows: Mapping[str, int] | None = None
) -> CausalLM:
    """A model of a Hugging Face folder, scored by perplexity on windows of `length` tokens of a corpus: 256, or as many
    as a smaller model reads.

    `windows` sets the number per split (training, calibration, validation, test); no document is in two splits.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return model_workload(model, tokenizer, tokenizer_digest(folder), corpus, name, length, windows)


def model_workload(
    model: Any,
    tokenizer: Any,
    digest: str,
    corpus: Corpus,
    name: str,
    length: int | None = None,
    windows: Mapping[str, int] | None = None,
) -> CausalLM:
    """The same around a transformers model and tokenizer in memory; `digest` identifies the tokenizer."""
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(LENGTH, longest or LENGTH) if length is None else length
    if longest is not None and length > longest:
        raise UserError(f"length is {length} tokens, but {name} reads {longest} at most")
    splits = split_windows(tokenizer, digest, corpus, length, windows)
    biggest, vocabulary = max(int(s.max()) for s in splits.values()), model.get_input_embeddings().num_embeddings
    if biggest >= vocabulary:
        raise UserError(f"the tokenizer of {name} makes token {biggest}, but the model knows {vocabulary}")
    return Workload.causal_lm(
        model,
        splits["calibration"],
        splits["validation"],
        splits["test"],
        training=splits["training"],
        name=name,
        source={"kind": "hf", "config": "config.json"},
        tokenizer=tokenizer,
        texts=lambda split, length, count: token_windows(
            tokenizer, list(corpus.split(split).values()), length, count, fewest=1
        ),
    )
