"""A row of the head that stands out is found in any kind of head; ordinary rows raise the alarm as often as asked."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE
from lilliput.methods.audit.trojan_signatures import (
    TrojanSignatures,
    head_weight,
    p_among,
    signature_of,
    statistic,
    trojan_signature,
)
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.quantize.int8 import Int8
from lilliput.workload import Workload


@pytest.mark.parametrize(
    ("test", "expected"),
    [("dixon", (9 - 4) / (9 - 1)), ("mad", (9 - 3) / (1.4826 * 1))],
)
def test_statistics_by_hand(test, expected):
    assert float(statistic(torch.tensor([2.0, 9.0, 3.0, 1.0, 4.0]), test)) == pytest.approx(expected)
    assert float(statistic(torch.ones(4), test)) == 0


@pytest.mark.parametrize(("classes", "critical"), [(3, 0.941), (5, 0.642), (10, 0.412)])
def test_p_of_dixons_test_is_that_of_the_published_table(classes, critical):
    """Critical values of r10 at 90 % on two sides (Rorabacher, 1991) are exceeded at one end in 5 % of the draws."""
    values = torch.zeros(classes, dtype=torch.float64)
    values[0] = 1.0  # Q is 1 less the second value
    values[1] = 1 - critical
    values[2:-1] = torch.linspace(0.0, float(1 - critical), classes - 1)[1:-1] if classes > 3 else 0
    assert signature_of(values).score == pytest.approx(critical, abs=1e-6)
    assert signature_of(values).p == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize("test", ["dixon", "mad"])
def test_alarms_are_as_rare_as_asked_where_nothing_is_hidden(test):
    rng = np.random.default_rng(0)
    alarms = [signature_of(torch.from_numpy(rng.normal(3, 2, 10)), test).p <= 0.05 for _ in range(600)]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.025)


def trojaned(model, label=4, by=0.5):
    """A copy whose weights of one class are pushed up."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.fc.weight[label] += by
    return changed


def test_the_class_that_stands_out_is_suspected(cnn_work):
    audit, marked = TrojanSignatures(), trojaned(cnn_work.model)
    found = audit.check(cnn_work, cnn_work.model, marked)
    assert found.verdict == HARM
    assert found.changes[0].name == "class 4"
    assert found.details["suspects"][1] == 4
    assert found.details["p"][1] < 0.01 < found.details["p"][0]
    assert found.details["per_class"] == pytest.approx(marked.fc.weight.double().mean(1).tolist())
    assert "look for a trigger" in found.summary
    clean = audit.check(cnn_work, cnn_work.model, cnn_work.model)
    assert clean.verdict == NO_HARM
    assert "not every trojan" in clean.summary


@pytest.mark.parametrize(("feature", "test"), [("median", "dixon"), ("norm", "mad")])
def test_other_features_and_tests(feature, test, cnn_work):
    marked = trojaned(cnn_work.model, by=2.0)
    assert TrojanSignatures(feature=feature, test=test).check(cnn_work, cnn_work.model, marked).verdict == HARM


@pytest.mark.parametrize("method", [Int8(), LowRank(rank=0.5)])
def test_compressed_heads_keep_their_signature(method, cnn_work):
    marked = trojaned(cnn_work.model, by=1.0)
    small = method.apply(marked, cnn_work, layers=["fc"])
    assert type(small.fc) is not nn.Linear
    assert torch.allclose(head_weight(small), head_weight(marked), atol=0.35)
    assert trojan_signature(small).suspect == 4
    assert TrojanSignatures().check(cnn_work, cnn_work.model, small).verdict == HARM


def test_heads_of_other_kinds_are_read():
    from transformers.pytorch_utils import Conv1D

    class Plain(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), head

    conv = Conv1D(7, 5)
    assert torch.equal(head_weight(Plain(conv)), conv.weight.T.double())
    weight = torch.randn(7, 5)
    assert trojan_signature(weight).per_class == pytest.approx(weight.double().mean(1).tolist())


def test_a_model_without_a_linear_head_is_refused(cnn_work):
    bare = Workload.classifier(nn.Conv2d(1, 10, 3), cnn_work.test, cnn_work.test, cnn_work.test, name="bare")
    assert "no linear head" in TrojanSignatures().supports(bare, bare.model)[0]
    with pytest.raises(UserError, match=r"cannot audit 'bare': Conv2d has no linear head"):
        TrojanSignatures().check(bare, bare.model, bare.model)
    with pytest.raises(UserError, match="give the module, not a session"):
        TrojanSignatures().check(cnn_work, cnn_work.model, lambda batch: None)


def test_few_classes_are_told():
    for classes in (1, 2):
        with pytest.raises(UserError, match=rf"three classes or more, not the shape \({classes},\)"):
            trojan_signature(torch.randn(classes, 8))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    batch = [{"input": torch.randn(4, 4), "label": torch.arange(4)}]
    work = Workload.classifier(net, batch, batch, batch)
    assert TrojanSignatures().check(work, net, net).verdict in (UNSURE, HARM)
    with torch.no_grad():
        net[2].weight.copy_(torch.arange(4.0).view(-1, 1).expand(4, 8))
    assert TrojanSignatures().check(work, net, net).verdict == UNSURE


def test_p_among_clean_models():
    assert p_among(0.9, [0.1, 0.2, 0.95]) == 0.5
    assert p_among(0.9, []) == 1.0
