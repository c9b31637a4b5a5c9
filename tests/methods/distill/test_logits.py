import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.distill.hidden import Hidden
from lilliput.methods.distill.logits import Logits, distillation_loss, trainable_modules
from lilliput.methods.distill.taid import Taid
from lilliput.methods.initialize.tleg import Tleg
from lilliput.methods.train.compressible_subspaces import CompressibleSubspaces
from lilliput.methods.train.epas import Epas
from lilliput.training import train
from lilliput.workload import Workload
from lilliput.zoo import nets


def reference(s, t, temperature):
    """T^2 sum p (log p - log q) in float64."""
    p, q = softmax(t / temperature, -1), log_softmax(s / temperature, -1)
    return temperature**2 * np.mean(np.sum(p * (log_softmax(t / temperature, -1) - q), -1))


@pytest.mark.parametrize("shape", [(4, 10), (2, 5, 7), (1, 2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_against_float64(shape, temperature):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, *shape)) * 5
    found = distillation_loss(torch.tensor(s), torch.tensor(t), temperature).item()
    assert found == pytest.approx(reference(s, t, temperature), rel=1e-4)


def test_loss_is_zero_for_equal_answers_also_when_shifted_and_at_extremes():
    t = torch.tensor([[1e4, -1e4, 0.0]])
    assert distillation_loss(t, t, 1.0).item() == 0
    assert distillation_loss(t / 1e3 + 7, t / 1e3, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(distillation_loss(-t, t, 0.1))


def test_gradient_at_high_temperature_is_that_of_the_squared_error_of_centred_logits():
    rng = np.random.default_rng(1)
    s, t = (torch.tensor(rng.normal(size=(1, 6)), dtype=torch.float32) for _ in range(2))
    s.requires_grad_()
    distillation_loss(s, t, 300.0).backward()
    centred = (s.detach() - s.detach().mean()) - (t - t.mean())
    torch.testing.assert_close(s.grad, centred / 6, rtol=0.05, atol=1e-3)


def test_different_vocabularies_are_refused():
    with pytest.raises(UserError, match=r"\(2, 3\) and \(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)


# --- the method ------------------------------------------------------------------------------------------------


def damaged(model):
    """A copy with noise on every matrix."""
    generator = torch.Generator().manual_seed(5)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=generator) * p.std())
    return model


def divergence(work, model):
    """Distance of the answers from the original's on validation data."""
    model.eval()
    with torch.no_grad():
        return sum(
            float(distillation_loss(work.forward(model, b), work.forward(work.model, b), 1.0)) for b in work.validation
        )


@pytest.mark.parametrize("fixture", ["cnn_work", "llama_work"])
def test_a_damaged_student_comes_closer_to_the_teacher_on_unseen_data(fixture, request):
    work = request.getfixturevalue(fixture)
    student = damaged(work.model)
    before = divergence(work, student)
    taught = Logits(steps=40, lr=3e-3).apply(student, work)
    assert divergence(work, taught) < 0.8 * before
    assert divergence(work, student) == before


def test_products_in_bfloat16_teach_nearly_the_same_and_leave_float32(cnn_work):
    student = damaged(cnn_work.model)
    exact, rounded = (Logits(steps=40, lr=3e-3, bfloat16=b).apply(student, cnn_work) for b in (False, True))
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in rounded.parameters())
    assert not torch.equal(rounded.fc.weight, exact.fc.weight)
    assert divergence(cnn_work, rounded) < 0.8 * divergence(cnn_work, student)


