"""The experiments' parts on tiny models and made-up answers, and their rules on figures that must and must not hold."""

import math
from types import SimpleNamespace

import pytest
import torch

from lilliput.methods.train.early_stop import Decision, EarlyStop
from lilliput.papers import _letters, ett, ttc_early_stop, vds_ttt
from lilliput.papers._letters import Letters, drawn, held_out, tokens_of, voted
from lilliput.zoo import nets
from lilliput.zoo.texts import Corpus

TINY = ett.Effort("tiny", window=96, documents=3, parts=("ffn_out", "all"), length=256, section=128)


@pytest.fixture(scope="module")
def task():
    return Letters(nets.load_tokenizer())


# --- ETT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, *ett.RIVALS])
def test_ett_has_to_beat_every_rival_by_two_standard_errors(weak):
    margins = dict.fromkeys((*ett.RIVALS, ett.WHOLE), (0.1, 0.04))
    assert ett.judge(margins | ({weak: (0.1, 0.06)} if weak else {})) is (weak is None)


def test_ett_must_not_be_worse_than_adapting_everything():
    margins = dict.fromkeys((*ett.RIVALS, ett.WHOLE), (0.1, 0.01))
    assert ett.judge(margins | {ett.WHOLE: (0.0, 1.0)})
    assert not ett.judge(margins | {ett.WHOLE: (-0.001, 1.0)})


def test_every_context_ends_with_the_same_scored_tokens():
    ids = torch.randint(3, 64, (TINY.length + TINY.section,), generator=torch.Generator().manual_seed(0))
    for windows in (ett.last_windows(ids, TINY), ett.retrieved_windows(ids, TINY)):
        assert windows.shape == (2, TINY.window)
        assert windows[:, -ett.TARGET :].flatten().tolist() == ids[TINY.length :].tolist()
    assert ett.last_windows(ids, TINY)[0].tolist() == ids[TINY.length - 32 : TINY.length + 64].tolist()
    assert ett.retrieved_windows(ids, TINY)[0, 16:32].tolist() == ids[TINY.length - 16 : TINY.length].tolist()


def test_the_most_similar_chunk_shares_the_rare_tokens():
    pieces = torch.tensor([[1, 1, 2, 3], [1, 1, 9, 8], [1, 1, 4, 5]])
    assert ett.most_similar(pieces, torch.tensor([9, 1, 1, 8])) == 1
    assert ett.most_similar(pieces, torch.tensor([4, 1, 1, 1])) == 2


def test_phrases_of_the_document_are_marked_where_they_come_again():
    ids = torch.arange(1000)[: TINY.length + TINY.section].clone()
    ids[TINY.length + 10 : TINY.length + 14] = ids[20:24]
    marks = ett.seen_before(ids, TINY)
    assert marks.nonzero().tolist() == [[0, 12], [0, 13]]  # the first two have another token before them


def test_the_cache_mixes_probabilities():
    plain, known = torch.full((1, ett.TARGET), math.log(4.0)), torch.tensor([5, 5, 6, 7])
    windows = torch.full((1, ett.TARGET + 3), 5)
    windows[0, -1] = 8
    found = ett.cached(plain, windows, known, 0.2)
    assert float(found[0, 0]) == pytest.approx(-math.log(0.8 * 0.25 + 0.2 * 0.5))
    assert float(found[0, -1]) == pytest.approx(-math.log(0.8 * 0.25))


def test_losses_are_those_of_the_last_tokens(tiny_llama):
    windows = torch.randint(3, 64, (2, 80), generator=torch.Generator().manual_seed(0))
    labels = windows.clone()
    labels[:, : -ett.TARGET] = -100
    with torch.no_grad():
        expected = float(tiny_llama(input_ids=windows, labels=labels).loss)
    assert float(ett.losses(tiny_llama, windows).mean()) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def tiny_texts(llama_work, monkeypatch):
    """A workload whose tokenizer turns the name of a document into tokens, and a corpus of such names."""

    def tokenize(text, **options):
        ids = torch.randint(3, 64, (400,), generator=torch.Generator().manual_seed(int(text)))
        return {"input_ids": ids.tolist()}

    work = SimpleNamespace(model=llama_work.model, tokenizer=tokenize)
    monkeypatch.setattr(ett.Workload, "from_name", lambda name: work)
    corpus = Corpus("numbers", {f"{i:03d}": str(i) for i in range(80)})
    monkeypatch.setattr(ett.texts, "state_of_the_union", lambda: corpus)
    return work


