"""Answers that teach: a model learns, query after query, from those of its own answers that a verifier trusts.

Of each query `candidates` answers are sampled; the one that the verifier scores highest is the answer, and when its
score reaches `threshold` the pair joins the buffer on which low-rank adapters learn before the next queries are
answered. The model's own weights stay, and everything is restored at the end.

    answers = VerifiedStream().run(model, verifier, prompts)

Paper: Moradi et al., Continuous Self-Improvement of Large Language Models by Test-time Training with Verifier-Driven
Sample Selection (VDS-TTT), 2025 (arXiv 2505.19475). Numbers of answers and updates, the threshold and the temperature
are values of our own; the answer to a query is picked before the model learns from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating
from lilliput.method import FLOAT_WEIGHTS, UNLABELLED, Facts, Settings, knob
from lilliput.methods.train._adapting import LORA, PARTS, PARTS_HELP, adapting, learn_, token_ids

Verifier = Callable[[Tensor, Sequence[Tensor]], Tensor]  # prompt (T,), answers -> trust in each, 0..1
IGNORED = -100  # label of tokens that are not learned


@dataclass(frozen=True)
class Answer:
    """What was given for a query: the tokens (with the end token, if there was one), and what the model learned."""

    tokens: Tensor
    trust: float  # the verifier's, in this answer
    learned: Tensor | None  # the answer that joined the buffer
    candidates: tuple[Tensor, ...]


@dataclass(frozen=True)
class VerifiedStream(Settings):
    """Keep improving on unlabelled queries by learning the answers that a verifier is sure of."""

    candidates: int = knob(8, low=1, high=1024, help="answers sampled for a query")
    threshold: float = knob(0.9, low=0.0, high=1.0, help="trust from which an answer is learned")
    temperature: float = knob(0.8, low=0.01, high=10.0, help="of the sampling")
    new_tokens: int = knob(64, low=1, high=100_000, help="most tokens of an answer")
    block: int = knob(8, low=1, high=10_000, help="queries answered between two updates")
    steps: int = knob(4, low=0, high=10_000, help="updates after a block")
    batch: int = knob(16, low=1, high=10_000, help="buffered answers per update")
    lr: float = knob(1e-3, low=1e-7, high=0.1, log=True, help="learning rate")
    part: str = knob(LORA, choices=PARTS, help=PARTS_HELP)
    rank: int = knob(8, low=1, high=1024, help="width of the adapters")
    seed: int = knob(0, low=0, help="sampling, order of the buffer, first values of adapters")
    facts: ClassVar[Facts] = Facts(
        stage="serve", needs={FLOAT_WEIGHTS}, data=UNLABELLED, effect="better answers to shifted queries, slower"
    )
    paper: ClassVar[str] = "vds_ttt"

    def run(
        self, model: Any, verifier: Verifier, prompts: Sequence[Any], teacher: Verifier | None = None
    ) -> list[Answer]:
        """The answers to all prompts (token ids) in their order; the model is restored to the bit."""
        with self.open(model, verifier, teacher) as stream:
            blocks = (prompts[i : i + self.block] for i in range(0, len(prompts), self.block))
            return [answer for block in blocks for answer in stream.ask(block)]

    @contextmanager
    def open(self, model: Any, verifier: Verifier, teacher: Verifier | None = None) -> Iterator[Stream]:
        """A stream that takes queries as they come; inside the block the model is the current, adapted one.

        `teacher`, if given, chooses what is learned in the place of the verifier, which then only picks the answers. A
        verifier that looks through a model needs one of its own, for this one changes. Raises UserError for a
        model that cannot generate or has no float weights in `part`.
        """
        if not callable(getattr(model, "generate", None)):
            raise UserError(f"{type(model).__name__} has no generate; give a causal language model of transformers")
        with adapting(model, self.part, self.rank, self.seed):
            yield Stream(self, model, verifier, teacher or verifier)


@dataclass
class Stream:
    """An open stream: what was learned so far, and the model that learned it."""

    settings: VerifiedStream
    model: Any
    verifier: Verifier
    teacher: Verifier
    buffer: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (prompt, answer)
    asked: int = 0  # queries

    def ask(self, prompts: Sequence[Any]) -> list[Answer]:
        """Answers to some queries by the current model, which then learns from them."""
        s = self.settings
        texts = [token_ids(p, self.model, "a prompt") for p in prompts]
        if not texts:
            return []
        sampled = sample(self.model, texts, s.candidates, s.new_tokens, s.temperature, s.seed + self.asked)
        answers = [self._answer(text, found) for text, found in zip(texts, sampled)]
        fresh = [(text, a.learned) for text, a in zip(texts, answers) if a.learned is not None]
        self.buffer += fresh
        self.asked += len(texts)
        if self.buffer and s.steps:
            self._learn_(fresh[: s.steps * s.batch], s.steps * s.batch)
        return answers

    def _answer(self, prompt: Tensor, candidates: list[Tensor]) -> Answer:
        different = list({tuple(c.tolist()): c for c in candidates}.values())  # each is verified once
        trust, best = _most_trusted(self.verifier, prompt, different)
        taught_trust, taught = trust, best
        if self.teacher is not self.verifier:
            taught_trust, taught = _most_trusted(self.teacher, prompt, different)
        learned = taught if taught_trust >= self.settings.threshold else None
        return Answer(best, trust, learned, tuple(candidates))

    def _learn_(self, fresh: list[tuple[Tensor, Tensor]], size: int) -> None:
        """A few updates on up to `size` pairs: the fresh ones, filled up from the buffer at random."""
        s = self.settings
        generator = torch.Generator().manual_seed(s.seed + self.asked)
        order = torch.randint(len(self.buffer), (size - len(fresh),), generator=generator).tolist()
        pairs = fresh + [self.buffer[i] for i in order]
        mixed = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
        batches = [mixed[i : i + s.batch] for i in range(0, len(mixed), s.batch)]
        learn_(self.model, batches, answer_loss, s.steps, s.lr, s.seed + self.asked)


def _most_trusted(verifier: Verifier, prompt: Tensor, answers: list[Tensor]) -> tuple[float, Tensor]:
    trust = torch.as_tensor(verifier(prompt, answers))
    if trust.shape != (len(answers),) or not bool(((trust >= 0) & (trust <= 1)).all()):
        raise UserError(
            f"the verifier gave {trust.tolist()!s:.80} for {len(answers)} answers; it must give one number from 0 to 1 "
            "for each"
        )
    best = int(trust.argmax())
    return float(trust[best]), answers[best]


# --- sampling and learning answers -----------------------------------------------------------------------------


def sample(
    model: Any, prompts: Sequence[Tensor], count: int, new_tokens: int, temperature: float, seed: int
) -> list[list[Tensor]]:
    """`count` answers to each prompt (T,), the end token included; 0 as temperature gives the greedy ones.

    torch's random state stays as it is.
    """
    end = _end_tokens(model)
    ids, mask = padded(list(prompts), _pad(model), left=True)
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if temperature > 0:
        how |= {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            ids.repeat_interleave(count, 0), attention_mask=mask.repeat_interleave(count, 0),
            max_new_tokens=new_tokens, pad_token_id=_pad(model), **how,
        )  # fmt: skip
    answers = [_until_end(row, end) for row in out[:, ids.shape[1] :].clone()]
    return [answers[i : i + count] for i in range(0, len(answers), count)]


def _end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, list) else {int(end)}


def _pad(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    return int(pad) if pad is not None else min(_end_tokens(model), default=0)


def _until_end(tokens: Tensor, end: set[int]) -> Tensor:
    """The tokens up to and with the first end token."""
    first = next((i for i, token in enumerate(tokens.tolist()) if token in end), len(tokens))
    return tokens[: first + 1]


def padded(texts: Sequence[Tensor], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Texts as ids (B, T) and their attention mask."""
    longest = max(len(t) for t in texts)
    ids = torch.full((len(texts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(0, len(text))
        ids[i, place], mask[i, place] = text, 1
    return ids, mask


def answer_loss(model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean loss of the answers' tokens, in nats; the prompts are given."""
    logits, labels = _answer_logits(model, pairs)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _answer_logits(model: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (B, T-1, V) and labels (B, T-1), IGNORED outside the answers."""
    ids, mask = padded([torch.cat(pair) for pair in pairs], _pad(model))
    labels = ids.masked_fill(mask == 0, IGNORED)
    for row, (prompt, _) in zip(labels, pairs):
        row[: len(prompt)] = IGNORED
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float(), labels[:, 1:]


# --- a verifier ------------------------------------------------------------------------------------------------


class ProbeVerifier:
    """Trust from a logistic regression on what a frozen copy of a model makes of an answer: the last hidden state and
    the mean and least log-probability of its tokens. `fit` it on answers of which it is known whether they are right.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.mean, self.scale = torch.zeros(()), torch.ones(())
        self.weight: Tensor | None = None  # of each feature, and last the constant

    def __call__(self, prompt: Tensor, answers: Sequence[Tensor]) -> Tensor:
        """(n,): probability that each answer is right."""
        return self.trust([(prompt, answer) for answer in answers])

    def trust(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(n,): the same for pairs of prompt and answer. Raises UserError before `fit`."""
        if self.weight is None:
            raise UserError("this verifier has not learned anything yet; call fit with right and wrong answers first")
        features = (self.features(pairs) - self.mean) / self.scale
        return torch.sigmoid(features @ self.weight[:-1] + self.weight[-1])

    def fit(self, pairs: Sequence[tuple[Tensor, Tensor]], right: Tensor, decay: float = 1e-2) -> ProbeVerifier:
        """Learn from pairs of prompt and answer, and whether each is right; `decay` weighs the squared weights."""
        labels = right.float()
        if len(labels) != len(pairs) or labels.min() == labels.max():
            raise UserError(f"{len(pairs)} answers with {int(labels.sum())} right ones; give some right and some wrong")
        features = self.features(pairs)
        self.mean, self.scale = features.mean(0), features.std(0).clamp_min(1e-6)
        x = (features - self.mean) / self.scale
        weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.binary_cross_entropy_with_logits(x @ weight[:-1] + weight[-1], labels)
            loss = loss + decay * weight[:-1].square().sum()
            loss.backward()
            return loss

        solver.step(closure)  # type: ignore[arg-type]
        self.weight = weight.detach()
        return self

    @torch.no_grad()
    def features(self, pairs: Sequence[tuple[Tensor, Tensor]], batch: int = 64) -> Tensor:
        """(n, hidden + 2)."""
        return torch.cat([self._features(pairs[i : i + batch]) for i in range(0, len(pairs), batch)])

    def _features(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        kept: list[Tensor] = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda layer, args: kept.append(args[0]))
        with attached([handle]):
            logits, labels = _answer_logits(self.model, pairs)
        ends = torch.tensor([len(prompt) + len(answer) - 1 for prompt, answer in pairs])
        hidden = kept[0][torch.arange(len(pairs)), ends].float()
        answered = labels != IGNORED
        logp = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        mean = (logp * answered).sum(1) / answered.sum(1)
        least = logp.masked_fill(~answered, 0.0).amin(1)
        return torch.cat([hidden, mean[:, None], least[:, None]], 1)
