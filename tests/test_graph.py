import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lilliput.errors import UserError
from lilliput.graph import coupled_channels, kept_count, remove_channels_
from lilliput.methods.factorize.low_rank import LowRank


def randomized(model, seed=0):
    """The model with non-trivial norms, in evaluation mode."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
    return model.eval()


class Residual(nn.Module):
    """Convolutions with a residual, a depthwise layer, and a flatten into the head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.deep = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.down(torch.relu(self.deep(self.up(x))))
        return self.head(x.flatten(1))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.after = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(10, 5, 1)

    def forward(self, x):
        return self.after(torch.cat((self.left(x), self.right(x)), 1)).mean((2, 3))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.conv, self.squeeze, self.excite, self.head = (
            nn.Conv2d(1, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.conv(x)
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class Shuffle(nn.Module):
    """Channels are reversed between two layers, which the graph cannot see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.first(x).flip(1)
        return self.second(x).mean((2, 3))


def outputs_with_zeroed_columns(model, x, columns):
    masked = copy.deepcopy(model)
    for name, indices in columns.items():
        masked.get_submodule(name).weight.data[:, indices] = 0
    return masked(x)


def test_groups_of_a_residual_net():
    model, x = randomized(Residual()), torch.randn(2, 1, 4, 4)
    groups = {g.name: g for g in coupled_channels(model, x)}
    assert list(groups) == ["stem", "up", "head"]
    assert set(groups["stem"].layers) == {
        ("stem", "out"),
        ("bn", "out"),
        ("up", "in"),
        ("down", "out"),
        ("head", "in"),
    }
    assert set(groups["up"].layers) == {("up", "out"), ("deep", "out"), ("down", "in")}
    assert [(g.channels, g.prunable) for g in groups.values()] == [(8, True), (12, True), (10, False)]
    flat = next(m for m in groups["stem"].members if m.module == "head")
    assert [c for i, c in zip(flat.indices, flat.channels) if i in (0, 15, 16, 127)] == [0, 0, 1, 7]


def test_removal_equals_zeroing_through_residual_depthwise_and_flatten():
    model, x = randomized(Residual()), torch.randn(2, 1, 4, 4)
    flat = [i for c in (1, 6) for i in range(16 * c, 16 * c + 16)]
    expected = outputs_with_zeroed_columns(model, x, {"up": [1, 6], "head": flat, "down": [0, 5, 11]})
    cut = remove_channels_(copy.deepcopy(model), x, {"down": [6, 1], "up": [0, 5, 11]})
    torch.testing.assert_close(cut(x), expected, atol=1e-5, rtol=1e-5)
    assert (cut.stem.out_channels, cut.bn.num_features, cut.down.out_channels, cut.head.in_features) == (6, 6, 6, 96)
    assert (cut.deep.groups, cut.deep.in_channels, tuple(cut.deep.weight.shape)) == (9, 9, (9, 1, 3, 3))


def test_removal_through_a_concatenation():
    model, x = randomized(Concat()), torch.randn(2, 1, 4, 4)
    expected = outputs_with_zeroed_columns(model, x, {"after": [0, 4, 9]})
    cut = remove_channels_(copy.deepcopy(model), x, {"left": [0], "right": [0, 5]})
    torch.testing.assert_close(cut(x), expected, atol=1e-5, rtol=1e-5)
    assert (cut.left.out_channels, cut.right.out_channels, cut.after.in_channels) == (3, 4, 7)


def test_removal_through_a_gate():
    model, x = randomized(Gate()), torch.randn(2, 1, 4, 4)
    expected = outputs_with_zeroed_columns(model, x, {"squeeze": [2], "head": [2], "excite": [3]})
    cut = remove_channels_(copy.deepcopy(model), x, {"conv": [2], "squeeze": [3]})
    torch.testing.assert_close(cut(x), expected, atol=1e-5, rtol=1e-5)


def test_state_of_the_model_survives():
    model, x = randomized(Residual()), torch.randn(2, 1, 4, 4)
    model.bn.train()
    model.stem.weight.requires_grad_(False)
    remove_channels_(model, x, {"stem": [0]})
    assert model.bn.training
    assert not model.training
    assert not model.stem.weight.requires_grad
    assert model.up.weight.requires_grad


def test_nothing_to_remove_is_identity():
    model, x = randomized(Residual()), torch.randn(2, 1, 4, 4)
    before = copy.deepcopy(model.state_dict())
    remove_channels_(model, x, {"stem": [], "up": []})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_heads_and_grouped_convolutions_are_not_cut():
    grouped = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1))
    assert [g.prunable for g in coupled_channels(grouped, torch.randn(1, 1, 4, 4))] == [False, False, False]
    block = nn.Sequential(nn.Sequential(Attention()), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([block])[0], nn.Linear(8, 3))
    prunable = {g.name: g.prunable for g in coupled_channels(model, torch.randn(2, 5, 4))}
    assert prunable == {"0": True, "1.0.0.q": False, "1.0.0.out": True, "1.1.0": True, "1.1.2": True, "2": False}


def test_the_width_of_factored_heads_stays_too():
    block = nn.Sequential(nn.Sequential(Attention()), nn.Linear(8, 8))
    model = LowRank(whiten="none").apply(nn.Sequential(nn.Linear(4, 8), nn.ModuleList([block])[0]))
    prunable = {g.name: g.prunable for g in coupled_channels(model, torch.randn(2, 5, 4))}
    assert prunable["1.0.0.q.1"] is False
    assert prunable["1.0.0.q.0"]
    assert prunable["1.0.0.out.0"]


def test_batches_and_logits_are_understood():
    model = randomized(Residual())
    batch = {"input": torch.randn(1, 1, 4, 4), "label": torch.tensor([1])}
    assert len(coupled_channels(model, batch)) == 3
    assert len(coupled_channels(model, 1, forward=lambda m, _: {"a": m(batch["input"])})) == 3


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ({"nowhere": [0]}, "'nowhere' makes no channels"),
        ({"bn": [9]}, "out of range"),
        ({"stem": [-1]}, "out of range"),
        ({"stem": range(8)}, "all 8 channels of 'stem' would go"),
        ({"head": [0]}, "model's output"),
        ({"stem": [0], "down": [1]}, "coupled with another layer"),
    ],
)
def test_wrong_requests_are_refused(remove, message):
    with pytest.raises(UserError, match=message):
        remove_channels_(randomized(Residual()), torch.randn(2, 1, 4, 4), remove)


def test_a_misread_graph_is_noticed():
    with pytest.raises(UserError, match="misread"):
        remove_channels_(randomized(Shuffle()), torch.randn(2, 1, 4, 4), {"first": [0]})


@given(st.integers(1, 500), st.floats(0, 1), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_kept_count_is_a_multiple_and_never_zero(total, ratio, round_to):
    kept = kept_count(total, ratio, round_to)
    assert 1 <= kept <= total
    assert kept == total or kept % round_to == 0
    assert ratio == 0 or abs(kept - total * (1 - ratio)) <= max(round_to, 1)


def test_kept_count_values():
    assert [kept_count(100, r) for r in (0, 0.25, 0.5, 1)] == [100, 75, 50, 1]
    assert [kept_count(100, r, 32) for r in (0, 0.04, 0.5, 0.9, 1)] == [100, 96, 64, 32, 32]
    assert kept_count(20, 0.9, 32) == 20
    with pytest.raises(UserError, match=r"ratio is 1\.5"):
        kept_count(10, 1.5)
