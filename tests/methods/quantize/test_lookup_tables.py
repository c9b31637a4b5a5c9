"""Codebooks against brute force, layers of indices against float ones, lookups against decoding, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.quantize._lut_net import ActivationTable, LUTNet, compose
from lilliput.methods.quantize.lookup_tables import (
    LookupTables,
    TableConv2d,
    TableLinear,
    kmeans,
    nearest,
    sampled_inputs,
    table_layer,
    uniform,
    with_zero,
)


def values(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def squared_error(x, book):
    return float((book[nearest(x, book)] - x).square().sum())


# --- codebooks -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(2, 40), st.integers(0, 999))
def test_the_nearest_entry_wins(count, entries, seed):
    x, book = values(count, seed), values(entries, seed + 1).sort().values
    found = (x - book[nearest(x, book)]).abs()
    assert torch.equal(found, (x.unsqueeze(1) - book).abs().min(1).values)


def test_few_distinct_values_are_kept_exactly():
    x = torch.tensor([3.0, -1.0, 0.0, 3.0, 0.0, 7.0])
    for entries in (4, 8):
        assert squared_error(x, kmeans(x, entries)) == 0


def test_kmeans_finds_the_best_two_groups():
    """On a line the best split in two is between sorted neighbours: try all."""
    x = values(60).sort().values
    best = min(
        float(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum())
        for i in range(1, 60)
        for a, b in [(x[:i], x[i:])]
    )
    assert squared_error(x, kmeans(x, 2)) == pytest.approx(best, rel=1e-4)


def test_kmeans_beats_even_spacing_and_more_entries_help():
    x = values(5000) ** 3
    even, clustered = ([squared_error(x, book(x, entries)) for entries in (4, 8, 16, 32)] for book in (uniform, kmeans))
    assert all(a < b for a, b in zip(clustered, even))
    assert clustered == sorted(clustered, reverse=True)
    assert even == sorted(even, reverse=True)


def test_uniform_entries_are_even_and_inside_the_range():
    x = values(1000)
    book = uniform(x, 9)
    assert torch.allclose(book.diff(), book.diff()[0].expand(8), rtol=1e-4)
    assert x.min() <= book[0]
    assert book[-1] <= x.max()
    assert squared_error(x, book) <= squared_error(x, torch.linspace(float(x.min()), float(x.max()), 9))


def test_zero_is_an_entry_of_inputs():
    book = with_zero(torch.tensor([-2.0, -0.3, 0.4, 1.0]))
    assert book.tolist() == pytest.approx([-2.0, 0.0, 0.4, 1.0])


@pytest.mark.parametrize("wrong", [torch.tensor([]), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_values_that_cannot_be_clustered_are_refused(wrong):
    for book in (kmeans, uniform):
        with pytest.raises(UserError, match="no values to cluster, or one is NaN"):
            book(wrong, 4)


# --- layers ----------------------------------------------------------------------------------------------------


def tabled(layer, weights=16, inputs=8, seed=3):
    return table_layer(layer, kmeans(layer.weight, weights), kmeans(values(1000, seed), inputs))


def expected(layer, new, x):
    """The float layer with weights and inputs replaced by their nearest entries, by numpy."""
    books = new.weight_book.numpy(), new.input_book.numpy()
    w, a = layer.weight.detach().numpy(), x.numpy()
    rounded = [b[np.abs(v[..., None] - b).argmin(-1)] for v, b in zip((w, a), books)]
    layer.weight.data, x = (torch.from_numpy(r) for r in rounded)
    return layer(x).detach()


LAYERS = {
    "linear": (lambda: nn.Linear(21, 9), (5, 21)),
    "without bias": (lambda: nn.Linear(8, 3, bias=False), (2, 8)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, padding=1), (2, 3, 9, 8)),
    "strided, dilated, grouped": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (2, 1), groups=2), (2, 4, 11, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_give_what_rounding_to_the_entries_gives(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), values(int(np.prod(shape))).view(shape)
    new = tabled(layer)
    by_decoding, by_lookup = new(x), new.sums(nearest(x, new.input_book))
    wanted = expected(layer, new, x)
    torch.testing.assert_close(by_decoding, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_lookup, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_rebuilt_from_config_and_state(kind):
    new = tabled(LAYERS[kind][0](), weights=32)
    again = type(new)(**new.rebuild_config())
    again.load_state_dict(new.state_dict())
    x = values(int(np.prod(LAYERS[kind][1]))).view(LAYERS[kind][1])
    assert torch.equal(again(x), new(x))


def test_sums_may_be_split_and_empty(monkeypatch):
    new = tabled(nn.Linear(32, 8))
    a = torch.randint(0, 8, (7, 32))
    whole = new.sums(a)
    monkeypatch.setattr("lilliput.methods.quantize.lookup_tables.GATHERED", 1)
    assert torch.equal(new.sums(a), whole)
    assert new.sums(a[:0]).shape == (0, 8)


def test_nan_stays_and_infinity_is_the_last_entry():
    new = tabled(nn.Linear(4, 2))
    x = torch.tensor([[0.1, float("nan"), 0.0, 0.0], [float("inf"), 0.0, 0.0, 0.0], [1e9, 0.0, 0.0, 0.0]])
    y = new(x)
    assert y[0].isnan().all()
    assert torch.equal(y[1], y[2])


def test_bytes_are_counted():
    new = tabled(nn.Linear(64, 10), weights=32, inputs=16)
    assert new.weight_bytes == 10 * 64 * 5 // 8 + 4 * (32 + 16)
    assert new.table_bytes == 4 * 32 * 16
    assert new.products().shape == (16, 32)


@pytest.mark.parametrize(("weights", "inputs"), [(1, 8), (8, 1), (256, 8), (12, 8)])
def test_books_that_indices_cannot_name_are_refused(weights, inputs):
    with pytest.raises(UserError, match="give a power of two up to 128"):
        TableLinear(8, 8, weights, inputs)


# --- the method ------------------------------------------------------------------------------------------------


def test_more_entries_keep_more_of_the_output(cnn_work):
    x = cnn_work.calibration[0]["input"]
    moved = []
    with torch.no_grad():
        before = cnn_work.model(x)
        for entries in (4, 16, 64):
            model = LookupTables(weights=entries, inputs=entries).apply(cnn_work.model, cnn_work)
            moved.append(float((model(x) - before).norm() / before.norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.2
    assert isinstance(model.conv1, TableConv2d)
    assert isinstance(model.fc, TableLinear)


def test_inputs_are_clustered_on_calibration_data_alone(cnn_work):
    cnn_work.validation = cnn_work.test = cnn_work.training = None
    seen = sampled_inputs(cnn_work.model, cnn_work, ["conv1"], cnn_work.calibration, 100)["conv1"]
    assert torch.isin(seen, torch.cat([b["input"].flatten() for b in cnn_work.calibration])).all()
    LookupTables().apply(cnn_work.model, cnn_work)


def test_a_tied_head_is_left_alone(llama_work):
    assert "lm_head" not in list(LookupTables().targets(llama_work.model))


def test_a_layer_that_nothing_reaches_is_named(cnn_work):
    cnn_work.model.spare = nn.Linear(4, 4)
    with pytest.raises(UserError, match="nothing reached 'spare'"):
        LookupTables().apply(cnn_work.model, cnn_work)


# --- a network of indices --------------------------------------------------------------------------------------


@pytest.fixture
def small_net(cnn_work):
    torch.manual_seed(0)
    cnn_work.model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.Tanh(),
        nn.Linear(16, 10),
    ).eval()
    return cnn_work


def test_lookups_and_decoding_give_the_same(small_net):
    lut = compose(small_net.model, small_net, 16, 16)
    x = small_net.test[0]["input"]
    torch.testing.assert_close(lut(x), lut(x, lookup=False), rtol=1e-4, atol=1e-4)


def test_a_network_of_many_entries_is_close_to_the_float_one(small_net):
    x = small_net.calibration[0]["input"]
    with torch.no_grad():
        before = small_net.model(x)
    errors = [
        float(
            (compose(small_net.model, small_net, n, n, activations=4 * n)(x, lookup=False) - before).norm()
            / before.norm()
        )
        for n in (4, 16, 64)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


def test_what_leaves_a_layer_is_encoded_again(small_net):
    """The second layer sees nothing but entries of its book, looked up from entries of the activation's table."""
    lut, seen = compose(small_net.model, small_net, 8, 8, activations=16), []
    last = lut.layers[4]
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    lut(small_net.test[0]["input"], lookup=False)
    assert torch.isin(seen[0], last.input_book).all()


