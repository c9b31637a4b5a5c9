import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import cache
from lilliput.errors import UserError
from lilliput.zoo import texts


class Words:
    """A tokenizer whose token is the number a word spells; `start` is put before a text."""

    def __init__(self, start=None):
        self.start = start
        self.calls = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.calls += 1
        single = isinstance(text, str)
        start = [self.start] if add_special_tokens and self.start is not None else []
        ids = [start + [int(w) if w.isdigit() else 7 for w in t.split()] for t in ([text] if single else text)]
        return {"input_ids": ids[0] if single else ids}


def numbered(documents, words):
    """Documents of consecutive numbers: document d holds d * 1000, d * 1000 + 1, ..."""
    return [" ".join(str(1000 * d + i) for i in range(words)) for d in range(1, documents + 1)]


# --- splits ----------------------------------------------------------------------------------------------------


def test_the_splits_of_the_addresses_are_fixed():
    corpus = texts.state_of_the_union()
    splits = {name: set(corpus.split(name)) for name in texts.SHARES}
    assert {name: len(split) for name, split in splits.items()} == {
        "training": 163,
        "calibration": 23,
        "validation": 24,
        "test": 23,
    }
    assert set.union(*splits.values()) == set(corpus.documents)
    listed = "|".join(",".join(sorted(splits[name])) for name in texts.SHARES)
    digest = "ab9165abe1bbc134eaf04bbdd8999b84b58793af229872b74c7ce3428241c39a"
    assert hashlib.sha256(listed.encode()).hexdigest() == digest
    assert corpus.digest() == "aab3da82dbc074ed9d02b20c703cfe3c66283b82e6a4d0acca3499f212b2b675"


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(max_size=8), min_size=texts.FEWEST_DOCUMENTS, max_size=60))
def test_no_document_is_in_two_splits_and_none_is_lost(names):
    corpus = texts.Corpus("c", dict.fromkeys(names, "text"))
    parts = [list(corpus.split(split)) for split in texts.SHARES]
    assert sorted(n for part in parts for n in part) == sorted(names)
    assert all(parts)


def test_the_digest_sees_every_change():
    base = {"a": "xy", "b": "z"}
    others = [{"a": "x", "b": "yz"}, {"a": "xy", "c": "z"}, {"a": "xy"}, {"a": "xz", "b": "z"}]
    digests = {texts.Corpus("c", d).digest() for d in [base, *others]}
    assert len(digests) == 5
    assert texts.Corpus("d", {"b": "z", "a": "xy"}).digest() in digests


# --- windows ---------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_or_cross_documents():
    ids = texts.token_windows(Words(), numbered(5, 103), length=10, count=50)
    assert ids.shape == (50, 10)
    assert ids.dtype == torch.int64
    assert (ids.diff() == 1).all()  # consecutive words of one document
    assert ids.unique().numel() == 500  # none twice
    assert (ids[:, 0] % 10 == 0).all()


def test_windows_depend_on_the_seed_alone():
    draws = [texts.token_windows(Words(), numbered(9, 100), 10, 20, seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_only_as_much_of_a_large_text_is_read_as_needed():
    tokenizer = Words()
    ids = texts.token_windows(tokenizer, numbered(400, 100), length=10, count=10)
    assert int(ids.max()) < 17_000  # sixteen documents are one reading
    assert tokenizer.calls == 3


def test_windows_start_with_the_beginning_of_text_where_the_tokenizer_sets_it():
    ids = texts.token_windows(Words(start=5), numbered(2, 27), length=10, count=6)
    assert (ids[:, 0] == 5).all()
    assert (ids[:, 1:].diff() == 1).all()


def test_too_few_windows_say_how_many_there_are():
    with pytest.raises(UserError, match="give 8 windows of 10 tokens, but 9 are needed"):
        texts.token_windows(Words(), numbered(4, 25), length=10, count=9)
    assert len(texts.token_windows(Words(), numbered(4, 25), 10, 9, fewest=4)) == 8


# --- the cache of windows --------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    return texts.Corpus("mine", dict(enumerate_names(numbered(40, 100))), own=True)


def enumerate_names(documents):
    return ((f"d{i}", text) for i, text in enumerate(documents))


def test_windows_are_read_from_the_cache_and_made_again_when_it_is_broken(corpus):
    first = texts.split_windows(Words(), "t", corpus, 10)
    again = texts.split_windows(None, "t", corpus, 10)  # no tokenizer is needed any more
    (file,) = cache.folder("windows").iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    third = texts.split_windows(Words(), "t", corpus, 10)
    for split in texts.COUNTS:
        assert torch.equal(first[split], again[split])
        assert torch.equal(first[split], third[split])


def test_windows_of_another_tokenizer_text_length_or_count_are_made_anew(corpus):
    other = texts.Corpus("mine", {**corpus.documents, "d0": "1 2 3"}, own=True)
    calls = [("t", corpus, 10), ("u", corpus, 10), ("t", other, 10), ("t", corpus, 12), ("t", corpus, 10, {"test": 5})]
    for call in calls:
        tokenizer = Words()
        texts.split_windows(tokenizer, *call)
        assert tokenizer.calls
    assert len(list(cache.folder("windows").iterdir())) == 5


def test_a_small_own_corpus_gives_what_it_has_but_explicit_counts_are_exact(corpus):
    found = texts.split_windows(Words(), "t", corpus, 20, {"test": 20})
    assert {k: len(v) for k, v in found.items()} == {"training": 140, "calibration": 16, "validation": 16, "test": 20}
    with pytest.raises(UserError, match=r"test split of 'mine'.*20 windows of 20 tokens, but 21"):
        texts.split_windows(Words(), "t", corpus, 20, {"test": 21})
    with pytest.raises(UserError, match=r"training split.*0 windows of 200 tokens, but 1"):
        texts.split_windows(Words(), "t", corpus, 200, {"training": 1})


@pytest.mark.parametrize(("length", "counts"), [(1, None), ("9", None), (8, {"tests": 3}), (8, {"test": 0})])
def test_wrong_sizes_are_refused(corpus, length, counts):
    with pytest.raises(UserError, match=r"give a (whole )?number"):
        texts.split_windows(Words(), "t", corpus, length, counts)


# --- a user's own text -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab \n", min_size=0, max_size=3000), max_size=12), st.sampled_from(["\n\n", "\n", " ", ""]))
def test_cutting_a_file_loses_nothing(pieces, separator):
    text = separator.join(pieces)
    groups = texts._grouped(text)
    found = {s.join(groups) for s in ("\n\n", "\n", " ")}
    assert text in found
    assert len(groups) == 1 or all(len(g) + 2 >= texts.GROUP_CHARS for g in groups)


def test_a_file_and_a_folder_become_documents(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i}. " + "word " * 100 for i in range(200)))
    book = texts.own_corpus(tmp_path / "book.txt")
    assert book.name == "book"
    assert book.own
    assert 20 <= len(book.documents) <= 26
    for i in range(10):
        (tmp_path / "docs" / f"{i}").mkdir(parents=True)
        (tmp_path / "docs" / f"{i}" / "text.txt").write_text(f"text {i}")
    assert texts.own_corpus(str(tmp_path / "docs")).documents["3/text"] == "text 3"


def test_unusable_texts_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        texts.own_corpus(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"no \.txt file"):
        texts.own_corpus(tmp_path)
    (tmp_path / "small.txt").write_text("few words")
    with pytest.raises(UserError, match="9 characters in 1 documents"):
        texts.own_corpus(tmp_path / "small.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(UserError, match="not UTF-8"):
        texts.own_corpus(tmp_path / "latin.txt")
