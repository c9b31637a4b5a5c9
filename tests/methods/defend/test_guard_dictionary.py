"""Sparse codes against a plain greedy search, dictionaries against the data's own, and pieces of pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lilliput.methods.defend._dictionary import assembled, learned_atoms, pieces, rebuilt, sparse_codes, sparsely


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def greedy(x, atoms, count):
    """Orthogonal matching pursuit of one vector, by least squares at each step."""
    chosen, rest, weights = [], x, None
    for _ in range(count):
        scores = np.abs(atoms @ rest)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, x, rcond=None)[0]
        rest = x - weights @ atoms[chosen]
    return chosen, weights


def test_codes_are_those_of_a_greedy_search():
    x, atoms = drawn(2, 5, 12), F.normalize(drawn(2, 30, 12, seed=1), dim=-1)
    index, weights = sparse_codes(x, atoms, 4)
    for g in range(2):
        for n in range(5):
            chosen, expected = greedy(x[g, n].numpy(), atoms[g].numpy(), 4)
            assert index[g, n].tolist() == chosen
            assert weights[g, n].numpy() == pytest.approx(expected, abs=1e-3)
    assert torch.allclose(rebuilt(index, weights, atoms), sparsely(x, atoms, 4))


def test_more_atoms_leave_less_and_as_many_as_dimensions_nothing():
    x, atoms = drawn(1, 20, 8), F.normalize(drawn(1, 16, 8, seed=1), dim=-1)
    errors = [float((x - sparsely(x, atoms, count)).norm()) for count in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2
    assert sparse_codes(x, atoms[:, :3], 8)[0].shape == (1, 20, 3)


def test_nothing_is_rebuilt_as_nothing():
    atoms = F.normalize(drawn(1, 16, 8), dim=-1)
    assert torch.equal(sparsely(torch.zeros(1, 3, 8, dtype=torch.float64), atoms, 3), torch.zeros(1, 3, 8))


def test_learned_atoms_explain_sparse_data_better_than_its_samples():
    truth = F.normalize(drawn(1, 24, 16), dim=-1)
    order = torch.rand(400, 24, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2]
    data = (drawn(400, 2, seed=3).unsqueeze(-1) * truth[0][order]).sum(1).unsqueeze(0)
    learned, begun = (learned_atoms(data[:, :300], 40, 2, rounds=r) for r in (12, 0))
    errors = [float((data[:, 300:] - sparsely(data[:, 300:], a, 2)).square().mean()) for a in (learned, begun)]
    assert errors[0] < 0.6 * errors[1]
    assert torch.allclose(learned.norm(dim=-1), torch.ones(1, 40, dtype=torch.float64))
    assert learned_atoms(data[:, :10], 40, 2).shape == (1, 10, 16)


@pytest.mark.parametrize(("height", "width", "size"), [(12, 12, 4), (13, 10, 4), (3, 3, 5)])
def test_pieces_make_the_picture_again(height, width, size):
    x = drawn(3, 2, height, width)
    parts = pieces(x, size)
    assert parts.shape == (-(-height // size) * -(-width // size), 3, 2 * size * size)
    assert torch.equal(assembled(parts, x.shape, size), x)
