"""Modes come back, hooks go, also when the work inside fails."""

import pytest
import torch
from torch import nn

from lilliput.hooks import channels_last, evaluating, tensors_in, watching


@pytest.fixture
def net():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2)).train()
    model[1].eval()
    return model


def test_each_module_gets_its_own_mode_back(net):
    with evaluating(net):
        assert not any(m.training for m in net.modules())
        assert net(torch.randn(2, 3)).requires_grad  # methods that want gradients use it too
    assert [m.training for m in net.modules()] == [True, True, False, True]


def test_modes_come_back_after_a_failure(net):
    with pytest.raises(RuntimeError), evaluating(net):
        net(torch.randn(2, 99))
    assert [m.training for m in net.modules()] == [True, True, False, True]


def test_the_order_of_convolution_weights_comes_back_with_what_was_learned():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3).to(memory_format=torch.channels_last), nn.Flatten())
    before, x = net[0].weight.detach().clone(), torch.randn(2, 3, 6, 6)
    expected = net(x)
    with channels_last(net), torch.no_grad():
        assert all(net[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 1))
        torch.testing.assert_close(net(x), expected)
        net[0].weight += 1
    assert net[0].weight.is_contiguous()
    assert torch.equal(net[0].weight, before + 1)
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_only_the_named_layers_are_seen_with_what_they_get(net):
    found = []
    x = torch.randn(2, 3, requires_grad=True)
    with evaluating(net), watching(net, ["2", "0"], lambda name, layer, y: found.append((name, layer, y))):
        net(x)
    assert [(name, layer) for name, layer, _ in found] == [("0", net[0]), ("2", net[2])]
    torch.testing.assert_close(found[0][2], x.detach())
    torch.testing.assert_close(found[1][2], net[0](x).detach())
    assert not any(y.requires_grad for _, _, y in found)


def test_an_input_given_by_name_is_seen():
    class Scale(nn.Module):
        def forward(self, *, by, x):
            return by * x

    net, found, x = nn.ModuleDict({"scale": Scale()}), [], torch.ones(2)
    with watching(net, ["scale"], lambda name, layer, y: found.append(y)):
        net["scale"](by=2, x=x)
    assert torch.equal(found[0], x)


def test_no_hook_stays_after_a_failure(net):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watching(net, ["0"], fail):
        net(torch.randn(2, 3))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_tensors_are_found_inside_lists_and_tuples():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert list(map(len, tensors_in([a, 5, [b, (c, "x")], None, {"d": a}]))) == [1, 2, 3]
