"""Moments against sums formed here, and gradients against one backward pass per sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput import moments as _moments
from lilliput.errors import UserError
from lilliput.moments import Moments, gradient_moments, input_shapes, input_squares, layer_rows, second_moments
from lilliput.workload import Workload


def classifier(model, x, batch_size=5):
    labels = torch.arange(len(x)) % 3
    batches = [{"input": a, "label": b} for a, b in zip(x.split(batch_size), labels.split(batch_size))]
    return Workload.classifier(model, batches, batches, batches)


class Net(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.grouped = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.relu(self.grouped(self.relu(self.conv(x)))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_linear_moments_are_the_sum_over_rows(net):
    x = torch.randn(13, 2, 8, 8)
    seen = []
    net.fc.register_forward_pre_hook(lambda layer, args: seen.append(args[0].double()))
    net(x)
    rows = seen[0]
    found = second_moments(net, classifier(net, x), ["fc"])["fc"]
    torch.testing.assert_close(found.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_squares_are_the_diagonal_of_the_moments(net):
    x = torch.randn(13, 2, 8, 8)
    work = classifier(net, x)
    found = input_squares(net, work, ["fc"], work.calibration)["fc"]
    torch.testing.assert_close(found, second_moments(net, work, ["fc"])["fc"].diagonal())
    x[3] = float("nan")
    with pytest.raises(UserError, match="'fc' hold NaN"):
        input_squares(net, work, ["fc"], [{"input": x}])
    with pytest.raises(UserError, match="'fc' never ran"):
        input_squares(net, work, ["fc"], [])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "padding": (2, 0)},
        {"dilation": 2, "padding": 2, "groups": 2},
        {"kernel_size": (1, 3), "groups": 4},
    ],
)
def test_patches_are_those_of_unfold(options):
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **options})
    x = torch.randn(3, 4, 9, 7)
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    expected = unfolded.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(layer_rows(conv, x), expected)


def test_rows_times_weights_are_the_output_of_the_layer():
    conv = nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", groups=2, bias=False)
    x = torch.randn(2, 4, 5, 5)
    product = layer_rows(conv, x) @ _moments.grouped_weight(conv).transpose(1, 2)  # (G, n, N / G)
    expected = conv(x).unflatten(1, (2, 3)).permute(1, 0, 3, 4, 2).flatten(1, 3)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_many_patches_are_sampled_at_the_same_places(monkeypatch):
    monkeypatch.setattr(_moments, "PATCHES", 50)
    conv, x = nn.Conv2d(1, 1, 3), torch.randn(2, 1, 20, 20)
    rows = layer_rows(conv, x)
    assert rows.shape == (1, 50, 9)
    torch.testing.assert_close(layer_rows(conv, 2 * x), 2 * rows)


def test_layers_that_share_an_input_get_what_each_would_alone(llama_work):
    layer = "model.layers.1.self_attn"
    names = [f"{layer}.q_proj", f"{layer}.k_proj", f"{layer}.o_proj", "model.layers.1.mlp.up_proj"]
    together = second_moments(llama_work.model, llama_work, names)
    for name in names:
        torch.testing.assert_close(together[name], second_moments(llama_work.model, llama_work, [name])[name])
    torch.testing.assert_close(together[names[0]], together[names[1]])
    assert not torch.allclose(together[names[0]], together[names[2]])


def test_a_layer_between_two_equal_inputs_does_not_mix_them(cnn_work):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input):
            x = input[:, 0, :4, 0]
            return self.a(x) + self.b(x * 3) + self.c(x)

    moments = second_moments(Two(), cnn_work, ["a", "b", "c"])
    torch.testing.assert_close(moments["b"], 9 * moments["a"])
    torch.testing.assert_close(moments["c"], moments["a"])


def test_shapes_are_those_of_the_first_call(net):
    work = classifier(net, torch.randn(13, 2, 8, 8))
    assert input_shapes(net, work, ["conv", "fc"], work.example) == {"conv": (1, 2, 8, 8), "fc": (1, 6)}
    net.idle = nn.Linear(2, 2)
    assert input_shapes(net, work, ["idle"], work.example) == {}


def test_cross_moments_and_means_pair_the_rows():
    x, y = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    moments = Moments("layer")
    for part in (slice(0, 3), slice(3, 7)):
        moments.add(x[:, part], y[:, part])
    torch.testing.assert_close(moments.get("cross"), torch.einsum("gnk,gnl->gkl", x, y) / 7)
    torch.testing.assert_close(moments.get("other_mean"), y.mean(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_names_the_layer(net, bad):
    x = torch.randn(4, 2, 8, 8)
    x[2, 0, 3, 3] = bad
    with pytest.raises(UserError, match="'conv'"):
        second_moments(net, classifier(net, x), ["conv", "fc"])


def test_a_layer_that_never_runs_is_named(net):
    net.idle = nn.Linear(3, 3)
    with pytest.raises(UserError, match="'idle'"):
        second_moments(net, classifier(net, torch.randn(4, 2, 8, 8)), ["idle"])


def test_other_layers_are_refused():
    with pytest.raises(UserError, match="Embedding"):
        layer_rows(nn.Embedding(3, 3), torch.zeros(1, 1))


@pytest.mark.parametrize("inplace", [False, True])
def test_squared_gradients_are_those_of_each_sample_alone(inplace):
    torch.manual_seed(0)
    net, x = Net(inplace).eval(), torch.randn(8, 2, 8, 8)
    work = classifier(net, x, batch_size=4)
    moments, fisher = gradient_moments(net, work, ["conv", "grouped", "fc"])
    for name, expected in _one_by_one(net, work).items():
        torch.testing.assert_close(fisher[name], expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(moments["fc"], second_moments(net, work, ["fc"])["fc"])


def _one_by_one(net, work):
    outputs, found = {}, {"conv": [], "grouped": [], "fc": []}

    def keep(name):
        def hook(module, args, out):
            outputs[name] = out
            return out.clone()

        return hook

    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in found]
    for batch in work.calibration:
        for x, label in zip(batch["input"], batch["label"]):
            loss = F.cross_entropy(net(x[None]), label[None])
            for name, gradient in zip(found, torch.autograd.grad(loss, [outputs[n] for n in found])):
                rows = gradient.movedim(1, -1).reshape(-1, gradient.shape[1])
                found[name].append(rows.square())
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).mean(0) for name, rows in found.items()}


def test_text_gradients_do_not_depend_on_the_batch_size(llama_work):
    name = "model.layers.0.mlp.down_proj"
    whole = gradient_moments(llama_work.model, llama_work, [name])[1][name]
    ones = [{"input_ids": row[None]} for b in llama_work.calibration for row in b["input_ids"]]
    llama_work.calibration = ones
    torch.testing.assert_close(
        gradient_moments(llama_work.model, llama_work, [name])[1][name], whole, rtol=1e-3, atol=0
    )
    assert whole.shape == (32,)
    assert (whole > 0).all()


def test_the_model_is_left_as_it_was(net):
    net.train()
    net.conv.weight.requires_grad_(False)
    work = classifier(net, torch.randn(4, 2, 8, 8))
    gradient_moments(net, work, ["conv", "fc"])
    assert net.training
    assert net.fc.training
    assert [p.requires_grad for p in net.conv.parameters()] == [False, True]
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
