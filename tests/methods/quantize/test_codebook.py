"""Codebooks: k-means against trying everything, the fit's error, the layer's bytes and products, and bad input."""

from itertools import combinations

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.quantize._codebook import BINS, CodebookLinear, best_scale, fit_codebook, kmeans_1d, nearest
from lilliput.methods.quantize._grid import choose_grid, dequantize, round_to_grid
from lilliput.methods.quantize.codebook import Codebook, whole_pieces


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values_of(q, scale, tables):
    return tables[0][q.long()].float() * scale.repeat_interleave(q.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_k_means_is_the_best_of_all_partitions(k, seed):
    """In one dimension clusters are intervals: all ways to cut 9 sorted values."""
    values, weights = gaussian(9, seed=seed).double(), gaussian(9, seed=seed + 50).abs().double()
    order = values.argsort()
    least = min(
        sum(
            float((weights[p] * (values[p] - (weights[p] * values[p]).sum() / weights[p].sum()).square()).sum())
            for p in (order[a:b] for a, b in zip((0, *cuts), (*cuts, 9)))
        )
        for cuts in combinations(range(1, 9), k - 1)
    )
    centres = kmeans_1d(values, weights, k)
    found = (weights * (values.unsqueeze(1) - centres).square().amin(1)).sum()
    assert float(found) == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert torch.equal(centres, centres.sort().values)


def test_k_means_of_few_and_of_many_values():
    assert kmeans_1d(torch.tensor([2.0, 1.0, 2.0]), torch.ones(3), 4).tolist() == [1, 2, 2, 2]
    ignored = kmeans_1d(torch.tensor([1.0, 50.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]), 2)
    assert ignored.tolist() == [1, 3]
    many = gaussian(40 * BINS)
    centres = kmeans_1d(many, torch.ones(len(many)), 4)
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])  # Lloyd-Max quantizer of a Gaussian
    assert (centres - expected).abs().max() < 0.05


def test_nearest_entries_are_those_of_argmin():
    u = gaussian(8, 30)
    for tables in (gaussian(4, 8), gaussian(1, 8)):
        per_row = tables.repeat_interleave(8 // len(tables), 0)
        expected = (u.unsqueeze(-1) - per_row.unsqueeze(1)).abs().argmin(-1)
        assert torch.equal(nearest(u, tables, 3), expected)


def test_the_scale_is_that_of_least_squares():
    w, entries, weight = gaussian(3, 8), gaussian(3, 8, seed=1), gaussian(3, 8, seed=2).abs()
    found = best_scale(w, entries, weight, torch.ones(3, 2))
    root = weight.sqrt().view(3, 2, 4, 1)
    expected = torch.linalg.lstsq(entries.view(3, 2, 4, 1) * root, w.view(3, 2, 4, 1) * root).solution
    torch.testing.assert_close(found, expected.view(3, 2))
    assert best_scale(w, torch.zeros(3, 8), weight, torch.full((3, 2), 7.0)).eq(7).all()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_the_error_is_below_that_of_a_grid_of_more_bits(bits, shared):
    """A uniform grid with scale and zero takes 0.25 bits more here."""
    w = gaussian(64, 256)
    fitted = fit_codebook(w, bits, 64, shared)
    layer = CodebookLinear.from_codes(*fitted, bits, None)
    grid = choose_grid(w, bits, 64, search=10)
    rounded = dequantize(round_to_grid(w, *grid, bits), *grid, bits)
    assert (layer.dequantized() - w).norm() < 0.99 * (rounded - w).norm()


def test_weights_with_large_inputs_are_kept_better():
    w, importance = gaussian(32, 64), torch.ones(64)
    importance[:8] = 100.0
    plain, weighed = (values_of(*fit_codebook(w, 3, 64, importance=i)) - w for i in (None, importance))
    assert weighed[:, :8].norm() < 0.8 * plain[:, :8].norm()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_multiplies_with_its_weights(bits, shared):
    w, bias, x = gaussian(20, 96), gaussian(20), gaussian(2, 5, 96, seed=3)
    layer = CodebookLinear.from_codes(*fit_codebook(w, bits, 32, shared), bits, bias)
    expected = x @ layer.dequantized().T + bias
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand_as(x))


