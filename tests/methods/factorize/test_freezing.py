"""Freezing factors in turn: what is frozen does not move, not even by momentum or weight decay."""

from functools import partial

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.factorize._freezing import SequentialFreezing, alternate, outer
from lilliput.methods.factorize.tucker import Tucker
from lilliput.training import Callback, train


class Watch(Callback):
    """Copies of the weights after every step."""

    def __init__(self):
        self.steps = []

    def on_start(self, state):
        self.on_step(state)

    def on_step(self, state):
        self.steps.append({n: p.detach().clone() for n, p in state.model.named_parameters()})

    def moved(self, step, name):
        return not torch.equal(self.steps[step][name], self.steps[step + 1][name])


@pytest.fixture
def factored(cnn_work):
    return Tucker(ratio=0.5).apply(cnn_work.model, layers=["conv3"])


def run(model, work, freezing, steps, optimizer=None, **options):
    watch = Watch()
    optimizer = optimizer or partial(torch.optim.AdamW, weight_decay=0.1)
    callbacks = [watch, freezing]
    train(model, work.training, work.loss, steps=steps, lr=1e-2, optimizer=optimizer, callbacks=callbacks, **options)
    return watch


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)])
def test_factors_train_in_turn_by_epoch(factored, cnn_work, optimizer):
    watch = run(factored, cnn_work, SequentialFreezing(), 8, optimizer)
    first, core, last, other = "conv3.0.weight", "conv3.1.weight", "conv3.2.weight", "fc.weight"
    for step in range(1, 7):  # the first and last learning rates of the schedule are next to nothing
        even_epoch = (step // 2) % 2 == 0
        assert watch.moved(step, first) == even_epoch
        assert watch.moved(step, core) == watch.moved(step, last) != even_epoch
        assert watch.moved(step, other)


def test_a_period_in_steps(factored, cnn_work):
    watch = run(factored, cnn_work, SequentialFreezing(period=3), 9)
    assert [watch.moved(s, "conv3.0.weight") for s in range(1, 8)] == [True, True, False, False, False, True, True]


def test_only_the_core_trains_with_outer(factored, cnn_work):
    watch = run(factored, cnn_work, SequentialFreezing(outer), 5)
    assert torch.equal(watch.steps[0]["conv3.0.weight"], watch.steps[-1]["conv3.0.weight"])
    assert torch.equal(watch.steps[0]["conv3.2.weight"], watch.steps[-1]["conv3.2.weight"])
    assert watch.moved(2, "conv3.1.weight")


def test_afterwards_everything_trains_but_what_was_frozen_before(factored, cnn_work):
    factored.conv1.requires_grad_(False)
    watch = run(factored, cnn_work, SequentialFreezing(), 3)
    assert not watch.moved(1, "conv1.weight")
    frozen = [n for n, p in factored.named_parameters() if not p.requires_grad]
    assert frozen == ["conv1.weight"]


def test_a_resumed_run_equals_an_uninterrupted_one(cnn_work, tmp_path, factored):
    import copy

    class Stop(Callback):
        def on_step(self, state):
            state.stop = state.step == 3

    whole, parts = copy.deepcopy(factored), copy.deepcopy(factored)
    train(whole, cnn_work.training, cnn_work.loss, steps=6, callbacks=[SequentialFreezing()])
    file = tmp_path / "run"
    stopped = [SequentialFreezing(), Stop()]
    train(parts, cnn_work.training, cnn_work.loss, steps=6, callbacks=stopped, checkpoint=file)
    again = copy.deepcopy(factored)
    train(again, cnn_work.training, cnn_work.loss, steps=6, callbacks=[SequentialFreezing()], checkpoint=file)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad


def test_the_lists(factored):
    assert alternate(factored) == [["conv3.1.weight", "conv3.2.weight"], ["conv3.0.weight"]]
    assert outer(factored) == [["conv3.0.weight", "conv3.2.weight"]]


def test_wrong_calls_are_refused(cnn_work):
    with pytest.raises(UserError, match="period is 0"):
        SequentialFreezing(period=0)
    with pytest.raises(UserError, match="no factored layer"):
        run(cnn_work.model, cnn_work, SequentialFreezing(), 1)
    assert all(isinstance(p, nn.Parameter) for p in cnn_work.model.parameters())
