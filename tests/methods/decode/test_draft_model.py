"""Drafting with a smaller model: what it holds, where it stops, what is refused, and the distribution end to end."""

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from lilliput.errors import UserError
from lilliput.methods.decode import DraftModel, Tally
from lilliput.methods.decode.draft_model import _Small, warpers


def test_its_cache_follows_the_text_through_rejections(make_table):
    table = make_table(0)
    drafter = _Small(DraftModel(tokens=3, sure=0.0), table, 100)
    text = [1, 2, 3]
    for wanted in ([4], [0, 1], [2, 2, 2, 2]):
        tokens = drafter.propose(torch.tensor(text), 10, None).tokens
        alone, expected = list(text), []
        for _ in range(3):
            expected.append(int(table.logits[alone[-2], alone[-1]].argmax()))
            alone.append(expected[-1])
        assert tokens == expected
        assert table.text == drafter.held.tolist() == alone[:-1]
        text += wanted


def test_it_stops_where_it_is_unsure_and_where_its_context_ends(make_table):
    table = make_table(0)
    assert _Small(DraftModel(sure=1.0), table, 100).propose(torch.tensor([1, 2]), 10, None).tokens == []
    table.rewind(0)
    assert len(_Small(DraftModel(tokens=6, sure=0.0), table, 5).propose(torch.tensor([1, 2]), 10, None).tokens) == 3
    table.rewind(0)
    assert len(_Small(DraftModel(tokens=6, sure=0.0), table, 99).propose(torch.tensor([1, 2]), 2, None).tokens) == 2


def test_greedy_drafts_were_chosen_and_sampled_ones_drawn(make_table):
    drafter = _Small(DraftModel(tokens=2, sure=0.0), make_table(0), 100)
    assert drafter.propose(torch.tensor([1, 2]), 10, None).proposals is None
    drafter.warpers = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    draft = drafter.propose(torch.tensor([1, 2]), 10, None)
    expected = (drafter.backend.logits[1, 2] / 0.5).softmax(-1)
    torch.testing.assert_close(draft.proposals[0], expected)
    assert draft.proposals.shape == (2, 5)


def test_the_draft_sees_warpers_alone():
    kept = TemperatureLogitsWarper(0.5)
    assert list(warpers(LogitsProcessorList([lambda ids, scores: scores, kept]))) == [kept]


def test_generated_pairs_follow_the_models_distribution(make_llama, likely):
    """End to end through `generate`: the two tokens after a prompt, of a vocabulary of six."""
    model, small = make_llama(2, vocabulary=6), make_llama(1, seed=3, vocabulary=6)
    ids, options = torch.tensor([[2, 3, 4]]), {"do_sample": True, "temperature": 1.3, "top_k": 4, "max_new_tokens": 2}

    def warped(text):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1] / 1.3
        best = logits.topk(4).indices
        return torch.zeros(6).index_put_((best,), logits[best].softmax(-1))

    first = warped([2, 3, 4])
    expected = torch.stack([first[a] * warped([2, 3, 4, a]) for a in range(6)])
    torch.manual_seed(0)
    counts, tally = torch.zeros(6, 6), Tally()
    for _ in range(800):
        text = model.generate(ids, custom_generate=DraftModel(sure=0.0), draft_model=small, tally=tally, **options)
        counts[tuple(text[0, 3:].tolist())] += 1
    assert likely(counts, expected)
    assert 800 < tally.steps < 1600


def test_a_draft_model_of_another_tokenizer_is_refused(model, make_llama, prompt):
    for other, message in (
        (make_llama(1, vocabulary=65), "has 65 tokens, the model 64"),
        (make_llama(1, bos_token_id=2), "bos_token_id is 2 for the draft"),
        (make_llama(1).train(), "draft_model.eval"),
        (None, "draft_model=small"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(prompt(), custom_generate=DraftModel(), draft_model=other, max_new_tokens=5)


def test_as_many_tokens_of_another_tokenizer_are_refused(model, make_llama, prompt, make_words):
    small, options = make_llama(1), {"custom_generate": DraftModel(), "max_new_tokens": 5, "do_sample": False}
    found = model.generate(prompt(), draft_model=small, tokenizers=(make_words(), make_words()), **options)
    assert torch.equal(found, model.generate(prompt(), max_new_tokens=5, do_sample=False))
    other = make_words([*range(63, -1, -1)])
    with pytest.raises(UserError, match="token 0 is 'word63' for the draft model and 'word0' for the model"):
        model.generate(prompt(), draft_model=small, tokenizers=(make_words(), other), **options)


def test_a_draft_model_may_read_less_than_the_model(model, make_llama, prompt):
    small, options = make_llama(1, max_position_embeddings=16), {"max_new_tokens": 30, "do_sample": False}
    tally = Tally()
    found = model.generate(prompt(9), custom_generate=DraftModel(sure=0.0), draft_model=small, tally=tally, **options)
    assert torch.equal(found, model.generate(prompt(9), **options))
    assert tally.drafted < 4 * 7
