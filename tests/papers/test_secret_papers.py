"""Parts of the experiment on secret inputs, and its rule on made-up results that must and must not hold."""

import numpy as np
import pytest
import torch

from lilliput.kernels.garbling import TABLE_BYTES
from lilliput.methods.circuits._binary_circuit import planes
from lilliput.methods.circuits._binary_model import read
from lilliput.methods.circuits.secret_inputs import SecretInputs, Traffic
from lilliput.papers import _fixed_point, xonn
from lilliput.papers.xonn import Asked, Rival


def one(accuracies=(94.0, 94.2, 93.8), equal=100, ands=1000, engine=0.01):
    traffic = Traffic(
        ands=ands, answers=100, answer_seconds=5.0, answer_bytes=10**7, setup_seconds=2.0, setup_bytes=10**5
    )
    return Asked(list(accuracies), equal, 100, 5 * ands, TABLE_BYTES * ands, [engine] * 5, traffic)


GOOD = {"plain": {}, "wide": {}, "whole": {}}


@pytest.mark.parametrize(
    ("changed", "rival_ands", "rival_s", "holds"),
    [
        ({}, 20_000, 0.2, True),
        ({"plain": {"equal": 99}}, 20_000, 0.2, False),
        ({"whole": {"equal": 0}}, 20_000, 0.2, False),
        ({}, 9_000, 0.2, False),
        ({}, 20_000, 0.09, False),
        ({"wide": {"ands": 3000}}, 20_000, 0.2, False),
        ({"whole": {"accuracies": (90.0, 90.2, 89.8)}}, 20_000, 0.2, False),
        ({"whole": {"accuracies": (97.0, 94.0, 88.0)}}, 20_000, 0.2, False),
        ({"plain": {"accuracies": (60.0, 60.0, 60.0)}}, 20_000, 0.2, True),
    ],
)
def test_the_rule(changed, rival_ands, rival_s, holds):
    found = {name: one(**changed.get(name, {})) for name in GOOD}
    rival, summed = Rival(0, TABLE_BYTES * rival_ands, rival_s, {"accuracy_percent": 95.0}), Rival(1, 1, 0.1, {})
    seen = xonn.evidence(found, [95.0, 95.2, 94.8], 1e-4, rival, summed, xonn.EFFORT, 0, 0.0)
    assert seen.holds is holds
    assert len(seen.rows) == 7
    assert seen.row("wide").values["answer_bytes"] == 10**5


def bits_of(values, width):
    return planes(np.asarray(values), width).reshape(-1)


@pytest.mark.parametrize("seed", range(4))
def test_the_rival_computes_what_it_says(seed):
    rng = np.random.default_rng(seed)
    x, w = rng.integers(0, 256, 5), rng.integers(-127, 128, (5, 3))
    circuit = _fixed_point.dense(5, 3)
    secret = np.concatenate([bits_of(abs(w), 7), (w < 0).reshape(-1)]).astype(np.uint8)
    found = circuit.run(bits_of(x, 8)[None].astype(bool), secret)[0].reshape(8, 3)
    total = x @ w - (w < 0).sum(0)
    width = 16 + 3  # of a sum of five products
    expected = np.maximum(total, 0) >> (width - 9)
    assert np.array_equal((found * (1 << np.arange(8))[:, None]).sum(0), expected)
    assert circuit.gates.ands > 5 * 3 * 104 > _fixed_point.known_products(5, 3) == 5 * 3 * 56


@pytest.mark.parametrize("seed", range(4))
def test_the_sum_in_the_circuit_is_the_sum(seed):
    rng = np.random.default_rng(seed)
    x, minus = rng.integers(0, 256, 6), rng.integers(0, 2, (6, 4))
    found = _fixed_point.signed_sum(6, 4).run(bits_of(x, 8)[None].astype(bool), minus.reshape(-1).astype(np.uint8))
    assert np.array_equal(found[0], x @ (1 - 2 * minus) - minus.sum(0) >= 0)


@pytest.mark.parametrize("whole", [False, True])
def test_the_perceptron_can_be_asked_in_secret(whole):
    torch.manual_seed(0)
    model = xonn.network(1, whole)
    p = torch.randint(0, 256, (64, 196))
    model(xonn.seen(p, not whole))
    model.eval()
    shape, _ = read(model, (196,), 8, 1 / 128, -1.0)
    assert [layer.filters for layer in shape.layers] == [128, 128, 10]
    assert shape.bits == 8 * whole
    server = SecretInputs(scale=1 / 128, offset=-1.0).server(model, (196,))
    inputs = p.numpy() if whole else xonn.seen(p, True).numpy()
    with torch.no_grad():  # whole numbers have ties, which rounding in float32 breaks in its own way
        expected = model.double()(xonn.seen(p, not whole).double()).argmax(-1)
    assert server.plain(inputs).tolist() == expected.tolist()


def test_the_float_network_has_the_same_widths():
    assert [m.out_features for m in xonn.network(None, True) if hasattr(m, "out_features")] == [128, 128, 10]


def test_an_experiment_in_small():
    effort = xonn.Effort(steps=2, answers=2, seeds=1)
    found = xonn.asked(1, True, 0, effort)
    assert (found.equal, found.answers) == (2, 2)
    assert found.row("x").values["equal_percent"] == 100
