"""A planted loss of one class or group is found, chance is not, and few samples are told as few."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit.groups import Groups

LABELS = torch.arange(10).repeat(200)


def test_a_starved_class_is_found_and_named_first(scripted, noisy_answers):
    before = noisy_answers(LABELS, 0.05, 0)
    after = torch.where((LABELS == 7) & (torch.arange(2000) // 10 % 5 == 0), (LABELS + 1) % 10, before)
    found = Groups().check(*_sides(scripted(LABELS, before, after)))
    assert found.verdict == HARM
    assert found.changes[0].name == "class 7"
    assert [c.name for c in found.changes if c.verdict == HARM] == ["class 7"]
    assert "1 harmed: class 7" in found.summary
    right = [(a == LABELS)[LABELS == 7].float().mean().item() for a in (before, after)]
    assert [found.changes[0].before, found.changes[0].after] == pytest.approx(right)
    assert found.changes[0].low < right[1] - right[0] < found.changes[0].high < 0


def _sides(pair):
    work, after = pair
    return work, work.model, after


@pytest.mark.parametrize("seed", range(5))
def test_chance_is_no_harm(scripted, noisy_answers, seed):
    before, after = (noisy_answers(LABELS, 0.02, 100 * seed + i) for i in (1, 2))
    found = Groups(tolerance=0.08).check(*_sides(scripted(LABELS, before, after)))
    assert found.verdict == NO_HARM
    assert len(found.changes) == 10


def test_harm_is_rarely_found_where_there_is_none(scripted, noisy_answers):
    labels, alarms = torch.arange(10).repeat(40), 0
    for seed in range(60):
        before, after = (noisy_answers(labels, 0.1, 1000 + 2 * seed + i) for i in (0, 1))
        alarms += Groups(tolerance=0.0).check(*_sides(scripted(labels, before, after))).verdict == HARM
    assert alarms <= 5


def test_groups_of_the_user_are_compared(scripted):
    labels = torch.arange(2).repeat(300)
    wears = (torch.arange(600) % 3 == 0).long()
    after = torch.where((wears == 1) & (torch.arange(600) % 2 == 0), 1 - labels, labels)
    found = Groups().check(*_sides(scripted(labels, labels, after, group__hat=wears)))
    assert found.changes[0].name == "hat 1"
    assert found.change("hat 1").verdict == HARM
    assert found.change("hat 0").verdict == NO_HARM
    assert found.change("hat 0").n == 400


def test_groups_of_three_are_not_judged(scripted):
    labels = torch.zeros(203, dtype=torch.long)
    group = torch.cat([torch.zeros(200), torch.ones(3)]).long()
    after = torch.where(group == 1, 1, labels)
    found = Groups().check(*_sides(scripted(labels, labels, after, group=group)))
    assert found.change("group 1").verdict == UNSURE
    assert found.change("group 1").n == 3
    assert found.verdict == UNSURE
    assert "group 1 (3 examples)" in found.summary
    assert Groups(fewest=1).check(*_sides(scripted([0, 0, 0], [0, 0, 0], [0, 0, 0]))).verdict == UNSURE


def test_one_class_alone_is_a_group(scripted):
    labels = torch.zeros(500, dtype=torch.long)
    found = Groups(relative="yes").check(*_sides(scripted(labels, labels, labels)))
    assert [c.name for c in found.changes] == ["class 0"]
    assert found.verdict == NO_HARM


def test_relative_losses_leave_out_what_all_lose(scripted):
    labels = torch.arange(4).repeat(300)
    all_lose = torch.where(torch.arange(1200) // 4 % 5 == 0, (labels + 1) % 4, labels)
    assert Groups().check(*_sides(scripted(labels, labels, all_lose))).verdict == HARM
    assert Groups(relative="yes", tolerance=0.1).check(*_sides(scripted(labels, labels, all_lose))).verdict == NO_HARM
    one_more = torch.where((labels == 2) & (torch.arange(1200) // 4 % 3 == 0), 0, all_lose)
    found = Groups(relative="yes").check(*_sides(scripted(labels, labels, one_more)))
    assert [c.name for c in found.changes if c.verdict == HARM] == ["class 2"]


def test_wrong_data_is_named(scripted, llama_work):
    work, after = scripted([0, 1], [0, 1], [0, 1])
    unlabelled = [{"input": b["input"]} for b in work.test]
    work.test = unlabelled
    with pytest.raises(UserError, match=r"audit\.groups cannot audit 'scripted': its test data has no labels"):
        Groups().check(work, work.model, after)
    with pytest.raises(UserError, match=r"use audit\.language"):
        Groups().check(llama_work, llama_work.model, llama_work.model)
    with pytest.raises(UserError, match="holds no sample"):
        Groups().check(*_sides(scripted([], torch.zeros(0, 2), torch.zeros(0, 2))))
    with pytest.raises(UserError, match=r"two or more"):
        Groups().check(*_sides(scripted([0, 0], torch.zeros(2, 1), torch.zeros(2, 1))))
    with pytest.raises(UserError, match="one integer per sample"):
        Groups().check(*_sides(scripted([0, 1], [0, 1], [0, 1], group=torch.zeros(2, 2))))
