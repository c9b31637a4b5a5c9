"""Two models of as many tokens: their tokenizers say whether a number means the same to both."""

import huggingface_hub
import pytest

from lilliput.errors import UserError
from lilliput.methods.decode._vocabulary import check_vocabulary, first_clash, tokenizer_of

SWAPPED = [*range(40), 41, 40, *range(42, 64)]
CLASH = r"token 40 is 'word41' for the small one and 'word40' for the model"


def check(model, small, tokenizers=(None, None)):
    check_vocabulary(model, small, "the small one", tokenizers)


def test_the_first_number_with_two_meanings_is_found(make_words):
    assert first_clash(make_words(), make_words()) is None
    assert first_clash(make_words(), make_words(SWAPPED)) == (40, "word40", "word41")


def test_tokens_that_only_one_of_them_knows_do_no_harm(make_words):
    more = make_words()
    more.add_tokens(["<tool>"])
    assert first_clash(make_words(), more) is None


def test_tokenizers_that_are_given_are_compared(model, make_llama, make_words):
    small = make_llama(1)
    check(model, small, (make_words(), make_words()))
    with pytest.raises(UserError, match=CLASH):
        check(model, small, (make_words(), make_words(SWAPPED)))


def test_what_is_not_at_hand_is_not_compared(model, make_llama, make_words, tmp_path):
    small = make_llama(1)
    check(model, small)
    check(model, small, (make_words(), None))
    small.config.name_or_path = str(tmp_path)  # without a tokenizer
    assert tokenizer_of(small) is None
    (tmp_path / "tokenizer_config.json").write_text("{")  # with one that cannot be read
    small.config.save_pretrained(tmp_path)
    assert tokenizer_of(small) is None
    check(model, small, (make_words(), None))
    small.config.name_or_path = "no name of: a repository"
    assert tokenizer_of(small) is None


def test_tokenizers_beside_the_weights_are_compared(model, make_llama, make_words, tmp_path):
    small = make_llama(1)
    for one, name, order in ((model, "large", range(64)), (small, "small", SWAPPED)):
        one.save_pretrained(tmp_path / name)
        make_words(order).save_pretrained(tmp_path / name)
    large, small = (type(model).from_pretrained(tmp_path / name) for name in ("large", "small"))
    with pytest.raises(UserError, match=CLASH):
        check(large, small)
    check(large, small, (None, make_words()))  # what is given counts
    check(large, large)


def test_tokenizers_in_the_hubs_cache_are_compared(model, make_llama, make_words, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    small, folder = make_llama(1), tmp_path / "models--someone--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    small.config.save_pretrained(folder / "snapshots" / "abc")
    make_words(SWAPPED).save_pretrained(folder / "snapshots" / "abc")
    small.config.name_or_path = "someone/small"
    with pytest.raises(UserError, match=CLASH):
        check(model, small, (make_words(), None))
    small.config.name_or_path = "someone/else"
    check(model, small, (make_words(), None))


def test_a_lone_tokenizer_is_refused(model, make_words):
    with pytest.raises(UserError, match="give a pair"):
        check(model, model, make_words())
