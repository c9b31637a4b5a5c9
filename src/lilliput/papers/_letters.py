"""Sorting the letters of real words: answers that can be checked, learned by llama-tiny from the zoo's text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.methods.train.verified_stream import ProbeVerifier, Verifier, answer_loss, sample
from lilliput.training import Callback, train
from lilliput.zoo import nets, texts

LR, BATCH = 2e-3, 64
HELD_OUT = 10  # one word in so many is not learned
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """The task in tokens: letters of a word, an arrow | the same letters in alphabetical order, the end token."""

    def __init__(self, tokenizer: Any):
        self.of_letter = dict(zip(ALPHABET, tokenizer.convert_tokens_to_ids(list(ALPHABET))))
        self.to_letter = {token: letter for letter, token in self.of_letter.items()}
        self.arrow, self.end = tokenizer.convert_tokens_to_ids("Ġto"), tokenizer.eos_token_id

    def prompt(self, word: str) -> Tensor:
        return torch.tensor([*(self.of_letter[letter] for letter in word), self.arrow])

    def answer(self, word: str) -> Tensor:
        return torch.tensor([*(self.of_letter[letter] for letter in sorted(word)), self.end])

    def right(self, prompt: Tensor, answer: Tensor) -> bool:
        """Whether an answer to a prompt is the right one, end token included."""
        word = "".join(self.to_letter[token] for token in prompt.tolist()[:-1])
        return answer.tolist() == self.answer(word).tolist()

    def rights(self, prompts: Sequence[Tensor], answers: Sequence[Sequence[Tensor]]) -> Tensor:
        """(prompts, answers of each): which are right."""
        return torch.tensor([[self.right(p, a) for a in found] for p, found in zip(prompts, answers)])


def words(split: str, lengths: Iterable[int]) -> dict[int, list[str]]:
    """Length -> the distinct words of small letters in a split of the State of the Union addresses, sorted."""
    text = " ".join(texts.state_of_the_union().split(split).values())
    found = sorted(set(re.findall(r"\b[a-z]+\b", text)))
    return {n: [word for word in found if len(word) == n] for n in lengths}


def drawn(pool: list[str], count: int, seed: int) -> list[str]:
    """`count` different words, or all there are, in an order drawn by the seed."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pool[i] for i in order[:count]]


def held_out(pool: dict[int, list[str]]) -> tuple[dict[int, list[str]], list[str]]:
    """(words to learn by length, words that are kept from learning)."""
    kept = [word for group in pool.values() for word in group[::HELD_OUT]]
    return {n: [w for i, w in enumerate(group) if i % HELD_OUT] for n, group in pool.items()}, kept


def taught(
    task: Letters, pool: dict[int, list[str]], steps: int, seed: int, callbacks: Iterable[Callback] = ()
) -> nn.Module:
    """llama-tiny after `steps` updates on the task, each on BATCH words of one length."""
    model, generator = nets.load("llama-tiny"), torch.Generator().manual_seed(seed)
    lengths = sorted(pool)
    batches = []
    for n in torch.randint(len(lengths), (steps,), generator=generator).tolist():
        group = pool[lengths[n]]
        picks = torch.randint(len(group), (BATCH,), generator=generator).tolist()
        batches.append([(task.prompt(group[i]), task.answer(group[i])) for i in picks])
    train(model, batches, answer_loss, steps=steps, lr=LR, clip_norm=1.0, callbacks=callbacks, seed=seed)
    return model.eval()


def tokens_of(pool: dict[int, list[str]], steps: int) -> float:
    """Tokens that `taught` learns from, on average: letters, arrow, letters and end token of each word."""
    return steps * BATCH * sum(2 * n + 2 for n in pool) / len(pool)


def greedy(model: nn.Module, task: Letters, prompts: Sequence[Tensor]) -> Tensor:
    """(prompts,): 1 where the greedy answer is right."""
    answers = sample(model, prompts, 1, longest_answer(prompts), 0.0, 0)
    return task.rights(prompts, answers)[:, 0].double()


def longest_answer(prompts: Sequence[Tensor]) -> int:
    """Tokens of the longest right answer: one per letter and the end token."""
    return max(map(len, prompts))


def voted(answers: Sequence[Tensor]) -> Tensor:
    """The most frequent answer; of equals the one that was drawn first."""
    counts = Counter(tuple(a.tolist()) for a in answers)
    return torch.tensor(counts.most_common(1)[0][0])


def learned_verifier(
    model: nn.Module, task: Letters, prompts: Sequence[Tensor], samples: int, temperature: float, seed: int
) -> Verifier:
    """A verifier that has seen right and wrong answers of the model to these prompts; when all are right, or all
    wrong, there is nothing to learn and it trusts every answer alike."""
    answers = sample(model, prompts, samples, longest_answer(prompts), temperature, seed)
    pairs = [(p, a) for p, found in zip(prompts, answers) for a in {tuple(a.tolist()): a for a in found}.values()]
    right = torch.tensor([task.right(*pair) for pair in pairs])
    if right.all() or not right.any():
        return lambda prompt, answers: torch.full((len(answers),), float(right.float().mean()))
    return ProbeVerifier(model).fit(pairs, right)
