"""The report: self-contained, safe with any text, true to the record, whole with parts of the record missing."""

import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plotly import graph_objects

from lilliput.device import Device
from lilliput.fitting.decoder_space import decoder_space
from lilliput.fitting.layers import bytes_by_part
from lilliput.fitting.predict import Predictor
from lilliput.fitting.report import charts, sections, words
from lilliput.fitting.report.front import MOST_TICKS, drop_of_damage, front, pareto
from lilliput.fitting.report.heat import heat, kind, strength
from lilliput.fitting.report.labels import Label, place
from lilliput.fitting.report.page import as_json, render, write_report
from lilliput.method import Change, Findings
from lilliput.methods.quantize.group import Group

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def score(name, value, unit=""):
    return {"name": name, "value": value, "low": value - 1, "high": value + 1, "n": 64, "unit": unit}


def candidate(number, name, measured, damage, scored, predicted):
    return {
        "number": number,
        "name": name,
        "plan": f"plan {number}",
        "genome": [number],
        "labels": {},
        "heat": [],
        "measured": measured,
        "damage": damage,
        "score": scored,
        "predicted": predicted,
    }


def unit(name, block, part, setting, option, options=4):
    return {"unit": name, "block": block, "part": part, "setting": setting, "option": option, "options": options}


@pytest.fixture
def decoder():
    """A finished fit of a language model with three blocks, budget met."""
    heat_units = [unit(f"m.{b} qkv", b, "qkv", s, o) for b, (s, o) in enumerate([("int8", 1), ("int4 g32", 2)])]
    costs = [(14.1, 255e6, 0.0012), (11.2, 191e6, 0.142), (13.6, 243e6, 0.0007)]
    names = ["int8 everywhere", "int4 g32 everywhere", "joint 1"]
    built = [
        candidate(
            i + 1,
            names[i],
            {"token_ms": ms, "memory_bytes": size, "size_bytes": size / 2, "drop": math.expm1(d)},
            d,
            score("perplexity", 14.6 * math.exp(d)),
            {"token_ms": 1.02 * ms, "memory_bytes": size, "damage": 0.9 * d},
        )
        for i, (ms, size, d) in enumerate(costs)
    ]
    return {
        "request": {
            "workload": "smol",
            "budget": "memory<=300MB, time_per_token<=15ms",
            "device": "here",
            "families": ["quantize"],
            "sampler": "genecai",
            "minutes": 10,
            "seed": 0,
            "command": "lilliput fit smol --budget 'memory<=300MB'",
        },
        "budget": "memory<=300000000B",
        "limits": {"memory_bytes": 300e6, "token_ms": 15.0},
        "original": {
            "values": {"token_ms": 36.4, "first_token_ms": 90.0, "memory_bytes": 702e6, "energy_j": 0.42},
            "notes": ["roofline: 29.1 ms (DRAM), 80% of the limit reached", "energy is modelled"],
        },
        "candidates": built,
        "chosen": 3,
        "plan": "plan 3",
        "verify": {
            "measured": {"token_ms": 13.9, "first_token_ms": 98.0, "memory_bytes": 262e6, "drop": 0.0024},
            "violations": [],
            "speedup": {"ratio": 2.61, "low": 2.55, "high": 2.66, "gain": True},
            "busy_cores": 0.0,
            "score_before": score("perplexity", 14.91),
            "score_after": score("perplexity", 14.946),
            "drop": 0.0024,
            "difference": {"mean": 0.0024, "low": 0.0016, "high": 0.0033},
            "audits": audits(language=[change("all text", 2.7, 2.702, 64), change("changed tokens", 0, 0.031, 64)]),
        },
        "front": [
            {"token_ms": 12.0 + i, "memory_bytes": (200 + 9 * i) * 1e6, "damage": 0.1 / (1 + i)} for i in range(9)
        ],
        "layers": [
            {"name": f"m.{i}", "before_bytes": 4000, "after_bytes": 900, "before_ms": 2.0, "after_ms": 0.5}
            for i in range(3)
        ],
        "heat": [*heat_units, unit("m.2 block", 2, "block", "drop", 1, 2), unit("lm_head", None, "head", "int8", 1)],
        "predictors": {"latency_rank_correlation": 0.93, "damage_rank_correlation": None, "built": 3},
        "seconds": {"measure": 24.3, "search and build": 288.0},
        "runtime": "lean",
        "threads": 2,
        "modelled": [],
    }


def change(name, before, after, n):
    return Change(name, before, after, after - before - 0.01, after - before + 0.01, n, "no harm found")