def test_pooling_takes_the_largest_index(small_net):
    pool_first = nn.Sequential(*[small_net.model[i] for i in (0, 2, 1, 3, 4, 5, 6)])
    x = small_net.test[0]["input"]
    a, b = (compose(m, small_net, 16, 16) for m in (small_net.model, pool_first))
    b.layers[2] = a.layers[1]  # the same tables
    b.layers[4] = a.layers[4]
    assert torch.equal(a(x, lookup=False), b(x, lookup=False)) or (a(x) - b(x)).abs().max() < 1e-4


def test_activations_are_pairs_and_the_nearest_input_wins():
    table = ActivationTable(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.0, 0.1, 0.9]))
    assert table(torch.tensor([-9.0, -0.4, 0.9, 1.1, 50.0])).tolist() == pytest.approx([0.0, 0.1, 0.1, 0.9, 0.9])


def test_bytes_of_a_network(small_net):
    lut = compose(small_net.model, small_net, 16, 8, activations=32)
    weights = 4 * 9, 16 * 256, 10 * 16
    assert lut.index_bytes == sum(-(-n // 8) * 4 * m for m, n in ((4, 9), (16, 256), (10, 16)))
    assert lut.table_bytes == len(weights) * 4 * 16 * 8 + 2 * 8 * 32


def test_foreign_layers_are_refused(small_net):
    with pytest.raises(UserError, match="not \\['BatchNorm2d'\\]"):
        LUTNet(nn.Sequential(nn.BatchNorm2d(1), tabled(nn.Linear(4, 2))))
    with pytest.raises(UserError, match="nothing"):
        LUTNet(nn.Sequential(nn.Flatten()))
