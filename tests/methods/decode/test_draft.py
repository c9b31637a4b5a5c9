"""Drafts as chains and trees, and the rule that keeps the model's distribution."""

import pytest
import torch

from lilliput.methods.decode._draft import NOTHING, Draft, pick

DRAWS = 20_000
P = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
Q = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3])


def test_a_chain_is_a_tree_without_branches():
    chain = Draft.chain([7, 8, 9])
    assert chain.is_chain
    assert chain.parents == [-1, 0, 1]
    assert chain.depths() == [0, 1, 2]
    assert torch.equal(chain.lineage(), torch.ones(3, 3).tril().bool())
    assert NOTHING.is_chain
    assert NOTHING.children(-1) == []


def test_a_tree_knows_who_stands_above_whom():
    tree = Draft([1, 2, 3, 4, 5], [-1, -1, 0, 0, 2])
    assert not tree.is_chain
    assert tree.children(-1) == [0, 1]
    assert tree.children(0) == [2, 3]
    assert tree.depths() == [0, 0, 1, 1, 2]
    above = [[0], [1], [0, 2], [0, 3], [0, 2, 4]]
    assert [row.nonzero().flatten().tolist() for row in tree.lineage()] == above


def test_the_best_token_is_followed_where_it_was_proposed():
    scores = torch.tensor([[0.0, 3.0, 1.0]])
    assert pick(scores, Draft([2, 1], [-1, -1]), -1, sample=False) == (1, 1)
    assert pick(scores, Draft([2], [-1]), -1, sample=False) == (1, None)
    assert pick(scores, Draft.chain([1, 1]), 0, sample=False) == (1, 1)
    assert pick(scores, Draft.chain([1, 1]), 1, sample=False) == (1, None)


def counts_of(make_draft, sample=True):
    """How often each token came out, and how often it was a drafted one."""
    tokens, taken = torch.zeros(5), 0
    for _ in range(DRAWS):
        token, child = pick(P.log()[None], make_draft(), -1, sample)
        tokens[token] += 1
        taken += child is not None
    return tokens, taken


def drawn(siblings):
    tokens = torch.multinomial(Q, siblings, replacement=True).tolist()
    return Draft(tokens, [-1] * siblings, Q.expand(siblings, -1))


@pytest.mark.parametrize(
    "make_draft",
    [lambda: drawn(1), lambda: drawn(2), lambda: drawn(3), lambda: Draft([0, 3], [-1, -1]), lambda: NOTHING],
    ids=["one drawn", "two drawn", "three drawn", "two chosen", "nothing"],
)
def test_tokens_follow_the_models_distribution(make_draft, likely):
    torch.manual_seed(0)
    tokens, _ = counts_of(make_draft)
    assert likely(tokens, P)
    assert not likely(tokens, Q)


def test_one_drawn_token_is_taken_as_often_as_the_distributions_overlap():
    torch.manual_seed(1)
    _, taken = counts_of(lambda: drawn(1))
    overlap = float(torch.minimum(P, Q).sum())
    assert abs(taken / DRAWS - overlap) < 4 * (overlap * (1 - overlap) / DRAWS) ** 0.5


def test_a_draft_from_the_same_distribution_is_always_taken():
    torch.manual_seed(2)
    for _ in range(200):
        token = int(torch.multinomial(P, 1))
        assert pick(P.log()[None], Draft.chain([token], P[None]), -1, sample=True) == (token, 0)
