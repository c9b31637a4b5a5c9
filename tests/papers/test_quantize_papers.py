"""The experiments' parts on tiny networks, and their rules on made-up rows that must and must not hold."""

import pytest
import torch

from lilliput.methods.quantize._coded import codable
from lilliput.paper import Row
from lilliput.papers import data_free_layerwise, gpfq
from lilliput.papers._pictures import Table, average, margin


def accuracies(**values):
    return {f"{net}_accuracy_percent": value for net, value in values.items()}


def gaussian(power):
    return {f"relative_squared_error_{k}_inputs": float(k) ** power for k in gpfq.INPUTS}


def row(name, values, spread=0.5):
    return Row(name, values, dict.fromkeys(values, spread))


@pytest.mark.parametrize(
    ("ours", "rounding", "power", "holds"),
    [(80.0, 70.0, -1.0, True), (70.5, 70.0, -1.0, False), (80.0, 70.0, -0.5, False), (60.0, 70.0, -1.0, False)],
)
def test_the_rule_of_path_following(ours, rounding, power, holds):
    rows = [
        row(gpfq.OURS, accuracies(a_3_bits=ours, b_2_bits=ours) | gaussian(power)),
        row(gpfq.ROUNDING, accuracies(a_3_bits=rounding, b_2_bits=rounding) | gaussian(0.0)),
    ]
    slopes, gain, verdict = gpfq.judge(rows)
    assert slopes == (pytest.approx(power), pytest.approx(0))
    assert gain[0] == pytest.approx(ours - rounding)
    assert verdict is holds


def test_rounding_that_improves_too_refutes_the_claim():
    values = accuracies(a_3_bits=90.0) | gaussian(-1.0)
    rows = [row(gpfq.OURS, values), row(gpfq.ROUNDING, accuracies(a_3_bits=50.0) | gaussian(-1.0))]
    assert not gpfq.judge(rows)[2]


@pytest.mark.parametrize(("best_rival", "holds"), [(70.0, True), (79.9, False), (85.0, False)])
def test_the_rule_of_data_free_compression(best_rival, holds):
    ours = row(data_free_layerwise.OURS, accuracies(a_4_bits=80.0, a_8_bits=0.0))  # 8 bits do not enter
    rivals = [row(name, accuracies(a_4_bits=60.0, a_8_bits=99.0)) for name in data_free_layerwise.RIVALS[:-1]]
    rivals.append(row(data_free_layerwise.RIVALS[-1], accuracies(a_4_bits=best_rival, a_8_bits=99.0)))
    (name, gain, spread), verdict = data_free_layerwise.judge([ours, *rivals])
    assert name == data_free_layerwise.RIVALS[-1]
    assert gain == pytest.approx(80 - best_rival)
    assert spread == pytest.approx(0.5 * 2**0.5)
    assert verdict is holds


def test_tables_average_repeats():
    table = Table()
    for value in (1.0, 3.0):
        table.add("a", "x", value)
    table.add("a", "y", 10.0)
    (found,) = table.rows()
    assert found.values == {"x": 2.0, "y": 10.0}
    assert found.spread == {"x": pytest.approx(2**0.5), "y": 0.0}
    assert average(found, ["x", "y"]) == (6.0, pytest.approx(2**0.5 / 2))
    assert margin(found, found, ["x"]) == (0.0, pytest.approx(2.0))


def test_the_gaussian_layer_shows_the_rate():
    table = Table()
    gpfq.gaussian_layer(table, seed=0)
    ours, rounding = table.rows()
    assert gpfq.slope(ours) < -0.75
    assert gpfq.slope(rounding) > -0.25


def test_path_following_contenders_on_a_tiny_network(cnn_work):
    table = Table()
    gpfq.compare(table, cnn_work, bits=(3,))
    gpfq.compare(table, cnn_work, bits=(3,), repeat=True)
    rows = {r.name: r for r in table.rows()}
    assert set(rows) == {"float", *gpfq.RULES}
    assert rows["float"].values["tiny-cnn_accuracy_percent"] == 100
    with torch.no_grad():
        float_logits = torch.cat([cnn_work.model(b["input"]) for b in cnn_work.calibration])
        change = {
            name: float(
                (
                    torch.cat([gpfq.quantized(cnn_work, 3, rule)(b["input"]) for b in cnn_work.calibration])
                    - float_logits
                ).norm()
            )
            for name, rule in gpfq.RULES.items()
        }
    assert change[gpfq.OURS] < 0.7 * change[gpfq.ROUNDING]
    assert change["GPTQ, same alphabet"] < 0.7 * change[gpfq.ROUNDING]


@pytest.mark.parametrize("rule", list(gpfq.RULES.values()), ids=list(gpfq.RULES))
def test_contenders_share_the_alphabet(cnn_work, rule):
    model = gpfq.quantized(cnn_work, 2, rule)
    for name in codable(model):
        found = model.get_submodule(name).weight.unique()
        assert len(found) <= 4  # three letters, and GPTQ's one more


def test_data_free_contenders_on_a_tiny_network(cnn_work):
    table = Table()
    contenders = {
        name: data_free_layerwise.Contender(
            c.settings.with_(samples=16, search=min(c.settings.search, 4), steps=min(c.settings.steps, 3)), c.real
        )
        for name, c in data_free_layerwise.CONTENDERS.items()
    }
    data_free_layerwise.compare(table, cnn_work, contenders, bits=(8,), seed=0, size=16)
    data_free_layerwise.prune(table, cnn_work, (0.01,), seed=0)
    rows = {r.name: r.values for r in table.rows()}
    assert set(rows) == {*data_free_layerwise.CONTENDERS, "magnitude"}
    assert rows[data_free_layerwise.REAL]["tiny-cnn_8_bits_accuracy_percent"] > 80
    assert rows["magnitude"]["tiny-cnn_1%_sparse_accuracy_percent"] > 90
