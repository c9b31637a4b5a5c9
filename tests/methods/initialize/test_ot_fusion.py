import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lilliput.errors import UserError
from lilliput.methods.initialize._coupling import distances, exact, sinkhorn
from lilliput.methods.initialize._hidden import Hidden, hidden_layers
from lilliput.methods.initialize.ot_fusion import OtFusion
from lilliput.methods.prune.neurons import Neurons
from lilliput.workload import Workload

WAYS = [OtFusion(), OtFusion(ground="activations"), OtFusion(solver="sinkhorn", epsilon=2e-3)]


def mlp(first=12, second=8, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(16, first), nn.ReLU(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, 4)
    return nn.Sequential(nn.Flatten(), *layers).eval()


class Cnn(nn.Module):
    """Two convolutions with batch norms, a flatten that gives each channel four columns, two linear layers."""

    def __init__(self, first=6, second=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3, stride=2, padding=1), nn.BatchNorm2d(second)
        self.fc1, self.fc2 = nn.Linear(4 * second, 10), nn.Linear(10, 4)

    def forward(self, input):
        x = torch.relu(self.bn1(self.conv1(input)))
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 4)
        return self.fc2(nn.functional.gelu(self.fc1(x.flatten(1))))  # no neuron is silent: all can be told apart


def cnn(first=6, second=8, seed=0):
    torch.manual_seed(seed)
    model = Cnn(first, second)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        for _ in range(20):
            model(pictures(16, 64, seed))
    return model.eval()


def pictures(size, count, seed):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def work_of(model, size):
    batches = [{"input": pictures(size, 32, seed), "label": torch.zeros(32, dtype=torch.long)} for seed in (5, 6)]
    return Workload.classifier(model, batches, batches, batches)


