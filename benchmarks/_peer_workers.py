"""The engines that benchmarks/peers.py compares, each in a process of its own that obeys lines on its standard input.

A request is a JSON line, and so is the answer: {"do": "run", "threads", "prompt", "new"} -> {"first_ms", "token_ms",
"tokens"}; {"do": "facts", "windows"} -> {"read_bytes", "parameters", "seconds", "nats"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOM = 1024  # tokens of a cache


class Engine:
    """`stream` gives greedy tokens; `nats` is the mean loss of windows of token ids; `seconds` what compiling took."""

    seconds = 0.0

    def stream(self, prompt: list[int], threads: int) -> Iterator[int]:
        raise NotImplementedError

    def read_bytes(self) -> int:
        """Of weights that one token reads."""
        raise NotImplementedError

    def nats(self, windows: list[list[int]]) -> float:
        raise NotImplementedError


class Torch(Engine):
    """transformers as it is, float32."""

    def __init__(self, model_name: str, form: str):
        import torch

        from lilliput import Workload

        self.torch = torch
        self.workload = Workload.from_name(model_name)
        self.model: Any = self.quantized(self.workload.model.eval(), form)
        self.forward = self.model

    def quantized(self, model: Any, form: str) -> Any:
        return model

    def read_bytes(self) -> int:
        tensors = {id(p): p for p in self.model.parameters()}
        return sum(p.numel() * p.element_size() for p in tensors.values())

    def stream(self, prompt: list[int], threads: int) -> Iterator[int]:
        torch = self.torch
        torch.set_num_threads(threads)
        ids, cache, filled = torch.tensor([prompt]), self.cache(), 0
        while True:
            with torch.inference_mode():
                positions = torch.arange(filled, filled + ids.shape[1])
                out = self.forward(input_ids=ids, past_key_values=cache, position_ids=positions[None],
                                   use_cache=True, logits_to_keep=1)  # fmt: skip
            cache, filled = out.past_key_values, filled + ids.shape[1]
            ids = out.logits[:, -1:].argmax(-1)
            yield int(ids)

    def cache(self) -> Any:
        return None

    def logits(self, ids: Any) -> Any:
        return self.model(input_ids=ids, use_cache=False).logits

    def nats(self, windows: list[list[int]]) -> float:
        torch, losses = self.torch, []
        for window in windows:
            ids = torch.tensor([window])
            with torch.inference_mode():
                logits = self.logits(ids)
                losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])))
        return sum(losses) / len(losses)


class Torchao(Torch):
    """torchao's int8 weights and dynamic int8 activations, compiled."""

    def quantized(self, model: Any, form: str) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model.lm_head.weight = self.torch.nn.Parameter(model.lm_head.weight.detach().clone())  # else tied to the table
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model

    def read_bytes(self) -> int:
        return sum(p.numel() for n, p in self.model.named_parameters() if "embed_tokens" not in n)

    def cache(self) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=ROOM)

    def stream(self, prompt: list[int], threads: int) -> Iterator[int]:
        if self.forward is self.model:
            self.forward = self.torch.compile(self.model, dynamic=False)
            start = time.perf_counter()
            tokens = super().stream(prompt, threads)
            for _ in range(4):
                next(tokens)
            self.seconds = time.perf_counter() - start
        return super().stream(prompt, threads)


class Lilliput(Torch):
    """Our native decoder; the form is float32, int8 or int4 with a group size, such as int4-64."""

    def quantized(self, model: Any, form: str) -> Any:
        from lilliput.methods.quantize.group import Group
        from lilliput.methods.quantize.int8 import Int8
        from lilliput.runtimes.lean import Lean

        if form == "int8":
            model = Int8().apply(model)
        elif form != "float32":
            bits, _, group = form.removeprefix("int").partition("-")
            model = Group(bits=int(bits), group=int(group)).apply(model)
        self.session = Lean().prepare(model, self.workload, max_length=ROOM)
        return model

    def read_bytes(self) -> int:
        table = {t.data_ptr() for t in self.model.get_input_embeddings().buffers()}  # a packed head has its own copy
        owned = {t.data_ptr(): t for m in self.model.modules() for t in _tensors(m)}
        return sum(t.numel() * t.element_size() for address, t in owned.items() if address not in table)

    def stream(self, prompt: list[int], threads: int) -> Iterator[int]:
        self.torch.set_num_threads(threads)
        return self.session.generate(self.torch.tensor([prompt]), ROOM - len(prompt))

    def logits(self, ids: Any) -> Any:
        return self.session({"input_ids": ids})


def _tensors(module: Any) -> Iterator[Any]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


class LlamaCpp(Engine):
    """llama.cpp through llama-cpp-python; the form is a path of a GGUF file."""

    def __init__(self, model_name: str, form: str):
        import llama_cpp

        self.module, self.path = llama_cpp, form
        self.by_threads: dict[int, Any] = {}

    def context(self, threads: int, every: bool = False) -> Any:
        key = -threads if every else threads
        if key not in self.by_threads:
            self.by_threads[key] = self.module.Llama(
                self.path, n_ctx=ROOM, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
                logits_all=every, verbose=False,
            )  # fmt: skip
        return self.by_threads[key]

    def stream(self, prompt: list[int], threads: int) -> Iterator[int]:
        import numpy as np

        llama = self.context(threads)
        llama.reset()
        tokens, vocabulary = prompt, llama.n_vocab()
        while True:
            llama.eval(tokens)
            logits = np.ctypeslib.as_array(self.module.llama_get_logits_ith(llama.ctx, -1), (vocabulary,))
            tokens = [int(logits.argmax())]
            yield tokens[0]

    def read_bytes(self) -> int:
        from gguf import GGUFReader

        return int(sum(t.n_bytes for t in GGUFReader(self.path).tensors))

    def nats(self, windows: list[list[int]]) -> float:
        import numpy as np

        llama, losses = self.context(2, every=True), []
        for window in windows:
            llama.reset()
            llama.eval(window)
            scores = np.asarray(llama.scores[: len(window) - 1], dtype=np.float64)
            highest = scores.max(-1)
            sums = np.log(np.exp(scores - highest[:, None]).sum(-1)) + highest
            losses.append(float((sums - scores[np.arange(len(window) - 1), window[1:]]).mean()))
        return sum(losses) / len(losses)


ENGINES = {"torch": Torch, "torchao": Torchao, "lilliput": Lilliput, "llama.cpp": LlamaCpp}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    engine = ENGINES[sys.argv[1]](*sys.argv[2:])
    for line in sys.stdin:
        print(json.dumps(_answer(engine, json.loads(line))), file=answers, flush=True)


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "facts":
        return {"read_bytes": engine.read_bytes(), "seconds": engine.seconds, "nats": engine.nats(request["windows"])}
    stream = engine.stream(request["prompt"], request["threads"])
    start = time.perf_counter()
    found = [next(stream)]
    first = time.perf_counter()
    found += [next(stream) for _ in range(request["new"] - 1)]
    each = (time.perf_counter() - first) / max(1, len(found) - 1)
    return {"first_ms": 1e3 * (first - start), "token_ms": 1e3 * each, "tokens": found}


if __name__ == "__main__":
    main()
