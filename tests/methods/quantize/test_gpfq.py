"""Path following against the recursion as the papers write it, its bound on Gaussian data, and on tiny networks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.edits import describe, replay
from lilliput.errors import UserError
from lilliput.methods.quantize._coded import CodedConv2d, CodedLinear
from lilliput.methods.quantize._packed import PackedLinear
from lilliput.methods.quantize.gpfq import Gpfq, alphabet_step, follow_path, path_error, quantize_layer
from lilliput.moments import Moments


def letter(z, levels, sparse, threshold):
    if sparse == "soft":
        z = np.sign(z) * max(abs(z) - threshold, 0.0)
    if sparse == "hard" and abs(z) <= threshold:
        z = 0.0
    return np.clip(np.round(z), -levels, levels)


def path(w, x, y, step, levels, sparse="none", threshold=0.0):
    """Codes and the running errors u_t of one neuron: w (K,), x and y (m, K), by the recursion itself."""
    u, q, errors = np.zeros(len(x)), np.zeros(len(w)), []
    for t in range(len(w)):
        size = y[:, t] @ y[:, t]
        z = y[:, t] @ (u + w[t] * x[:, t]) / size if size else w[t]
        q[t] = letter(z / step, levels, sparse, threshold)
        u = u + w[t] * x[:, t] - q[t] * step * y[:, t]
        errors.append(u)
    return q, np.array(errors)


def sums(x, y):
    return torch.tensor(y.T @ y)[None].float(), torch.tensor(y.T @ x)[None].float()


@pytest.mark.parametrize(("sparse", "threshold"), [("none", 0.0), ("soft", 0.7), ("hard", 0.8)])
@pytest.mark.parametrize("k", [20, 300])  # 300: more than two lazy blocks
def test_equals_the_recursion(sparse, threshold, k):
    rng = np.random.default_rng(0)
    w, x = rng.uniform(-1, 1, (5, k)), rng.normal(size=(40, k))
    y = x + 0.2 * rng.normal(size=x.shape)
    y[:, 3] = 0  # an input that the changed network never uses
    steps = rng.uniform(0.1, 0.4, 5)
    found = follow_path(
        torch.tensor(w)[None].float(), *sums(x, y), torch.tensor(steps)[None].float(), 3, sparse, threshold
    )
    expected = np.stack([path(row, x, y, step, 3, sparse, threshold)[0] for row, step in zip(w, steps)])
    assert (found[0].numpy() == expected).mean() > 0.98  # a tie in float32 sends the rest of its path another way


def test_groups_are_followed_apart():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 4, 9, generator=g), torch.randn(3, 50, 9, generator=g)
    gram, step = x.transpose(1, 2) @ x, torch.full((3, 4), 0.3)
    together = follow_path(w, gram, gram, step, 7)
    for i in range(3):
        part = slice(i, i + 1)
        assert torch.equal(together[part], follow_path(w[part], gram[part], gram[part], step[part], 7))


def test_independent_inputs_give_rounding():
    w = torch.rand(1, 6, 16) * 2 - 1
    gram = torch.diag(torch.rand(16) + 0.1)[None]
    found = follow_path(w, gram, gram, torch.full((1, 6), 0.25), 3)
    assert torch.equal(found.float(), (w / 0.25).round().clamp(-3, 3))


def test_each_step_adds_at_most_a_quarter_of_the_squared_step():
    """|u_t|^2 <= sin^2 |u_(t-1)|^2 + step^2 / 4 |X_t|^2 while no letter is clipped: a fact of every data set."""
    rng = np.random.default_rng(1)
    x, w, step = rng.exponential(size=(12, 200)), rng.uniform(-1, 1, 200), 0.5
    q, u = path(w, x, x, step, levels=10**9)
    before = np.vstack([np.zeros((1, 12)), u[:-1]])
    sizes = (x**2).sum(0)
    along = (x.T * before).sum(1) ** 2 / sizes
    assert ((u**2).sum(1) <= (before**2).sum(1) - along + step**2 / 4 * sizes + 1e-9).all()
    found = follow_path(torch.tensor(w)[None, None].float(), *sums(x, x), torch.full((1, 1), step), 127)
    assert (found[0, 0].numpy() == q).mean() > 0.98


def gaussian_errors(k, m=16, neurons=64, levels=3):
    """Mean |u|^2 and relative squared error, of path following and of rounding, for weights uniform in -1..1."""
    g = torch.Generator().manual_seed(k)
    x, w = torch.randn(m, k, generator=g), torch.rand(neurons, k, generator=g) * 2 - 1
    step, gram = 1.0 / levels, (x.T @ x)[None]
    q = follow_path(w[None], gram, gram, torch.full((1, neurons), step), levels)[0] * step
    rounded = (w / step).round().clamp(-levels, levels) * step
    norm = (w @ x.T).square().sum(1).mean()
    errors = [((w - v) @ x.T).square().sum(1).mean() for v in (q, rounded)]
    return float(errors[0]), float(errors[0] / norm), float(errors[1] / norm)


def test_the_relative_error_falls_as_one_over_the_inputs():
    """The theorem of the module's docstring: E|u|^2 <= step^2 m^2 / 4 whatever K, hence a relative error like 1 / K."""
    sizes = [64, 256, 1024, 2048]
    found = {k: gaussian_errors(k) for k in sizes}
    for k in sizes[1:]:
        assert found[k][0] <= (1 / 3) ** 2 * 16**2 / 4
    slope = np.polyfit(np.log(sizes), np.log([found[k][1] for k in sizes]), 1)[0]
    assert -1.3 < slope < -0.75
    rounding = np.polyfit(np.log(sizes), np.log([found[k][2] for k in sizes]), 1)[0]
    assert abs(rounding) < 0.2


