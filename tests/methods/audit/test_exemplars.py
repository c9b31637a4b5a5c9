"""Exemplars by hand, by votes, and by chance alone."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit.exemplars import Exemplars, exemplars, modal_answers


def logits(*answers, classes=3):
    return torch.nn.functional.one_hot(torch.tensor(answers), classes).float()


def test_most_votes_win_and_probability_decides_ties():
    three = [logits(0, 1, 2), logits(0, 1, 1), logits(2, 1, 2)]
    assert modal_answers(three).tolist() == [0, 1, 2]
    assert modal_answers([logits(0, 1), 3 * logits(2, 0)]).tolist() == [2, 0]


def test_exemplars_are_where_the_modes_differ():
    before = [logits(0, 1, 2), logits(0, 1, 2), logits(1, 1, 2)]
    after = [logits(0, 2, 2), logits(0, 2, 1), logits(0, 1, 2)]
    assert exemplars(before, after).tolist() == [False, True, False]
    with pytest.raises(UserError, match="shapes"):
        exemplars(before, [logits(0, 1)])


def test_flipped_answers_and_how_hard_they_were(scripted):
    labels = torch.arange(4).repeat(100)
    before = torch.where(torch.arange(400) < 40, (labels + 1) % 4, labels)  # hard ones, wrong already
    after = torch.where(torch.arange(400) < 80, (labels + 2) % 4, labels)
    work, model = scripted(labels, before, after)
    found = Exemplars().check(work, work.model, model)
    change = found.change("changed answers")
    assert (change.after, change.n, found.verdict) == (0.2, 400, HARM)
    assert change.low < 0.2 < change.high
    assert found.details["accuracy_on_exemplars"] == 0.5
    assert found.details["accuracy_on_others"] == 1
    assert found.details["became_wrong"] == pytest.approx(0.1)
    assert found.details["became_right"] == 0
    assert found.details["indices"] == list(range(50))
    assert found.details["by_class"] == {"0": 20, "1": 20, "2": 20, "3": 20}
    assert "20.00% of 400 answers changed" in found.summary


def test_nothing_changed_is_no_harm_unless_there_are_few(scripted):
    labels = torch.arange(2).repeat(200)
    work, model = scripted(labels, labels, labels)
    assert Exemplars().check(work, work.model, model).verdict == NO_HARM
    assert Exemplars().check(work, work.model, model).details["accuracy_on_exemplars"] is None
    work, model = scripted([0, 1, 0], [0, 1, 0], [0, 1, 0])
    assert Exemplars().check(work, work.model, model).verdict == UNSURE


def test_several_models_leave_out_what_chance_changes(scripted, noisy_answers):
    labels = torch.arange(10).repeat(100)
    models = []
    for seed in range(6):
        work, after = scripted(labels, noisy_answers(labels, 0.1, seed), noisy_answers(labels, 0.1, 100 + seed))
        models.append((work.model, after))
    before, after = (list(side) for side in zip(*models))
    alone = Exemplars().check(work, before[0], after[0])
    together = Exemplars().check(work, before, after)
    assert alone.change("changed answers").after > 0.15
    assert together.change("changed answers").after < 0.01
    assert together.verdict == NO_HARM
    assert together.details["chance"] < 0.1
    with pytest.raises(UserError, match="0 models before"):
        Exemplars().check(work, [], after)
