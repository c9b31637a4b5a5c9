"""Parts of the experiments on circuits, and the rule of CodeX on made-up results that must and must not hold."""

import importlib.util

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.circuits._fpga import Fpga
from lilliput.methods.circuits.streaming import Streaming
from lilliput.methods.quantize.lookup_tables import table_layer
from lilliput.papers import _circuits, codex
from lilliput.papers._pictures import Table
from lilliput.workload import Workload

SCALE = codex.Scale(steps=30, retrain_steps=5, rounds=1, test=64, seeds=2, frames=1)


def made_up(codes=(90.0, 90.2), share=0.2, cycles=100.0, wrong=0.0):
    table = Table()
    accuracies = {
        codex.FLOAT: (90.0, 90.5),
        codex.CODES: codes,
        codex.UNIFORM: (88.0, 88.1),
        codex.WEIGHTS: (90.0, 90.0),
    }
    for name, values in accuracies.items():
        for value in values:
            table.add(name, "accuracy_percent", value)
    for name, of_chip in ((codex.CODES, share), (codex.WEIGHTS, 0.5)):
        table.add(name, "chip_share", of_chip)
        table.add(name, "cycles_per_frame", cycles if name == codex.CODES else 100.0)
        table.add(name, "wrong_scores_of_cpp", wrong)
    return table


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"codes": (88.0, 88.2)}, False),
        ({"codes": (87.0, 93.0)}, False),  # the mean is fine, its error is not
        ({"share": 0.3}, False),
        ({"cycles": 150.0}, False),
        ({"wrong": 1.0}, False),
    ],
)
def test_the_rule_of_codex(changed, holds):
    seen = codex.evidence(made_up(**changed), SCALE, 0)
    assert seen.holds is holds
    assert [row.name for row in seen.rows] == [codex.FLOAT, codex.CODES, codex.UNIFORM, codex.WEIGHTS]


@pytest.fixture(scope="module")
def small():
    table = Table()
    return table, codex.one_network(table, SCALE, 0)


def test_every_form_becomes_a_circuit_with_its_codes(small):
    table, designs = small
    for name, design in designs.items():
        products = design.net.products
        assert [len(p.values) for p in products] == [256] + [256 if name == codex.WEIGHTS else 16] * 3
        assert all(len(p.weights.unique()) <= 16 for p in products)
        assert len(design.net.stages) == 6  # bytes are codes already; two poolings
        assert table.all(name, "same_answers_as_float_sums_percent")[0] > 80
    assert designs[codex.CODES].net.activation_bits < designs[codex.WEIGHTS].net.activation_bits


def test_cpp_of_every_form_is_exact(small):
    for design in small[1].values():
        q = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
        assert torch.equal(design.run_cpp(q)[0], design.net(q))


@pytest.mark.skipif(_circuits.lacking() is not None, reason=str(_circuits.lacking()))
def test_hardware_is_measured(small):
    """On a single layer of tables, which is quick."""
    torch.manual_seed(0)
    layer = table_layer(nn.Linear(16, 4), torch.linspace(-1, 1, 16), torch.linspace(0, 1, 16))
    batch = {"input": torch.rand(64, 16), "label": torch.zeros(64, dtype=torch.int64)}
    work = Workload.classifier(nn.Sequential(layer), [batch], [batch], [batch])
    design = Streaming().emit(work.model, work)
    found = _circuits.hardware(design, design.net.read(batch["input"][:3]), Fpga.load("ice40-up5k"), multipliers=False)
    assert found["wrong_scores"] == found["multipliers"] == 0
    assert found["frames_simulated"] >= 2
    assert found["cycles_per_frame"] <= found["latency_cycles"]
    assert found["chip_share"] == pytest.approx(
        max(found["luts"] / 5280, found["flip_flops"] / 5280, found["block_rams"] / 30)
    )


def test_what_is_missing_is_said_before_any_training(monkeypatch):
    monkeypatch.setattr(codex, "one_network", lambda *_: pytest.fail("trained first"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lilliput\[circuits\]"):
        codex.experiment()