def test_every_contender_of_ett_sees_every_document_and_the_model_stays(tiny_texts):
    before = {k: v.clone() for k, v in tiny_texts.model.state_dict().items()}
    found, weight = ett.run(TINY, seed=0)
    assert set(found) == {*ett.RIVALS, ett.OURS, ett.WHOLE}
    assert weight in ett.CACHE_WEIGHTS
    for one in found.values():
        assert [tuple(loss.shape) for loss in one.losses] == [(2, ett.TARGET)] * 3
        assert one.row("a").values["nats_per_token"] == pytest.approx(float(one.by_document().mean()))
    assert all(torch.equal(before[k], v) for k, v in tiny_texts.model.state_dict().items())


def test_the_other_documents_losses_stand_by_the_document_they_are_of(tiny_texts, monkeypatch):
    monkeypatch.setattr(ett, "RATE", 1e-7)  # learns nothing, so that what is adapted to does not matter
    near = {"rtol": 1e-2, "atol": 1e-2}
    found, _ = ett.run(TINY, seed=0)
    torch.testing.assert_close(torch.stack(found[ett.OTHER].losses), torch.stack(found[ett.TRUNCATED].losses), **near)


def test_documents_are_drawn_by_the_seed_from_their_split(tiny_texts):
    first, again, other = (ett.drawn_documents(tiny_texts.tokenizer, "test", TINY, 3, s) for s in (0, 0, 1))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert {len(ids) for ids in first} == {TINY.length + TINY.section}


# --- sorting letters -------------------------------------------------------------------------------------------


def test_letters_are_sorted_and_judged_to_the_end(task):
    prompt, answer = task.prompt("quiz"), task.answer("quiz")
    assert [task.to_letter[t] for t in answer.tolist()[:-1]] == list("iquz")
    assert answer[-1] == task.end
    assert len(set(task.of_letter.values())) == 26
    assert task.arrow not in task.to_letter
    assert task.right(prompt, answer)
    assert not task.right(prompt, answer[:-1])
    assert not task.right(prompt, answer.flip(0))
    rights = task.rights([prompt, task.prompt("ab")], [[answer, answer[1:]], [task.answer("ba"), answer]])
    assert rights.tolist() == [[True, False], [True, False]]


def test_words_are_kept_from_learning_and_drawn_by_the_seed():
    pool = {2: [f"{a}{b}" for a in "abcde" for b in "fghij"], 1: list("klm")}
    learned, kept = held_out(pool)
    assert len(kept) == 4
    assert {n: len(group) for n, group in learned.items()} == {2: 22, 1: 2}
    assert not {w for group in learned.values() for w in group} & set(kept)
    assert drawn(pool[2], 5, 0) == drawn(pool[2], 5, 0) != drawn(pool[2], 5, 1)
    assert len(set(drawn(pool[2], 99, 0))) == 25
    assert tokens_of(pool, steps=10) == 10 * _letters.BATCH * (4 + 6) / 2


def test_words_come_from_the_split_that_is_asked_for(monkeypatch):
    corpus = Corpus("made up", {f"{i}": f"Only {'abcdefghij'[i] * 4} counts, not Abcd or x1yz." for i in range(10)})
    monkeypatch.setattr(_letters.texts, "state_of_the_union", lambda: corpus)
    found = {split: set(_letters.words(split, [4])[4]) for split in ("training", "test")}
    assert {split: len(group) for split, group in found.items()} == {"training": 7, "test": 1}
    assert not found["training"] & found["test"]


def test_a_vote_is_for_the_most_frequent_and_then_for_the_first():
    answers = [torch.tensor(a) for a in ([1, 2], [3], [3], [1, 2], [4])]
    assert voted(answers).tolist() == [1, 2]
    assert voted(answers[1:]).tolist() == [3]


def test_a_verifier_without_wrong_answers_trusts_all_alike(task, monkeypatch, tiny_llama):
    prompts = [task.prompt("ba"), task.prompt("dc")]
    monkeypatch.setattr(_letters, "sample", lambda *args: [[task.answer("ba")] * 2, [task.answer("dc")]])
    verifier = _letters.learned_verifier(tiny_llama, task, prompts, 2, 1.0, 0)
    assert verifier(prompts[0], [task.answer("ab"), torch.tensor([3])]).tolist() == [1.0, 1.0]