@pytest.mark.parametrize("fixture", ["cnn_work", "llama_work"])
def test_hard_loss_alone_is_training_on_the_workloads_own_loss(fixture, request):
    work = request.getfixturevalue(fixture)
    student = damaged(work.model)
    taught = Logits(steps=5, hard=1.0).apply(student, work)
    train(student, work.training, work.loss, steps=5, lr=1e-3, clip_norm=1.0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(taught.get_parameter(name), parameter, msg=name)


def test_the_teacher_and_the_modes_stay_as_they_were(cnn_work):
    before = copy.deepcopy(cnn_work.model.state_dict())
    cnn_work.model.bn1.train()
    taught = Logits(steps=3).apply(damaged(cnn_work.model), cnn_work)
    after = cnn_work.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert cnn_work.model.bn1.training
    assert not cnn_work.model.training
    assert all(p.grad is None and p.requires_grad for p in taught.parameters())


def test_only_the_chosen_layers_move(llama_work):
    student = damaged(llama_work.model)
    layers = ["model.layers.1.mlp", "*norm"]
    taught = Logits(steps=2).apply(student, llama_work, layers)
    moved = {n for n, p in taught.named_parameters() if not torch.equal(p, student.get_parameter(n))}
    expected = {n for n, _ in student.named_parameters() if "layers.1.mlp" in n or "norm" in n}
    assert moved == expected


def test_frozen_and_integer_parameters_are_left_alone(cnn_work):
    student = damaged(cnn_work.model)
    student.conv1.weight.requires_grad_(False)
    student.fc.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    assert "conv1" not in set(trainable_modules(student))
    taught = Logits(steps=2).apply(student, cnn_work)
    assert torch.equal(taught.conv1.weight, student.conv1.weight)
    assert not taught.conv1.weight.requires_grad
    assert torch.equal(taught.fc.codes, student.fc.codes)
    assert not torch.equal(taught.fc.weight, student.fc.weight)


def test_unlabelled_calibration_data_is_enough(cnn_work):
    cnn_work.training = None
    cnn_work.calibration = [{"input": b["input"]} for b in cnn_work.calibration]
    student = damaged(cnn_work.model)
    assert not torch.equal(Logits(steps=1).apply(student, cnn_work).fc.weight, student.fc.weight)
    with pytest.raises(UserError, match=r"no 'label'.*hard=0"):
        Logits(steps=1, hard=0.5).apply(student, cnn_work)


def test_it_repeats_exactly_and_follows_the_seed(cnn_work):
    student = damaged(cnn_work.model)
    a, b, c = (Logits(steps=5, seed=s).apply(student, cnn_work).fc.weight for s in (0, 0, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_wrong_use(cnn_work):
    with pytest.raises(UserError, match="temperature is 0"):
        Logits(temperature=0)
    with pytest.raises(UserError, match=r"call apply\(model, workload\)"):
        Logits().apply(cnn_work.model)
    frozen = copy.deepcopy(cnn_work.model).requires_grad_(False)
    with pytest.raises(UserError, match=r"float parameters of TinyCnn are frozen; call requires_grad_\(True\)"):
        Logits().apply(frozen, cnn_work)


@pytest.fixture
def untouched(monkeypatch):
    """Fails when a training begins."""
    for module in ("distill.logits", "initialize.tleg", "train.compressible_subspaces", "train.epas"):
        monkeypatch.setattr(f"lilliput.methods.{module}.train", lambda *_, **__: pytest.fail("it began to train"))


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize(
    "method", [Logits(hard=0.5), Hidden(hard=0.5), Taid(hard=0.5), CompressibleSubspaces(ends="alike")], ids=type
)
def test_labels_outside_the_outputs_are_refused_before_anything_is_learned(method, label, untouched):
    torch.manual_seed(0)
    work = vit_work()
    work.training = [*work.calibration, {**work.calibration[0], "label": torch.tensor([0, label, -100, 1])}]
    with pytest.raises(UserError, match=rf"a batch has the label {label}, but VisionTransformer has 10 outputs"):
        method.apply(copy.deepcopy(work.model), work)
    work.training = [{"input": work.calibration[0]["input"]}]
    with pytest.raises(UserError, match="a batch has no 'label'"):
        method.apply(copy.deepcopy(work.model), work)


def test_soft_labels_and_ignored_ones_are_learned():
    work = vit_work()
    for label in (torch.tensor([0, 9, -100, 1]), torch.full((4, 10), 0.1)):
        work.training = [{**work.calibration[0], "label": label}]
        assert torch.isfinite(Logits(hard=0.5, steps=1).apply(work.model, work).head.weight).all()


def vit_work():
    model = nets.vit(dim=16, layers=2, heads=2).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {"input": torch.randn(4, 1, 28, 28, generator=generator), "label": torch.tensor([0, 9, 3, 1])}
    return Workload.classifier(model, [batch], [batch], [batch])


@pytest.mark.parametrize("method", [Logits(), Hidden(), Taid(), Tleg(), Epas()], ids=type)
def test_tokens_that_the_model_does_not_know_are_refused_before_anything_is_learned(method, llama_work, untouched):
    known = llama_work.model.get_input_embeddings().num_embeddings
    for token in (known, -3):
        llama_work.training = [{"input_ids": torch.tensor([[1, 2, token, 3]])}]
        with pytest.raises(UserError, match=f"holds token {token}, but LlamaForCausalLM knows {known}"):
            method.apply(llama_work.model, llama_work)


@pytest.mark.parametrize("method", [Logits(), Hidden(), Taid(), Tleg(blocks=2)], ids=type)
def test_another_question_is_refused_before_anything_is_learned(method, untouched):
    with pytest.raises(UserError, match=r"\(1, 3\) and \(1, 10\); they must answer the same question"):
        method.apply(nets.vit(dim=16, layers=2, heads=2, classes=3), vit_work())


def test_batches_that_are_made_as_they_come_are_left_to_the_training(cnn_work):
    batches = list(cnn_work.training)
    cnn_work.training = iter(batches)
    taught = Logits(steps=len(batches), hard=0.5).apply(cnn_work.model, cnn_work)
    assert torch.isfinite(taught.fc.weight).all()