def audits(**changes):
    """What audits wrote into a record."""
    found = [Findings(f"audit.{k}", "harm found", f"seen by {k}", tuple(v)).to_json() for k, v in changes.items()]
    return {"findings": found}


@pytest.fixture
def classifier(decoder):
    """A fit of a classifier for a modelled device that misses its limit on the quality."""
    record = copy.deepcopy(decoder)
    record["limits"] = {"latency_ms": 2.5, "drop": 0.01}
    record["modelled"] = ["latency_ms"]
    record["original"]["values"] = {"latency_ms": 8.6, "memory_bytes": 21e6}
    for c, (ms, drop) in zip(record["candidates"], [(3.1, 0.002), (2.2, 0.28), (2.4, 0.02)]):
        c["measured"] = {"latency_ms": ms, "memory_bytes": 19e6, "drop": drop}
        c["damage"], c["score"], c["predicted"] = (
            2 * drop,
            score("accuracy", 94 * (1 - drop), "%"),
            {"damage": drop, "latency_ms": ms},
        )
    record["front"] = [{"latency_ms": 2.0 + i, "memory_bytes": 19e6, "damage": 0.1 / (1 + i)} for i in range(5)]
    record["heat"] = [unit("conv1 bits", None, "bits", "int8", 1, 2), unit("conv1 rank", None, "rank", "rank 50%", 2)]
    record["layers"] = [{"name": "conv1", "before_bytes": 900, "after_bytes": 225}]
    record["verify"] |= {
        "measured": {"latency_ms": 2.4, "memory_bytes": 18e6, "drop": 0.0117},
        "violations": ["drop is 1.17 %, over the limit of 1 % by 0.17 %"],
        "speedup": {"ratio": 1.02, "low": 0.97, "high": 1.08, "gain": False},
        "score_before": score("accuracy", 93.9, "%"),
        "score_after": score("accuracy", 92.8, "%"),
        "drop": 0.0117,
        "difference": {"mean": -1.1, "low": -2.0, "high": -0.2},
    }
    found = [change(f"class {i}", 0.95, 0.85 + 0.02 * i, 80) for i in range(12)]
    record["verify"]["audits"] = audits(
        exemplars=[change("changed answers", 0, 0.034, 800)],
        calibration=[change("calibration error", 0.021, 0.034, 800)],
        groups=found,
    )
    return record


class Page(HTMLParser):
    """Elements, attributes and visible text of a page, and what its scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.scripts, self.inside = [], [], [], [], ""
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.texts.append(data)


@pytest.fixture
def without_plotly(monkeypatch):
    """Pages that are small enough to be parsed quickly."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "plotly")


def figures_of(page):
    def refuse(name):
        raise AssertionError(f"{name} in the figures")

    return json.loads(page.scripts[0], parse_constant=refuse)


def test_the_page_says_what_was_asked_and_what_came_out(decoder, without_plotly):
    page = Page(render(decoder))
    assert "Budget met" in page.text
    assert "memory 702 MB → 262 MB" in page.text
    for part in ("36.4 ms", "13.9 ms", "✓ limit 15 ms", "2.62 times faster", "3.1 %", "worse beyond the noise"):
        assert part in page.text, part
    assert "lilliput apply plan.yaml smol --out fitted" in page.text
    assert "80% of the limit reached" in page.text


def test_a_missed_budget_and_modelled_numbers_are_marked(classifier, without_plotly):
    page = Page(render(classifier))
    assert "Budget not met" in page.text
    assert "✗ limit 1 % worse" in page.text
    assert page.texts.count("modelled") == 3  # the card, the candidates' column, the predictor
    assert "latency (ms, modelled)" in page.scripts[0]
    assert "no gain, the interval includes 1" in page.text
    assert "2 more classes" in page.text
    assert "0.021 → 0.034" in page.text


