"""A binary network as a circuit: it gives what the torch model gives, and its gates tell nothing of the weights."""

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.circuits import _binary_model
from lilliput.methods.circuits._binary_circuit import BinaryCircuit, plain, planes
from lilliput.methods.circuits._binary_model import read
from lilliput.methods.circuits._parties import digest, under_taps
from lilliput.methods.circuits._shapes import LayerShape, Shape
from lilliput.methods.quantize.binary import BinaryConv2d, BinaryLinear, pack

SCALE, OFFSET = 1 / 20, -0.4
SIGNS = {"scale": "none"}
REAL = {"activations": "real", "scale": "layer"}


def settle(model, size, seed=0):
    """Weights, factors (some negative) and biases that are not the first ones, norms that have seen inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if name == "bias" else 1))
            if getattr(module, "levels", None) is not None:
                module.levels.fill_(1.0)
            if getattr(module, "gamma", None) is not None:
                module.gamma.fill_(0.7)
        for _ in range(20):
            model.train()(torch.rand(64, *size, generator=generator) * 15 * SCALE + OFFSET)
    return model.eval()


def perceptron(first=SIGNS, shift=False):
    return nn.Sequential(
        nn.Flatten(),
        BinaryLinear(12, 9, **first),
        nn.BatchNorm1d(9),
        BinaryLinear(9, 7, shift=shift),
        nn.BatchNorm1d(7),
        BinaryLinear(7, 5, **SIGNS),
    )


def convolutions(first=SIGNS):
    return nn.Sequential(
        BinaryConv2d(2, 5, 3, padding=1, **first),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(5),
        BinaryConv2d(5, 4, (2, 3), stride=(1, 2), padding=(1, 1), bias=False, shift=True),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        BinaryLinear(4 * 3 * 1, 3, scale="layer"),
    )


MODELS = {
    "perceptron": (perceptron, (12,)),
    "thresholds": (lambda first=SIGNS: perceptron(first, shift=True), (12,)),
    "convolutions": (convolutions, (2, 6, 8)),
}


def made(name, first, seed=0):
    build, size = MODELS[name]
    return settle(build(first), size, seed), size


def whole(count, size, seed=1):
    return torch.randint(0, 16, (count, *size), generator=torch.Generator().manual_seed(seed))


def shares(shape, layers, p, seed=0):
    """Random shares of the first product less thresholds: (the server's, the client's)."""
    layer, secret = shape.layers[0], layers[0]
    sums = np.where(secret.weights, 1, -1) @ under_taps(layer, p)
    ours = np.random.default_rng(seed).integers(0, 2**shape.share_bits, sums.shape)
    return ours, (sums - secret.thresholds - ours) % 2**shape.share_bits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_signs_in_the_open_and_in_the_circuit_are_those_of_torch(name, seed):
    model, size = made(name, SIGNS, seed)
    x = torch.randn(100, *size, generator=torch.Generator().manual_seed(seed))
    expected = model(x).argmax(-1).numpy()
    assert len(set(expected.tolist())) > 1
    shape, layers = read(model, size, 8, 1.0, 0.0)
    bits = (x >= 0).flatten(1).numpy()
    assert np.array_equal(plain(shape, layers, bits), expected)
    compiled = BinaryCircuit(shape)
    assert np.array_equal(compiled.answer(compiled.circuit.run(bits, compiled.garbler_bits(layers))), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_whole_numbers_in_the_open_and_by_shares_are_those_of_torch(name, seed):
    model, size = made(name, REAL, seed)
    p = whole(12, size)
    expected = model(p * SCALE + OFFSET).argmax(-1).numpy()
    shape, layers = read(model, size, 4, SCALE, OFFSET)
    assert np.array_equal(plain(shape, layers, p.flatten(1).numpy()), expected)
    compiled = BinaryCircuit(shape)
    for one, answer in zip(p.numpy(), expected):
        ours, theirs = shares(shape, layers, one)
        found = compiled.circuit.run(
            planes(theirs, shape.share_bits).reshape(1, -1).astype(bool), compiled.garbler_bits(layers, ours)
        )
        assert compiled.answer(found[0]) == answer


def test_packed_networks_give_the_same_secrets():
    for name in MODELS:
        model, size = made(name, REAL)
        for a, b in zip(read(model, size, 4, SCALE, OFFSET)[1], read(pack(model), size, 4, SCALE, OFFSET)[1]):
            for key, value in vars(a).items():
                assert np.array_equal(value, getattr(b, key))


def test_the_circuit_is_the_same_for_all_weights_of_a_shape():
    first, second = (read(*made("convolutions", REAL, seed), 4, SCALE, OFFSET)[0] for seed in (0, 1))
    assert first == second
    assert digest(BinaryCircuit(first).circuit) == digest(BinaryCircuit(second).circuit)


def test_a_neuron_takes_the_ands_of_counting_and_comparing():
    shape = Shape((LayerShape((30, 1, 1), 6, (1, 1)), LayerShape((6, 1, 1), 2, (1, 1))))
    compiled = BinaryCircuit(shape)
    hidden = 6 * ((30 - (30).bit_count()) + 5)
    scores = 2 * (6 - (6).bit_count() + 4)
    largest = (4 + 1) + (4 + 1) + 1  # compare, choose the score, choose the index
    assert compiled.circuit.gates.ands == hidden + scores + largest


def test_a_first_layer_of_whole_numbers_takes_the_ands_of_one_sum_each():
    shape = Shape((LayerShape((30, 1, 1), 6, (1, 1)), LayerShape((6, 1, 1), 2, (1, 1))), bits=8)
    signs = Shape(shape.layers)
    others = BinaryCircuit(signs).circuit.gates.ands - 6 * (30 - (30).bit_count() + 5)
    assert shape.share_bits == 15  # of numbers from -15301 to 15301
    assert BinaryCircuit(shape).circuit.gates.ands == others + 6 * 14


@pytest.mark.parametrize("scale", ["none", "layer"])
def test_equal_scores_go_to_the_first_class_as_in_torch(scale):
    model = nn.Sequential(BinaryLinear(4, 3, scale="none", bias=False), BinaryLinear(3, 6, scale=scale))
    settle(model, (4,))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.copy_(torch.tensor([-1.0, 0.25, 0.5, 0.5, 0.25, 0.5]))
    shape, layers = read(model, (4,), 8, 1.0, 0.0)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert set(plain(shape, layers, (x >= 0).numpy()).tolist()) == {2} == set(model(x).argmax(-1).tolist())


def test_a_class_far_behind_never_wins_and_one_far_ahead_always_does():
    model = settle(nn.Sequential(BinaryLinear(4, 3, bias=False), BinaryLinear(3, 3, scale="none")), (4,))
    bits = np.random.default_rng(0).integers(0, 2, (16, 4)).astype(bool)
    for ahead, expected in ((1e9, {1}), (-1e9, {0, 2})):
        with torch.no_grad():
            model[1].bias.copy_(torch.tensor([0.1, ahead, 0.0]))
        shape, layers = read(model, (4,), 8, 1.0, 0.0)
        compiled = BinaryCircuit(shape)
        found = compiled.answer(compiled.circuit.run(bits, compiled.garbler_bits(layers)))
        assert set(found.tolist()) <= expected
        assert np.array_equal(found, plain(shape, layers, bits))


@pytest.mark.parametrize(
    ("factor", "constant", "first", "flipped"),
    [(2.0, -5.0, 3, False), (2.0, -6.0, 3, False), (-2.0, 5.0, 3, True), (-2.0, 6.0, 4, True)],
)
def test_thresholds_are_the_first_sums_that_fulfil_the_condition(factor, constant, first, flipped):
    least, flips = _binary_model._thresholds(np.array([[factor]]), np.array([[constant]]))
    assert (least[0, 0], flips[0]) == (first, flipped)
    for total in range(-10, 10):
        assert ((total >= least[0, 0]) ^ flips[0]) == (factor * total + constant >= 0)


@pytest.mark.parametrize("constant", [-1.0, 0.0, 1.0])
def test_a_factor_of_zero_gives_a_constant(constant):
    least, flips = _binary_model._thresholds(np.array([[0.0]]), np.array([[constant]]))
    assert all(((total >= least[0, 0]) ^ flips[0]) == (constant >= 0) for total in (-1000, 0, 1000))


REFUSED = {
    "is a ReLU": lambda: nn.Sequential(BinaryLinear(4, 3), nn.ReLU(), BinaryLinear(3, 2, **SIGNS)),
    "is a Linear": lambda: nn.Sequential(nn.Linear(4, 3), BinaryLinear(3, 2, **SIGNS)),
    "only the first": lambda: nn.Sequential(BinaryLinear(4, 3), BinaryLinear(3, 2, **REAL)),
    "2 signs per input": lambda: nn.Sequential(BinaryLinear(4, 3), BinaryLinear(3, 2, levels=2)),
    "alpha_K": lambda: nn.Sequential(BinaryLinear(4, 3, scale="alpha_K"), BinaryLinear(3, 2, **SIGNS)),
    "shift=False": lambda: nn.Sequential(BinaryLinear(4, 3, shift=True), BinaryLinear(3, 2, **SIGNS)),
    "one factor for all": lambda: nn.Sequential(BinaryLinear(4, 3), BinaryLinear(3, 2, scale="alpha")),
    "last module": lambda: nn.Sequential(BinaryLinear(4, 3), BinaryLinear(3, 2, **SIGNS), nn.BatchNorm1d(2)),
    "no binary layer": lambda: nn.Sequential(nn.Flatten()),
    "nn.Sequential": lambda: BinaryLinear(4, 3),
    "takes 5 inputs": lambda: nn.Sequential(BinaryLinear(5, 3), BinaryLinear(3, 2, **SIGNS)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_networks_without_an_exact_circuit_are_refused(message):
    torch.manual_seed(0)
    with pytest.raises(UserError, match=message):
        read(REFUSED[message](), (4,), 8, 1.0, 0.0)


@pytest.mark.parametrize("kernel", [(3, 3), (2, 1), (1, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_places_are_those_of_torch(kernel, stride, padding, dilation):
    layer = LayerShape((2, 9, 7), 1, kernel, stride, padding, dilation, pool=(2, 1))
    picture = torch.arange(1.0, 2 * 9 * 7 + 1).view(1, 2, 9, 7)
    columns = nn.functional.unfold(picture, kernel, dilation, padding, stride)[0].T
    assert np.array_equal(layer.places(), columns.numpy() - 1)
    outputs = torch.randn(1, 1, *layer.picture)
    pooled = outputs.flatten()[torch.from_numpy(layer.windows())].amax(0)
    assert torch.equal(pooled.view(layer.pooled), nn.functional.max_pool2d(outputs, 2, 1)[0, 0])


def test_a_shape_survives_its_text():
    shape, _ = read(*made("convolutions", REAL), 4, SCALE, OFFSET)
    assert Shape.from_json(shape.to_json()) == shape


GOOD = b'{"bits": 0, "layers": [{"inputs": [4, 1, 1], "filters": 2, "kernel": [1, 1]}]}'


@pytest.mark.parametrize(
    "change",
    [
        (b"{", b"["),
        (b"4", b"4000000"),
        (b"4", b"-4"),
        (b"4", b"4.5"),
        (b"4", b"NaN"),
        (b'"filters": 2', b'"filters": "2"'),
        (b'"filters": 2', b'"filters": true'),
        (b"[1, 1]", b"[1]"),
        (b"[1, 1]", b"[3, 3]"),
        (b"[4, 1, 1]", b"[4, 1]"),
        (b'"kernel"', b'"colonel"'),
        (b'"bits": 0', b'"bits": 8'),
        (b'"bits": 0', b'"bits": 64'),
        (GOOD, b"[" * 5000),
        (GOOD, b"\xff\xfe"),
        (GOOD, b"null"),
        (GOOD, b'{"bits": 0, "layers": []}'),
    ],
)
def test_what_is_no_shape_is_refused(change):
    assert Shape.from_json(GOOD).inputs == 4
    with pytest.raises(UserError):
        Shape.from_json(GOOD.replace(*change, 1))
