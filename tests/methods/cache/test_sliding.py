import pytest
from numpy_llama import assert_same_as_reference, kept_positions

from lilliput.errors import UserError
from lilliput.methods.cache import Sliding


@pytest.mark.parametrize("sinks", [0, 2])
def test_it_holds_and_computes_what_the_definition_says(sharp_llama, text, sinks):
    def rule(entries, length):
        return [e for e in entries if e.home < sinks or e.home >= length - (8 - sinks)]

    sizes = assert_same_as_reference(sharp_llama, Sliding(budget=8, sinks=sinks).cache(sharp_llama), rule, text)
    assert set(sizes) == {8}


def test_the_smallest_window_is_the_last_token(sharp_llama, text):
    cache = Sliding(budget=1, sinks=0).cache(sharp_llama)
    for piece in text.split(7):
        sharp_llama(piece[None], past_key_values=cache)
        assert kept_positions(cache)[0] == [[cache.get_seq_length() - 1]] * 2


@pytest.mark.parametrize("sinks", [8, 9])
def test_sinks_that_leave_no_window_are_refused(sinks):
    with pytest.raises(UserError, match=f"sinks is {sinks}.*budget of 8"):
        Sliding(budget=8, sinks=sinks)


def test_the_window_is_what_the_sinks_leave():
    assert Sliding(budget=10, sinks=3).window == 7
