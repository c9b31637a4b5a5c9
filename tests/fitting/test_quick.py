"""Candidates without healing: new statistics of batch norms."""

import copy

import pytest
import torch
from torch import nn

from lilliput import Plan, Step
from lilliput.fitting.judge import Judge
from lilliput.fitting.quick import quick_model, reestimate_norms_
from lilliput.methods.distill.logits import Logits
from lilliput.methods.prune.channels import Channels
from lilliput.methods.quantize.int8_static import Int8Static


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_statistics_are_those_of_the_batches(cnn_work):
    model = Channels(ratio=0.5).apply(cnn_work.model, cnn_work)
    seen = []
    first = norms(model)[0]
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    reestimate_norms_(model, cnn_work, cnn_work.calibration[:2])
    handle.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean, means, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.running_var, variances, rtol=1e-3, atol=1e-4)
    assert not any(m.training for m in model.modules())
    assert first.momentum == norms(cnn_work.model)[0].momentum


def test_a_model_without_batch_norms_stays_as_it_is(cnn_work):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate_norms_(model, cnn_work, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_statistics_of_other_data_are_mended(cnn_work):
    """Judged against the net as it was before its norms were spoilt."""
    reestimate_norms_(cnn_work.model, cnn_work, cnn_work.calibration)
    judge, model = Judge(cnn_work, "calibration"), copy.deepcopy(cnn_work.model)
    for norm in norms(model):
        norm.running_mean += 3.0
        norm.running_var *= 50.0
    spoilt = judge.judge(model).damage
    reestimate_norms_(model, cnn_work, cnn_work.calibration)
    assert judge.judge(model).damage < 1e-3 * spoilt


def test_healing_is_left_out_and_quantization_comes_last(cnn_work):
    steps = [Step(Channels(ratio=0.25)), Step(Logits(steps=10**6)), Step(Int8Static())]
    found = quick_model(Plan(steps), cnn_work, cnn_work.calibration)
    assert [type(m).__name__ for m in found.modules()] == [
        type(m).__name__ for m in Plan([steps[0], steps[2]]).apply(cnn_work).modules()
    ]


@pytest.mark.parametrize("method", [Int8Static()])
def test_without_structural_steps_it_is_the_plan(cnn_work, method):
    found, expected = quick_model(Plan([Step(method)]), cnn_work, []), Plan([Step(method)]).apply(cnn_work)
    for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
