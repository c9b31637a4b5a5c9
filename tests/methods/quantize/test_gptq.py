"""GPTQ against the textbook elimination in float64, against rounding, and on a tiny language model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.quantize._grid import choose_grid, dequantize, round_to_grid
from lilliput.methods.quantize._packed import PackedLinear
from lilliput.methods.quantize._walk import BlockWalk, walkable_blocks
from lilliput.methods.quantize.gptq import Gptq, gptq, inverse_factor
from lilliput.methods.quantize.group import Group


def problem(seed, n=48, k=64, samples=200, rank=None):
    """Weights (n, k) and the second moments (k, k) of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or k, k, generator=g) * torch.logspace(0, -1, k)
    x = torch.randn(samples, rank or k, generator=g) @ mixing
    return torch.randn(n, k, generator=g), x.T @ x / samples


def error(w, q, scale, zero, bits, hessian):
    d = (dequantize(q, scale, zero, bits) - w).double()
    return ((d @ hessian.double()) * d).sum(1)


def eliminate(w, hessian, scale, zero, bits, damping):
    """Codes by the textbook: round a column, spread its error by H^-1, drop it from H^-1 by one elimination step."""
    w, h = w.double().numpy().copy(), hessian.double().numpy().copy()
    h += damping * np.diag(h).mean() * np.eye(len(h))
    inverse, group, q = np.linalg.inv(h), w.shape[1] // scale.shape[1], np.zeros(w.shape)
    for k in range(w.shape[1]):
        s, z = scale[:, k // group].numpy(), zero[:, k // group].numpy()
        q[:, k] = np.clip(np.round((w[:, k] - z) / s) + 2 ** (bits - 1), 0, 2**bits - 1)
        lost = (w[:, k] - (q[:, k] - 2 ** (bits - 1)) * s - z) / inverse[k, k]
        w[:, k + 1 :] -= np.outer(lost, inverse[k, k + 1 :])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return q


@pytest.mark.parametrize("k", [64, 288])  # 288: more than two lazy blocks
def test_equals_the_textbook_on_a_given_grid(k):
    w, hessian = problem(0, n=8, k=k, samples=3 * k)
    grid = choose_grid(w, 3, 32)
    q, scale, zero = gptq(w, hessian, 3, 32, damping=0.05, grid=grid)
    assert (q.numpy() == eliminate(w, hessian, *grid, 3, 0.05)).mean() > 0.995  # ties may fall to either side
    torch.testing.assert_close((scale, zero), grid)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([4, 60, 400]))
def test_no_row_is_worse_than_rounding(seed, bits, act_order, samples):
    w, hessian = problem(seed, samples=samples)
    group = 64 if bits == 8 else 32
    found = gptq(w, hessian, bits, group, act_order=act_order)
    grid = choose_grid(w, bits, group, symmetric=bits == 8)
    limit = error(w, round_to_grid(w, *grid, bits), *grid, bits, hessian)
    assert (error(w, *found, bits, hessian) <= limit * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_halves_the_error_when_inputs_are_correlated(bits):
    w, hessian = problem(1, rank=24, samples=500)
    grid = choose_grid(w, bits, 32)
    rounding = error(w, round_to_grid(w, *grid, bits), *grid, bits, hessian).sum()
    assert error(w, *gptq(w, hessian, bits, 32), bits, hessian).sum() < 0.5 * rounding


@pytest.mark.parametrize("act_order", [False, True])
def test_is_rounding_when_inputs_are_independent(act_order):
    w, _ = problem(2)
    found = gptq(w, torch.diag(torch.rand(64) + 0.1), 4, 32, act_order=act_order)
    grid = choose_grid(w, 4, 32)
    torch.testing.assert_close(found, (round_to_grid(w, *grid, 4), *grid))


def test_dead_inputs_are_rounded_and_change_nothing_else():
    w, hessian = problem(3)
    grid = choose_grid(w, 3, 32)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 7, 40]] = True
    hessian[dead], hessian[:, dead] = 0, 0
    q, _, _ = gptq(w, hessian, 3, 32, damping=0.01, grid=grid)
    assert torch.equal(q[:, dead], round_to_grid(w, *grid, 3)[:, dead])
    shifted = w + dead * 0.1  # other values of the dead weights
    assert torch.equal(gptq(shifted, hessian, 3, 32, grid=grid)[0][:, ~dead], q[:, ~dead])


def test_all_inputs_dead_is_rounding():
    w, _ = problem(4)
    grid = choose_grid(w, 4, 32)
    assert torch.equal(gptq(w, torch.zeros(64, 64), 4, 32)[0], round_to_grid(w, *grid, 4))


def test_fewer_samples_than_inputs_still_factor():
    _, hessian = problem(5, samples=3)
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64).double(), rtol=0, atol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_an_indefinite_hessian_is_refused():
    with pytest.raises(UserError, match="not positive"):
        inverse_factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01)


