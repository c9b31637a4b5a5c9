"""The parts of the experiments on tiny models, and their rules on made-up figures that must and must not hold."""

import pytest
import torch

from lilliput.hooks import watching
from lilliput.methods.offload.flash_ffn import PREDICTED, FlashFFN, flash_parts
from lilliput.metrics.latency import Comparison
from lilliput.papers import llm_in_a_flash as flash
from lilliput.papers.llm_in_a_flash import FLASH, GATED, KEPT, LESS, NAIVE, PINNED, SPARSE, TOLERATED, WINDOWED


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))


def faster(low):
    return Comparison(low + 0.2, low, low + 0.4, (1.0, 1.0), 9)


@pytest.mark.parametrize(
    ("shares", "cost_high", "low", "holds"),
    [
        ([LESS, 0.1], 0.01, 1.1, True),
        ([LESS + 0.01, 0.1], 0.01, 1.1, False),
        ([0.1], TOLERATED + 0.001, 1.1, False),
        ([0.1], 0.01, 0.99, False),
    ],
)
def test_the_rule(shares, cost_high, low, holds):
    assert flash.judge(shares, cost_high, faster(low)) is holds


@pytest.fixture
def found(llama_work):
    found = flash.Found()
    for seed in range(2):
        flash.one_seed(found, llama_work, flash.Effort(steps=2, seeds=2, tokens=40), seed)
    return found


def test_every_contender_reads_what_it_should(found):
    rows = {row.name: row.values for row in found.rows()}
    assert set(rows) == {*flash.MODELS, NAIVE, PINNED, SPARSE, KEPT, FLASH, WINDOWED, GATED}
    whole = 2 * 96 * 512 / 1e3  # layers, neurons, bytes of a record of 3 rows of 32 float32 in its blocks
    assert rows[NAIVE]["kilobytes_per_token"] == pytest.approx(whole)
    assert rows[PINNED]["kilobytes_per_token"] == pytest.approx(whole / 2)
    assert rows[NAIVE]["reads_per_token"] == rows[PINNED]["reads_per_token"] == 2
    assert rows[SPARSE]["hit_rate"] == 0
    assert rows[SPARSE]["kilobytes_per_token"] > rows[KEPT]["kilobytes_per_token"] > rows[FLASH]["kilobytes_per_token"]
    assert rows[KEPT]["reads_per_token"] > 2 * rows[FLASH]["reads_per_token"]
    assert rows[FLASH]["kilobytes_per_token"] <= rows[WINDOWED]["kilobytes_per_token"]
    assert 0 < rows[WINDOWED]["hit_rate"] <= rows[FLASH]["hit_rate"] < 1
    assert all(row["read_ms_per_token"] > 0 for name, row in rows.items() if name not in flash.MODELS)
    assert len(found.times[FLASH]) == len(found.times[PINNED]) == 2 * 3  # blocks of 16, 16 and 8 tokens
    assert [len(losses) for losses in found.losses.values()] == [2, 2]


def test_neurons_are_those_that_the_part_takes_to_fire(llama_work):
    from lilliput.methods.layers.relufy import Relufy

    relufied = Relufy(sparsity=0.8).apply(llama_work.model, llama_work)
    for model in (FlashFFN(gate="float32").apply(relufied), FlashFFN(gate=PREDICTED).apply(relufied, llama_work)):
        keys = flash.firing_neurons(model, llama_work, 30)
        assert [len(layer) for layer in keys] == [30, 30]
        part, seen = flash_parts(model)[0], []
        with torch.no_grad(), watching(model, ["model.layers.0.mlp"], lambda name, part, x, seen=seen: seen.append(x)):
            llama_work.forward(model, llama_work.test[0])
        expected = part.firing(seen[0].flatten(0, 1))[1]
        assert keys[0] == [row.nonzero().flatten().tolist() for row in expected[:30]]