def test_the_file_needs_nothing_else(decoder, tmp_path):
    write_report(decoder, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < 5.5e6
    assert len(re.findall(r"\* plotly\.js v\d", text)) == 1
    scripts = re.findall(r"<script.*?</script>", text, re.DOTALL)
    own = text.replace(max(scripts, key=len), "")
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", own)


def test_text_of_users_is_never_markup(decoder, without_plotly):
    decoder["request"] |= {"workload": HOSTILE, "command": HOSTILE, "sampler": HOSTILE}
    decoder["plan"] = decoder["verify"]["score_before"]["name"] = HOSTILE
    decoder["original"]["notes"] = [HOSTILE]
    decoder["verify"]["violations"] = [HOSTILE]
    for rows, key in (("candidates", "name"), ("layers", "name"), ("heat", "setting"), ("heat", "unit")):
        for row in decoder[rows]:
            row[key] = HOSTILE
    page = Page(render(decoder))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not any("alert" in script for script in page.scripts[1:])
    assert "<" not in page.scripts[0]
    drawn = json.dumps(figures_of(page))  # plotly reads tags in texts
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert page.text.count("<script>alert('x')</script>") >= 8


def test_undefined_numbers_become_dashes(decoder, without_plotly):
    nan = float("nan")
    decoder["front"][0]["damage"] = decoder["candidates"][0]["measured"]["token_ms"] = nan
    decoder["candidates"][1]["damage"] = decoder["verify"]["difference"]["low"] = nan
    decoder["verify"]["measured"]["first_token_ms"] = float("inf")
    decoder["layers"][0]["after_ms"] = decoder["seconds"]["measure"] = nan
    page = Page(render(decoder))
    figures_of(page)
    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert words.MISSING in page.text


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_parts_of_the_record_may_be_missing(kind, request, without_plotly):
    record = request.getfixturevalue(kind)
    for key in ("front", "heat", "layers", "predictors", "seconds"):
        record[key] = None
    for c in record["candidates"]:
        c["genome"] = None
        del c["predicted"]
    page = Page(render(record))
    assert "Settings per" not in page.text
    assert "How good the predictions were" not in page.text
    for key in ("front", "heat", "layers", "predictors", "seconds"):
        del record[key]
    record["candidates"] = []
    page = Page(render(record))
    assert "Everything that was built" not in page.text
    assert list(figures_of(page)) == ["quality"]


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_every_figure_is_one_plotly_accepts(kind, request, without_plotly):
    figures = figures_of(Page(render(request.getfixturevalue(kind))))
    assert len(figures) >= 5
    for figure in figures.values():
        assert graph_objects.Figure(figure).data  # refuses unknown and wrong properties


def test_the_front_stands_at_the_measured_places(decoder):
    figure = front(decoder)["memory_bytes"]
    traces = {t["name"]: t for t in figure["data"]}
    assert traces["chosen"]["x"] == [243.0]
    assert traces["original"]["x"] == [702.0]
    assert traces["same setting everywhere"]["x"] == [255.0, 191.0]
    box = figure["layout"]["shapes"][0]
    assert box["x1"] == 300.0
    ticks = dict(zip(figure["layout"]["yaxis"]["ticktext"], figure["layout"]["yaxis"]["tickvals"]))
    assert ticks["1 %"] < traces["same setting everywhere"]["y"][1] < ticks["20 %"]  # 15.3 %
    assert list(front(decoder)) == ["token_ms", "memory_bytes", "size_bytes"]


def test_a_ruined_candidate_leaves_the_others_their_room(decoder):
    before = front(decoder)["memory_bytes"]["layout"]["yaxis"]
    decoder["candidates"][-1]["measured"]["drop"] = 1e7
    after = front(decoder)["memory_bytes"]["layout"]["yaxis"]
    assert after["range"][1] < 2.5 * before["range"][1]  # 1e7 would take it to 5 times
    apart = [b - a for a, b in itertools.pairwise(sorted(after["tickvals"]))]
    assert min(apart) >= (after["range"][1] - after["range"][0]) / MOST_TICKS


def test_a_drop_limit_bounds_the_region(classifier):
    figure = front(classifier)["latency_ms"]
    box, ticks = figure["layout"]["shapes"][0], figure["layout"]["yaxis"]
    assert box["y1"] == dict(zip(ticks["ticktext"], ticks["tickvals"]))["1 %"]


def test_damage_reads_as_drop(decoder, classifier):
    exact = drop_of_damage(decoder, decoder["candidates"])
    assert exact(0.142) == pytest.approx(decoder["candidates"][1]["measured"]["drop"])
    estimated = drop_of_damage(classifier, classifier["candidates"])
    assert estimated(0.3) == pytest.approx(0.15)
    assert drop_of_damage(classifier, classifier["candidates"][:1]) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30))
def test_pareto_keeps_what_nothing_beats(pairs):
    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in pairs)

    assert pareto(pairs) == sorted({p for p in pairs if not beaten(p)})


