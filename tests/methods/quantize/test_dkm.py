"""Differentiable k-means: equal values and gradients however it is computed and saved, bytes, processes, the method."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.quantize._codebook import CodebookLinear
from lilliput.methods.quantize._dkm import DKMLinear, Rounded, TableWeights, soft_weights
from lilliput.methods.quantize._saving import Keeper, Unique
from lilliput.methods.quantize.dkm import Dkm


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(n=3000, k=8):
    u = gaussian(n).bfloat16().float().requires_grad_()
    return u, torch.linspace(-2, 2, k)


def in_numpy(u, c, tau, rounds):
    """The equations in float64."""
    u, c = u.detach().double().numpy(), c.double().numpy()
    import numpy as np

    for i in range(rounds + 1):
        a = np.exp(-((u[:, None] - c) ** 2) / tau)
        a /= a.sum(1, keepdims=True)
        if i < rounds:
            c = (a * u[:, None]).sum(0) / a.sum(0)
    return torch.from_numpy(a @ c), torch.from_numpy(c)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_plain_and_table_are_the_equations(rounds):
    u, c = start()
    expected = in_numpy(u, c, 0.1, rounds)
    for how in (soft_weights, TableWeights.apply):
        found = how(u, c, 0.1, rounds)
        assert all((a.double() - b).abs().max() < 1e-5 for a, b in zip(found, expected))


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("tau", [0.02, 0.3])
def test_the_gradient_on_distinct_values_is_the_plain_one(rounds, tau):
    u, c = start()
    slope = gaussian(len(u), seed=1)
    plain = torch.autograd.grad((soft_weights(u, c, tau, rounds)[0] * slope).sum(), u)[0]
    table = torch.autograd.grad((TableWeights.apply(u, c, tau, rounds)[0] * slope).sum(), u)[0]
    assert (table - plain).norm() < 1e-5 * plain.norm()


def test_the_gradient_is_that_of_finite_differences():
    u, c = (t.detach().double() for t in start(n=12, k=3))
    u.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_weights(x, c, 0.3, 2)[0], (u,))


def test_equal_bit_patterns_are_one_value():
    u = torch.tensor([1.0, -1.0, 1.0, 0.0, -0.0, 1.0])
    unique = Unique.of(u)
    assert torch.equal(u[unique.first][unique.index], u)
    assert torch.equal(unique.counts.sort().values, torch.tensor([1.0, 1.0, 1.0, 3.0]))
    assert Unique.of(gaussian(200_000)).first.numel() < 20_000


@pytest.mark.parametrize("mode", ["copy", "marshal", "unique"])
def test_what_is_kept_gives_the_same_gradient(mode):
    u, c = start()
    slope, keeper = gaussian(len(u), seed=1), Keeper(mode)
    expected = torch.autograd.grad((soft_weights(u, c, 0.1, 3)[0] * slope).sum(), u)[0]
    with keeper.saving(), keeper.clustering(u):
        mixed, _ = soft_weights(u, c, 0.1, 3)
    assert keeper.live_bytes > 0
    found = torch.autograd.grad((mixed * slope).sum(), u)[0]
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    del mixed
    assert keeper.live_bytes == 0
    assert keeper.memory_report()["peak_bytes"] > 0


def test_each_step_saves_more():
    u, c = start(n=200_000)
    peaks = []
    for mode in ("copy", "marshal", "unique"):
        keeper = Keeper(mode)
        with keeper.saving(), keeper.clustering(u):
            mixed, _ = soft_weights(u, c, 0.1, 3)
        mixed.sum().backward()
        peaks.append(keeper.peak_bytes)
    assert peaks[0] > 1.3 * peaks[1] > 10 * peaks[2]
    rows = len(Unique.of(u).first)
    assert peaks[2] < 2 * len(u) + 4 * rows * (3 * 4 * 8 + 20) + 4096


def test_views_of_one_storage_are_kept_once():
    x = gaussian(100, 10).requires_grad_()
    y = x * 2
    keeper = Keeper("marshal")
    with keeper.saving():
        z = (y.T * y.T).sum() + (y * 3).square().sum() + y.view(10, 100).square().sum()
    assert keeper.live_bytes == 2 * y.nbytes  # y, and y * 3
    z.backward()
    torch.testing.assert_close(x.grad, (2 * 4 * 11) * x.detach())


def test_wrong_modes_are_refused():
    with pytest.raises(UserError, match="'half'"):
        Keeper("half")
    with pytest.raises(UserError, match=r"torch\.distributed"):
        Keeper("shard")


def _one_process(rank, path, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    u, c = start(n=30_001)
    keeper = Keeper("shard")
    with keeper.saving(), keeper.clustering(u):
        mixed, _ = soft_weights(u, c, 0.1, 2)
    mixed.square().sum().backward()
    found[rank] = (keeper.peak_bytes, u.grad.tolist())
    dist.destroy_process_group()


def test_two_processes_keep_half_of_the_indices_each(tmp_path):
    found = mp.Manager().dict()
    mp.spawn(_one_process, (tmp_path / "store", found), nprocs=2)
    u, c = start(n=30_001)
    keeper = Keeper("unique")
    with keeper.saving(), keeper.clustering(u):
        mixed, _ = soft_weights(u, c, 0.1, 2)
    mixed.square().sum().backward()
    for rank in (0, 1):
        peak, gradient = found[rank]
        assert torch.allclose(torch.tensor(gradient), u.grad, rtol=1e-5, atol=1e-6)
        assert 0.9 * 30_000 < keeper.peak_bytes - peak < 1.1 * 30_000


# --- the layer and the method ----------------------------------------------------------------------------------


def test_a_layer_without_temperature_is_k_means_and_finalises_to_itself():
    linear = nn.Linear(128, 48)
    layer = DKMLinear(linear, bits=3, group=64, temperature=1e-3).eval()
    packed = layer.finalise()
    assert isinstance(packed, CodebookLinear)
    hard = packed.dequantized()
    assert (layer.soft_weight() - hard).norm() < 0.03 * hard.norm()
    x = gaussian(5, 128)
    assert (packed(x) - layer(x)).norm() < 0.05 * layer(x).norm()


def test_gradients_of_a_layer_are_those_of_its_plain_computation():
    torch.manual_seed(0)
    linear, x, grads = nn.Linear(64, 32), gaussian(4, 64), []
    for keeper in (None, Keeper("copy"), Keeper("unique")):
        layer = DKMLinear(linear, bits=2, group=32)
        layer.keeper = keeper
        layer(x).square().sum().backward()
        grads.append(layer.weight.grad)
    for found in grads[1:]:
        assert (found - grads[0]).norm() < 1e-5 * grads[0].norm()


def test_rounding_passes_gradients():
    x = gaussian(10).requires_grad_()
    y = Rounded.apply(x)
    assert torch.equal(y, x.detach().bfloat16().float())
    y.sum().backward()
    assert x.grad.eq(1).all()


def test_training_lowers_the_loss_of_clustered_weights(llama_work):
    def loss(model):
        with torch.no_grad():
            return sum(float(llama_work.loss(model, b)) for b in llama_work.training)

    first, last = (Dkm(bits=2, steps=n, lr=3e-3).apply(llama_work.model, llama_work) for n in (1, 30))
    assert loss(last) < 0.95 * loss(first)
    assert sum(isinstance(m, CodebookLinear) for m in last.modules()) == 15
    with pytest.raises(UserError, match="to train on"):
        Dkm().apply(llama_work.model)
