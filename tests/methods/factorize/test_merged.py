"""factorize.merged: exact where nothing separates, the bottleneck's depth restored where a norm does."""

import pytest
import torch
from torch import nn

from lilliput.edits import describe, replay
from lilliput.errors import UserError
from lilliput.methods.factorize._chains import linear_pairs
from lilliput.methods.factorize.merged import Merged, multiply
from lilliput.methods.factorize.tucker import Tucker
from lilliput.workload import Workload
from lilliput.zoo.nets import bottleneck_resnet, vit


class Plain(nn.Module):
    """1x1, 3x3, 1x1 without anything between: what merging is exact for after Tucker."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 20, 1, stride=2)
        self.fc1, self.fc2 = nn.Linear(20, 30, bias=False), nn.Linear(30, 10)

    def forward(self, input):
        return self.fc2(self.fc1(self.c(self.b(self.a(input))).mean((2, 3))))


@pytest.fixture
def bottleneck_work(cnn_work):
    torch.manual_seed(0)
    model = bottleneck_resnet(width=8, depth=11)
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 1, 16, 16))
    model.eval()
    return Workload.classifier(model, cnn_work.calibration, cnn_work.validation, cnn_work.test)


def test_merging_without_nonlinearities_is_exact():
    model = Tucker(ratio=0.5).apply(Plain(), layers=["b"])
    x = torch.randn(2, 1, 9, 9)
    merged = Merged().apply(model)
    torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=1e-5)
    kinds = [type(merged.get_submodule(n)) for n in ("a", "b.0", "b.1", "b.2", "c", "fc1", "fc2")]
    assert kinds.count(nn.Identity) == 3
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_product_of_two_layers():
    a, b = nn.Conv2d(4, 6, 1, stride=2), nn.Conv2d(6, 3, 1, stride=(1, 2))
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(multiply(a, b)(x), b(a(x)), atol=1e-6, rtol=1e-5)
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    torch.testing.assert_close(multiply(a, b, norm)(x), b(norm(a(x))), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"Linear and a Conv2d"):
        multiply(nn.Linear(4, 4), b)


def test_a_low_rank_pair_is_not_merged_back():
    model = Tucker(ratio=0.5).apply(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()))
    assert len(linear_pairs(model)) == 1
    assert list(Merged().targets(model)) == []


def convolutions(model):
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_a_decomposed_bottleneck_returns_to_its_depth(bottleneck_work):
    cores = [n for n in Tucker().targets(bottleneck_work.model) if n.endswith("conv2")]
    model = Tucker(ratio=0.5).apply(bottleneck_work.model, layers=cores)
    merged = Merged(norms="move").apply(model, bottleneck_work)
    assert convolutions(model) == convolutions(bottleneck_work.model) + 2 * len(cores)
    assert convolutions(merged) == convolutions(bottleneck_work.model)
    block = merged.blocks[0]
    assert block.bn1.num_features == block.conv2[1].in_channels == block.conv1.out_channels
    assert block.bn2.num_features == block.conv2[1].out_channels == block.conv3.in_channels
    assert isinstance(block.conv2[0], nn.Identity)
    assert torch.isfinite(merged(bottleneck_work.test[0]["input"])).all()
    assert list(Merged(norms="keep").targets(model)) == []


def test_moved_norms_start_as_the_identity_with_the_datas_statistics(bottleneck_work):
    model = Tucker(ratio=0.5).apply(bottleneck_work.model, layers=["blocks.0.conv2"])
    merged = Merged(norms="move").apply(model, bottleneck_work)
    norm, seen = merged.blocks[0].bn1, []
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for batch in bottleneck_work.calibration:
        merged(batch["input"])
    x = torch.cat(seen)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), unbiased=False), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm(x), x, atol=1e-4, rtol=1e-4)


def test_moving_is_exact_where_the_activation_does_nothing(cnn_work):
    """With ReLU replaced by nothing, only the norms move, and those start as the identity."""
    model = bottleneck_resnet(width=8, depth=11)
    for block in model.blocks:
        block.relu = nn.Identity()
    model.eval()
    work = Workload.classifier(model, cnn_work.calibration, cnn_work.validation, cnn_work.test)
    model = Tucker(ratio=0.5).apply(model, layers=["blocks.0.conv2", "blocks.2.conv2"])
    merged = Merged(norms="move").apply(model, work)
    x = cnn_work.test[0]["input"]
    torch.testing.assert_close(merged(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_merged_model_is_rebuilt_from_edits(bottleneck_work):
    model = Tucker(ratio=0.5).apply(bottleneck_work.model, layers=["blocks.1.conv2"])
    merged = Merged(norms="move").apply(model, bottleneck_work)
    skeleton = bottleneck_resnet(width=8, depth=11)
    rebuilt = replay(skeleton, describe(merged, skeleton)).eval()
    rebuilt.load_state_dict(merged.state_dict())
    x = bottleneck_work.test[0]["input"]
    assert torch.equal(rebuilt(x), merged(x))


def test_multilayer_perceptrons_and_untraceable_models_are_left_alone(llama_work):
    assert list(Merged(norms="move").targets(vit(dim=16, layers=1, heads=2))) == []
    assert list(Merged().targets(llama_work.model)) == []

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="finds no layer"):
        Merged().apply(Branches())


def test_a_layer_used_twice_is_not_merged():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    assert linear_pairs(Twice()) == []


def test_moving_norms_needs_a_workload(bottleneck_work):
    model = Tucker().apply(bottleneck_work.model, layers=["blocks.0.conv2"])
    with pytest.raises(UserError, match=r"norms='keep'"):
        Merged(norms="move").apply(model)
