"""Text from a fitted language model: streamed from an artifact, or by the native decoder inside `model.generate`.

model.generate(**inputs, custom_generate=native_sampling)
with accelerated(model):                  # or accelerated(model, Ngram()), see lilliput.methods.decode
    model.generate(**inputs, streamer=streamer)
load("fitted").generate(**inputs)         # as the fit chose to serve it: see `Served`
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import artifact
from lilliput.artifact import load_example, load_tokenizer, read_architecture, serving_of
from lilliput.errors import UserError
from lilliput.kernels.decoder import Decoder, foreign_layers
from lilliput.kernels.decoder_parts import parts_of, refusals
from lilliput.measuring import bare_workload, generator
from lilliput.method import CachePolicy
from lilliput.methods.decode._verify import context_of
from lilliput.runtimes import choose
from lilliput.served import PIECE, Setting, prepare

OWN_WAYS = ("custom_generate", "past_key_values", "assistant_model", "cache_implementation")


def load(folder: str | Path, model: nn.Module | None = None, serve: bool = True) -> nn.Module:
    """The fitted model of an artifact, in eval mode, equal to the bit to the one saved.

    `model` is an instance of your own class for artifacts of models that neither transformers nor the zoo can build.
    A language model whose fit chose a way to serve it generates so (`Served`), with `serve=False` plainly.
    """
    found = artifact.load(folder, model)
    setting = serving_of(folder) if serve else None
    if setting is not None:
        found.generate = Served(found, setting)  # type: ignore[assignment]
    return found


class Served:
    """`generate` of a model with a decoder or a cache policy in it; a policy's cache is new for each call.

    A call that names a way of its own (OWN_WAYS, several beams) goes its way; several texts at once are not drafted.
    """

    def __init__(self, model: Any, setting: Setting):
        self.model, self.setting = model, setting

    def __call__(self, inputs: Any = None, *args: Any, **options: Any) -> Any:
        plain = partial(type(self.model).generate, self.model)
        config = options.get("generation_config") or self.model.generation_config
        beams = options.get("num_beams", config.num_beams) or 1
        if beams > 1 or any(options.get(name) is not None for name in OWN_WAYS):
            return plain(inputs, *args, **options)
        if isinstance(self.setting, CachePolicy):
            cache = self.setting.cache(self.model)
            return plain(inputs, *args, past_key_values=cache, **{"prefill_chunk_size": PIECE} | options)
        loop = self.setting if _draftable(options.get("input_ids") if inputs is None else inputs, options) else None
        loop = loop or native_sampling
        return plain(inputs, *args, custom_generate=partial(loop, streamer=options.get("streamer")), **options)


def _draftable(ids: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a call is for one whole text, its tokens alone: what decoders that draft can follow."""
    mask = options.get("attention_mask")
    whole = mask is None or bool((mask == 1).all())
    asked = options.get("return_dict_in_generate") or options.get("use_cache") is False
    one = ids is not None and len(ids) == 1 and (options.get("num_return_sequences") or 1) == 1
    return one and whole and not asked


def stream_text(folder: str | Path, prompt: str, tokens: int, plain: bool = False) -> Iterator[str]:
    """Greedy continuation of `prompt`, piece by piece, as the fit chose to serve it, or `plain`: on the fastest runtime
    alone; ends early at the end-of-text token.

    Raises UserError for a text that the model's positions do not reach; warns of one beyond the context of the budget.
    """
    if read_architecture(folder)["kind"] != "causal_lm":
        raise UserError(f"{str(folder)!r} is not a language model")
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise UserError(f"{str(folder)!r} has no tokenizer; save it from a workload that has one")
    model, tokenizer = artifact.load(folder), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one word")
    _check_length(folder, model, ids.shape[1], tokens)
    workload = bare_workload(model, load_example(folder), "causal_lm")
    runtime = choose(model, workload)
    options: dict[str, Any] = {"max_length": ids.shape[1] + tokens} if runtime.keeps_text else {}
    session: Any = prepare(runtime, model, workload, setting=None if plain else serving_of(folder), **options)
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


def _check_length(folder: str | Path, model: nn.Module, prompt: int, tokens: int) -> None:
    """Whether a text of prompt and new tokens can be read, and was what the budget is about."""
    longest, fitted = context_of(model), (read_architecture(folder).get("facts") or {}).get("context")
    if prompt + tokens > longest:
        raise UserError(
            f"a prompt of {prompt} tokens and {tokens} new ones are {prompt + tokens}, but the model reads {longest}; "
            "shorten the prompt or ask for fewer tokens"
        )
    if fitted is not None and prompt + tokens > fitted:
        warnings.warn(
            f"the text may grow to {prompt + tokens} tokens; memory and time were measured for {fitted}", stacklevel=3
        )


