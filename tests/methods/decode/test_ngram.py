"""Looking up the ending of a text in itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.decode.ngram import Ngram, _Lookup, copied, find_ending

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def slow_ending(text, longest, shortest):
    """The same by comparing every place."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                return end
    return None


@settings(deadline=None)
@given(TEXTS, st.integers(1, 5), st.integers(1, 5))
def test_endings_are_those_that_comparing_every_place_finds(text, longest, shortest):
    assert find_ending(torch.tensor(text), longest, shortest) == slow_ending(text, longest, shortest)


def test_the_longest_ending_wins_and_of_those_the_last():
    text = [1, 2, 3, 9, 2, 3, 8, 7, 2, 3, 6, 1, 2, 3]
    assert find_ending(torch.tensor(text), 3, 1) == 3
    assert find_ending(torch.tensor(text), 2, 1) == 10
    assert find_ending(torch.tensor(text), 3, 3) == 3
    assert find_ending(torch.tensor([1, 2, 3, 4]), 3, 1) is None
    assert find_ending(torch.tensor([1]), 3, 1) is None


def test_a_copy_goes_on_in_itself():
    assert copied(torch.tensor([1, 2, 3, 4, 5]), 2, 3) == [3, 4, 5]
    assert copied(torch.tensor([9, 1, 2, 1, 2]), 3, 5) == [1, 2, 1, 2, 1]


def test_drafts_grow_while_they_hold_and_shrink_when_they_do_not():
    ids = torch.tensor([5, 6, 7, 8] * 20)
    lookup, start, lengths = _Lookup(Ngram(tokens=8)), 12, []
    for held in ("all", "all", "all", "all", 3, 0, "all"):
        tokens = lookup.propose(ids[:start], 100, None).tokens
        assert tokens == ids[start : start + len(tokens)].tolist()
        lengths.append(len(tokens))
        if held == "all":
            start += len(tokens)
        else:
            lookup.drafted[held] = 99  # as if the model had said something else there
            start += len(tokens)
    assert lengths == [2, 4, 8, 8, 8, 4, 1]


def test_drafts_end_where_there_is_no_room_or_no_match():
    ids = torch.tensor([5, 6, 7, 8, 5, 6])
    assert _Lookup(Ngram()).propose(ids, 1, None).tokens == [7]
    assert _Lookup(Ngram(tokens=1)).propose(ids, 100, None).tokens == [7]
    assert _Lookup(Ngram()).propose(ids[:4], 100, None).tokens == []


def test_a_range_upside_down_is_refused():
    with pytest.raises(UserError, match="shortest is 5"):
        Ngram(longest=4, shortest=5)
