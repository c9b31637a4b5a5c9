"""factorize.tucker on a small convolutional network."""

import logging

import pytest
import torch
from torch import nn

from lilliput.edits import describe, replay
from lilliput.errors import UserError
from lilliput.methods.factorize._factors import compose_layer
from lilliput.methods.factorize.tucker import Tucker


def test_convolutions_become_three_and_one_channel_stays(cnn_work):
    model = Tucker(ratio=0.5).apply(cnn_work.model)
    assert list(Tucker().targets(cnn_work.model)) == ["conv2", "conv3"]
    assert [c.kernel_size for c in model.conv3] == [(1, 1), (3, 3), (1, 1)]
    assert [c.stride for c in model.conv3] == [(1, 1), (2, 2), (1, 1)]
    kept = sum(p.numel() for p in model.conv3.parameters()) / cnn_work.model.conv3.weight.numel()
    assert 0.3 < kept <= 0.5


def test_quality_falls_with_the_ratio(cnn_work):
    def error(ratio):
        model = Tucker(ratio=ratio).apply(cnn_work.model)
        return float((compose_layer(model.conv3).weight - cnn_work.model.conv3.weight).norm())

    errors = [error(r) for r in (0.9, 0.6, 0.3, 0.1)]
    assert errors == sorted(errors)


def test_branches_group_the_core_and_say_so(cnn_work, caplog):
    with caplog.at_level(logging.INFO):
        model = Tucker(ratio=0.5, branches=4).apply(cnn_work.model, layers=["conv3"])
    plain = Tucker(ratio=0.5).apply(cnn_work.model, layers=["conv3"])
    assert model.conv3[1].groups == 4
    assert "conv3: relative error of the kernel" in caplog.text
    assert "needs fine-tuning" in caplog.text
    assert model.conv3[1].weight.numel() * 3.5 < plain.conv3[1].weight.numel() * 1.5
    one = Tucker(ratio=0.5, branches=1).apply(cnn_work.model, layers=["conv3"])
    assert torch.equal(one.conv3[1].weight, plain.conv3[1].weight)


def test_per_layer_settings_snap_and_rebuild(cnn_work):
    model = Tucker(ratio=0.5).apply(
        cnn_work.model, layers={"conv2": {"ratio": 0.9, "snap": 4}, "conv3": {"branches": 2}}
    )
    assert model.conv2[1].weight.shape[0] % 4 == 0
    skeleton = type(cnn_work.model)()
    rebuilt = replay(skeleton, describe(model, skeleton)).eval()
    rebuilt.load_state_dict(model.state_dict())
    x = cnn_work.test[0]["input"]
    assert torch.equal(rebuilt(x), model(x))


def test_wrong_calls_are_refused():
    with pytest.raises(UserError, match="branches is 3"):
        Tucker(branches=3)
    with pytest.raises(UserError, match="finds no layer"):
        Tucker().apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
