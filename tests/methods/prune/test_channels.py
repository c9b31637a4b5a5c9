import copy

import pytest
import torch

from lilliput.errors import UserError
from lilliput.graph import coupled_channels
from lilliput.methods.prune.channels import Channels, filter_scores, reader_scores
from lilliput.workload import Workload
from lilliput.zoo import nets

X = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def test_filter_scores_against_numpy():
    weight = torch.randn(5, 3, 2, 2)
    squares = (weight.double().numpy() ** 2).sum((1, 2, 3))
    torch.testing.assert_close(filter_scores(weight, 2), torch.tensor(squares / squares.mean()).float())
    ones = abs(weight.double().numpy()).sum((1, 2, 3))
    torch.testing.assert_close(filter_scores(weight, 1), torch.tensor(ones / ones.mean()).float())


def test_reader_score_is_the_expected_error_of_a_1x1_reader():
    x, weight = torch.randn(500, 4), torch.randn(3, 4)
    scores = reader_scores(weight[:, :, None, None], x.square().mean(0))
    for c in range(4):
        error = (x[:, c : c + 1] * weight[:, c]).square().sum(1).mean()
        assert float(scores[c]) == pytest.approx(float(error), rel=1e-4)


def masked(model, gone):
    """The dense model with the columns at zero that read the removed channels of conv1 (and conv2) and of conv3."""
    model = copy.deepcopy(model)
    for name, index in (("conv2", "first"), ("conv3", "first"), ("fc", "last")):
        model.get_submodule(name).weight.data[:, gone[index]] = 0
    return model


def by_hand(model, work, importance):
    """Scores of the residual group (conv1, conv2) and of conv3."""
    convs = [model.conv1, model.conv2, model.conv3]
    w = [c.weight.detach() for c in convs]
    if importance in ("l1", "l2"):
        power = 1 if importance == "l1" else 2
        sums = [v.abs().pow(power).sum((1, 2, 3)) for v in w]
        sums = [s / s.mean() for s in sums]
        return sums[0] + sums[1], sums[2]
    if importance == "bn":
        gammas = [b.weight.detach().abs() for b in (model.bn1, model.bn2, model.bn3)]
        return gammas[0] + gammas[1], gammas[2]
    inputs = {"conv2": [], "conv3": [], "fc": []}
    for name in inputs:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: inputs[n].append(args[0]))
    with torch.no_grad():
        for batch in work.calibration:
            work.forward(model, batch)
    found = {n: torch.cat(x) for n, x in inputs.items()}
    read = {n: found[n].square().mean((0, 2, 3)) for n in ("conv2", "conv3")}
    first = sum(read[n] * model.get_submodule(n).weight.detach().square().sum((0, 2, 3)) for n in read)
    return first, found["fc"].square().mean(0) * model.fc.weight.detach().square().sum(0)


@pytest.mark.parametrize("importance", ["l1", "l2", "bn", "activation"])
def test_equals_masked_reference(tiny_cnn, cnn_work, importance):
    torch.manual_seed(5)
    for bn in (tiny_cnn.bn1, tiny_cnn.bn2, tiny_cnn.bn3):
        bn.weight.data.uniform_(-2, 2)
        bn.bias.data.uniform_(-1, 1)
    small = Channels(ratio=0.5, importance=importance).apply(tiny_cnn, cnn_work)
    first, last = by_hand(copy.deepcopy(tiny_cnn), cnn_work, importance)
    gone = {"first": first.topk(8, largest=False).indices, "last": last.topk(16, largest=False).indices}
    torch.testing.assert_close(small(X), masked(tiny_cnn, gone)(X), atol=1e-5, rtol=1e-5)
    assert [c.out_channels for c in (small.conv1, small.conv2, small.conv3)] == [8, 8, 16]
    assert (small.conv2.in_channels, small.bn1.num_features, small.fc.in_features) == (8, 8, 16)
    assert small.fc.out_features == 10
    assert tiny_cnn.conv1.out_channels == 16


def test_extremes(tiny_cnn, cnn_work):
    same = Channels(ratio=0.0).apply(tiny_cnn, cnn_work)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), tiny_cnn.parameters(), strict=True))
    least = Channels(ratio=0.95, round_to=4).apply(tiny_cnn, cnn_work)
    assert [c.out_channels for c in (least.conv1, least.conv2, least.conv3)] == [4, 4, 4]
    one = Channels(ratio=0.95).apply(tiny_cnn, cnn_work)
    assert one.conv1.out_channels == 1
    assert torch.isfinite(one(X)).all()


def test_named_layers_and_their_ratios(tiny_cnn, cnn_work):
    def sizes(layers):
        small = Channels(ratio=0.5).apply(tiny_cnn, cnn_work, layers=layers)
        return [c.out_channels for c in (small.conv1, small.conv2, small.conv3)]

    assert sizes(["conv3"]) == [16, 16, 16]
    assert sizes(["conv2"]) == [8, 8, 32]
    assert sizes({"conv1": {"ratio": 0.25}, "conv2": {"ratio": 0.75}, "conv3": {"ratio": 0.75}}) == [8, 8, 8]


@pytest.mark.parametrize("build", [nets.resnet, nets.mobilenet, nets.bottleneck_resnet])
def test_zoo_nets_shrink_and_run(build):
    torch.manual_seed(0)
    model = build().eval()
    data = [{"input": torch.randn(4, 1, 28, 28), "label": torch.zeros(4, dtype=torch.long)}]
    work = Workload.classifier(model, data, data, data)
    small = Channels(ratio=0.5, round_to=4).apply(model, work)
    assert sum(p.numel() for p in small.parameters()) < 0.35 * sum(p.numel() for p in model.parameters())
    assert small(data[0]["input"]).shape == (4, 10)
    widths = [g.channels for g in coupled_channels(small, data[0]["input"]) if g.prunable]
    assert all(w % 4 == 0 for w in widths)


def test_bad_input(tiny_cnn, cnn_work, tiny_llama, llama_work):
    with pytest.raises(UserError, match=r"look at calibration data.*prune\.magnitude.*apply\(model, workload\)"):
        Channels().apply(tiny_cnn)
    with pytest.raises(UserError, match="finds no layer it can change in LlamaForCausalLM"):
        Channels().apply(tiny_llama, llama_work)
    with pytest.raises(UserError, match="cannot change 'fc'"):
        Channels().apply(tiny_cnn, cnn_work, layers=["fc"])
    with pytest.raises(UserError, match="ratio is 2"):
        Channels(ratio=2)
    last = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1))
    data = [{"input": torch.randn(1, 1, 4, 4), "label": torch.zeros(1, dtype=torch.long)}]
    with pytest.raises(UserError, match="reach the model's output"):
        Channels().apply(last, Workload.classifier(last, data, data, data))
