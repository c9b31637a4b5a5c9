"""Shares of zeros and their aggregates against plain loops, and neurons that are used again."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.layers._sparsity import (
    aggregated,
    limited,
    random_of_equal_size,
    reusable,
    reused,
    sparsity_report,
)
from lilliput.methods.layers.relufy import Relufy
from lilliput.methods.layers.sparse_ffn import SparseFFN


def by_hand(active, window):
    texts, tokens, neurons = active.shape
    shares = []
    for b in range(texts):
        for start in range(0, tokens - window + 1, window):
            used = {j for t in range(start, start + window) for j in range(neurons) if active[b, t, j]}
            shares.append(1 - len(used) / neurons)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("window", [1, 2, 5, 7])
def test_aggregates_are_those_of_a_plain_loop(window):
    active = torch.rand(2, 7, 30, generator=torch.Generator().manual_seed(0)) < 0.1
    assert aggregated(active, window) == pytest.approx(by_hand(active, window))


def test_windows_only_grow_the_neurons_in_use(llama_work):
    model = Relufy(sparsity=0.9).apply(llama_work.model, llama_work)
    for layer in sparsity_report(model, llama_work, (1, 4, 24)):
        assert layer.zeros == pytest.approx(layer.silent[1])
        assert layer.silent[1] > layer.silent[4] > layer.silent[24] > 0


def test_a_smooth_model_has_no_zeros(llama_work):
    assert all(layer.zeros == 0 for layer in sparsity_report(llama_work.model, llama_work, (1, 8)))


def test_a_sparse_part_reports_what_the_ordinary_one_does(llama_work):
    model = Relufy(sparsity=0.9).apply(llama_work.model, llama_work)
    sparse = SparseFFN(gate="float32", rows="float32").apply(model)
    before, after = (sparsity_report(m, llama_work, (4,)) for m in (model, sparse))
    assert [a.name for a in after] == [b.name for b in before]
    assert [a.zeros for a in after] == pytest.approx([b.zeros for b in before], abs=2e-3)


def test_reuse_allows_what_the_tokens_before_loaded():
    active = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 1]]]).bool()
    allowed = reusable(active, 2)
    assert allowed[0, :2].all()
    assert allowed[0, 2:4].tolist() == [[True, True, False]] * 2
    assert allowed[0, 4].all()


def test_reuse_changes_answers_less_than_as_many_random_neurons(llama_work):
    model = Relufy(sparsity=0.7).apply(llama_work.model, llama_work)
    batch = llama_work.test[0]
    with torch.no_grad():
        whole = llama_work.forward(model, batch)
        with limited(model, reused(6)):
            again = llama_work.forward(model, batch)
        with limited(model, random_of_equal_size(6)):
            random = llama_work.forward(model, batch)
        assert torch.equal(llama_work.forward(model, batch), whole)
    assert 0 < float((again - whole).norm()) < float((random - whole).norm())


@pytest.mark.parametrize("window", [0, 8])
def test_windows_that_do_not_fit_are_refused(window):
    with pytest.raises(UserError, match="window"):
        aggregated(torch.ones(1, 7, 3).bool(), window)


def test_no_tokens_cannot_be_loaded():
    with pytest.raises(UserError, match="gamma"):
        reusable(torch.ones(1, 7, 3).bool(), 0)
