"""factorize.targeted with clocks made here; no real time decides a test."""

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.factorize._clock import Clock, median_ratio, paired_ms, torch_inference, torch_training
from lilliput.methods.factorize._factors import factored_layers, ranks_for
from lilliput.methods.factorize.targeted import Targeted, decompose_, multiplications


def weights(module):
    return sum(p.numel() for p in module.parameters())


def wide_gains(module, shape):
    """Milliseconds of a machine on which each layer costs a fixed amount, so that only large layers gain."""
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())
    return 1.0 * layers + 0.001 * weights(module)


def test_only_layers_that_get_faster_are_decomposed(cnn_work):
    method = Targeted(ratio=0.4, rounds=3)
    rows = method.choose(cnn_work.model, cnn_work, time_ms=wide_gains)
    assert [(row.layer, row.kept) for row in rows] == [("conv2", False), ("conv3", True), ("fc", False)]
    model = decompose_(cnn_work.model, rows)
    assert list(factored_layers(model)) == ["conv3"]
    assert rows[1].chosen_ms == rows[1].after_ms < rows[1].before_ms
    assert rows[0].chosen_ms == rows[0].before_ms
    assert rows[1].input_shape == (1, 16, 16, 16)


def test_the_margin_decides(cnn_work):
    def slightly_faster(module, shape):
        return 9.0 if isinstance(module, nn.Sequential) else 10.0

    for margin, kept in ((0.05, True), (0.15, False), (0.1, False)):
        rows = Targeted(margin=margin).choose(cnn_work.model, cnn_work, time_ms=slightly_faster)
        assert {row.kept for row in rows} == {kept}


def test_readings_alternate_and_one_slow_burst_changes_nothing():
    calls = []
    a, b = nn.Linear(2, 2), nn.Linear(2, 3)

    def drifting(module, shape):
        calls.append(module)
        return (1.0 if module is a else 0.8) * (50 if len(calls) in (3, 4) else 1)

    pairs = paired_ms(drifting, a, b, (1, 2), 5)
    assert calls == [a, b] * 5
    assert median_ratio(pairs) == pytest.approx(0.8)


def test_equal_layers_at_equal_shapes_are_measured_once(llama_work):
    calls = []

    def count(module, shape):
        calls.append(shape)
        return 1.0

    rows = Targeted(rounds=2).choose(llama_work.model, llama_work, time_ms=count)
    assert len(rows) == 14
    assert len(calls) == 2 * 2 * 4  # q and o alike, k and v, gate and up, down; two modules, two rounds


def test_snap_takes_the_rank_below_the_step():
    layer = nn.Linear(128, 128)
    steps = Targeted(ratio=0.6, snap=True, rounds=1)

    def time_ms(module, shape):
        rank = module[0].out_features if isinstance(module, nn.Sequential) else 64
        return -(-rank // 16) + (3 if rank > 32 else 0)

    assert ranks_for(layer, 0.6) == (38,)
    assert steps.measure("x", layer, (1, 128), time_ms).ranks == (32,)
    conv = steps.measure("x", nn.Conv2d(64, 64, 3), (1, 64, 8, 8), lambda m, s: float(weights(m) > 20_000)).ranks
    assert conv[0] == conv[1]
    assert conv[0] % 4 == 0


def test_training_phase_uses_the_training_batch(cnn_work):
    shapes = set()
    Targeted(phase="train", rounds=1).choose(cnn_work.model, cnn_work, time_ms=lambda m, s: shapes.add(s) or 1.0)
    assert {s[0] for s in shapes} == {16}


@pytest.mark.parametrize("phase", ["infer", "train"])
def test_the_real_clocks_run_and_leave_the_model_alone(cnn_work, phase):
    before = {k: v.clone() for k, v in cnn_work.model.state_dict().items()}
    rows = Targeted(phase=phase, runtime="torch", rounds=1).choose(cnn_work.model, cnn_work)
    assert all(row.before_ms > 0 and row.after_ms > 0 for row in rows)
    assert all(torch.equal(before[k], v) for k, v in cnn_work.model.state_dict().items())
    assert all(p.grad is None for p in cnn_work.model.parameters())


def test_runners_do_what_they_say():
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(torch_inference(layer, x)(), layer(x))
    torch_training(layer, x)()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(2, 3))
    assert x.grad is not None
    prepared = []
    clock = Clock(lambda m, x: prepared.append(m) or (lambda: None))
    assert clock(layer, (1, 3)) >= 0
    clock(layer, (1, 3))
    assert len(prepared) == 1


def test_multiplications_against_a_count_by_hand():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    assert multiplications(conv, (2, 6, 8, 8)) == 2 * 16 * 8 * 6 * 9
    assert multiplications(conv, (2, 6, 8, 8), (4, 3)) == 2 * (64 * 3 * 6 + 16 * (4 * 3 * 9 + 4 * 8))
    assert multiplications(nn.Linear(6, 4), (2, 5, 6)) == 2 * 5 * 24
    assert multiplications(nn.Linear(6, 4), (2, 5, 6), (2,)) == 2 * 5 * 2 * 10
    assert multiplications(nn.Conv2d(6, 4, 1, stride=2), (1, 6, 8, 8), (2,)) == 16 * 2 * 10


def test_a_workload_is_needed(cnn_work):
    with pytest.raises(UserError, match="needs a workload to know the shapes"):
        Targeted().apply(cnn_work.model)
