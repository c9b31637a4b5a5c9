"""A fast tokenizer's vocabulary as the metadata of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from lilliput._gguf_matrices import gguf_package
from lilliput.errors import UserError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {LLAMA3_PATTERN: "llama-bpe", LLAMA3_PATTERN.replace("{1,3}", ""): "qwen2"}


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> str:
    """Write the vocabulary of a fast byte-level BPE tokenizer and return llama.cpp's name of how it splits text."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return "none: the file takes token ids only"
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(data)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens, types = _tokens(data, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    template = tokenizer.chat_template
    if template:
        writer.add_chat_template(template if isinstance(template, str) else template["default"])
    return pre


def _tokens(data: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids and llama.cpp's type of each, filled up to the rows of the embedding."""
    kinds = gguf_package().TokenType
    found = {i: (text, kinds.NORMAL) for text, i in data["model"]["vocab"].items()}
    for added in data["added_tokens"]:
        found[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    if found and max(found) >= rows:
        raise UserError(
            f"the tokenizer makes token {max(found)}, but the embedding has {rows} rows; save them together"
        )
    filled = [found.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(rows)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text before it merges: gpt-2, smollm, llama-bpe or qwen2.

    A tokenizer that transformers rebuilt from a GGUF file has lost the rule that every digit stands alone; a vocabulary
    in which no digit touches another character tells that it was trained with it.
    """
    steps = data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if data["model"].get("type") == "BPE" and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "smollm" if _digits_stand_alone(data["model"]["vocab"]) else "gpt-2"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in PATTERNS:
            return PATTERNS[steps[0]["pattern"]["Regex"]]
    raise UserError(
        f"the tokenizer splits text by {kinds}, which is none of llama.cpp's known ways (byte-level gpt-2, smollm, "
        "llama-bpe, qwen2); serve this model with lilliput generate or transformers instead"
    )


def _digits_stand_alone(vocabulary: dict[str, int]) -> bool:
    with_digit = [t for t in vocabulary if any("0" <= c <= "9" for c in t) and not t.startswith("<")]
    return bool(with_digit) and all(len(t) == 1 for t in with_digit)