def covered(label, where, width=6.9):
    """Left, bottom, right, top of a placed text, from plotly's anchors."""
    size = width * len(label.text)
    left = label.x + where["xshift"] - {"left": 0.0, "center": size / 2, "right": size}[where["xanchor"]]
    middle = label.y + where["yshift"]
    return left, middle - 8, left + size, middle + 8


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(0, 300)), min_size=1, max_size=8))
def test_names_do_not_cover_each_other(places):
    labels = [Label(f"candidate {i}", x, y) for i, (x, y) in enumerate(places)]
    boxes = [covered(n, w) for n, w in zip(labels, place(labels, places, (500, 300))) if w]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            assert shared < 16 * 6.9 * 4


def test_a_name_at_the_right_edge_goes_to_the_left():
    assert place([Label("original", 495, 150)], [(495, 150)], (500, 300))[0]["xanchor"] == "right"
    assert place([Label("original", 5, 150)], [(5, 150)], (500, 300))[0]["xanchor"] == "left"


def test_stronger_settings_have_more_colour():
    def of(label, option=1):
        return strength(unit("u", 0, "p", label, option))

    assert of("float32", 0) == of("keep", 0) == 0
    assert 0 < of("int8") < of("int4 g32") < of("int3 g32") < of("int2 g32") <= 1
    assert (of("table4 g64"), of("table3 g64")) == (of("int4 g32"), of("int3 g32"))
    assert kind("table4 g64") == kind("int8") == "bits"
    assert 0 < of("-12.5% neurons") < of("-50.0% neurons") <= 1
    assert 0 < of("rank 75%") < of("rank 35%") <= 1
    assert strength(unit("u", 0, "block", "drop", 1, 2)) == 1
    assert of("something new", 1) < of("something new", 2) < of("something new", 3)


def test_the_map_has_blocks_as_rows_and_parts_as_columns(decoder, classifier):
    grid = heat(decoder)
    assert grid["columns"] == ["qkv", "block"]
    assert [name for name, _ in grid["rows"]] == ["0", "1", "2"]
    assert grid["rows"][1][1][0]["text"] == "int4 g32"
    assert grid["rows"][0][1][1] is None
    assert [name for name, _ in grid["outside"]] == ["lm_head"]
    assert [name for name, _ in heat(classifier)["rows"]] == ["conv1"]


@pytest.mark.parametrize(
    ("key", "before", "after", "text"),
    [
        ("token_ms", 30, 10, "3 times faster"),
        ("token_ms", 10, 9, "10 % faster"),
        ("latency_ms", 10, 20, "2 times slower"),
        ("memory_bytes", 100, 25, "4 times smaller"),
        ("size_bytes", 100, 112, "12 % larger"),
        ("energy_j", 100, 100.1, "unchanged"),
        ("energy_j", None, 1, ""),
        ("energy_j", float("nan"), 1, ""),
    ],
)
def test_a_change_in_words(key, before, after, text):
    assert words.change(key, before, after) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (2.55, 2.66, "2.62 times faster"),
        (0.9, 3.0, "no gain beyond the noise"),
        (0.5, 0.6, "but slower side by side"),
    ],
)
def test_a_time_is_better_only_when_the_comparison_says_so(low, high, text, decoder):
    decoder["verify"]["speedup"] |= {"low": low, "high": high, "gain": low > 1}
    assert sections.cards(decoder)[0]["change"] == text


def test_what_got_worse_names_costs_that_rose(decoder):
    tiles = {t["title"]: t["value"] for t in sections.damage(decoder)}
    assert tiles["time to first token"] == "90 ms → 98 ms"
    assert tiles["perplexity"] == "14.91 → 14.95"
    assert "memory" not in tiles


def test_ways_to_serve_stand_with_their_figures(decoder, without_plotly):
    assert sections.serving(decoder) is None
    low_bit = {"method": "cache.low_bit", "settings": {"bits": 4}}
    interval = {"ratio": 0.4, "low": 0.38, "high": 0.41}
    plain = {"candidate": 3, "serving": None, "label": "plain", "measured": {"token_ms": 13.6, "memory_bytes": 343e6}}
    cached = {
        "candidate": 3,
        "serving": low_bit,
        "label": "cache.low_bit (bits 4)",
        "measured": {"token_ms": 34.0, "memory_bytes": 262e6},
        "cache_bytes": 20e6,
        "damage": 0.004,
        "speedup": interval,
    }
    refused = {"candidate": 3, "serving": {}, "label": "cache.h2o", "refused": "it needs the attention 'sdpa' <b>"}
    decoder["serving"] = {"rows": [plain | {"damage": 0.0007}, cached, refused], "chosen": low_bit, "label": "low"}
    decoder["verify"]["policy"] = {"nats": 0.0031, "error": None, "texts": 2, "tokens": 4096}
    found = sections.serving(decoder)
    assert [row["chosen"] for row in found["rows"]] == [False, True, False]
    assert [row["costs"][0]["over"] for row in found["rows"]] == [False, True, False]
    assert [row["cache"] for row in found["rows"]] == ["–", "20 MB", "–"]
    assert found["rows"][1]["gain"] == "0.40 [0.38, 0.41]"
    page = render(decoder)
    assert "0.0031 nats per token at the end of 2 test texts of 4096 tokens" in page
    assert "&lt;b&gt;" in page
    assert ", served with low" in page


