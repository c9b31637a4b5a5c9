import numpy as np
import pytest
import torch
from torch import nn

from lilliput.methods.train.gradient_centralization import GradientCentralization, centralize_
from lilliput.methods.train.sam import Sam


def test_the_mean_of_each_output_goes_as_in_numpy():
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gradient.numpy() - gradient.numpy().mean((1, 2, 3), keepdims=True)
    found = centralize_(gradient)
    assert found is gradient
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(centralize_(found.clone()), found, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1, 1), (1, 1)])
def test_single_weights_of_an_output_keep_their_gradient(shape):
    assert torch.equal(centralize_(torch.ones(shape)), torch.ones(shape))


def test_sparse_gradients_stay():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    assert torch.equal(centralize_(table.weight.grad).to_dense()[1], torch.ones(3))


@pytest.mark.parametrize(("layers", "centralized"), [("all", {"0.weight", "3.weight"}), ("convolutions", {"0.weight"})])
def test_steps_are_those_of_centralized_gradients(layers, centralized):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = GradientCentralization(layers=layers).attach(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(5, 2, 4, 4)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        gradient = gradients[name]
        if name in centralized:
            gradient = gradient - gradient.flatten(1).mean(1).view(-1, *[1] * (gradient.ndim - 1))
        torch.testing.assert_close(p.detach(), before[name] - gradient)
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks


def test_with_sam_the_gradient_of_the_step_is_centralized():
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False)
    optimizer = Sam().wrap(torch.optim.SGD(model.parameters(), lr=1.0), model)
    GradientCentralization().attach(optimizer)
    before, x = model.weight.detach().clone(), torch.randn(5, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    step = model.weight.detach() - before
    assert float(step.norm()) > 0.1
    torch.testing.assert_close(step.mean(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_a_trainer_of_transformers_centralizes(tiny_llama, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, optim="sgd",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 2
    name = "model.layers.0.mlp.up_proj.weight"
    before = tiny_llama.get_parameter(name).detach().clone()
    trainer = Trainer(tiny_llama, arguments, train_dataset=data)
    GradientCentralization().attach(trainer.create_optimizer())
    trainer.train()
    step = tiny_llama.get_parameter(name).detach() - before
    assert float(step.abs().max()) > 0
    torch.testing.assert_close(step.mean(1), torch.zeros(len(step)), atol=1e-6, rtol=0)
