"""A workload: a model, the data to fit it on, how to score it, and the input its speed is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError

Batch = dict[str, Tensor]
SPLITS = ("calibration", "validation", "test")
ROOM = 64  # tokens that a measurement writes behind its prompt at most


def is_input(key: str) -> bool:
    """Whether a batch's tensor of this name goes into the model: all but `label`, `group` and `group.<name>`."""
    return key != "label" and key.partition(".")[0] != "group"


@dataclass(frozen=True)
class Metric:
    """How outputs become a score.

    `per_sample(logits, batch)` gives one number per sample (per window for text), `reduce(values)` turns all of them
    into the score. `Metric.torchmetrics` wraps any torchmetrics class.
    """

    name: str
    unit: str
    higher_is_better: bool
    per_sample: Callable[[Tensor, Batch], Tensor]
    reduce: Callable[[Tensor], float] = lambda values: float(values.mean())

    def drop(self, before: float, after: float) -> float:
        """Relative loss of quality: 0.01 is one percent worse than `before`, negative is better."""
        worse = before - after if self.higher_is_better else after - before
        return worse / max(abs(before), 1e-12)

    @classmethod
    def torchmetrics(cls, metric, name: str, higher_is_better: bool, unit: str = "") -> Metric:
        """Any torchmetrics metric, computed batch by batch as `metric(logits, batch["label"])`."""
        return cls(name, unit, higher_is_better, lambda logits, batch: metric(logits, batch["label"]).reshape(1))


def _correct(logits: Tensor, batch: Batch) -> Tensor:
    return (logits.argmax(-1) == batch["label"]).float() * 100


def _window_nll(logits: Tensor, batch: Batch) -> Tensor:
    """(B, T, V) -> (B,): mean negative log-likelihood of each window, in nats per token."""
    ids = batch["input_ids"]
    nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(ids.shape[0], -1).mean(-1)


ACCURACY = Metric("accuracy", "%", True, _correct)
PERPLEXITY = Metric("perplexity", "", False, _window_nll, lambda values: float(values.double().mean().exp()))


@dataclass(frozen=True)
class Score:
    """A value with its 95 % bootstrap interval over `n` samples."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g}{self.unit} [{self.low:.4g}, {self.high:.4g}]"


@dataclass
class Workload:
    """What is fitted. Build one with `.causal_lm`, `.classifier` or `.from_name`, or subclass: override `forward`, and
    `loss` when training needs another one. Batches are dictionaries of tensors whose first dimension is the batch.
    Audits look at the integers `group` or `group.<name>` of the test batches, which no model sees."""

    model: nn.Module
    calibration: Sequence[Batch]  # unlabelled use is enough
    validation: Sequence[Batch]  # the search may look at it
    test: Sequence[Batch]  # looked at once, by verify
    metric: Metric
    example: Batch  # what latency and memory are measured on
    training: Iterable[Batch] | None = None
    name: str = "model"
    source: dict[str, Any] = field(default_factory=dict)  # how the unchanged architecture is built: see artifact
    tokenizer: Any = None
    prompts: Sequence[str] = ()  # what `audit.language` asks
    texts: Callable[[str, int, int], Tensor] | None = None  # (split, length, count) -> (up to count, length) token ids
    kind = "custom"

    def __post_init__(self):
        for split in SPLITS:
            if len(getattr(self, split)) == 0:
                raise UserError(f"workload {self.name!r}: the {split} data is empty; give at least one batch")

    def forward(self, model: Any, batch: Batch) -> Tensor:
        """Logits of one batch; `model` is a module or a runtime's session."""
        inputs = {k: v for k, v in batch.items() if is_input(k)}
        return model(**inputs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar training loss of one batch."""
        return F.cross_entropy(self.forward(model, batch), batch["label"])

    @torch.inference_mode()
    def values(self, model: Any, split: str = "validation") -> Tensor:
        """The metric's per-sample numbers over a split, (n,). Raises UserError on NaN."""
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        was_training = getattr(model, "training", False)
        if was_training:
            model.eval()
        values = torch.cat([self.metric.per_sample(self.forward(model, b), b).cpu() for b in getattr(self, split)])
        if was_training:
            model.train()
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(f"{self.metric.name} is not a finite number on {bad} of {len(values)} {split} samples")
        return values

    def score(self, model: Any, split: str = "validation") -> Score:
        """The metric on a split with its bootstrap interval."""
        return self.summarize(self.values(model, split))

    def summarize(self, values: Tensor, draws: int = 500) -> Score:
        """Per-sample numbers -> Score; the interval is the central 95 % of seeded bootstrap draws."""
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(values), (draws, len(values)), generator=generator)
        boots = torch.tensor([self.metric.reduce(values[p]) for p in picks])
        low, high = torch.quantile(boots, torch.tensor([0.025, 0.975])).tolist()
        m = self.metric
        return Score(m.name, m.reduce(values), low, high, len(values), m.unit)

    @property
    def short_example(self) -> Batch:
        """The example, where it is only to be seen what a model answers."""
        return self.example

    def at_context(self, tokens: int) -> Self:
        """The same, measured with a context of so many tokens; for language models alone. Raises UserError."""
        raise UserError(
            f"context is {tokens!r}, but {self.name} is no language model: it keeps nothing from token to token; "
            "leave context out"
        )

    @classmethod
    def from_name(cls, name: str, **options) -> Workload:
        """A workload of the zoo (`lilliput zoo` lists them), a Hugging Face directory or a GGUF file."""
        from lilliput import zoo

        return zoo.load(name, **options)

    @staticmethod
    def causal_lm(model, calibration, validation, test, **options) -> CausalLM:
        """A language model; each split is a (n, length) tensor of token ids or a sequence of batches."""
        splits = [windows(s) if isinstance(s, Tensor) else list(s) for s in (calibration, validation, test)]
        if isinstance(options.get("training"), Tensor):
            options["training"] = windows(options["training"])
        options.setdefault("metric", PERPLEXITY)
        if all(splits):
            options.setdefault("example", {"input_ids": splits[0][0]["input_ids"][:1, :64]})
        return CausalLM(model, *splits, **options)

    @staticmethod
    def classifier(model, calibration, validation, test, **options) -> Classifier:
        """A classifier; batches hold `input` (B, ...) and `label` (B,). DataLoaders of pairs work too."""
        splits = [_labelled(s) for s in (calibration, validation, test)]
        if options.get("training") is not None:
            options["training"] = _labelled(options["training"])
        options.setdefault("metric", ACCURACY)
        if all(splits):
            options.setdefault("example", {"input": splits[0][0]["input"][:1]})
        return Classifier(model, *splits, **options)


