"""The code of the knobs is invertible, keeps their order, and follows what the study's trials share."""

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lilliput.methods.search import _genome
from lilliput.methods.search._genome import Genome, History, decode, encode, is_ordered, levels, reflect

SPACE = {
    "bits": CategoricalDistribution([2, 3, 4, 8, 16]),
    "kind": CategoricalDistribution(["svd", None, True, 3]),
    "ratio": FloatDistribution(0.1, 0.95, step=0.05),
    "rate": FloatDistribution(1e-5, 1e-1, log=True),
    "share": FloatDistribution(-2, 3),
    "rank": IntDistribution(8, 64, step=8),
    "width": IntDistribution(1, 1000, log=True),
    "odd": IntDistribution(-3, 3),
}


@st.composite
def params(draw):
    return {
        "bits": draw(st.sampled_from([2, 3, 4, 8, 16])),
        "kind": draw(st.sampled_from(["svd", None, True, 3])),
        "ratio": 0.1 + 0.05 * draw(st.integers(0, 17)),
        "rate": 10 ** draw(st.floats(-5, -1)),
        "share": draw(st.floats(-2, 3)),
        "rank": 8 * draw(st.integers(1, 8)),
        "width": draw(st.integers(1, 1000)),
        "odd": draw(st.integers(-3, 3)),
    }


@given(params())
def test_decode_undoes_encode(values):
    genome = Genome.of(SPACE)
    vector = genome.encode(values)
    again = genome.decode(vector)
    assert ((vector >= 0) & (vector <= 1)).all()
    for name in ("bits", "kind", "rank", "width", "odd"):
        assert again[name] is values[name] or again[name] == values[name]
        assert type(again[name]) is type(values[name])
    for name in ("ratio", "rate", "share"):
        assert again[name] == pytest.approx(values[name], rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=len(SPACE), max_size=len(SPACE)))
def test_every_vector_decodes_to_values_of_the_space(vector):
    genome = Genome.of(SPACE)
    values = genome.decode(np.array(vector))
    for name, d in SPACE.items():
        assert d._contains(d.to_internal_repr(values[name]))
    snapped = genome.snap(np.array(vector))
    grid = genome.levels > 0
    assert np.array_equal(genome.encode(values)[grid], snapped[grid])


@pytest.mark.parametrize("d", SPACE.values())
def test_the_ends_decode_to_the_ends(d):
    if isinstance(d, CategoricalDistribution):
        assert (decode(d, 0.0), decode(d, 1.0)) == (d.choices[0], d.choices[-1])
    else:
        assert decode(d, 0.0) == pytest.approx(d.low)
        assert decode(d, 1.0) == pytest.approx(d.high)


def test_grid_values_are_equally_likely():
    d = IntDistribution(0, 4)
    drawn = [decode(d, (i + 0.5) / 1000) for i in range(1000)]
    assert np.bincount(drawn).tolist() == [200] * 5


def test_levels_and_order():
    assert [levels(d) for d in SPACE.values()] == [5, 4, 18, 0, 0, 8, 0, 7]
    assert [is_ordered(d) for d in SPACE.values()] == [True, False, True, True, True, True, True, True]
    assert is_ordered(CategoricalDistribution([8, 4, 2]))
    assert not is_ordered(CategoricalDistribution([8, 2, 4]))
    assert not is_ordered(CategoricalDistribution([False, True]))


def test_knobs_of_one_value_are_left_out():
    assert list(Genome.of({"a": IntDistribution(3, 3), "b": IntDistribution(0, 1)}).space) == ["b"]


def test_reflection_stays_inside_and_keeps_what_is_inside():
    x = np.array([-0.2, 0.0, 0.3, 1.0, 1.2, 2.7, -3.1])
    assert np.allclose(reflect(x), [0.2, 0, 0.3, 1, 0.8, 0.7, 0.9])
    assert encode(IntDistribution(0, 1), 1) == 0.75


def test_history_reads_new_trials_once_and_drops_knobs_that_not_all_share(monkeypatch):
    calls = []
    real = Genome.encode
    monkeypatch.setattr(Genome, "encode", lambda self, p: calls.append(1) or real(self, p))
    study, history = optuna.create_study(directions=["maximize", "minimize"]), History()
    assert history.update(study) is None
    for i in range(4):
        trial = study.ask({"a": IntDistribution(0, 9), "b": IntDistribution(0, 9)})
        trial.set_user_attr("violation", i - 2)
        study.tell(trial, [1.0 * i, 2.0])
        assert list(history.update(study).space) == ["a", "b"]
    assert len(calls) == 4
    records = history.before(3, study.directions)
    assert records.losses.tolist() == [[0, 2], [-1, 2], [-2, 2]]
    assert records.violations.tolist() == [0, 0, 0]
    assert history.before(9, study.directions).violations.tolist() == [0, 0, 0, 1]
    study.tell(study.ask({"a": IntDistribution(0, 9), "c": IntDistribution(0, 9)}), [0.0, 0.0])
    study.tell(study.ask({"a": IntDistribution(0, 9)}), state=optuna.trial.TrialState.FAIL)
    assert list(history.update(study).space) == ["a"]
    assert history.before(99, study.directions).vectors.shape == (5, 1)


def test_history_forgets_another_study():
    history = History()
    for name in ("a", "b"):
        study = optuna.create_study()
        study.tell(study.ask({name: IntDistribution(0, 9)}), 0.0)
        assert list(history.update(study).space) == [name]


def test_violation_comes_from_the_attribute_or_from_constraints():
    study = optuna.create_study()
    trial = study.ask()
    trial.set_constraint("a", 2.0)
    trial.set_constraint("b", -5.0)
    assert _genome.violation(study.tell(trial, 0.0)) == 2.0