def test_more_samples_per_input_make_it_harder():
    relative = [gaussian_errors(512, m)[1] for m in (8, 32, 128)]
    assert relative == sorted(relative)
    assert relative[2] > 4 * relative[0]


def test_the_step_follows_the_named_radius():
    w = torch.tensor([[[1.0, -4.0, 2.0], [0.5, 0.25, -0.5]]])
    assert alphabet_step(w, 2, "max", 1.0, True).tolist() == [[2.0, 0.25]]
    assert alphabet_step(w, 2, "max", 1.0, False).tolist() == [[1.125, 1.125]]  # the mean of the largest, 2.25
    assert alphabet_step(w, 2, "median", 4.0, True).tolist() == [[4.0, 1.0]]
    assert alphabet_step(w, 2, "median", 4.0, False).tolist() == [[1.0, 1.0]]


def moments_of(x, y):
    moments = Moments("layer")
    moments.add(y[None], x[None])
    return moments


def test_path_error_is_the_squared_distance_up_to_a_constant():
    x = torch.randn(30, 8)
    y, w, q = x + 0.1 * torch.randn(30, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    truth = (x @ w[0].T - y @ q[0].T).square().mean(0)
    constant = (x @ w[0].T).square().mean(0)
    torch.testing.assert_close(path_error(w, q, moments_of(x, y))[0] + constant, truth, rtol=1e-4, atol=1e-4)


def test_trying_alphabets_is_never_worse_than_one_of_them():
    layer, x = nn.Linear(32, 6), torch.randn(100, 32)
    moments, w = moments_of(x, x), layer.weight.detach()[None]

    def error(**settings):
        codes, step, _ = quantize_layer(layer, Gpfq(bits=3, **settings), moments)
        return path_error(w, codes * step.unsqueeze(-1), moments)[0]

    best = error(multiple=0.0)
    assert (best <= error(multiple=1.0) + 1e-6).all()
    assert error(multiple=0.0, per_neuron=False).sum() <= error(multiple=0.7, per_neuron=False).sum() + 1e-6


def test_the_bias_takes_the_mean_error():
    layer = nn.Linear(16, 5)
    x = torch.rand(200, 16) + 0.5
    y = x + 0.3
    codes, step, bias = quantize_layer(layer, Gpfq(bits=2, correct_bias=True), moments_of(x, y))
    assert bias is not None
    changed = y @ (codes[0] * step.T).T + bias
    torch.testing.assert_close(changed.mean(0), layer(x).detach().mean(0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def damage(model, work):
    return float(torch.cat([work.forward(model, b) - work.forward(work.model, b) for b in work.calibration]).norm())


def rounded(model, bits):
    """Every layer by plain rounding to its own largest weight."""
    levels = 2 ** (bits - 1) - 1
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            w = layer.weight.data
            step = w.flatten(1).abs().amax(1).view(-1, *[1] * (w.dim() - 1)) / levels
            layer.weight.data = (w / step).round() * step
    return model


def test_a_convolutional_network_keeps_more_than_by_rounding(cnn_work):
    ours = Gpfq(bits=3).apply(cnn_work.model, cnn_work)
    assert damage(ours, cnn_work) < 0.6 * damage(rounded(copy.deepcopy(cnn_work.model), 3), cnn_work)
    assert isinstance(ours.conv2, CodedConv2d)
    assert isinstance(ours.fc, PackedLinear)
    assert ours.conv2.codes.numel() == 16 * 144 * 3 // 8  # three bits each


def test_a_language_model_keeps_its_tied_embedding(llama_work):
    model = Gpfq(bits=4, samples=200).apply(llama_work.model, llama_work)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = rounded(copy.deepcopy(llama_work.model).model, 4)
    assert damage(model, llama_work) < 0.8 * damage(_with_body(llama_work.model, plain), llama_work)


def _with_body(model, body):
    model = copy.deepcopy(model)
    model.model = body
    return model


def test_block_by_block_is_layer_by_layer_with_changed_inputs(llama_work, monkeypatch):
    """The cached walk gives what running both whole models for the block would."""
    from lilliput.methods.quantize import gpfq

    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    walked = Gpfq(bits=3).apply(llama_work.model, llama_work, names)
    monkeypatch.setattr(gpfq, "walkable_blocks", lambda model, workload: [])
    whole = Gpfq(bits=3).apply(llama_work.model, llama_work, names)
    for name in names:
        ours, theirs = walked.get_submodule(name), whole.get_submodule(name)
        assert (ours.dequantized() == theirs.dequantized()).float().mean() > 0.97


@pytest.mark.parametrize("sparse", ["soft", "hard"])
def test_sparse_rules_make_zeros(cnn_work, sparse):
    dense, thin = (
        Gpfq(bits=4, sparse=rule, threshold=1.0, multiple=1.0).apply(cnn_work.model, cnn_work, ["conv2"])
        for rule in ("none", sparse)
    )
    shares = [float((m.conv2.dequantized() == 0).float().mean()) for m in (dense, thin)]
    assert shares[1] > shares[0] + 0.05


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_what_it_makes_can_be_rebuilt(cnn_work, tiny_cnn, bits):
    skeleton = copy.deepcopy(cnn_work.model)
    model = Gpfq(bits=bits).apply(cnn_work.model, cnn_work)
    again = replay(skeleton, describe(model, copy.deepcopy(cnn_work.model)))
    again.load_state_dict(model.state_dict())
    x = cnn_work.example["input"]
    torch.testing.assert_close(again.eval()(x), model(x))
    assert isinstance(model.fc, CodedLinear if bits == 5 else PackedLinear)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_survive_packing(bits):
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (5, 13))
    layer = CodedLinear(13, 5, bits, bias=False)
    layer.set_(codes, torch.arange(1.0, 6.0), None)
    torch.testing.assert_close(layer.dequantized(), codes * torch.arange(1.0, 6.0).unsqueeze(1))
    assert layer.weight_bytes == 5 * (13 if bits == 8 else 2 * bits) + 20


def test_without_data_it_says_so(tiny_cnn):
    with pytest.raises(UserError, match="needs a workload"):
        Gpfq().apply(tiny_cnn)
