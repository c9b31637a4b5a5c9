import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lilliput.errors import UserError
from lilliput.training import Callback, KeepBest, constant, cosine, train


def net(seed=0, dropout=0.3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def pictures(count=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 1, 8, 8, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(count)]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class DieAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise RuntimeError("power cut")


class Freeze(Callback):
    """Freezes the convolution after the second epoch."""

    def on_epoch(self, state):
        if state.epoch == 2:
            state.model[0].weight.requires_grad_(False)


# --- the update ------------------------------------------------------------------------------------------------


def test_sgd_equals_a_float64_computation_by_hand():
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 1))
    model = nn.Linear(2, 1, bias=False).double()
    w = model.weight.detach().numpy().copy()
    batches = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(xs, ys)]
    seen = []

    def loss_fn(m, batch):
        seen.append(next(i for i, b in enumerate(batches) if b is batch))
        return F.mse_loss(m(batch[0]), batch[1])

    history = train(model, batches, loss_fn, steps=7, lr=0.1, optimizer=torch.optim.SGD, schedule=constant)
    for step, i in enumerate(seen):
        error = xs[i] @ w.T - ys[i]
        assert history.losses[step] == pytest.approx((error**2).mean(), rel=1e-12)
        w = w - 0.1 * 2 * (error.T @ xs[i]) / 4
    np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-12)


def test_each_epoch_sees_every_batch_once_in_a_new_order_that_the_seed_fixes():
    def orders(seed):
        seen = []
        train(nn.Linear(1, 1), list(range(8)), lambda m, b: (seen.append(b), m.weight.sum())[1], steps=24, seed=seed)
        return seen[:8], seen[8:16], seen[16:]

    first = orders(0)
    assert all(sorted(epoch) == list(range(8)) for epoch in first)
    assert first[0] != first[1] != first[2]
    assert orders(0) == first
    assert orders(1) != first


@pytest.mark.parametrize(
    ("done", "factor"), [(0.05, 0.5), (0.1, 1.0), (0.55, 0.55), (1.0, 0.1), (0.325, 0.1 + 0.45 * (1 + math.sqrt(0.5)))]
)
def test_cosine_schedule(done, factor):
    assert cosine(0.1, 0.1)(done) == pytest.approx(factor)


def test_learning_rates_of_groups_follow_the_schedule_in_proportion():
    rates = []

    class Look(Callback):
        def on_step(self, state):
            rates.append([g["lr"] for g in state.optimizer.param_groups])

    def two_groups(parameters, lr):
        return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": lr * 10}], lr=lr)

    train(net(), pictures(), cross_entropy, steps=4, lr=0.01, optimizer=two_groups, schedule=lambda d: 1 - d,
          callbacks=[Look()])  # fmt: skip
    assert rates == [pytest.approx([0.01 * f, 0.1 * f]) for f in (1, 0.75, 0.5, 0.25)]


def test_clip_norm_limits_the_update():
    model, before = nn.Linear(3, 1), None
    before = model.weight.detach().clone(), model.bias.detach().clone()
    train(model, [torch.ones(1, 3)], lambda m, b: 1e6 * m(b).sum(), steps=1, lr=1.0, clip_norm=0.5,
          optimizer=torch.optim.SGD, schedule=constant)  # fmt: skip
    moved = torch.cat([(model.weight - before[0]).flatten(), model.bias - before[1]])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_modes_are_put_back():
    model = net().eval()
    model[3].train()
    train(model, pictures(), cross_entropy, steps=2)
    assert [m.training for m in model.modules()] == [False, False, False, False, True, False, False]


# --- resuming --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("dies_at", [2, 5, 8, 13])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, optimizer, dies_at):
    options = {"steps": 14, "lr": 0.01, "optimizer": optimizer, "seed": 3, "clip_norm": 1.0}
    whole, parts = net(), net()
    torch.manual_seed(7)
    expected = train(whole, pictures(), cross_entropy, callbacks=[Freeze()], **options)
    torch.manual_seed(7)
    options |= {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every_s": 0}
    with pytest.raises(RuntimeError, match="power cut"):
        train(parts, pictures(), cross_entropy, callbacks=[Freeze(), DieAt(dies_at)], **options)
    torch.manual_seed(99)
    fresh = net(seed=5)
    history = train(fresh, pictures(), cross_entropy, callbacks=[Freeze()], **options)
    assert same(whole, fresh)
    assert history.losses == expected.losses
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in whole.parameters()]


def test_resume_is_exact_in_channels_last(tmp_path):
    def fresh():
        return net(dropout=0.0).to(memory_format=torch.channels_last)

    whole, parts, file = fresh(), fresh(), tmp_path / "run"
    train(whole, pictures(), cross_entropy, steps=9)
    with pytest.raises(RuntimeError):
        train(parts, pictures(), cross_entropy, steps=9, callbacks=[DieAt(4)], checkpoint=file, checkpoint_every_s=0)
    parts = fresh()
    train(parts, pictures(), cross_entropy, steps=9, checkpoint=file)
    assert same(whole, parts)


