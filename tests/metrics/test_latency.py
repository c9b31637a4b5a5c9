import gc
import itertools

import numpy as np
import pytest
from scipy import stats

from lilliput.errors import UserError
from lilliput.metrics import latency


class Clock:
    """A clock that only the measured functions move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(latency, "perf_counter", lambda: self.now)

    def takes(self, *milliseconds):
        times = itertools.cycle(milliseconds)

        def run():
            self.now += next(times) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_measure_reports_median_and_spread(clock):
    found = latency.measure(clock.takes(*range(1, 101)), min_runs=100, min_seconds=0, warmup=0)
    assert found.median_ms == pytest.approx(50.5)
    assert found.p90_ms == pytest.approx(np.percentile(range(1, 101), 90))
    assert found.iqr_ms == pytest.approx(49.5)
    assert found.runs == 100
    assert found.threads >= 1


def test_measure_goes_on_until_both_limits_are_reached(clock):
    assert latency.measure(clock.takes(100), min_runs=20, min_seconds=0.95).runs == 20
    assert latency.measure(clock.takes(10), min_runs=20, min_seconds=0.955).runs == 96


def test_warmup_does_not_count(clock):
    calls = iter([500.0, 500.0, 500.0])

    def run():
        clock.now += next(calls, 2.0) / 1e3

    found = latency.measure(run, min_runs=5, min_seconds=0, warmup=3)
    assert (found.median_ms, found.iqr_ms) == (pytest.approx(2.0), pytest.approx(0.0))


def test_measure_refuses_nothing_to_measure():
    with pytest.raises(UserError, match="min_runs is 0"):
        latency.measure(lambda: None, min_runs=0)


def test_garbage_collection_is_off_while_measuring_and_restored():
    seen = []
    latency.measure(lambda: seen.append(gc.isenabled()), min_runs=2, min_seconds=0, warmup=0)
    assert seen == [False, False]
    assert gc.isenabled()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        latency.measure(fail, warmup=0)
    assert gc.isenabled()


def test_compare_interleaves(clock):
    order = []
    a, b = clock.takes(4), clock.takes(4)
    latency.compare(lambda: (order.append("a"), a()), lambda: (order.append("b"), b()), rounds=5, warmup=1)
    assert "".join(order) == "ab" + "ab" * 5


def test_compare_finds_a_gain(clock):
    found = latency.compare(clock.takes(10, 10.5, 9.5), clock.takes(5, 5.1), rounds=20)
    assert found.ratio == pytest.approx(2.0, abs=0.15)
    assert 1 < found.low <= found.ratio <= found.high
    assert found.gain
    assert not found.loss
    assert found.medians_ms == (pytest.approx(10, abs=0.3), pytest.approx(5.05, abs=0.06))
    assert "faster" in str(found)


def test_compare_finds_a_loss(clock):
    found = latency.compare(clock.takes(5, 5.1), clock.takes(10, 10.5), rounds=20)
    assert found.loss
    assert not found.gain
    assert "slower" in str(found)


def test_short_runs_are_repeated_within_a_sample(clock):
    calls = []
    fast = clock.takes(0.1)
    found = latency.compare(lambda: (calls.append(1), fast()), clock.takes(4), rounds=5, warmup=1)
    assert len(calls) == 1 + 5 * 20
    assert found.medians_ms[0] == pytest.approx(0.1)


def test_drift_of_the_machine_cancels_in_pairs():
    drift = np.linspace(1, 5, 40)
    noise = np.random.default_rng(0).normal(1, 0.01, (2, 40))
    found = latency.paired_ratio(10 * drift * noise[0], 9 * drift * noise[1])
    assert found.gain
    assert found.ratio == pytest.approx(10 / 9, rel=0.01)


def test_equal_things_are_rarely_called_a_gain():
    rng = np.random.default_rng(0)
    verdicts = [latency.paired_ratio(*rng.normal(10, 1, (2, 30)), draws=400) for _ in range(200)]
    assert sum(v.gain for v in verdicts) <= 14  # 2.5 % of 200 are expected, three standard deviations more allowed
    assert sum(v.loss for v in verdicts) <= 14
    assert all(v.low <= v.ratio <= v.high for v in verdicts)


def test_interval_agrees_with_scipy():
    a, b = np.random.default_rng(1).normal(10, 1, (2, 60))
    ours = latency.paired_ratio(a, b, draws=4000)
    theirs = stats.bootstrap((a / b,), np.median, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.01), pytest.approx(theirs.high, abs=0.01))


def test_compare_goes_on_until_both_limits_are_reached(clock):
    assert latency.compare(clock.takes(4), clock.takes(6), rounds=30, min_seconds=0.2).rounds == 30
    assert latency.compare(clock.takes(4), clock.takes(6), rounds=5, min_seconds=0.095).rounds == 10


def test_compare_refuses_too_few_rounds():
    with pytest.raises(UserError, match="rounds is 4"):
        latency.compare(lambda: None, lambda: None, rounds=4)


def _generation(clock, first_ms, later_ms, length=100):
    starts = []

    def start():
        starts.append(1)
        clock.now += first_ms / 2e3  # building the generator belongs to the first token

        def steps():
            clock.now += first_ms / 2e3
            yield 0
            for token in range(1, length):
                clock.now += later_ms / 1e3
                yield token

        return steps()

    return start, starts


def test_generation_separates_the_first_token(clock):
    start, starts = _generation(clock, 80, 5)
    found = latency.measure_generation(start, tokens=8, repeats=3)
    assert (found.first_token_ms, found.token_ms) == (pytest.approx(80), pytest.approx(5))
    assert (found.first_token_iqr_ms, found.token_iqr_ms) == (pytest.approx(0), pytest.approx(0))
    assert (found.tokens, found.repeats) == (8, 3)
    assert len(starts) == 1 + 3


def test_generation_that_ends_early(clock):
    assert latency.measure_generation(_generation(clock, 80, 5, length=4)[0], tokens=8).tokens == 4
    with pytest.raises(UserError, match="ended after 1 tokens"):
        latency.measure_generation(_generation(clock, 80, 5, length=1)[0], tokens=8)
    with pytest.raises(UserError, match="tokens is 1"):
        latency.measure_generation(_generation(clock, 80, 5)[0], tokens=1)


def test_waits_until_others_are_quiet(clock, monkeypatch):
    loads = iter([1.9, 0.8, 0.1, 5.0])
    monkeypatch.setattr(latency, "busy_cores", lambda: next(loads))
    monkeypatch.setattr(latency.time, "sleep", lambda s: None)
    assert latency.wait_until_quiet() == 0.1


def test_gives_up_waiting_and_tells_the_load(clock, monkeypatch):
    def busy():
        clock.now += 0.5
        return 1.7

    monkeypatch.setattr(latency, "busy_cores", busy)
    monkeypatch.setattr(latency.time, "sleep", lambda s: None)
    assert latency.wait_until_quiet(seconds=3) == 1.7
    assert clock.now <= 3.5


def test_own_work_is_not_load_of_others(monkeypatch):
    from collections import namedtuple

    from lilliput import _probe

    Times = namedtuple("Times", "user system idle iowait")
    system = iter([Times(10, 5, 100, 7), Times(11.5, 5.5, 100, 9)])
    own = iter([(3.0, 0.0), (3.5, 0.5)])
    clock = iter([0.0, 2.0])

    class Process:
        def cpu_times(self):
            return next(own)

    monkeypatch.setattr(_probe.psutil, "cpu_times", lambda: next(system))
    monkeypatch.setattr(_probe.psutil, "Process", Process)
    monkeypatch.setattr(_probe.time, "sleep", lambda s: None)
    monkeypatch.setattr(_probe.time, "perf_counter", lambda: next(clock))
    assert _probe.busy_cores() == pytest.approx((2.0 - 1.0) / 2.0)


def test_streams_are_compared_in_turn(monkeypatch):
    clock, order = Clock(monkeypatch), []

    def stream(name, milliseconds):
        run = clock.takes(milliseconds)
        while True:
            order.append(name)
            run()
            yield name

    found = latency.compare_streams(stream("a", 4), stream("b", 1), block=3, rounds=5)
    assert "".join(order) == "aaabbb" * 5
    assert (found.ratio, found.low, found.high) == pytest.approx((4, 4, 4))
    assert found.medians_ms == pytest.approx((12, 3))


def test_a_stream_that_ends_early_is_refused():
    with pytest.raises(UserError, match="2 items early"):
        latency.compare_streams(iter(range(4)), iter(range(100)), block=3, rounds=5)
