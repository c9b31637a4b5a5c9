import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lilliput.budget import QUANTITIES, SHARE, Budget, format_quantity
from lilliput.errors import UserError

MEASURED = {"latency_ms": 25.0, "memory_bytes": 60e6, "size_bytes": 39e6, "drop": 0.004}


def test_parses_several_strings_into_base_units():
    budget = Budget("latency<=20ms", " memory <= 80 MB , size<40MB", "drop<=1%", "energy<=500mJ, time_per_token<=0.5s,")
    assert budget.limits == pytest.approx(
        {
            "latency_ms": 20,
            "memory_bytes": 80e6,
            "size_bytes": 40e6,
            "drop": 0.01,
            "energy_j": 0.5,
            "token_ms": 500,
        }
    )
    assert budget.relative == {}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("latency<=1500us", "latency_ms", 1.5),
        ("latency<=2µs", "latency_ms", 0.002),
        ("time_to_first_token<=1s", "first_token_ms", 1000),
        ("memory<=2KiB", "memory_bytes", 2048),
        ("memory<=2KB", "memory_bytes", 2000),
        ("memory<=2kB", "memory_bytes", 2000),
        ("memory<=1GiB", "memory_bytes", 1073741824),
        ("size<=1.5MiB", "size_bytes", 1572864),
        ("size<=1e3B", "size_bytes", 1000),
        ("energy<=.5uJ", "energy_j", 5e-7),
        ("drop<=0%", "drop", 0),
        ("drop≤2.5%", "drop", 0.025),
        ("luts<=20000", "luts", 20_000),
        ("latency<=1ms@50MHz", "latency_ms", 1),
    ],
)
def test_units(text, key, value):
    assert Budget(text).limits == pytest.approx({key: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed<=20ms", "'speed'.*latency, time_to_first_token"),
        ("latency<=20MB", "'MB'.*us, ms, s, %"),
        ("latency<=20", "unit ''.*us, ms, s"),
        ("drop<=0.01", "unit ''.*%"),
        ("drop<=1MB", "'MB'.*%"),
        ("energy<=1MJ", "'MJ'.*uJ, mJ, J"),
        ("latency>=20ms", "not a limit"),
        ("latency<=20ms memory<=3MB", "not a limit"),
        ("latency<=1,5ms", "unit ''"),
        ("latency<=-20ms", "negative"),
        ("latency<=nanms", "not a finite"),
        ("latency<=infms", "not a finite"),
        ("latency<=1e400ms", "not a finite"),
        ("memory<=1e308GB", "not a finite"),
        ("latency<=0ms", "never be met"),
        ("latency<=1e-400s", "never be met"),
        ("memory<=0%", "never be met"),
        ("latency<=1ms, latency<=2ms", "more than once"),
        ("memory<=1MB, memory<=50%", "more than once"),
        ("luts<=20kB", "'kB'.*no unit, %"),
        ("latency<=1ms@50", "clock '50'.*50MHz"),
        ("latency<=1ms@0MHz", "clock '0MHz'"),
        ("latency<=1ms@50mhz", "clock '50mhz'"),
        ("latency<=1ms@", "not a limit"),
        ("latency<=50%@50MHz", "only an absolute latency"),
        ("luts<=100@50MHz", "only an absolute latency"),
        ("", "empty"),
        (" , ", "empty"),
    ],
)
def test_refuses(text, words):
    with pytest.raises(UserError, match=words):
        Budget(text)


def test_refuses_no_strings_and_no_string():
    with pytest.raises(UserError, match="empty"):
        Budget()
    with pytest.raises(UserError, match="not of 20"):
        Budget(20)  # pyright: ignore[reportArgumentType]


def test_slack_violations_met():
    budget = Budget("latency<=20ms, memory<=80MB, drop<=1%")
    assert budget.slack(MEASURED) == pytest.approx({"latency_ms": -0.25, "memory_bytes": 0.25, "drop": 0.6})
    assert budget.violations(MEASURED) == ["latency is 25 ms, over the limit of 20 ms by 5 ms"]
    assert not budget.met(MEASURED)
    assert budget.met(MEASURED | {"latency_ms": 20.0})


def test_nan_and_missing_figures_never_pass():
    assert not Budget("latency<=20ms").met({"latency_ms": math.nan})
    with pytest.raises(UserError, match="but 'energy_j' was not measured"):
        Budget("energy<=1J").met(MEASURED)


def test_slack_of_a_drop_of_zero():
    budget = Budget("drop<=0%")
    assert budget.met({"drop": -0.01})
    assert budget.met({"drop": 0.0})
    assert [budget.slack({"drop": d})["drop"] for d in (-0.01, 0.0, 0.01)] == [math.inf, 0.0, -math.inf]


def test_relative_limits_resolve_against_the_original():
    budget = Budget("memory<=50%, latency<=20ms")
    assert budget.relative == {"memory_bytes": 0.5}
    with pytest.raises(UserError, match="resolve"):
        budget.met(MEASURED)
    resolved = budget.resolve({"memory_bytes": 100e6, "latency_ms": 70.0})
    assert resolved.limits == {"memory_bytes": 50e6, "latency_ms": 20.0}
    assert resolved.relative == {}
    assert Budget(str(resolved)) == resolved
    with pytest.raises(UserError, match="memory_bytes"):
        budget.resolve({})
    with pytest.raises(UserError, match="never be met"):
        budget.resolve({"memory_bytes": 0.0})