class CausalLM(Workload):
    """Next-token prediction; `forward` returns logits (B, T, V)."""

    kind = "causal_lm"

    def forward(self, model: Any, batch: Batch) -> Tensor:
        out = model(input_ids=batch["input_ids"], use_cache=False) if isinstance(model, nn.Module) else model(batch)
        return getattr(out, "logits", out)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return _window_nll(self.forward(model, batch), batch).mean()

    @property
    def short_example(self) -> Batch:
        """The first ROOM tokens of the example: logits of all tokens of a context would not fit into small machines."""
        return {"input_ids": self.example["input_ids"][:, :ROOM]}

    def at_context(self, tokens: int) -> Self:
        """The same, whose example is a prompt that leaves ROOM tokens of a context of `tokens`.

        Memory then holds the keys and values of that many, and a token is timed behind them. Raises UserError for a
        context that is no number above ROOM, or beyond the positions of the model.
        """
        longest = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if type(tokens) is not int or tokens <= ROOM:
            raise UserError(
                f"context is {tokens!r}; give a whole number above {ROOM}, the tokens that a measurement writes"
            )
        if longest is not None and tokens > longest:
            raise UserError(f"context is {tokens} tokens, but {self.name} reads {longest} at most; give no more")
        text, _ = self.long_text("calibration", tokens - ROOM, 1)
        return dataclasses.replace(self, example={"input_ids": text})

    def long_text(self, split: str, length: int, count: int) -> tuple[Tensor, bool]:
        """(n, length) token ids of a split, n up to `count`, and whether each of them is a piece of one text.

        They come from `texts`, else from windows that are as long; failing these, windows are put together, and
        repeated where they do not suffice, which is enough to take times and no more.
        """
        if self.texts is not None:
            with suppress(UserError):  # no document of the split is as long
                return self.texts(split, length, count), True
        rows = [row for batch in getattr(self, split) for row in batch["input_ids"]]
        whole = [row[:length] for row in rows if len(row) >= length][:count]
        if whole:
            return torch.stack(whole), True
        joined = torch.cat(rows)
        return joined.repeat(-(-length // len(joined)))[None, :length], False


class Classifier(Workload):
    """Class logits (B, C) from `batch["input"]`."""

    kind = "classifier"

    def forward(self, model: Any, batch: Batch) -> Tensor:
        out = model(batch["input"]) if isinstance(model, nn.Module) else model(batch)
        return getattr(out, "logits", out)


def need_workload(workload: Workload | None, method: str, why: str) -> Workload:
    """The workload. Raises UserError with what the method needs it for, and perhaps what works without one."""
    if workload is None:
        raise UserError(f"{method} needs a workload {why}; call apply(model, workload)")
    return workload


def windows(ids: Tensor, batch_size: int = 4) -> list[Batch]:
    """(n, length) token ids -> batches of up to `batch_size` windows."""
    return [{"input_ids": chunk} for chunk in ids.split(batch_size)]


def _labelled(batches: Iterable) -> list[Batch]:
    """Batches as dictionaries; pairs (input, label) become {"input", "label"}."""
    return [b if isinstance(b, dict) else {"input": b[0], "label": b[1]} for b in batches]