def test_rows_that_clipping_hurts_keep_plain_rounding():
    w, hessian = problem(3, rank=2, samples=3)
    scale, zero = choose_grid(w, 4, 32)
    grid = scale / 4, zero  # so narrow that errors pushed on are clipped: without a way back rows get twice as bad
    q, _, _ = gptq(w, hessian, 4, 32, grid=grid)
    rounded = round_to_grid(w, *grid, 4)
    limit = error(w, rounded, *grid, 4, hessian)
    assert (error(w, q, *grid, 4, hessian) <= limit * (1 + 1e-4)).all()
    assert 0 < (q == rounded).all(1).sum() < len(w) / 2


def test_act_order_spends_its_care_on_large_inputs():
    w, hessian = problem(6, samples=800)
    hessian = hessian.flip(
        0, 1
    )  # the largest inputs last: the natural order treats them when nothing is left to adjust
    first = error(w, *gptq(w, hessian, 3, 32, act_order=True), 3, hessian).sum()
    assert first < error(w, *gptq(w, hessian, 3, 32), 3, hessian).sum()


def test_act_order_is_the_textbook_from_the_largest_input_down():
    w, hessian = problem(8, n=8, k=160)  # more than one lazy block
    shuffled = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    hessian = hessian[shuffled][:, shuffled]
    order = hessian.diagonal().argsort(descending=True)
    grid = choose_grid(w, 3, 160)
    expected = eliminate(w[:, order], hessian[order][:, order], *grid, 3, 0.05)
    q, _, _ = gptq(w, hessian, 3, 160, damping=0.05, act_order=True, grid=grid)
    assert (q[:, order].numpy() == expected).mean() > 0.995


def test_eight_bits_are_symmetric():
    w, hessian = problem(7)
    _, scale, zero = gptq(w, hessian, 8, 64)
    assert scale.shape == (48, 1)
    assert not zero.any()


def damage(model, work):
    """Mean squared change of the logits on the calibration data."""
    changes = [work.forward(model, b) - work.forward(work.model, b) for b in work.calibration]
    return float(torch.cat(changes).square().mean())


@torch.no_grad()
def test_a_language_model_is_hurt_less_than_by_rounding(llama_work):
    layers = ["model.layers.*"]
    ours = Gptq(bits=3, group=32, search=0).apply(llama_work.model, llama_work, layers)
    plain = Group(bits=3, group=32, search=0).apply(llama_work.model, llama_work, layers)
    assert damage(ours, llama_work) < 0.8 * damage(plain, llama_work)
    packed = [m for m in ours.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 14
    assert {m.bits for m in packed} == {3}


def test_settings_of_one_layer_are_its_own(llama_work):
    layers = {"model.layers.0.*": {}, "model.layers.1.mlp.up_proj": {"bits": 8}}
    model = Gptq(bits=4, group=32).apply(llama_work.model, llama_work, layers)
    assert model.model.layers[0].self_attn.q_proj.bits == 4
    assert model.model.layers[1].mlp.up_proj.bits == 8
    assert isinstance(model.model.layers[1].mlp.down_proj, torch.nn.Linear)


@torch.no_grad()
def test_later_blocks_see_what_the_changed_ones_make(llama_work):
    model, batches = llama_work.model, llama_work.calibration
    blocks = walkable_blocks(model, llama_work)
    assert blocks == ["model.layers.0", "model.layers.1"]
    walk = BlockWalk(model, llama_work, batches, blocks)
    model.model.layers[0].mlp.down_proj.weight.mul_(-2)
    walk.advance_(0)
    seen = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    for batch in batches:
        llama_work.forward(model, batch)
    handle.remove()
    torch.testing.assert_close(walk.hidden, seen)
    walk.advance_(1)
    expected = torch.cat([llama_work.forward(model, b) for b in batches])
    logits = [model.lm_head(model.model.norm(h)) for h in walk.hidden]
    torch.testing.assert_close(torch.cat(logits), expected)


def test_a_network_without_blocks_takes_it_too(cnn_work):
    cnn_work.model.fc = torch.nn.Linear(32, 10)
    model = Gptq(bits=4, group=32).apply(cnn_work.model, cnn_work)
    assert isinstance(model.fc, PackedLinear)


def test_only_as_much_calibration_as_asked(llama_work):
    ran = []
    handle = llama_work.model.model.layers[0].mlp.register_forward_hook(lambda *args: ran.append(args[1][0].shape[0]))
    small = Gptq(samples=24).apply(llama_work.model, llama_work, ["model.layers.0.mlp.up_proj"])
    handle.remove()
    assert isinstance(small.model.layers[0].mlp.up_proj, PackedLinear)
    assert sum(ran) <= 4 + 1  # the first batch of four windows, and one window that tells how the blocks are called


def test_without_data_it_says_so(tiny_llama):
    with pytest.raises(UserError, match="needs a workload"):
        Gptq().apply(tiny_llama)