def permuted(model, work, seed=3):
    """The same function with its hidden neurons in another order, written without the code under test."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for hidden in hidden_layers(model, work):
            first, out = other.get_submodule(hidden.into[0]), other.get_submodule(hidden.out)
            order = torch.randperm(len(first.weight), generator=generator)
            for module in (first, *(other.get_submodule(n) for n in hidden.norms)):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.ndim:
                        tensor.copy_(tensor[order].clone())
            places = out.weight.shape[1] // len(order)
            columns = (order[:, None] * places + torch.arange(places)).flatten()
            out.weight.copy_(out.weight[:, columns].clone())
    return other


def llama_work_with(work, scale):
    """The tiny Llama, and one whose feed-forward neurons are in another order and slightly moved."""
    other = copy.deepcopy(work.model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in other.model.layers:
            order = torch.randperm(96, generator=generator)
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.copy_(linear.weight[order] + scale * torch.randn(96, 32, generator=generator))
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    return other


# --- couplings -------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_numpy():
    a, b = torch.randn(5, 7), torch.randn(4, 7)
    expected = np.square(a.double().numpy()[:, None] - b.double().numpy()[None]).sum(-1)
    np.testing.assert_allclose(distances(a, b).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_the_exact_coupling_is_the_best_permutation():
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = min(sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    coupling = exact(cost)
    assert float((coupling * cost).sum()) * 5 == pytest.approx(best)
    assert sorted(coupling.unique().tolist()) == pytest.approx([0, 0.2])


@pytest.mark.parametrize(("n", "m"), [(4, 6), (6, 4), (3, 9), (1, 5)])
def test_couplings_of_other_widths_are_those_of_the_linear_program(n, m):
    cost = torch.rand(n, m, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    sums = np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]
    program = linprog(cost.numpy().ravel(), A_eq=np.vstack([rows, columns]), b_eq=sums)
    coupling = exact(cost)
    assert float((coupling * cost).sum()) == pytest.approx(program.fun)
    torch.testing.assert_close(coupling.sum(1), torch.full((n,), 1 / n).double())
    torch.testing.assert_close(coupling.sum(0), torch.full((m,), 1 / m).double())


def test_sinkhorn_tends_to_the_exact_coupling_and_to_none():
    cost = torch.rand(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    near = sinkhorn(cost, 1e-3)
    torch.testing.assert_close(near, exact(cost), rtol=0, atol=1e-3)
    torch.testing.assert_close(sinkhorn(cost, 1e4), torch.full((6, 4), 1 / 24).double(), rtol=1e-3, atol=0)
    middle = sinkhorn(cost, 0.1)
    torch.testing.assert_close(middle.sum(1), torch.full((6,), 1 / 6).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(middle.sum(0), torch.full((4,), 1 / 4).double(), rtol=1e-9, atol=0)
    # the optimality condition: log T + C / epsilon is a sum of a row's and a column's number
    rest = middle.log() + cost / (0.1 * cost.mean())
    rest = rest - rest.mean(1, keepdim=True)
    torch.testing.assert_close(rest, rest[:1].expand(6, 4), rtol=0, atol=1e-9)


def test_sinkhorn_stops_when_rows_sum_well_enough(monkeypatch):
    cost = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double()
    found = {rounds: sinkhorn(cost, 0.1, rounds) for rounds in (1, 2, 5000)}
    monkeypatch.setattr("lilliput.methods.initialize._coupling.TOLERANCE", 1.2)
    assert float((6 * found[1].sum(1) - 1).abs().max()) < 1.2
    assert torch.equal(sinkhorn(cost, 0.1), found[1])
    assert not torch.equal(found[2], found[1])


def test_widths_that_share_no_divisor_are_refused_where_they_are_large():
    assert math.lcm(97, 64) > 4096
    with pytest.raises(UserError, match="97 and 64 neurons have 6208 as their least common multiple"):
        exact(torch.rand(97, 64))
    assert sinkhorn(torch.rand(97, 64), 0.05).shape == (97, 64)


def test_without_scipy_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match=r"pip install 'lilliput\[fuse\]'"):
        exact(torch.rand(3, 3))


# --- where neurons are -----------------------------------------------------------------------------------------------


def test_hidden_neurons_of_a_chain_are_found_with_their_norms():
    model = cnn()
    assert hidden_layers(model, work_of(model, 16)) == [
        Hidden(("conv1",), ("bn1",), "conv2"),
        Hidden(("conv2",), ("bn2",), "fc1"),
        Hidden(("fc1",), (), "fc2"),
    ]


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_what_is_proved_does_not_depend_on_the_size_of_the_answers(factor):
    model = mlp()
    with torch.no_grad():
        for parameter in model[5].parameters():
            parameter.mul_(factor)
    assert len(hidden_layers(model, work_of(model, 4))) == 2


def test_hidden_neurons_of_a_llama_are_those_of_its_feed_forward_parts(llama_work):
    found = hidden_layers(llama_work.model, llama_work)
    path = "model.layers.1.mlp"
    assert found[1] == Hidden((f"{path}.gate_proj", f"{path}.up_proj"), (), f"{path}.down_proj")
    assert len(found) == 2


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, input):
        return self.b(self.a(self.a(input.flatten(1))))


class Own(Twice):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Twice, "'a' runs twice"),
        (Own, "owns tensors itself"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Softmax(1), nn.GroupNorm(2, 6), nn.Linear(6, 4)),
         "exchanging its neurons changes what it answers"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(64, 4)),
         "'1' is no plain linear layer and no convolution of one group"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), "no hidden neurons"),
    ],
)  # fmt: skip
def test_nets_whose_neurons_cannot_be_told_apart_are_refused(make, why):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    with pytest.raises(UserError, match=why):
        OtFusion().fuse(model, copy.deepcopy(model), work_of(model, 4))


def test_residual_nets_and_gpt2_are_refused(cnn_work, llama_work):
    with pytest.raises(UserError, match="TinyCnn is neither a plain chain"):
        OtFusion().fuse(cnn_work.model, cnn_work.model, cnn_work)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UserError, match="Conv1D"):
        OtFusion().fuse(gpt2, gpt2, llama_work)


# --- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", WAYS, ids=["weights", "activations", "sinkhorn"])
@pytest.mark.parametrize(("make", "size"), [(mlp, 4), (cnn, 16)])
def test_a_permuted_net_is_put_back_in_order(settings, make, size):
    model = make()
    work = work_of(model, size)
    other = permuted(model, work)
    x = work.test[0]["input"]
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    moved = settings.aligned(model, other, work)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(moved[name], tensor, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("ground", ["weights", "activations"])
def test_a_permuted_feed_forward_part_is_put_back_in_order(llama_work, ground):
    other = llama_work_with(llama_work, 1e-4)
    ids = llama_work.test[0]["input_ids"]
    fused = OtFusion(ground=ground).fuse(llama_work.model, other, llama_work)
    torch.testing.assert_close(fused(ids).logits, llama_work.model(ids).logits, rtol=1e-2, atol=1e-2)
    plain = OtFusion(share=1.0).fuse(llama_work.model, other, llama_work)
    torch.testing.assert_close(plain(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "size"), [(mlp, 4), (cnn, 16)])
def test_the_moved_net_answers_as_before_whatever_it_is_moved_to(make, size):
    """Exact couplings of equal widths are permutations, so the function stays."""
    model, other = make(seed=0), make(seed=1)
    work = work_of(model, size)
    again = copy.deepcopy(model)
    again.load_state_dict(OtFusion().aligned(model, other, work))
    x = work.test[0]["input"]
    torch.testing.assert_close(again(x), other(x), rtol=1e-4, atol=1e-4)


def test_a_net_of_copied_neurons_is_carried_to_the_narrow_one_and_back():
    narrow, wide = mlp(12, 8), mlp(24, 8)
    work = work_of(narrow, 4)
    with torch.no_grad():
        wide[1].weight.copy_(narrow[1].weight.repeat(2, 1))
        wide[1].bias.copy_(narrow[1].bias.repeat(2))
        wide[3].weight.copy_(narrow[3].weight.repeat(1, 2) / 2)
        wide[3].bias.copy_(narrow[3].bias)
        wide[5].load_state_dict(narrow[5].state_dict())
    x = work.test[0]["input"]
    torch.testing.assert_close(wide(x), narrow(x), rtol=1e-4, atol=1e-5)
    for target, source in ((narrow, wide), (wide, narrow)):
        fused = OtFusion().fuse(target, source, work)
        torch.testing.assert_close(fused(x), narrow(x), rtol=1e-4, atol=1e-5)
        assert [p.shape for p in fused.parameters()] == [p.shape for p in target.parameters()]


def test_share_weighs_the_two_nets_and_neither_is_changed():
    model, other = mlp(seed=0), mlp(seed=1)
    work = work_of(model, 4)
    before = [copy.deepcopy(one.state_dict()) for one in (model, other)]
    moved = OtFusion().aligned(model, other, work)
    for share in (0.0, 0.25, 1.0):
        fused = OtFusion(share=share).fuse(model, other, work).state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(fused[name], (1 - share) * tensor + share * moved[name])
    for one, old in zip((model, other), before):
        assert all(torch.equal(tensor, old[name]) for name, tensor in one.state_dict().items())


def test_aligned_nets_are_nearer_than_they_were():
    model, other = mlp(64, 32, seed=0), mlp(64, 32, seed=1)
    moved = OtFusion().aligned(model, other, work_of(model, 4))

    def apart(tensors):
        return sum(float((tensors[n] - t).square().sum()) for n, t in model.state_dict().items())

    assert apart(moved) < 0.95 * apart(other.state_dict())


def test_statistics_of_norms_are_those_of_the_fused_net():
    model, other = cnn(seed=0), cnn(seed=1)
    work = work_of(model, 16)
    fused = OtFusion().fuse(model, other, work)
    with torch.no_grad():
        seen = fused.conv1(torch.cat([batch["input"] for batch in work.calibration]))
    torch.testing.assert_close(fused.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert fused.bn1.momentum == 0.1
    assert not any(module.training for module in fused.modules())


def test_a_pruned_llama_is_fused_with_its_parent(llama_work):
    small = Neurons(ratio=0.5, round_to=8).apply(llama_work.model, llama_work)
    fused = OtFusion(share=0.3).fuse(small, llama_work.model, llama_work)
    assert fused.model.layers[0].mlp.down_proj.in_features == 48
    assert torch.isfinite(fused(llama_work.test[0]["input_ids"]).logits).all()


def test_other_layers_and_other_outputs_are_refused():
    model = mlp()
    work = work_of(model, 4)
    with pytest.raises(UserError, match="not of the same layers"):
        OtFusion().fuse(model, nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), work)
    larger = mlp()
    larger[1] = nn.Linear(25, 12)  # it could not even run
    with pytest.raises(UserError, match=r"'1\.weight' is \[12, 16\] in one net and \[12, 25\] in the other"):
        OtFusion().fuse(model, larger, work)
    other = mlp()
    other[5] = nn.Linear(8, 5)
    with pytest.raises(UserError, match=r"'5\.weight' is \[4, 8\] in one net and \[5, 8\] in the other"):
        OtFusion().fuse(model, other, work)


def test_neurons_that_answer_at_other_places_are_compared_by_weights_alone():
    def strided(stride):
        torch.manual_seed(stride)
        layers = nn.Conv2d(1, 4, 3, stride), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(4, 4)).eval()

    model, other = strided(1), strided(2)
    work = work_of(model, 8)
    assert OtFusion().fuse(model, other, work)(work.test[0]["input"]).shape == (32, 4)
    with pytest.raises(UserError, match="'0' answers at different places"):
        OtFusion(ground="activations").fuse(model, other, work)