@pytest.mark.parametrize("shared", [True, False])
def test_parts_of_a_large_layer_are_fitted_as_the_whole(shared, monkeypatch):
    """Rows in parts give the same sums; only their order changes."""
    w, importance = gaussian(90, 64), gaussian(64, seed=1).square()
    whole = fit_codebook(w, 3, 32, shared, importance)
    monkeypatch.setattr("lilliput.methods.quantize._codebook.CHUNK", 16 * 64)
    in_parts = fit_codebook(w, 3, 32, shared, importance)
    errors = [float(((values(found, w) - w).square() * importance).sum()) for found in (whole, in_parts)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert (whole[0] == in_parts[0]).float().mean() > 0.99


def values(fitted, w):
    q, scale, tables = fitted
    rows = tables.repeat_interleave(2, 0)[: len(w)] if len(tables) > 1 else tables.expand(len(w), -1)
    return rows.gather(1, q.long()).float() * scale.repeat_interleave(w.shape[1] // scale.shape[1], 1)


def test_tables_that_begin_with_some_rows_end_about_as_good(monkeypatch):
    w = gaussian(256, 64)
    errors = []
    for start in (2**20, 2**11):
        monkeypatch.setattr("lilliput.methods.quantize._codebook.START", start)
        errors.append(float((values_of(*fit_codebook(w, 4, 64)) - w).norm()))
    assert errors[1] < 1.01 * errors[0]


def test_bytes_are_bits_scales_and_tables():
    layer = CodebookLinear.from_codes(*fit_codebook(gaussian(64, 128), 3, 64), 3, None)
    assert layer.weight_bytes == 64 * 128 * 3 // 8 + 2 * 64 * 2 + 16
    rows = CodebookLinear.from_codes(*fit_codebook(gaussian(64, 128), 3, 64, shared=False), 3, None)
    assert rows.weight_bytes == 64 * 128 * 3 // 8 + 2 * 64 * 2 + 4 * 64


def test_a_layer_builds_without_memory_exports_and_compiles():
    layer = CodebookLinear.from_codes(*fit_codebook(gaussian(20, 64), 4, 32), 4, None)
    with torch.device("meta"):
        again = CodebookLinear(**layer.rebuild_config())
    again.load_state_dict(layer.state_dict(), assign=True)
    x = gaussian(3, 64)
    assert torch.equal(again(x), layer(x))
    model = nn.Sequential(layer)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert torch.equal(program.module()(gaussian(7, 64)), layer(gaussian(7, 64)))
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_constant_zero_and_single_weights():
    for w in (torch.zeros(4, 64), torch.full((4, 64), 0.5), torch.ones(1, 1)):
        layer = CodebookLinear.from_codes(*fit_codebook(w, 2, w.shape[1]), 2, None)
        assert (layer.dequantized() - w).abs().max() <= 0.01


def test_wrong_sizes_and_values_are_refused():
    with pytest.raises(UserError, match="NaN"):
        fit_codebook(torch.full((2, 32), float("nan")), 4, 32)
    with pytest.raises(UserError, match="does not divide"):
        fit_codebook(torch.ones(2, 48), 4, 32)
    for bad in ({"group": 16}, {"group": 0}, {"bits": 5}, {"in_features": 0}):
        with pytest.raises(UserError):
            CodebookLinear(**({"in_features": 64, "out_features": 8, "bits": 4, "group": 32} | bad))
    with pytest.raises(UserError, match="int64"):
        CodebookLinear(64, 8, 4, 32)(torch.ones(1, 64, dtype=torch.int64))


def test_the_method_needs_data_only_to_weigh(llama_work):
    model = Codebook(bits=3, weighting=False).apply(llama_work.model)
    assert sum(isinstance(m, CodebookLinear) for m in model.modules()) == 15
    with pytest.raises(UserError, match="weighting=False"):
        Codebook().apply(llama_work.model)
    assert whole_pieces(64, 576) == 64
    assert whole_pieces(128, 96) == 32
    assert whole_pieces(64, 24) == 24
