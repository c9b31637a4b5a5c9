import copy

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.train.sam import Sam

HESSIAN = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self):
        return 0.5 * self.w @ HESSIAN @ self.w


def closure_of(model, optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


def test_a_step_on_a_bowl_is_the_formula():
    model = Bowl()
    optimizer = Sam(rho=0.3).wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    w, expected_loss = model.w.detach().clone(), float(model())
    slope = HESSIAN @ w
    expected = w - 0.1 * HESSIAN @ (w + 0.3 * slope / slope.norm())
    value = optimizer.step(closure_of(model, optimizer, Bowl.forward))
    torch.testing.assert_close(model.w.detach(), expected)
    assert float(value) == pytest.approx(expected_loss)


def test_without_a_distance_it_is_the_other_optimizer():
    nets = [Bowl(), Bowl()]
    plain = torch.optim.Adam(nets[0].parameters(), lr=0.1)
    sam = Sam(rho=0.0).wrap(torch.optim.Adam(nets[1].parameters(), lr=0.1))
    for _ in range(5):
        plain.step(closure_of(nets[0], plain, Bowl.forward))
        sam.step(closure_of(nets[1], sam, Bowl.forward))
    assert torch.equal(nets[0].w, nets[1].w)


def test_the_distance_is_that_of_all_parameters_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    optimizer = Sam(rho=0.7).wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(torch.randn(3, 4)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.perturbed():
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before)])
        assert all(p.grad is None for p in model.parameters())
    assert float(moved.norm()) == pytest.approx(0.7, rel=1e-4)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_batch_norms_see_each_batch_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    twin, x = copy.deepcopy(model), torch.randn(8, 4)
    optimizer = Sam(rho=1.0).wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.step(closure_of(model, optimizer, lambda m: m(x).square().sum()))
    twin(x)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(twin.named_buffers())[name])


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves():
    model = Bowl()
    optimizer = Sam().wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.w.detach().clone()
    with pytest.raises(UserError, match="norm of the gradient is nan"):
        optimizer.step(closure_of(model, optimizer, lambda m: m() * float("nan")))
    assert torch.equal(model.w, before)


def test_a_gradient_of_zero_is_no_error():
    model = Bowl()
    optimizer = Sam().wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.w.detach().clone()
    optimizer.step(closure_of(model, optimizer, lambda m: 0.0 * m()))
    assert torch.equal(model.w, before)


def test_a_trainer_of_transformers_steps_as_a_loop_does(tiny_llama, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    nets = [copy.deepcopy(tiny_llama) for _ in range(2)]
    optimizers = [Sam(rho=0.5).wrap(torch.optim.SGD(net.parameters(), lr=0.05), net) for net in nets]

    class Sharp(Trainer):
        def training_step(self, *inputs):
            loss = super().training_step(*inputs)
            with optimizers[0].perturbed():
                super().training_step(*inputs)
            return loss

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    Sharp(nets[0], arguments, train_dataset=data, optimizers=(optimizers[0], None)).train()
    nets[1].train()
    for _ in range(3):
        optimizers[1].step(closure_of(nets[1], optimizers[1], lambda net: net(input_ids=ids, labels=ids).loss))
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(next(nets[0].parameters()), next(tiny_llama.parameters()))
