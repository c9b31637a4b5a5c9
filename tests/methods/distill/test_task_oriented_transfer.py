import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.distill.task_oriented_transfer import Head, TaskOrientedTransfer, features_of, retrieve


class Features(nn.Module):
    """A large model: it knows the direction that tells the classes apart."""

    def __init__(self):
        super().__init__()
        self.dropout, self.weight = nn.Dropout(0.5), nn.Parameter(torch.eye(20)[:4] + 0.01)

    def forward(self, x):
        return self.dropout(x) @ self.weight.T


def inputs(count, seed):
    """Vectors whose class is the largest of the first three entries; the other entries are loud noise."""
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    x[:, 3:] *= 2
    return x, x[:, :3].argmax(-1)


def labelled(count=30, seed=0):
    x, labels = inputs(count, seed)
    return {"input": x, "label": labels}


def accuracy(model, seed=9):
    x, labels = inputs(1000, seed)
    with torch.no_grad():
        return float((model(x).argmax(-1) == labels).float().mean())


@pytest.fixture
def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))


METHOD = TaskOrientedTransfer(steps=300, tuning_steps=20, lr=1e-2)


# --- the method ------------------------------------------------------------------------------------------------


def test_a_student_learns_more_from_the_answers_than_from_the_few_labels(student):
    features, few = Features().train(), labelled()
    before = copy.deepcopy(features.state_dict())
    start = copy.deepcopy(student.state_dict())
    result = METHOD.transfer(features, student, few, inputs(1500, 1)[0])
    alone = copy.deepcopy(student)
    METHOD.with_(tuning_steps=320, tuning_lr=1e-2).tune_(alone, few)
    assert accuracy(result.model) > accuracy(alone) + 0.1
    assert all(torch.equal(v, before[k]) for k, v in features.state_dict().items())
    assert all(torch.equal(v, start[k]) for k, v in student.state_dict().items())
    assert features.training
    assert set(result.seconds) == {"features", "head", "learning", "tuning"}
    assert min(result.seconds.values()) >= 0


def test_the_answers_are_those_of_the_head_on_the_features(student):
    features, few, unlabelled = Features(), labelled(), inputs(64, 1)[0]
    method = METHOD.with_(steps=4, tuning_steps=0)
    result = method.transfer(features, student, few, unlabelled)
    by_hand = copy.deepcopy(student)
    method.learn_(by_hand, unlabelled, result.head(features_of(features, unlabelled)))
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(parameter, result.model.get_parameter(name))
    tuned = METHOD.with_(steps=0, tuning_steps=3).transfer(features, student, few, unlabelled).model
    alone = copy.deepcopy(student)
    METHOD.with_(tuning_steps=3).tune_(alone, few)
    assert torch.equal(tuned[0].weight, alone[0].weight)


def test_it_repeats_exactly_and_follows_the_seed(student):
    def weight(seed):
        method = METHOD.with_(seed=seed, steps=5)
        return method.transfer(Features(), student, labelled(), inputs(200, 1)[0]).model[0].weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


# --- the head --------------------------------------------------------------------------------------------------


def test_the_head_is_where_the_gradient_of_its_loss_is_zero():
    x, labels = inputs(60, 2)
    x = x * torch.linspace(1, 100, 20) + 5
    head = Head.fitted(x, labels, decay=0.1)
    mean, scale = x.mean(0), x.std(0)
    weight = (head.linear.weight * scale).double().requires_grad_()
    bias = (head.linear.bias + head.linear.weight @ mean).double().requires_grad_()
    standard = ((x - mean) / scale).double()
    loss = F.cross_entropy(standard @ weight.T + bias, labels) + 0.1 * weight.square().sum() / 3
    loss.backward()
    assert float(weight.grad.abs().max()) < 2e-3
    assert float(bias.grad.abs().max()) < 2e-3
    torch.testing.assert_close(head(x).double(), standard @ weight.detach().T + bias.detach(), rtol=1e-3, atol=1e-2)
    assert not any(p.requires_grad for p in head.parameters())


def test_a_feature_that_never_changes_does_no_harm():
    x, labels = inputs(60, 2)
    x[:, 7] = 3.0
    head = Head.fitted(x, labels, decay=0.1)
    assert torch.isfinite(head(x + 1)).all()


# --- retrieval -------------------------------------------------------------------------------------------------


def test_retrieval_finds_the_nearest_by_angle():
    gallery = torch.tensor([[1.0, 0], [0, 5], [-1, 0], [3, 0.1], [0.1, 0.1]])
    assert retrieve(gallery, torch.tensor([[7.0, 0]]), 3).tolist() == [0, 3, 4]
    assert retrieve(gallery, torch.tensor([[7.0, 0]]), 3, balanced=False).tolist() == [0, 3, 4]


def test_balanced_retrieval_serves_every_query_and_takes_nothing_twice():
    generator = torch.Generator().manual_seed(0)
    crowd = torch.tensor([1.0, 0, 0]) + 0.01 * torch.randn(50, 3, generator=generator)
    rare = torch.tensor([0, 1.0, 0]) + 0.5 * torch.randn(10, 3, generator=generator)
    gallery, queries = torch.cat([crowd, rare]), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    balanced, plain = retrieve(gallery, queries, 12), retrieve(gallery, queries, 12, balanced=False)
    assert len(set(balanced.tolist())) == len(set(plain.tolist())) == 12
    assert int((balanced >= 50).sum()) == 6
    assert int((plain >= 50).sum()) < 3
    assert sorted(retrieve(gallery, queries, 60).tolist()) == list(range(60))


# --- mistakes --------------------------------------------------------------------------------------------------


def test_wrong_use(student):
    x, labels = inputs(10, 0)
    with pytest.raises(UserError, match=r"steps is 2\.5"):
        TaskOrientedTransfer(steps=2.5)
    with pytest.raises(UserError, match="at least two classes"):
        METHOD.transfer(Features(), student, {"input": x, "label": torch.zeros(10, dtype=torch.long)}, x)
    with pytest.raises(UserError, match="one label from 0 for each"):
        METHOD.transfer(Features(), student, {"input": x, "label": labels[:5]}, x)
    with pytest.raises(UserError, match="give a vector for each"):
        METHOD.transfer(nn.Unflatten(1, (4, 5)), student, {"input": x, "label": labels}, x)
    unasked = nn.Linear(7, 7)  # that would not take the inputs
    with pytest.raises(UserError, match="the student has 20 outputs, but the labels are of 3 classes"):
        METHOD.transfer(unasked, nn.Linear(20, 20), labelled(), x)
    with pytest.raises(UserError, match="0 unlabelled inputs"):
        METHOD.transfer(unasked, student, labelled(), x[:0])
    with pytest.raises(UserError, match="labelled holds input"):
        METHOD.transfer(unasked, student, {"input": x}, x)
    for wrong in (labels.float(), labels - 1, labels[:, None]):
        with pytest.raises(UserError, match="one label from 0 for each"):
            METHOD.transfer(unasked, student, {"input": x, "label": wrong}, x)
    for count in (0, 11):
        with pytest.raises(UserError, match=f"{count} of 10 rows"):
            retrieve(x, x, count)