@contextmanager
def accelerated(model: Any, decoder: Any = None) -> Iterator[Any]:
    """Inside, `model.generate` runs a decoder, streamers included: by default `native_sampling` where that can."""
    loop = native_sampling if decoder is None else decoder
    plain = model.generate

    def generate(*args: Any, streamer: Any = None, custom_generate: Any = None, **options: Any) -> Any:
        chosen = custom_generate or partial(loop, streamer=streamer)
        if options.get("assistant_model") is not None:
            chosen = custom_generate
        return plain(*args, streamer=streamer, custom_generate=chosen, **options)

    before = vars(model).get("generate")
    model.generate = generate
    try:
        yield model
    finally:
        del model.generate
        if before is not None:
            model.generate = before


def native_sampling(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy or sampled continuations (B, length) for `model.generate(custom_generate=native_sampling)`.

    Tokens are those of transformers' own loop; rows may be padded on the left. What it cannot do is left to that loop
    with a warning that says why. transformers hands no streamer to a custom loop: bind it here with
    `functools.partial`, or use `accelerated`. Raises UserError for assisted generation.
    """
    if obstacle := _obstacle(model, input_ids, generation_config, model_kwargs):
        warnings.warn(f"generating without the native decoder: {obstacle}", stacklevel=2)
        loop = _own_loop(model, generation_config)
        options = {} if streamer is None else {"streamer": streamer}
        return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **options, **model_kwargs)
    decoder = Decoder(model)
    mask, length = model_kwargs.get("attention_mask"), generation_config.max_length
    prompts = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(input_ids)]
    caches = [decoder.cache(length) for _ in prompts]
    logits = torch.cat([decoder(row, cache) for row, cache in zip(prompts, caches)])
    running = torch.ones(len(prompts), dtype=torch.long)
    while True:
        tokens = _chosen(logits_processor(input_ids, logits), generation_config.do_sample)
        if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            tokens = tokens * running + generation_config._pad_token_tensor * (1 - running)
        input_ids = torch.cat([input_ids, tokens[:, None]], 1)
        if streamer is not None:
            streamer.put(tokens)
        running = running & ~stopping_criteria(input_ids, None)
        if not running.any():
            break
        logits = decoder.step(tokens, caches)
    if streamer is not None:
        streamer.end()
    return input_ids


def _chosen(scores: Tensor, sample: bool) -> Tensor:
    """A token (B,) out of the scores (B, V)."""
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)


def _own_loop(model: Any, generation_config: Any) -> Any:
    """The method of transformers that would have run without a custom loop."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = generation_config.get_generation_mode()
    if "assisted" in mode.value:
        raise UserError("assisted generation has a loop of its own; call generate without custom_generate")
    return getattr(type(model), GENERATION_MODES_MAPPING[mode])


def _obstacle(model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why the native decoder cannot run this call, '' when it can."""
    mode = generation_config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        return f"it has no {mode.replace('_', ' ')}"
    if generation_config.return_dict_in_generate:
        return "it returns token ids alone (return_dict_in_generate)"
    if reasons := refusals(model) or foreign_layers(parts_of(model)):
        return "; ".join(reasons)
    return _unlike(model, input_ids, model_kwargs)


def _unlike(model: nn.Module, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str:
    """What is unusual in the inputs of a call."""
    from transformers import DynamicCache

    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    if model.training:
        return "the model is in training mode"
    if type(cache) is not DynamicCache or getattr(cache, "_is_user_defined", False) or cache.get_seq_length():
        return f"it keeps its own keys and values, a {type(cache).__name__} was given"
    if model_kwargs.get("inputs_embeds") is not None:
        return "it takes token ids, not inputs_embeds"
    padded = torch.ones_like(input_ids) if mask is None else mask.long()
    if (padded.diff() < 0).any() or not padded[:, -1].all():
        return "the attention mask is not a padding on the left"
    positions, expected = model_kwargs.get("position_ids"), padded.cumsum(-1) - 1
    if positions is not None and not ((positions == expected) | (padded == 0)).all():
        return "position_ids are given"
    return ""
