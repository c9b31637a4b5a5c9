"""Domains that a language model forgot, tokens that changed, refusals that were lost."""

import copy
import math

import pytest
import torch

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit._answers import answers
from lilliput.methods.audit.language import Language, refuses
from lilliput.workload import Workload


@pytest.fixture
def domains(tiny_llama):
    """Windows of even tokens in one domain, of odd ones in another."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 63, (24, 16), generator=generator)
    group = torch.arange(24) % 2
    ids = ids // 2 * 2 + group.view(-1, 1)
    batches = [{"input_ids": a, "group.parity": b} for a, b in zip(ids.split(5), group.split(5))]
    return Workload.causal_lm(tiny_llama, batches, batches, batches, name="two-domains")


def forgetful(model, tokens):
    """A copy that finds some tokens less likely; its head is its own then."""
    changed = copy.deepcopy(model)
    bias = torch.zeros(64)
    bias[tokens] = -3
    head = torch.nn.Linear(32, 64)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.copy_(bias)
    changed.lm_head = head
    return changed


def test_a_domain_that_was_forgotten_is_found(domains):
    changed = forgetful(domains.model, torch.arange(1, 64, 2))
    found = Language().check(domains, domains.model, changed)
    assert found.verdict == HARM
    assert found.changes[0].name == "parity 1"
    assert found.change("parity 1").verdict == HARM
    assert found.change("parity 0").verdict == NO_HARM
    assert found.change("parity 0").after < found.change("parity 0").before
    old, new = (domains.values(m, "test") for m in (domains.model, changed))
    assert found.change("all text").before == pytest.approx(float(old.mean()))
    assert found.change("all text").after == pytest.approx(float(new.mean()))
    perplexities = [domains.score(m, "test").value for m in (domains.model, changed)]
    assert found.details["perplexity"]["all text"] == pytest.approx(perplexities)
    tokens = found.change("changed tokens")
    assert 0 < tokens.low < tokens.after < tokens.high
    assert tokens.verdict == ""


def test_the_summary_says_how_large_the_change_is(domains):
    changed = forgetful(domains.model, torch.arange(1, 64, 2))
    found = Language().check(domains, domains.model, changed)
    whole, tokens = found.change("all text"), found.change("changed tokens")
    old, new = found.details["perplexity"]["parity 1"]
    assert f", parity 1 {old:.4g} -> {new:.4g}, parity 0 " in found.summary
    assert f"[{math.exp(whole.low) - 1:+.1%}, {math.exp(whole.high) - 1:+.1%}] on 24 windows" in found.summary
    assert found.summary.endswith(f"; {tokens.after:.1%} of the likeliest next tokens changed.")


def test_changed_tokens_are_counted(domains):
    changed = forgetful(domains.model, torch.arange(1, 64, 2))
    with torch.no_grad():
        answers = [
            torch.cat([domains.forward(m, b).argmax(-1) for b in domains.test]) for m in (domains.model, changed)
        ]
    found = Language().check(domains, domains.model, changed).change("changed tokens")
    assert found.after == pytest.approx(float((answers[0] != answers[1]).double().mean()))


def test_the_same_model_shows_no_harm_and_few_windows_cannot_tell(domains):
    found = Language().check(domains, domains.model, domains.model)
    assert found.verdict == NO_HARM
    assert found.change("changed tokens").after == 0
    domains.test = [{k: v[:3] for k, v in domains.test[0].items()}]
    assert Language().check(domains, domains.model, domains.model).verdict == UNSURE


def test_refusals_are_english_phrases_at_the_start():
    assert refuses(" I'm sorry, but that is not possible.")
    assert refuses("I cannot help with that")
    assert not refuses("You cannot park here")
    assert not refuses("")


class Parrot(torch.nn.Module):
    """Answers each prompt with a fixed text."""

    def __init__(self, tokenizer, text):
        super().__init__()
        self.said = torch.tensor([tokenizer(text)["input_ids"]])

    def generate(self, ids, **_):
        return torch.cat([ids, self.said], 1)


class Words:
    """A tokenizer of whole words."""

    def __init__(self):
        self.known = []

    def __call__(self, text, return_tensors=None):
        self.known += [w for w in text.split() if w not in self.known]
        ids = [self.known.index(w) for w in text.split()]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.known[i] for i in ids.tolist())


def test_lost_refusals_are_harm(domains):
    domains.tokenizer = Words()
    audit, same = Language(fewest=2), [answers(domains, domains.model)] * 2
    sorry, sure = (Parrot(domains.tokenizer, text) for text in ("I'm sorry no", "Sure here"))
    domains.prompts = [f"question {i}" for i in range(120)]
    found = audit.check(domains, sorry, sure, same)
    assert found.verdict == HARM
    assert found.change("lost refusals").after == 1
    assert found.change("changed answers").after == 1
    kept = audit.check(domains, sorry, sorry, same)
    assert kept.verdict == NO_HARM
    assert kept.change("lost refusals").n == 120
    none = audit.check(domains, sure, sorry, same)
    assert none.change("lost refusals").n == 0
    assert none.verdict == NO_HARM


def test_prompts_are_answered_by_a_real_model(domains, make_tokenizer):
    domains.tokenizer = make_tokenizer()
    domains.prompts = ["the cat", "12 mats"]
    found = Language(tokens=4).check(domains, domains.model, domains.model)
    assert found.change("changed answers").after == 0
    assert found.change("changed answers").n == 2
    domains.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        Language().check(domains, domains.model, domains.model)


def test_a_classifier_is_refused(cnn_work):
    with pytest.raises(UserError, match=r"use audit\.groups"):
        Language().check(cnn_work, cnn_work.model, cnn_work.model)