def test_audits_stand_with_their_verdicts(classifier, without_plotly):
    page = Page(render(classifier))
    for part in ("audit.groups", "harm found", "seen by exemplars", "class 11", "3.4 %"):
        assert part in page.text, part
    assert {
        "name": "audit.groups",
        "verdict": "harm found",
        "mark": "bad",
        "text": "seen by groups",
    } in sections.audits(classifier)
    first = sections.classes(classifier)["first"][0]
    assert (first["label"], first["count"], first["between"]) == ("class 0", 80, "−11 … −9")
    del classifier["verify"]["audits"]
    assert sections.audits(classifier) == []
    assert sections.classes(classifier) is None


def test_the_direction_of_the_metric_follows_from_the_drop(decoder, classifier):
    assert words.higher_is_better(decoder["verify"]) is False
    assert words.higher_is_better(classifier["verify"]) is True
    decoder["verify"]["difference"] = {"mean": -0.1, "low": -0.2, "high": -0.05}
    assert "better beyond the noise" in sections.difference(decoder)
    decoder["verify"]["difference"]["high"] = 0.05
    assert "may be chance" in sections.difference(decoder)


def test_a_workload_made_in_python_gets_python_lines(decoder):
    decoder["request"]["command"] = "lilliput.fit(...)"
    lines = sections.commands(decoder)
    compile(lines, "report", "exec")
    assert "lp.Plan.load" in lines


def test_names_of_blocks_and_layers():
    assert charts.short_names(["model.layers.0", "model.layers.1", "lm_head"]) == (["0", "1", "head"], "block")
    assert charts.short_names(["conv1", "layer1.0.conv2"]) == (["conv1", "layer1.0.conv2"], "layer")


def test_script_data_cannot_end_the_script():
    text = as_json({"a": "</script><!--", "b": [1.23456789, float("inf")]})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!--", "b": [1.23457, None]}


def test_bytes_of_packed_layers_count_before_and_after_their_use(tiny_llama, llama_work):
    packed = Group(bits=4, group=32).apply(tiny_llama, llama_work)
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (96, 32), (96, 32), (32, 96)]
    expected = 2 * 32 * 4 + sum(n * k // 2 + 2 * 2 * n * k // 32 for n, k in shapes)  # norms, codes, grids
    for _ in range(2):
        row = bytes_by_part(tiny_llama, packed, {})[0]
        assert row == {"name": "model.layers.0", "before_bytes": 2 * 128 + 4 * 12288, "after_bytes": expected}
        with torch.inference_mode():
            llama_work.forward(packed, llama_work.example)


def test_milliseconds_of_the_parts_add_up(llama_work):
    device = Device.load("raspberry-pi-4")
    space = decoder_space(llama_work, ("quantize", "prune"), 0.5, 1e6, 1, device)
    none = (0,) * len(space.units)
    factors = {"overhead": 2.0, "int8": 0.5, "int4 g32": 1.5}
    predictor = Predictor(space, {"token_ms": factors})
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        genome = tuple(int(torch.randint(n, (1,), generator=generator)) for n in space.sizes)
        assert sum(space.layer_ms(genome, factors).values()) == pytest.approx(predictor.costs(genome)["token_ms"])
    dropped = tuple(int(u.name == "model.layers.1 block") for u in space.units)
    rows = bytes_by_part(
        llama_work.model,
        space.plan(dropped).apply(llama_work),
        space.labels(dropped),
        (space.layer_ms(none, {}), space.layer_ms(dropped, {})),
    )
    assert [r["name"] for r in rows] == ["model.layers.0", "model.layers.1", "lm_head"]
    assert (rows[1]["after_bytes"], rows[1]["after_ms"]) == (0, 0.0)
    assert rows[0]["after_ms"] == rows[0]["before_ms"] > 0