# --- VDS-TTT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, *vds_ttt.RIVALS])
def test_vds_ttt_has_to_beat_every_rival_by_two_standard_errors(weak):
    margins = dict.fromkeys(vds_ttt.RIVALS, (0.1, 0.04))
    assert vds_ttt.judge(margins | ({weak: (0.1, 0.06)} if weak else {})) is (weak is None)


def test_a_stream_is_noted_in_the_order_of_the_queries(task, tiny_llama):
    queries = [task.prompt(word) for word in ("ab", "ba", "cab", "bac")]
    small = {token: i + 3 for i, token in enumerate({t for q in queries for t in q.tolist()} | {task.end})}

    class Small(Letters):
        def __init__(self):
            self.of_letter = {k: small[v] for k, v in task.of_letter.items() if v in small}
            self.to_letter = {v: k for k, v in self.of_letter.items()}
            self.arrow, self.end = small[task.arrow], small[task.end]

    mine = Small()
    queries = [mine.prompt(word) for word in ("ab", "ba", "cab", "bac")]
    answers = {tuple(q.tolist()): mine.answer(w) for q, w in zip(queries[:2], ("ab", "ab"))}

    class Opened:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def ask(self, asked):
            given = [answers.get(tuple(q.tolist()), torch.tensor([3])) for q in asked]
            return [vds_ttt.Answer(a, 0.5, a if len(a) > 1 else None, (a,)) for a in given]

    method = SimpleNamespace(open=lambda *args: Opened(), block=2, steps=1)
    one, order = vds_ttt.Found(), torch.tensor([3, 0, 2, 1])
    vds_ttt.stream(one, method, tiny_llama, mine, None, [queries[i] for i in order.tolist()], order)
    assert one.by_query().tolist() == [1, 1, 0, 0]
    row = one.row("a")
    assert row.values["accuracy_percent"] == 50
    assert row.values["first_quarter_percent"] == 0
    assert row.values["last_quarter_percent"] == 100
    assert row.values["trust_above_accuracy_points"] == 0
    assert row.values["learned_share"] == 0.5
    assert row.values["learned_right_share"] == 1


def test_the_teachers_of_the_rivals(task):
    prompt, right, wrong = task.prompt("ba"), task.answer("ba"), torch.tensor([1])
    assert vds_ttt.first(prompt, [wrong, right, wrong]).tolist() == [1, 0, 0]
    assert vds_ttt.right_or_wrong(task)(prompt, [wrong, right]).tolist() == [0, 1]


# --- early stopping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "gain", "holds"), [(0.5, 0.0, True), (0.89, 0.1, True), (0.95, 0.1, False), (0.5, -0.001, False)]
)
def test_early_stopping_has_to_save_and_to_lose_nothing(share, gain, holds):
    decision = Decision(share, 0.5, 0.8, 0.7, 0.9, 4, True)
    assert ttc_early_stop.judge(decision, gain) is holds
    assert not ttc_early_stop.judge(None, gain)


def test_patience_ends_after_looks_without_anything_better():
    stopper = EarlyStop().stopper(lambda model: None)
    for i, right in enumerate((1, 2, 2, 1, 4, 4)):
        accuracy = (torch.arange(4) < right).double()
        stopper.see((i + 1) / 10, {1: accuracy, 2: accuracy})
    assert ttc_early_stop.patience(stopper) == (0.2, 0.4)


def test_every_way_to_answer_is_tested_on_the_same_tries(task, monkeypatch, tiny_llama):
    prompts, right, wrong = (
        [task.prompt("ba"), task.prompt("dc")],
        [task.answer("ba"), task.answer("dc")],
        torch.ones(1),
    )
    tries = [[right[0], wrong, wrong, right[0]], [wrong, wrong, right[1], wrong]]
    monkeypatch.setattr(ttc_early_stop, "sample", lambda *args: tries)
    monkeypatch.setattr(ttc_early_stop, "greedy", lambda *args: torch.tensor([0.0, 1.0]))

    def verifier(prompt, answers):
        return torch.tensor([float(len(a)) for a in answers])

    tested = ttc_early_stop.tested_on(tiny_llama, task, prompts, 2, verifier)
    assert tested.greedy.tolist() == [0, 1]
    assert tested.voted.tolist() == [1, 0]
    assert tested.picked.tolist() == [1, 0]
    torch.testing.assert_close(tested.passed, torch.tensor([5 / 6, 1 / 2], dtype=torch.float64))
