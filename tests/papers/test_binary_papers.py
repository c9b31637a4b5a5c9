"""Parts of the experiments on binary networks, and their rules on made-up results that must and must not hold."""

import pytest
import torch
from torch import nn

from lilliput.methods.quantize.binary import BinaryConv2d, BinaryLinear, PackedBinaryConv2d, PackedBinaryLinear, pack
from lilliput.papers import _binary_nets, rebnet, xnor_net
from lilliput.papers._binary_nets import Trained


def trained(value, spread=0.1):
    return Trained([value - spread, value, value + spread], nn.Identity())


def constant(forms, **changed):
    return {name: [changed.get(name, 1.0)] * 5 for name in forms}


@pytest.mark.parametrize(
    ("bwn", "connect", "xnor_ms", "holds"),
    [(89.0, 80.0, 0.1, True), (85.0, 80.0, 0.1, False), (89.0, 89.0, 0.1, False), (89.0, 80.0, 1.0, False)],
)
def test_the_rule_of_xnor_net(bwn, connect, xnor_ms, holds):
    found = {name: trained(90.0) for name in xnor_net.FORMS} | {"BWN": trained(bwn)}
    found["BinaryConnect"] = Trained([connect - 0.2, connect, connect + 0.2], nn.Identity())
    seen = xnor_net.evidence(found, constant(xnor_net.FORMS, XNOR=xnor_ms), xnor_net.EFFORT, 0, 0.0)
    assert seen.holds is holds
    assert {row.name for row in seen.rows} == set(xnor_net.FORMS)


@pytest.mark.parametrize(
    ("second", "third", "ms", "holds"),
    [
        (82.0, 83.0, 2.0, True),
        (82.0, 81.5, 2.0, True),
        (80.0, 83.0, 2.0, False),
        (82.0, 81.0, 2.0, False),
        (82.0, 83.0, 2.5, False),
    ],
)
def test_the_rule_of_rebnet(second, third, ms, holds):
    found = {name: trained(80.0) for name in rebnet.FORMS}
    found["ReBNet M=2"] = Trained([second - 0.1, second, second + 0.2], nn.Identity())
    found["ReBNet M=3"] = trained(third, 1.0)
    times = constant(rebnet.FORMS, **{"ReBNet M=2": ms, "ReBNet M=3": 2.8})
    seen = rebnet.evidence(found, times, rebnet.EFFORT, 0, 0.0)
    assert seen.holds is holds


def test_circuits_stand_in_the_rows_of_their_levels():
    found = {name: trained(80.0) for name in rebnet.FORMS}
    circuits = {m: {"luts": 100.0 * m, "cycles_per_frame": 7.0} for m in (1, 2, 3)}
    seen = rebnet.evidence(found, constant(rebnet.FORMS), rebnet.EFFORT, 0, 0.0, circuits)
    assert seen.row("ReBNet M=2").values["luts"] == 200
    assert "luts" not in seen.row("float32").values
    assert "take 100, 200, 300 look-up tables at 7 cycles" in seen.figure


@pytest.mark.parametrize("name", xnor_net.FORMS)
def test_conv4_has_the_form_and_packs_alike(name):
    torch.manual_seed(0)
    net = xnor_net.network(xnor_net.FORMS[name])
    binary = [m for m in net if isinstance(m, BinaryConv2d)]
    assert len(binary) == (0 if name == "float32" else 3)
    x = torch.randn(4, 1, 28, 28)
    net(x)
    packed = pack(net).eval()
    assert sum(isinstance(m, PackedBinaryConv2d) for m in packed) == len(binary)
    torch.testing.assert_close(packed(x), net.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", rebnet.FORMS)
def test_the_perceptron_has_the_form_and_packs_alike(name):
    torch.manual_seed(0)
    net = rebnet.network(name)
    binary = [m for m in net if isinstance(m, BinaryLinear)]
    assert len(binary) == (0 if name == "float32" else 4)
    assert not binary or binary[0].levels is None
    x = torch.randn(16, 1, 28, 28)
    net(x)
    packed = pack(net).eval()
    assert sum(isinstance(m, PackedBinaryLinear) for m in packed) == len(binary)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), net.eval()(x), rtol=1e-3, atol=1e-3)


def test_two_bit_uniform_keeps_its_steps():
    layer = rebnet.linear(8, 8, rebnet.UNIFORM)
    assert not layer.levels.requires_grad
    x = torch.tensor([[-2.0, -0.7, -0.6, -0.1, 0.1, 0.6, 0.7, 2.0]])
    expected = torch.tensor([[-3.0, -3.0, -1.0, -1.0, 1.0, 1.0, 3.0, 3.0]]) / 3
    torch.testing.assert_close(layer.binary_input(x).detach(), expected)


def test_times_are_taken_in_turn_on_one_thread():
    layers = {name: pack(rebnet.linear(16, 16, name)).eval() for name in ("float32", "ReBNet M=2")}
    times = _binary_nets.one_thread_ms(layers, torch.randn(2, 16), rounds=5)
    assert {name: len(values) for name, values in times.items()} == {"float32": 5, "ReBNet M=2": 5}
