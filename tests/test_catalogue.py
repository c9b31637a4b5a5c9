"""Rows and pages of methods, papers and devices: complete, readable, and plain enough for JSON."""

import json

import pytest

from lilliput import catalogue
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.method import find_method, method_names
from lilliput.paper import Evidence, Row, paper_names

every_method = pytest.mark.parametrize("name", method_names())


@every_method
def test_a_row_holds_every_setting_and_is_json(name):
    row, cls = catalogue.method_row(name), find_method(name)
    assert set(row["settings"]) == set(cls.knobs())
    assert json.loads(json.dumps(row))["settings"].keys() == row["settings"].keys()
    assert row["class"] == cls.__name__
    assert row["stage"] == cls.facts.stage
    for key, setting in row["settings"].items():
        assert setting["default"] == cls.defaults()[key]
        assert setting["help"]


@every_method
def test_its_summary_is_one_line_of_words(name):
    summary = catalogue.method_row(name)["summary"]
    assert "\n" not in summary
    assert "  " not in summary
    assert 10 < len(summary) <= 120


@every_method
def test_a_page_shows_settings_ranges_and_facts_without_holes(name):
    page, cls = catalogue.method_page(name), find_method(name)
    assert page.startswith(f"{name} (lilliput.methods.{name.partition('.')[0]}.{cls.__name__})")
    for key, knob in cls.knobs().items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"  {key} = ")]
        assert line.endswith(knob.help)
        assert "None" not in line
        for end in (knob.low, knob.high):
            assert end is None or str(end) in line
    assert f"  effect: {cls.facts.effect}" in page
    assert getattr(cls, "paper", "") in page


def test_methods_of_papers_name_them_and_papers_name_their_methods():
    rows = catalogue.paper_rows()
    assert [row["slug"] for row in rows] == paper_names()
    claimed = {method: row["slug"] for row in rows for method in row["methods"]}
    for name in method_names():
        slug = catalogue.method_row(name)["paper"]
        assert slug == "" or slug in paper_names()
        assert slug == "" or name in claimed
    assert set(claimed) <= set(method_names())


def test_paper_rows_are_complete():
    for row in catalogue.paper_rows():
        assert row["title"]
        assert row["claim"]
        assert row["authors"]
        assert 1980 < row["year"] < 2030
        json.dumps(row)


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match=r"prune\.everything"):
        catalogue.method_row("prune.everything")


def test_evidence_shows_values_with_their_spread_and_the_verdict():
    rows = [Row("baseline", {"error": 0.123456, "bits": 4}, {"error": 0.0123}), Row("ours", {"error": 0.1})]
    text = catalogue.evidence_text("gpfq", Evidence("one seed", rows, False, "a tenth less", "one net"))
    assert text.startswith("gpfq: does NOT hold here\n  a tenth less\n")
    assert "error 0.1235 ± 0.012, bits 4" in text
    assert text.endswith("  setup: one seed\n  limits: one net")
    assert catalogue.evidence_text("x", Evidence("", rows, True, "", "")).startswith("x: holds here")


def test_devices_are_this_one_and_those_of_the_package(monkeypatch):
    here = Device.load("laptop")
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: here))
    rows = catalogue.device_rows()
    assert [row["name"] for row in rows] == ["here", *Device.names()]
    assert all(row["memory_bytes"] > 0 and row["cores"] > 0 for row in rows)
    small = next(row for row in rows if row["name"] == "cortex-m7")
    assert "modelled" in small["summary"]
    assert small["measured"] is False
