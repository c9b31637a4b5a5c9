"""The experiments' parts on trainings of a moment, and their rules on figures that must and must not hold."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lilliput.errors import UserError
from lilliput.papers import _equal_seconds, cvnets_sampler, resnet9_small_data, swiftlearn
from lilliput.papers._equal_seconds import Effort, Found, Trainee, compare, train_for, training_set

TINY = Effort(seconds=0.05, seeds=2, pictures=300, test_pictures=50, rates=(1e-3, 1e-2), validation_pictures=50)
CLEAR, UNCLEAR, WORSE = (1.0, 0.3), (1.0, 0.6), (-1.0, 0.3)


class Clock:
    """Stands in the place of `time.perf_counter`; it goes on when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_equal_seconds, "time", SimpleNamespace(perf_counter=clock))
    return clock


def trainee(log, clock, rate=1.0):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=rate)

    def step(batch):
        log.append(optimizer.param_groups[0]["lr"])
        clock.now += 1

    model = nn.ParameterList([weight])
    return Trainee(model, optimizer, lambda done: (torch.zeros(3), done), step, lambda: {"own": 7.0})


# --- the clock -------------------------------------------------------------------------------------------------


def test_the_beginning_is_in_the_time_and_the_rate_follows_it(clock):
    log = []

    def begin():
        clock.now += 20
        return trainee(log, clock)

    _, figures = train_for(begin, 20)
    assert log == []
    assert figures == {"steps": 0, "samples": 0, "own": 7}
    _, figures = train_for(begin, 100)
    assert figures == {"steps": 80, "samples": 240, "own": 7}
    assert log == sorted(log, reverse=True)  # the rise was over before the first step
    assert 0.9 < log[0] < 1
    assert log[-1] < 0.01


def test_the_best_rate_is_found_on_other_pictures_and_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(_equal_seconds, "training_set", lambda seed, count: seed)
    monkeypatch.setattr(_equal_seconds, "train_for", lambda begin, seconds: (begin(), {"steps": 1.0}))
    monkeypatch.setattr(_equal_seconds, "accuracy_percent", lambda model, pictures: model[2] + len(pictures) / 1e3)
    seen = []

    def contender(name, best):
        def begin(data, seed, rate):
            seen.append((name, data, seed, rate))
            return SimpleNamespace(model=(name, seed, -abs(rate - best)))

        return begin

    found = compare({"a": contender("a", 1e-3), "b": contender("b", 1e-2)}, TINY, 5, lambda model, test: {"more": 2.0})
    assert (found["a"].rate, found["b"].rate) == (1e-3, 1e-2)
    warming, tuning, final = seen[:2], seen[2:6], seen[6:]
    assert warming == [("a", 1005, 1005, 1e-3), ("b", 1005, 1005, 1e-3)]
    assert {(data, seed) for _, data, seed, _ in tuning} == {(1005, 1005)}
    assert final == [("a", 5, 5, 1e-3), ("b", 5, 5, 1e-2), ("a", 6, 6, 1e-3), ("b", 6, 6, 1e-2)]
    assert found["a"].figures == {"steps": [1.0, 1.0], "more": [2.0, 2.0]}
    row = found["a"].row("a")
    assert row.values == {"accuracy_percent": 0.05, "steps": 1, "more": 2, "learning_rate": 1e-3}
    assert row.spread["accuracy_percent"] == 0


def test_a_rate_that_breaks_a_training_down_is_out(monkeypatch):
    monkeypatch.setattr(_equal_seconds, "training_set", lambda seed, count: seed)
    monkeypatch.setattr(_equal_seconds, "train_for", lambda begin, seconds: (begin(), {}))
    monkeypatch.setattr(_equal_seconds, "accuracy_percent", lambda model, pictures: 10.0)

    def begin(data, seed, rate):
        if rate > 5e-3:
            raise UserError("not finite")
        return SimpleNamespace(model=None)

    assert compare({"a": begin}, replace(TINY, rates=(1e-2, 1e-3)), 0)["a"].rate == 1e-3


def test_training_sets_are_drawn_by_the_seed():
    first, again, other = (training_set(s, 20) for s in (0, 0, 1))
    assert torch.equal(first.tensors[0], again.tensors[0])
    assert not torch.equal(first.tensors[0], other.tensors[0])
    assert first.tensors[0].shape == (20, 1, 28, 28)


# --- SwiftLearn ------------------------------------------------------------------------------------------------


def test_swiftlearn_has_to_beat_every_rival():
    names = (swiftlearn.FULL, swiftlearn.RANDOM, swiftlearn.LOSS)
    assert swiftlearn.judge(dict.fromkeys(names, CLEAR))
    for name in names:
        assert not swiftlearn.judge(dict.fromkeys(names, CLEAR) | {name: UNCLEAR})


def steps_of(begin, count):
    one = begin()
    one.model.train()
    for _ in range(count):
        one.step(one.draw(0.0))
    return one


def test_a_training_of_swiftlearn_counts_its_passes():
    small = swiftlearn.SETTINGS.with_(warmup=1, refresh=1, keep=0.2)
    data = training_set(0, 300)
    one = steps_of(lambda: swiftlearn.beginning(small)(data, 0, 1e-3), 8)
    assert one.facts()["scoring_seconds"] > 0
    one = steps_of(lambda: swiftlearn.begin_full(data, 0, 1e-3), 1)
    assert one.facts() == {}


