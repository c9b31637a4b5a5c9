import copy

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.distill.hidden import (
    Hidden,
    blocks_of,
    captured,
    cosine_distance,
    depth_pairs,
    squared_distance,
)
from lilliput.methods.distill.logits import Logits
from lilliput.methods.factorize.tucker import Tucker
from lilliput.workload import Workload
from lilliput.zoo import nets


def test_squared_distance_against_numpy_and_free_of_scale():
    s, t = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    expected = ((s - t) ** 2).sum() / (t**2).sum()
    assert squared_distance(torch.tensor(s), torch.tensor(t)).item() == pytest.approx(expected, rel=1e-5)
    assert squared_distance(torch.tensor(s * 9), torch.tensor(t * 9)).item() == pytest.approx(expected, rel=1e-5)
    assert squared_distance(torch.ones(2), torch.zeros(2)).isfinite()


def test_cosine_distance_against_scipy():
    s, t = np.random.default_rng(1).normal(size=(2, 6, 5))
    expected = np.mean([cosine(a, b) for a, b in zip(s, t)])
    found = cosine_distance(torch.tensor(s).view(2, 3, 5), torch.tensor(t).view(2, 3, 5)).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert cosine_distance(torch.zeros(1, 4), torch.ones(1, 4)).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("student", "teacher", "ends"),
    [(2, 6, [2, 5]), (3, 3, [0, 1, 2]), (3, 4, [0, 2, 3]), (1, 5, [4]), (6, 2, [0, 0, 0, 0, 1, 1]), (5, 6, None)],
)
def test_depth_pairs(student, teacher, ends):
    pairs = depth_pairs([f"s{i}" for i in range(student)], [f"t{i}" for i in range(teacher)])
    found = [int(t[1:]) for t in pairs.values()]
    assert found == sorted(found)
    assert found[-1] == teacher - 1
    assert ends is None or found == ends


def test_blocks_are_found(tiny_llama):
    assert blocks_of(tiny_llama) == ["model.layers.0", "model.layers.1"]
    assert blocks_of(nets.resnet(4, 8)) == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(UserError, match=r"distill\.logits"):
        blocks_of(nn.Linear(2, 2))


@pytest.mark.parametrize("method", [None, Tucker(ratio=0.5)], ids=["whole", "factored"])
def test_targets_are_refused_where_apply_is(method, cnn_work):
    """A net without a list of blocks, whose factored convolutions are lists, but of factors."""
    model = method.apply(cnn_work.model, cnn_work) if method else cnn_work.model
    for call in (lambda: list(Hidden().targets(model)), lambda: Hidden(steps=1).apply(model, cnn_work)):
        with pytest.raises(UserError, match=r"no list of blocks.*use distill\.logits"):
            call()


def test_targets_are_what_learns(tiny_llama):
    assert list(Hidden().targets(tiny_llama)) == list(Logits().targets(tiny_llama))


def test_captured_gives_the_outputs_width_last_and_leaves_no_hook():
    net = nets.resnet(4, 8).eval()
    x = torch.randn(2, 1, 28, 28)
    with captured(net, ["conv"]) as states:
        net(x)
    torch.testing.assert_close(states["conv"], net.conv(x).permute(0, 2, 3, 1))
    assert not net.conv._forward_hooks


# --- the method ------------------------------------------------------------------------------------------------


@pytest.fixture
def resnet_work():
    """Random pictures and an untrained teacher with running statistics of these."""
    torch.manual_seed(0)
    teacher = nets.resnet(8, 14, stem_stride=4)
    pictures = [torch.randn(16, 1, 28, 28) for _ in range(4)]
    with torch.no_grad():
        for x in pictures * 5:
            teacher.train()(x)
    splits = [[{"input": x, "label": torch.zeros(16, dtype=torch.long)}] for x in pictures[1:]]
    return Workload.classifier(teacher.eval(), *splits, training=[{"input": x} for x in pictures[:1]])


def state_distance(work, model, name, other, measure):
    """Distance of the states of two blocks on validation data."""
    with torch.no_grad(), captured(model.eval(), [name]) as ours, captured(work.model, [other]) as theirs:
        work.forward(model, work.validation[0])
        work.forward(work.model, work.validation[0])
    return measure(ours[name], theirs[other]).item()


@pytest.mark.parametrize(("distance", "measure"), [("squared", squared_distance), ("cosine", cosine_distance)])
def test_states_come_closer_on_unseen_data_than_by_logits_alone(resnet_work, distance, measure):
    student = copy.deepcopy(resnet_work.model)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    options = {"steps": 40, "lr": 3e-3}
    blocks = ("blocks.3", "blocks.3")
    before = state_distance(resnet_work, copy.deepcopy(student), *blocks, measure)
    plain = Logits(**options).apply(student, resnet_work)
    alone = state_distance(resnet_work, plain, *blocks, measure)
    taught = Hidden(weight=10.0, distance=distance, **options).apply(student, resnet_work)
    after = state_distance(resnet_work, taught, *blocks, measure)
    assert after < 0.9 * min(before, alone)


def test_a_narrower_student_learns_through_a_map_that_is_thrown_away(resnet_work):
    torch.manual_seed(1)
    student = nets.resnet(4, 8, stem_stride=4)
    taught = Hidden(steps=3).apply(student, resnet_work)
    assert [n for n, _ in taught.named_parameters()] == [n for n, _ in student.named_parameters()]
    assert not torch.equal(taught.conv.weight, student.conv.weight)
    assert not any(m._forward_hooks for model in (taught, resnet_work.model) for m in model.modules())


def test_a_llama_with_fewer_blocks(llama_work):
    student = copy.deepcopy(llama_work.model)
    del student.model.layers[0]
    student.config.num_hidden_layers = 1
    before = state_distance(llama_work, student, "model.layers.0", "model.layers.1", squared_distance)
    taught = Hidden(steps=40, lr=3e-3, hard=0.1).apply(student, llama_work)
    assert state_distance(llama_work, taught, "model.layers.0", "model.layers.1", squared_distance) < before


def test_weight_zero_is_the_logits_method(resnet_work):
    torch.manual_seed(1)
    student = nets.resnet(8, 8, stem_stride=4)
    a = Hidden(steps=4, weight=0.0).apply(student, resnet_work)
    b = Logits(steps=4).apply(student, resnet_work)
    torch.testing.assert_close(a.head.weight, b.head.weight)


def test_it_repeats_exactly(resnet_work):
    student = nets.resnet(4, 8, stem_stride=4)
    a, b = (Hidden(steps=3).apply(student, resnet_work).head.weight for _ in range(2))
    assert torch.equal(a, b)


def test_states_of_another_size_are_refused_with_the_way_out(resnet_work):
    other = nets.resnet(8, 8, stem_stride=1)
    with pytest.raises(UserError, match=r"no block of the student.*use distill\.logits"):
        Hidden(steps=1).apply(other, resnet_work)


def test_an_unknown_distance_is_refused():
    with pytest.raises(UserError, match="distance is 'far'"):
        Hidden(distance="far")
