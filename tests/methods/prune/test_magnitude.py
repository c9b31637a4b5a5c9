import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import UserError
from lilliput.methods.prune.magnitude import Growing, Magnitude, cubic, mask


def test_cubic_schedule_values():
    assert [cubic(t, 4, 0.0, 0.8) for t in (0, 4, 9)] == [0.0, 0.8, 0.8]
    assert cubic(2, 4, 0.0, 0.8) == pytest.approx(0.8 - 0.8 * 0.125)
    assert cubic(1, 2, 0.2, 0.6) == pytest.approx(0.6 - 0.4 / 8)
    assert cubic(0, 0, 0.0, 0.5) == 0.5
    assert cubic(-1, 4, 0.1, 0.5) == pytest.approx(0.1)


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_cubic_is_monotone(steps, initial, final):
    values = [cubic(t, steps, initial, final) for t in range(steps + 1)]
    differences = np.diff(values) * (1 if final >= initial else -1)
    assert (differences >= -1e-12).all()


@given(st.integers(0, 100), st.floats(0, 1))
@settings(deadline=None)
def test_mask_drops_exactly_the_smallest(seed, sparsity):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    kept = mask(weight, sparsity)
    count = round(sparsity * 35)
    assert int((~kept).sum()) == count
    order = np.sort(np.abs(weight.numpy()).ravel())
    np.testing.assert_array_equal(np.sort(weight[~kept].abs().numpy()), order[:count])


def test_mask_extremes_and_ties():
    weight = torch.ones(4, 4)
    assert mask(weight, 0).all()
    assert not mask(weight, 1).any()
    assert int(mask(weight, 0.5).sum()) == 8
    with pytest.raises(UserError, match=r"sparsity is 1\.2"):
        mask(weight, 1.2)


def test_one_shot_zeroes_the_smallest_of_each_layer(tiny_cnn):
    sparse = Magnitude(sparsity=0.75).apply(tiny_cnn)
    for name in ("conv1", "conv2", "conv3", "fc"):
        before, after = (m.get_submodule(name).weight for m in (tiny_cnn, sparse))
        count = round(0.75 * before.numel())
        assert int((after == 0).sum()) == count
        kept = after != 0
        assert torch.equal(after[kept], before[kept])
        assert before[~kept].abs().max() <= before[kept].abs().min()
    assert torch.equal(sparse.bn1.weight, tiny_cnn.bn1.weight)


def test_own_sparsities_and_identity(tiny_cnn):
    same = Magnitude(sparsity=0.0).apply(tiny_cnn)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), tiny_cnn.parameters(), strict=True))
    some = Magnitude().apply(tiny_cnn, layers={"conv1": {"sparsity": 0.25}, "fc": {"sparsity": 0.99}})
    assert int((some.conv1.weight == 0).sum()) == 36
    assert int((some.fc.weight == 0).sum()) == 317
    assert torch.equal(some.conv2.weight, tiny_cnn.conv2.weight)


def test_tied_head_is_left_alone(tiny_llama):
    targets = list(Magnitude().targets(tiny_llama))
    assert "lm_head" not in targets
    assert len(targets) == 14


def test_training_reaches_the_sparsity_and_learns(cnn_work, tiny_cnn):
    method = Magnitude(sparsity=0.9, steps=20, lr=1e-2)
    trained = method.apply(tiny_cnn, cnn_work)
    cut = Magnitude(sparsity=0.9).apply(tiny_cnn, cnn_work)
    for name in ("conv1", "conv2", "conv3", "fc"):
        weight = trained.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(0.9 * weight.numel())

    def loss(model):
        with torch.no_grad():
            return sum(float(cnn_work.loss(model, b)) for b in cnn_work.training)

    assert loss(trained) < loss(cut)
    assert not trained.training


def test_steps_without_training_data_are_one_shot(tiny_cnn, cnn_work):
    cnn_work.training = None
    once, stepped = (Magnitude(steps=s).apply(tiny_cnn, cnn_work) for s in (0, 50))
    assert torch.equal(once.conv1.weight, stepped.conv1.weight)


def test_growth_follows_the_schedule_and_zeros_stay(tiny_cnn):
    model = copy.deepcopy(tiny_cnn)
    growing = Growing({"conv3": 0.8}, steps=40)
    weight, shares, dead = model.conv3.weight, [], torch.zeros_like(model.conv3.weight, dtype=torch.bool)
    for step in range(1, 41):
        with torch.no_grad():
            weight.add_(0.01 * torch.randn_like(weight))  # an update that would revive zeros
        growing.on_step(SimpleNamespace(model=model, step=step))
        assert not weight[dead].any()
        dead = weight == 0
        shares.append(float(dead.float().mean()))
    assert shares[14] == pytest.approx(cubic(15, 30, 0, 0.8), abs=1e-3)
    assert shares[29] == shares[-1] == pytest.approx(0.8, abs=1e-3)
    again = Growing({"conv3": 0.8}, steps=40)
    again.recall(growing.memory())
    assert torch.equal(again.kept["conv3"], growing.kept["conv3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sparsity": 1.0}, "sparsity is 1.0"), ({"steps": -1}, "steps is -1"), ({"lr": 0}, "lr is 0")],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        Magnitude(**options)


def test_nothing_to_prune():
    with pytest.raises(UserError, match="finds no layer"):
        Magnitude().apply(torch.nn.Sequential(torch.nn.ReLU()))