def test_a_clock_is_part_of_the_budget():
    budget = Budget("luts<=20000, latency <= 1 ms @ 50 MHz")
    assert budget.clock_hz == 50e6
    assert str(budget) == "luts<=20000, latency<=1ms@50MHz"
    assert Budget(str(budget)) == budget
    assert hash(Budget(str(budget))) == hash(budget)
    assert budget != Budget("luts<=20000, latency<=1ms")
    assert budget != Budget("luts<=20000, latency<=1ms@12MHz")
    assert budget == Budget("luts<=20000, latency<=1ms@0.05GHz")
    assert budget.resolve({}).clock_hz == budget.scaled(0.5).clock_hz == 50e6
    assert Budget("latency<=1ms").clock_hz is None
    assert budget.violations({"luts": 24_000.0, "latency_ms": 0.5}) == [
        "luts is 24000, over the limit of 20000 by 4000"
    ]


def test_str_is_what_was_written():
    assert str(Budget("latency <= 20 ms", "memory<80MB,drop<=1%")) == "latency<=20ms, memory<=80MB, drop<=1%"
    assert repr(Budget("size<=40MB")) == "Budget('size<=40MB')"


_UNITS = st.sampled_from([(name, unit) for name, (_, units) in QUANTITIES.items() for unit in SHARE | units])
_NUMBERS = st.floats(min_value=1e-9, max_value=1e12)


@given(st.lists(st.tuples(_UNITS, _NUMBERS), min_size=1, unique_by=lambda item: item[0][0]))
def test_round_trip(items):
    budget = Budget(*(f"{name}<={number!r}{unit}" for (name, unit), number in items))
    again = Budget(str(budget))
    assert again == budget
    assert hash(again) == hash(budget)
    assert str(again) == str(budget)


_PIECES = st.sampled_from(
    [*QUANTITIES, "<", "<=", "≤", ",", " ", "%", "ms", "MiB", "J", "1", "0", ".5", "1e9", "-", "inf"]
)


@given(st.one_of(st.text(), st.lists(_PIECES, max_size=12).map("".join)))
@example("latency<=٣ms")
@example("latency<=1_0ms")
@example("\x00<=1ms")
def test_any_string_parses_or_is_refused_politely(text):
    try:
        budget = Budget(text)
    except UserError:
        return
    assert Budget(str(budget)) == budget
    assert all(0 <= limit < math.inf for limit in (budget.limits | budget.relative).values())


@given(_NUMBERS, st.floats(min_value=0, max_value=1e12))
def test_met_agrees_with_slack_and_violations(limit, value):
    budget = Budget(f"latency<={limit!r}ms")
    measured = {"latency_ms": value}
    assert budget.met(measured) == (value <= limit) == (not budget.violations(measured))
    assert budget.met(measured) == (budget.slack(measured)["latency_ms"] >= 0)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("latency_ms", 12.34, "12.3 ms"),
        ("token_ms", 0.0421, "42.1 us"),
        ("first_token_ms", 1500, "1.5 s"),
        ("latency_ms", 999.7, "1 s"),
        ("memory_bytes", 81.2e6, "81.2 MB"),
        ("size_bytes", 512, "512 B"),
        ("size_bytes", 999.9e6, "1 GB"),
        ("weight_bytes", 12345e9, "12345 GB"),
        ("energy_j", 0.0021, "2.1 mJ"),
        ("drop", 0.014, "1.4 %"),
        ("drop", -0.002, "-0.2 %"),
        ("latency_ms", math.nan, "nan s"),
        ("latency_ms", math.inf, "inf s"),
        ("latency_ms", 0.0, "0 us"),
        ("perplexity", 21.35, "21.4"),
    ],
)
def test_format_quantity(key, value, text):
    assert format_quantity(key, value) == text


@given(
    st.sampled_from(["latency_ms", "memory_bytes", "energy_j", "drop"]),
    st.floats(-1e300, 1e300),
)
def test_format_quantity_keeps_three_digits(key, value):
    number, unit = format_quantity(key, value).split(" ")
    scale = {"us": 1e-3, "s": 1e3, "kB": 1e3, "MB": 1e6, "GB": 1e9, "uJ": 1e-6, "mJ": 1e-3, "%": 0.01}.get(unit, 1)
    assert float(number) * scale == pytest.approx(value, rel=6e-3, abs=1e-300)


def test_scaling_leaves_quality_alone():
    scaled = Budget("time_per_token<=10ms, memory<=80MB, drop<=1%").scaled(0.5)
    assert scaled.limits == {"token_ms": 5.0, "memory_bytes": 40e6, "drop": 0.01}


def test_a_limit_is_raised_in_its_own_unit():
    budget = Budget("memory<=2MB, size<=1MB").raised("memory_bytes", 5e5)
    assert budget.limits == {"memory_bytes": 2.5e6, "size_bytes": 1e6}
    assert str(budget) == "memory<=2.5MB, size<=1MB"
