"""The experiments on codebooks and seeds: their rules on made-up results, and their parts on tiny models."""

import pytest
import torch
from torch import nn

from lilliput.methods.quantize.dkm import Dkm
from lilliput.papers import edkm, seedlm
from lilliput.papers._paired import advantage, as_float_, bits_per_weight, drawn_test
from lilliput.papers._pictures import Table


def losses(mean, seed=0, windows=40):
    """Losses of windows that differ in difficulty, alike for every contender, and a little by chance."""
    generator = torch.Generator().manual_seed(seed)
    chance = 0.02 * torch.randn(windows, generator=generator)
    return mean + torch.linspace(-1, 1, windows) + chance - chance.mean()


@pytest.mark.parametrize(
    ("three", "four", "holds"),
    [(3.6, 3.42, True), (3.699, 3.42, False), (3.6, 3.5, False), (3.8, 3.42, False)],
)
def test_the_rule_of_seeds(three, four, holds):
    found = {"float": losses(3.4), f"{seedlm.OURS} 3": losses(three, 1), f"{seedlm.OURS} 4": losses(four, 2)}
    found[f"{seedlm.ROUNDING} 3"] = losses(3.7, 3)
    assert seedlm.evidence(Table(), found, seed=0).holds is holds


@pytest.mark.parametrize(
    ("ours", "small_mb", "holds"), [(3.5, 10.0, True), (3.5, 30.0, False), (3.599, 10.0, False), (3.7, 10.0, False)]
)
def test_the_rule_of_clustering(ours, small_mb, holds):
    table = Table()
    table.add(edkm.MODES["copy"], "saved_mb_3_bits", 200.0)
    table.add(edkm.MODES["unique"], "saved_mb_3_bits", small_mb)
    found = {f"{edkm.OURS} 3": losses(ours, 1)}
    found |= {f"{name} 3": losses(3.6, i) for i, name in enumerate((edkm.QAT, edkm.TUNED_KMEANS, edkm.KMEANS))}
    assert edkm.evidence(table, found, (3,), steps=1, seed=0).holds is holds


def test_an_advantage_is_paired():
    gain, error = advantage(losses(3.0), losses(3.1))
    assert gain == pytest.approx(0.1, abs=1e-6)
    assert error < 1e-6


def test_test_windows_are_drawn_by_the_seed(llama_work):
    drawn = [drawn_test(llama_work, 5, seed) for seed in (0, 0, 1)]
    ids = [torch.cat([b["input_ids"] for b in d.test]) for d in drawn]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    assert len(ids[0].unique(dim=0)) == 5
    assert len(llama_work.test) == 2


@pytest.mark.parametrize("bits", [4, 3])
def test_contenders_of_seeds_on_a_tiny_model(llama_work, bits):
    table = Table()
    for name, method in seedlm.contenders(bits).items():
        small = {"candidates": 2} if "SeedLM" in name else {}
        seedlm.compare(table, llama_work, name, method.with_(**small), bits)
    rows = {row.name: row.values for row in table.rows()}
    for values in rows.values():
        assert values[f"relative_squared_error_{bits}_bits"] < {4: 0.03, 3: 0.1}[bits]
        assert bits <= values[f"bits_per_weight_{bits}_bits"] < bits + 1.6
    picked, plain = (rows[n][f"relative_squared_error_{bits}_bits"] for n in (seedlm.PICKED, seedlm.OURS))
    assert picked < plain


def test_unpacked_models_answer_like_packed_ones(llama_work):
    packed = seedlm.Seeds(candidates=1).apply(llama_work.model)
    assert bits_per_weight(packed) == pytest.approx(4.0)
    expected = llama_work.values(packed, "test")
    unpacked = as_float_(packed)
    assert type(unpacked.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(llama_work.values(unpacked, "test"), expected, rtol=1e-4, atol=1e-4)


def test_saved_bytes_on_a_tiny_model(llama_work):
    table = Table()
    edkm.saved_by_model(table, llama_work, bits=2)
    saved = {row.name: row.values["saved_mb_2_bits"] for row in table.rows()}
    assert saved["DKM"] > saved["+ marshalling"] > saved["+ uniquification"] > 0
    assert saved[edkm.TABLE] < saved["+ marshalling"]


def test_two_processes_save_less_than_one():
    one, two = edkm.saved_by_weights("unique", bits=2, seed=0), edkm.saved_by_two_processes(bits=2, seed=0)
    half_of_the_indices = edkm.WIDE[0] * edkm.WIDE[1]  # of 2 bytes each
    assert all(0.95 * half_of_the_indices < one - peak < 1.05 * half_of_the_indices for peak in two)


def test_training_with_rounded_weights_ends_packed(llama_work):
    model = edkm.rounding_trained(llama_work, bits=3, steps=2, seed=0)
    assert bits_per_weight(model) == pytest.approx(3 + 32 / 32)  # a scale and a zero for each group of 32
    changed = [n for n, m in model.named_modules() if hasattr(m, "weight_bytes")]
    assert changed == list(Dkm().resolve(llama_work.model, edkm.BLOCKS))


def test_rounding_in_training_passes_gradients():
    layer = edkm.RoundedLinear(nn.Linear(64, 8), bits=2)
    x = torch.randn(4, 64)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.linear.weight.grad, x.sum(0).expand(8, 64))
    grid_values = (layer(torch.eye(64)) - layer.linear.bias).detach().T
    assert all(len(row.unique()) <= 5 for row in grid_values.round(decimals=4))
