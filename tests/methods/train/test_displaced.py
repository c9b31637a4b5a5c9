"""What optimizers around another one share: torch's interface, restored weights, and runs that go on after a kill."""

import copy

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.train._displaced import WrappedOptimizer, still_statistics
from lilliput.methods.train.gradient_centralization import GradientCentralization
from lilliput.methods.train.meta_step import MetaStep, halves
from lilliput.methods.train.sam import Sam


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


BATCHES = [(torch.randn(10, 6, generator=g), torch.randint(3, (10,), generator=g)) for g in [torch.Generator()] * 5]


class Run:
    """A training of one kind, with momentum and a schedule, that can be stopped after any step."""

    def __init__(self, kind):
        self.kind, self.model, self.losses = kind, network(), []
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        wrap = {"sam": Sam().wrap, "meta": MetaStep().wrap}.get(kind)
        self.optimizer = wrap(base, self.model) if wrap else base
        GradientCentralization().attach(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)

    def go(self, steps):
        while len(self.losses) < steps:
            self.losses.append(getattr(self, self.kind)(BATCHES[len(self.losses) % len(BATCHES)]))
            self.schedule.step()
        return self

    def plain(self, batch):
        self.optimizer.zero_grad()
        value = loss_fn(self.model, batch)
        value.backward()
        self.optimizer.step()
        return float(value.detach())

    def sam(self, batch):
        def closure():
            self.optimizer.zero_grad()
            value = loss_fn(self.model, batch)
            value.backward()
            return value

        return float(self.optimizer.step(closure).detach())

    def meta(self, batch):
        first, second = halves(batch)
        self.optimizer.zero_grad()
        value = loss_fn(self.model, first)
        value.backward()
        with self.optimizer.ahead():
            loss_fn(self.model, second).backward()
        self.optimizer.step()
        return float(value.detach())

    PARTS = ("model", "optimizer", "schedule")

    def saved(self):
        states = {name: copy.deepcopy(getattr(self, name).state_dict()) for name in self.PARTS}
        return states, torch.get_rng_state(), list(self.losses)

    def restored(self, saved):
        states, random, self.losses = saved
        for name, state in states.items():
            getattr(self, name).load_state_dict(state)
        torch.set_rng_state(random)
        return self


@pytest.mark.parametrize("kind", ["plain", "sam", "meta"])
@pytest.mark.parametrize("killed", [1, 7])
def test_a_killed_run_has_the_losses_of_an_uninterrupted_one(kind, killed):
    expected = Run(kind).go(20)
    saved = Run(kind).go(killed).saved()
    again = Run(kind).restored(saved).go(20)
    assert again.losses == expected.losses
    for a, b in zip(again.model.parameters(), expected.model.parameters()):
        assert torch.equal(a, b)
    assert expected.losses[-1] < expected.losses[0]


def test_a_wrapped_optimizer_is_the_other_one():
    model, twin = network(), network()
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    wrapped = WrappedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    assert isinstance(wrapped, torch.optim.Optimizer)
    for batch in BATCHES:
        for net, optimizer in ((model, wrapped), (twin, plain)):
            torch.manual_seed(1)
            optimizer.zero_grad()
            loss_fn(net, batch).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    for group in wrapped.param_groups:
        group["lr"] = 0.5
    assert wrapped.base.param_groups[0]["lr"] == 0.5
    assert wrapped.state is wrapped.base.state
    assert wrapped.defaults is wrapped.base.defaults
    wrapped.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [None, ValueError])
def test_displaced_weights_come_back_to_the_bit_also_after_an_error(error):
    model = network()
    optimizer = WrappedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    loss_fn(model, BATCHES[0]).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    try:
        with optimizer.displaced([(p, 1e3) for p, _ in optimizer.with_gradients()]):
            for (name, p), gradient in zip(model.named_parameters(), gradients):
                torch.testing.assert_close(p.detach(), before[name] + 1e3 * gradient)
            loss_fn(model, BATCHES[1])
            if error:
                raise error
    except ValueError:
        assert error
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_statistics_move_outside_and_stay_inside():
    model = network()
    before = copy.deepcopy(model[1].state_dict())
    with still_statistics(model):
        model(BATCHES[0][0])
    assert all(torch.equal(v, before[k]) for k, v in model[1].state_dict().items())
    model(BATCHES[0][0])
    assert not torch.equal(model[1].running_mean, before["running_mean"])


@pytest.mark.parametrize(
    "enter", [lambda m, o: Sam().wrap(o, m).perturbed(), lambda m, o: MetaStep().wrap(o, m).ahead()]
)
def test_a_second_pass_without_a_first_is_refused(enter):
    model = network()
    with pytest.raises(UserError, match="finds no gradient"), enter(model, torch.optim.SGD(model.parameters(), 0.1)):
        pass