def test_a_finished_run_is_read_back_and_not_trained_again(tmp_path):
    first, second = net(), net(seed=2)
    train(first, pictures(), cross_entropy, steps=6, checkpoint=tmp_path / "run")
    history = train(second, pictures(), cross_entropy, steps=6, checkpoint=tmp_path / "run")
    assert same(first, second)
    assert history.steps == 6
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    ids = [torch.randint(5, (4,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    a, b = tied(), tied()
    train(a, ids, lambda m, x: F.cross_entropy(m(x), x), steps=5, checkpoint=tmp_path / "run")
    train(b, ids, lambda m, x: F.cross_entropy(m(x), x), steps=5, checkpoint=tmp_path / "run")
    assert same(a, b)
    assert b[1].weight is b[0].weight


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(100)])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read.*delete it"):
        train(net(), pictures(), cross_entropy, steps=6, checkpoint=tmp_path / "run")


def test_a_foreign_file_or_model_or_data_set_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="delete it"):
        train(net(), pictures(), cross_entropy, steps=6, checkpoint=tmp_path / "foreign")
    train(nn.Linear(1, 1), [0] * 5, lambda m, b: m.weight.sum(), steps=1, checkpoint=tmp_path / "other")
    with pytest.raises(UserError, match="another model"):
        train(net(), pictures(5), cross_entropy, steps=6, checkpoint=tmp_path / "other")
    with pytest.raises(UserError, match="number of batches"):
        train(net(), pictures(4), cross_entropy, steps=6, checkpoint=tmp_path / "other")


# --- ends ------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_and_keeps_it(tmp_path):
    class Press(Callback):
        def on_step(self, state):
            if state.step == 4:
                signal.getsignal(signal.SIGINT)(signal.SIGINT, None)  # a real one that goes astray ends the test run

    usual = signal.getsignal(signal.SIGINT)
    model, whole = net(dropout=0.0), net(dropout=0.0)
    options = {"steps": 10, "checkpoint": tmp_path / "run"}
    history = train(model, pictures(), cross_entropy, callbacks=[Press()], **options)
    assert (history.interrupted, history.stopped, history.steps) == (True, False, 4)
    assert signal.getsignal(signal.SIGINT) is usual
    history = train(model, pictures(), cross_entropy, **options)
    train(whole, pictures(), cross_entropy, steps=10)
    assert not history.interrupted
    assert same(model, whole)


def test_a_callback_may_stop_the_run():
    class Stop(Callback):
        def on_epoch(self, state):
            state.stop = state.epoch == 2

    history = train(net(), pictures(), cross_entropy, steps=100, callbacks=[Stop()])
    assert (history.stopped, history.interrupted, history.steps) == (True, False, 10)


def test_seconds_end_the_run():
    history = train(net(), pictures(), cross_entropy, seconds=0.2)
    assert history.steps > 0
    assert history.seconds >= 0.2
    assert train(net(), pictures(), cross_entropy, seconds=0).steps == 0


def test_keep_best_ends_with_the_best_weights_also_after_a_kill(tmp_path):
    scores = {5: 1.0, 10: 3.0, 15: 2.0, 20: 2.5}
    seen = {}

    def run(model, *more, **options):
        steps = iter(range(5, 21, 5))

        def score(m):
            assert not m.training
            step = options.get("first", 0) + next(steps)
            seen[step] = {k: v.clone() for k, v in m.state_dict().items()}
            return scores[step]

        first = options.pop("first", 0)
        options["first"] = first
        keep = KeepBest(score)
        kept = {k: v for k, v in options.items() if k != "first"}
        train(model, pictures(), cross_entropy, steps=20, callbacks=[keep, *more], **kept)
        return keep

    model = net(dropout=0.0)
    assert run(model).best == 3.0
    assert all(torch.equal(v, seen[10][k]) for k, v in model.state_dict().items())
    killed, options = net(dropout=0.0), {"checkpoint": tmp_path / "run", "checkpoint_every_s": 0}
    with pytest.raises(RuntimeError):
        run(killed, DieAt(13), **options)
    assert run(killed, first=10, **options).best == 3.0
    assert same(killed, model)


def test_frozen_parameters_do_not_move_even_with_weight_decay():
    model = net()
    model[0].weight.requires_grad_(False)
    before, head = model[0].weight.clone(), model[5].weight.clone()
    train(model, pictures(), cross_entropy, steps=5, optimizer=partial(torch.optim.AdamW, weight_decay=0.5))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[5].weight, head)


def test_progress_is_told_on_stderr(capsys):
    train(net(), pictures(), cross_entropy, steps=3, progress="recovery")
    text = capsys.readouterr().err
    assert "recovery" in text
    assert "100%  step 3" in text


# --- wrong use -------------------------------------------------------------------------------------------------


def test_nan_loss_names_the_step_and_the_way_out():
    batches = [(torch.full((2, 1, 8, 8), v), torch.tensor([0, 1])) for v in (1.0, 1.0, math.nan)]
    with pytest.raises(UserError, match=r"loss became nan at step \d .*lower lr"):
        train(net(), batches, cross_entropy, steps=6)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match=r"norm of the gradient became (nan|inf) at step 0"):
        train(model, [0], lambda m, b: (m.weight * 0).abs().sqrt().sum(), steps=6)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (net(), pictures(), {}, "no end"),
        (net(), [], {"steps": 1}, "empty"),
        (net(), pictures(), {"steps": -1}, "-1 steps"),
        (net(), pictures(), {"seconds": -0.5}, "-0.5 seconds"),
        (nn.ReLU(), pictures(), {"steps": 1}, "nothing to train"),
    ],
)
def test_wrong_calls(model, batches, options, message):
    with pytest.raises(UserError, match=message):
        train(model, batches, cross_entropy, **options)


def test_a_callback_whose_memory_cannot_be_stored_is_named(tmp_path):
    class Odd(Callback):
        def memory(self):
            return {"x": object()}

    with pytest.raises(UserError, match="without a checkpoint"):
        train(net(), pictures(), cross_entropy, steps=1, callbacks=[Odd()], checkpoint=tmp_path / "run")
