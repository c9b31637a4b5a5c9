"""The parts of the experiment on tiny models, and its rule on made-up figures that must and must not hold."""

import pytest
import torch

from lilliput.metrics.quality import Difference
from lilliput.papers import _sparse_times, relu_strikes_back
from lilliput.papers.relu_strikes_back import (
    LEAST_ZEROS,
    NORMS,
    ORIGINAL,
    PRUNED,
    RELU,
    SHIFTED,
    THRESHOLDED,
    TOLERATED,
    Effort,
    Found,
    judge,
    thresholded,
    weights_read,
)


def cost(original=0.0, thresholded_rival=-0.1, pruned_rival=-0.1):
    means = {ORIGINAL: original, THRESHOLDED: thresholded_rival, PRUNED: pruned_rival}
    return {name: Difference(mean, mean - 0.001, mean + 0.001) for name, mean in means.items()}


@pytest.mark.parametrize(
    ("zeros", "costs", "faster", "holds"),
    [
        (0.9, cost(), 1.5, True),
        (LEAST_ZEROS - 0.01, cost(), 1.5, False),
        (0.9, cost(original=TOLERATED), 1.5, False),
        (0.9, cost(thresholded_rival=0.01), 1.5, False),
        (0.9, cost(pruned_rival=0.01), 1.5, False),
        (0.9, cost(), 0.99, False),
    ],
)
def test_the_rule(zeros, costs, faster, holds):
    assert judge(zeros, costs, faster) is holds


def test_a_token_reads_the_gate_and_the_rows_of_who_fired():
    assert weights_read(0) == pytest.approx(1)
    assert weights_read(1) == pytest.approx(1 / 3)
    assert weights_read(0.9) == pytest.approx(0.4)


def test_every_contender_runs_on_a_tiny_model(llama_work):
    found = {}
    relu_strikes_back.compare(found, llama_work, Effort(steps=4, seeds=1, length=24, check_every=2), seed=0)
    assert list(found) == [ORIGINAL, RELU, SHIFTED, NORMS, THRESHOLDED, PRUNED]
    rows = {name: one.row(name).values for name, one in found.items()}
    assert rows[ORIGINAL]["zeros"] == 0
    assert rows[SHIFTED]["zeros"] > rows[RELU]["zeros"] > 0.2
    assert rows[THRESHOLDED]["zeros"] == pytest.approx(rows[SHIFTED]["zeros"], abs=0.1)
    assert rows[PRUNED]["share_of_weights_read"] == pytest.approx(rows[SHIFTED]["share_of_weights_read"])
    assert {"validation_perplexity_reused_neurons", "validation_perplexity_random_neurons"} <= set(rows[SHIFTED])
    assert any(key.endswith("_tokens") and "perplexity" in key for key in rows[RELU])


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Tiny texts have 24 tokens."""
    monkeypatch.setattr(relu_strikes_back, "WINDOWS", (1, 4, 8))


@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_thresholds_silence_the_share_asked_for(llama_work, zeros):
    model, seen = thresholded(llama_work, zeros), []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        for batch in llama_work.calibration:
            llama_work.forward(model, batch)
    assert float((torch.cat(seen) == 0).float().mean()) == pytest.approx(zeros, abs=0.01)


def test_spread_is_over_seeds_or_else_over_windows():
    one = Found([torch.tensor([1.0, 2.0])])
    one.add(zeros=0.5)
    assert one.row("x").spread["test_perplexity"] > 0
    two = Found([torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])], {"zeros": [0.4, 0.6]})
    row = two.row("x")
    assert row.values["zeros"] == pytest.approx(0.5)
    assert row.spread["zeros"] == pytest.approx(0.02**0.5)
    assert row.spread["test_perplexity"] == pytest.approx(abs(torch.e**2 - torch.e) / 2**0.5)


def test_times_have_all_contenders(monkeypatch):
    monkeypatch.setattr(_sparse_times, "INPUTS", 64)
    monkeypatch.setattr(_sparse_times, "NEURONS", 96)
    rows, faster = _sparse_times.feed_forward_times(0.9, rounds=5)
    assert len(rows) == 6
    assert all(row.values["ffn_us"] > 0 for row in rows)
    assert faster.ratio > 0


def test_tokens_are_timed_in_the_native_decoder(llama_work):
    from lilliput.methods.layers.relufy import Relufy

    rows = _sparse_times.token_times(llama_work, Relufy(sparsity=0.9).apply(llama_work.model, llama_work), rounds=5)
    assert [row.name.split(",")[0] for row in rows] == ["token"] * 3
