"""Text from a fitted language model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilliput.artifact import load, load_example, load_tokenizer, read_architecture
from lilliput.errors import UserError
from lilliput.measuring import bare_workload, generator
from lilliput.runtimes import choose


def stream_text(folder: str | Path, prompt: str, tokens: int) -> Iterator[str]:
    """Greedy continuation of `prompt`, piece by piece, on the fastest runtime; ends early at the end-of-text token."""
    if read_architecture(folder)["kind"] != "causal_lm":
        raise UserError(f"{str(folder)!r} is not a language model")
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise UserError(f"{str(folder)!r} has no tokenizer; save it from a workload that has one")
    model, tokenizer = load(folder), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one word")
    workload = bare_workload(model, load_example(folder), "causal_lm")
    runtime = choose(model, workload)
    options: dict[str, Any] = {"max_length": ids.shape[1] + tokens} if runtime.name == "lean" else {}
    session: Any = runtime.prepare(model, workload, **options)
    end = model.config.eos_token_id  # type: ignore[union-attr]
    done, shown = [], ""
    for token in generator(session)(ids, tokens):
        if token == end or (isinstance(end, list) and token in end):
            return
        done.append(token)
        text = tokenizer.decode(done)
        if not text.endswith("�"):  # half of a character
            yield text[len(shown) :]
            shown = text