def test_highest_loss_chooses_more_wrong_labels_than_there_are(monkeypatch):
    monkeypatch.setattr(swiftlearn, "train_for", lambda begin, steps: (steps_of(begin, int(steps)), {}))
    small = swiftlearn.SETTINGS.with_(warmup=3, refresh=100, keep=0.2)
    shares = {
        score: swiftlearn.noisy_percent(small.with_(score=score), Effort(16, 1, 300, 10, (1e-3,)), 0, 3e-3)
        for score in ("random", "loss")
    }
    assert shares["loss"] > 20
    assert shares["random"] < 20


def test_rows_of_swiftlearn_say_how_many_wrong_labels_were_chosen():
    rows = swiftlearn.rows_of({"a": Found(1.0, [1.0]), "b": Found(1.0, [2.0])}, {"b": 12.0})
    assert "wrong_labels_chosen_percent" not in rows[0].values
    assert rows[1].values["wrong_labels_chosen_percent"] == 12.0


# --- ResNet-9 --------------------------------------------------------------------------------------------------


def test_recipes_are_the_whole_without_one_part_each():
    found = resnet9_small_data.recipes()
    switched = {name: sum(vars(s).values()) for name, s in found.items()}
    assert switched.pop(resnet9_small_data.ALL) == 5
    assert switched.pop(resnet9_small_data.PLAIN) == 0
    assert set(switched.values()) == {4}
    assert len(switched) == 5


def test_the_recipe_has_to_beat_the_plain_one_and_no_part_may_cost_more_than_it_gives():
    names = list(resnet9_small_data.recipes())[1:]
    assert resnet9_small_data.judge(dict.fromkeys(names, CLEAR))
    assert resnet9_small_data.judge(dict.fromkeys(names, UNCLEAR) | {resnet9_small_data.PLAIN: CLEAR})
    assert not resnet9_small_data.judge(dict.fromkeys(names, CLEAR) | {resnet9_small_data.PLAIN: UNCLEAR})
    assert not resnet9_small_data.judge(dict.fromkeys(names, CLEAR) | {"without sam": WORSE})


@pytest.mark.parametrize("name", list(resnet9_small_data.recipes()))
def test_every_recipe_learns(name):
    pictures, labels, index = training_set(0, 128).tensors
    data = TensorDataset(pictures, labels, index)
    one = resnet9_small_data.beginning(resnet9_small_data.recipes()[name], 2)(data, 0, 0.02)
    before = [p.detach().clone() for p in one.model.parameters() if p.requires_grad]
    one.model.train()
    for _ in range(2):
        one.step(one.draw(0.0))
    moved = [p for p in one.model.parameters() if p.requires_grad]
    assert len(moved) == len(before)
    assert not any(torch.equal(a, b) for a, b in zip(before, moved))
    assert all(torch.isfinite(p).all() for p in moved)
    whitened = sum(not p.requires_grad for p in one.model.parameters())
    assert whitened == (0 if name in ("without whitening", resnet9_small_data.PLAIN) else 2)


# --- CVNets ----------------------------------------------------------------------------------------------------


def test_variable_batches_have_to_beat_one_size_and_not_lose_to_growing():
    names = (cvnets_sampler.FIXED, cvnets_sampler.GROWING, cvnets_sampler.SAME_BATCH)
    assert cvnets_sampler.judge(dict.fromkeys(names, CLEAR))
    assert cvnets_sampler.judge(dict.fromkeys(names, CLEAR) | {cvnets_sampler.GROWING: (-1.0, 0.6)})
    assert not cvnets_sampler.judge(dict.fromkeys(names, (-1.0, 0.6)))
    assert not cvnets_sampler.judge(dict.fromkeys(names, CLEAR) | {cvnets_sampler.FIXED: UNCLEAR})
    assert not cvnets_sampler.judge(dict.fromkeys(names, CLEAR) | {cvnets_sampler.GROWING: WORSE})


def test_growing_pictures_come_in_fitting_batches():
    draw = cvnets_sampler.growing(training_set(0, 300), 0)
    shapes = [tuple(draw(done)[0].shape) for done in (0.0, 0.3, 0.6, 0.99, 1.0)]
    assert shapes == [(196, 1, 16, 16), (125, 1, 20, 20), (87, 1, 24, 24), (64, 1, 28, 28), (64, 1, 28, 28)]


@pytest.mark.parametrize("module", [swiftlearn, resnet9_small_data, cvnets_sampler])
def test_an_experiment_gives_rows_and_a_verdict(module, monkeypatch):
    monkeypatch.setattr(module, "Effort", lambda *args: TINY)
    evidence = module.experiment(seed=1)
    assert isinstance(evidence.holds, bool)
    assert len(evidence.rows) >= 4
    assert "seeds 1 to 2" in evidence.setup
    for row in evidence.rows:
        assert 0 <= row.values["accuracy_percent"] <= 100
        assert row.values["learning_rate"] in TINY.rates
