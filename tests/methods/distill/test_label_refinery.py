import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lilliput.errors import UserError
from lilliput.methods.distill._views import Views
from lilliput.methods.distill.label_refinery import LabelRefinery, refined_loss


class Net(nn.Module):
    """Two layers with what behaves differently in training; remembers what it saw and in which mode."""

    def __init__(self, hidden=16):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(36), nn.Dropout(0.2)
        self.first, self.second = nn.Linear(36, hidden), nn.Linear(hidden, 4)
        self.seen = []

    def forward(self, x):
        self.seen.append((x.clone(), self.training, torch.is_grad_enabled()))
        return self.second(self.dropout(torch.relu(self.first(self.norm(x.flatten(1))))))


@pytest.fixture
def data():
    """Four classes: a bright pixel in each quarter."""
    generator = torch.Generator().manual_seed(0)
    pictures, labels = 0.3 * torch.randn(64, 1, 6, 6, generator=generator), torch.arange(64) % 4
    for picture, label in zip(pictures, labels.tolist()):
        picture[0, 1 + 3 * (label // 2), 1 + 3 * (label % 2)] += 3
    return TensorDataset(pictures, labels)


def test_loss_has_the_gradient_of_cross_entropy_with_soft_targets():
    torch.manual_seed(0)
    student, refinery, x = nn.Flatten(), nn.Linear(9, 9), torch.randn(5, 9, requires_grad=True)
    batch = {"input": x}
    refined_loss(student, refinery, batch).backward()
    gradient, x.grad = x.grad, None
    F.cross_entropy(x, refinery(x).detach().softmax(-1)).backward()
    torch.testing.assert_close(gradient, x.grad)


def test_entropy_of_the_targets_is_noted():
    nats = []
    even, sure = (nn.Linear(3, 4, bias=True) for _ in range(2))
    with torch.no_grad():
        for model, bias in ((even, [0.0] * 4), (sure, [99.0, 0, 0, 0])):
            model.weight.zero_()
            model.bias.copy_(torch.tensor(bias))
    for refinery in (even, sure):
        refined_loss(nn.Linear(3, 4), refinery, {"input": torch.randn(2, 3)}, nats)
    assert nats == pytest.approx([torch.tensor(4.0).log().item(), 0], abs=1e-5)


def test_every_generation_sees_the_same_crops_as_its_refinery_which_only_answers(data):
    made = []

    def make():
        made.append(Net())
        return made[-1]

    chain = LabelRefinery(generations=3, steps=5, batch=16, padding=1).refine(make, data)
    assert [g.model for g in chain] == made
    for before, after in itertools.pairwise(made):
        taught, asked = after.seen[:5], before.seen[-5:]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(taught, asked))
        assert {a[1:] for a in taught} == {(True, True)}
        assert {b[1:] for b in asked} == {(False, False)}
    assert not torch.equal(made[1].seen[0][0], made[2].seen[0][0])
    assert chain[0].target_nats == 0 < chain[1].target_nats
    assert all(p.grad is None or g.model is made[-1] or p.requires_grad for g in chain for p in g.model.parameters())


def test_a_chain_learns_without_labels_after_the_first_generation(data):
    blind = TensorDataset(data.tensors[0], torch.zeros(64))
    method = LabelRefinery(generations=1, steps=150, batch=16, lr=1e-2, padding=0, flip=False)
    first = method.refine(Net, data)[0].model
    second = method.with_(generations=2).refine(lambda: Net(hidden=24), blind, refinery=first)
    for model in (first, second[-1].model):
        model.eval()
        with torch.no_grad():
            assert float((model(data.tensors[0]).argmax(-1) == data.tensors[1]).float().mean()) > 0.95
    assert all(g.target_nats > 0 for g in second)


def test_it_repeats_exactly_and_leaves_the_random_state_and_the_refinery(data):
    refinery = Net().train()
    before = copy.deepcopy(refinery.state_dict())
    method = LabelRefinery(generations=2, steps=3)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a = method.refine(Net, data, refinery)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    b = method.refine(Net, data, refinery)
    other = method.with_(seed=9).refine(Net, data, refinery)
    assert torch.equal(a[-1].model.first.weight, b[-1].model.first.weight)
    assert not torch.equal(a[-1].model.first.weight, other[-1].model.first.weight)
    assert all(torch.equal(v, before[k]) for k, v in refinery.state_dict().items())
    assert refinery.training


def test_crops_change_from_epoch_to_epoch(data):
    made = []
    LabelRefinery(generations=1, steps=3, batch=64, padding=2).refine(lambda: made.append(Net()) or made[0], data)
    first, second = (made[0].seen[i][0] for i in (0, 1))
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    assert Views(2).padding == 2


def test_wrong_use(data):
    for settings, match in (({"generations": 0}, "generations is 0"), ({"steps": 1.5}, "whole number")):
        with pytest.raises(UserError, match=match):
            LabelRefinery(**settings)
    pictures, labels = data.tensors[:2]
    for label in (-1, 1000):
        wrong = TensorDataset(pictures, torch.full_like(labels, label))
        with pytest.raises(UserError, match=f"a picture has the label {label}, but the student has"):
            LabelRefinery(generations=1, steps=1).refine(Net, wrong)
    model = Net()
    with pytest.raises(UserError, match="build a new one"):
        LabelRefinery(generations=2, steps=1).refine(lambda: model, data)
