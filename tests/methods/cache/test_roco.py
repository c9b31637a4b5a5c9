import numpy as np
import pytest
from numpy_llama import assert_same_as_reference, heavy, kept_positions

from lilliput.errors import UserError
from lilliput.methods.cache import RoCo


def robust(budget, varied, newest):
    """The last ones, the most varied of the others, then the largest means."""

    def rule(entries, length):
        last = [e for e in entries if e.home >= length - newest]
        others = sorted((e for e in entries if e.home < length - newest), key=lambda e: -np.std(e.seen))
        by_mean = sorted(others[varied:], key=lambda e: -np.mean(e.seen))
        return (last + others[:varied] + by_mean)[:budget]

    return rule


@pytest.mark.parametrize(
    ("settings", "varied", "newest"),
    [
        ({"varied": 0.25, "recent": 0.25}, 2, 2),
        ({"varied": 0.0, "recent": 0.5}, 0, 4),
        ({"varied": 1.0, "recent": 0.0}, 7, 1),
    ],
)
def test_it_keeps_what_varies_and_then_the_largest_means(sharp_llama, text, settings, varied, newest):
    cache = RoCo(budget=8, **settings).cache(sharp_llama)
    sizes = assert_same_as_reference(sharp_llama, cache, robust(8, varied, newest), text)
    assert set(sizes) == {8}


def test_it_is_not_the_rule_of_heavy_hitters(sharp_llama, text):
    with pytest.raises(AssertionError):
        assert_same_as_reference(sharp_llama, RoCo(budget=8, recent=0.5).cache(sharp_llama), heavy(8, 4), text)


def test_a_budget_of_one_is_the_last_token(sharp_llama, text):
    cache = RoCo(budget=1).cache(sharp_llama)
    sharp_llama(text[None], past_key_values=cache)
    assert kept_positions(cache) == [[[34]] * 2] * 2


def test_more_protected_than_there_is_room_for_is_refused():
    with pytest.raises(UserError, match=r"varied is 0\.7 and recent 0\.5"):
        RoCo(varied=0.7, recent=0.5)
