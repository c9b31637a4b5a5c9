import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from lilliput.errors import UserError
from lilliput.methods.distill._trainer import LOSS_FILE, counted
from lilliput.methods.distill.logits import Logits, distillation_loss
from lilliput.methods.distill.taid import Taid


def pairs(count, shape=(4, 6)):
    """Logits of a student that comes closer to its teacher."""
    rng = np.random.default_rng(0)
    teacher, start = rng.normal(size=(2, *shape)) * 3
    return [(teacher + (start - teacher) * 0.9**i, teacher) for i in range(count)]


def schedule(losses, s):
    """t before each step, of the paper's update written with plain numbers."""
    t, momentum, found = s.t_start, 0.0, []
    for n, loss in enumerate(losses):
        found.append(t)
        if n:
            momentum = s.beta * momentum + (1 - s.beta) * (losses[n - 1] - loss) / losses[n - 1]
            line = s.t_start + (s.t_end - s.t_start) * min((n + 1) / s.steps, 1)
            t = min(s.t_end, max(line, t + s.alpha * (1 - t) / (1 + math.exp(-momentum))))
    return found


@pytest.mark.parametrize(
    "settings", [Taid(steps=12), Taid(steps=40, alpha=0.3, beta=0.5), Taid(steps=9, t_start=0.1, t_end=0.7, alpha=1.0)]
)
def test_losses_and_shares_against_float64(settings):
    loss_fn, found, shares = settings.soft_loss(), [], []
    for student, teacher in pairs(15):
        shares.append(float(loss_fn.t))
        s = torch.tensor(student, dtype=torch.float32, requires_grad=True)
        found.append(loss_fn(s, torch.tensor(teacher, dtype=torch.float32)).item())
        target = (1 - shares[-1]) * student + shares[-1] * teacher
        kl = np.sum(softmax(target, -1) * (log_softmax(target, -1) - log_softmax(student, -1)), -1).mean()
        assert found[-1] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert shares == pytest.approx(schedule(found, settings), abs=1e-9)
    assert shares == sorted(shares)
    assert shares[0] == settings.t_start
    assert float(loss_fn.t) <= settings.t_end


def test_without_alpha_the_share_is_a_straight_line():
    loss_fn = Taid(steps=10, alpha=0.0).soft_loss()
    shares = []
    for student, teacher in pairs(12):
        loss_fn(torch.tensor(student, requires_grad=True), torch.tensor(teacher))
        shares.append(float(loss_fn.t))
    assert shares[1:10] == pytest.approx([0.4 + 0.06 * n for n in range(2, 11)])
    assert shares[-1] == 1


def test_a_falling_loss_moves_the_share_faster_than_a_rising_one():
    ends = []
    for order in (1, -1):
        loss_fn = Taid(steps=10**6, alpha=0.1, beta=0.0).soft_loss()
        for student, teacher in pairs(10)[::order]:
            loss_fn(torch.tensor(student, requires_grad=True), torch.tensor(teacher))
        ends.append(float(loss_fn.t))
    assert ends[0] > ends[1] > 0.4


def test_a_start_at_the_students_own_answers_does_not_stop_the_share():
    loss_fn = Taid(steps=10**6, t_start=0.0, alpha=0.1, beta=0.5).soft_loss()
    for student, teacher in pairs(10):
        loss_fn(torch.tensor(student, requires_grad=True), torch.tensor(teacher))
    assert float(loss_fn.momentum) > -1
    assert float(loss_fn.t) > 0.2


def test_with_the_whole_teacher_it_is_the_plain_distillation_loss_and_gradient():
    student, teacher = (torch.tensor(x, dtype=torch.float32) for x in pairs(1)[0])
    grads = []
    for loss_fn in (Taid(t_start=1.0, temperature=3.0).soft_loss(), lambda s, t: distillation_loss(s, t, 3.0)):
        s = student.clone().requires_grad_()
        loss_fn(s, teacher).backward()
        grads.append(s.grad)
    torch.testing.assert_close(*grads)


def test_the_target_has_no_gradient_and_without_the_teacher_there_is_nothing_to_learn():
    s = torch.randn(3, 5, requires_grad=True)
    loss = Taid(t_start=0.0).soft_loss()(s, torch.randn(3, 5))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(s.grad, torch.zeros(3, 5), rtol=0, atol=1e-6)


def test_evaluation_does_not_move_it_and_its_state_goes_on():
    steps = [(torch.tensor(s, requires_grad=True), torch.tensor(t)) for s, t in pairs(8)]
    whole, first = (Taid(steps=8, alpha=0.3).soft_loss() for _ in range(2))
    for pair in steps:
        whole(*pair)
    for pair in steps[:4]:
        first(*pair)
        with torch.no_grad():
            first(*steps[7])
    second = Taid(steps=8, alpha=0.3).soft_loss()
    second.load_state_dict(first.state_dict())
    for pair in steps[4:]:
        second(*pair)
    assert second.state_dict() == whole.state_dict()


def test_wrong_use():
    with pytest.raises(UserError, match=r"t_end is 0\.2, below t_start 0\.4"):
        Taid(t_end=0.2)
    with pytest.raises(UserError, match=r"\(1, 3\) and \(2, 3\)"):
        Taid().soft_loss()(torch.zeros(1, 3), torch.zeros(2, 3))


# --- the method ------------------------------------------------------------------------------------------------


def test_with_the_whole_teacher_the_method_is_distillation(llama_work):
    torch.manual_seed(5)
    student = copy.deepcopy(llama_work.model)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = Taid(t_start=1.0, steps=5, hard=0.2).apply(student, llama_work)
    plain = Logits(temperature=1.0, steps=5, hard=0.2).apply(student, llama_work)
    partly = Taid(steps=5, hard=0.2).apply(student, llama_work)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), msg=name)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(partly.get_parameter(weight), plain.get_parameter(weight), atol=1e-5)


# --- transformers ----------------------------------------------------------------------------------------------


def trainer_of(method, model, teacher, folder, **options):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 64, (16, 12), generator=generator)
    labels = rows.clone()
    labels[:, :5] = -100
    data = [{"input_ids": r, "labels": row} for r, row in zip(rows, labels)]
    usual = {
        "max_steps": 8, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "learning_rate": 3e-3,
        "logging_strategy": "no", "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **usual | options)
    return method.trainer(model, arguments, teacher, train_dataset=data)


@pytest.fixture
def student(tiny_llama):
    torch.manual_seed(7)
    return type(tiny_llama)(tiny_llama.config).eval()


def test_a_trainer_of_transformers_brings_the_student_closer(tiny_llama, student, tmp_path):
    def distance():
        ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return float(distillation_loss(student.eval()(ids).logits, tiny_llama(ids).logits, 1.0))

    before, weights = distance(), {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    trainer = trainer_of(Taid(steps=16), student, tiny_llama, tmp_path, max_steps=40, gradient_accumulation_steps=2)
    trainer.train()
    assert distance() < 0.8 * before
    assert float(trainer.soft_loss.calls) == 80
    assert float(trainer.soft_loss.t) == 1
    assert all(torch.equal(v, weights[k]) for k, v in tiny_llama.state_dict().items())


def test_a_trainer_that_was_killed_goes_on_with_the_same_share(tiny_llama, student, tmp_path):
    method = Taid(steps=20, alpha=0.2)
    whole = trainer_of(method, copy.deepcopy(student), tiny_llama, tmp_path / "whole")
    whole.train()
    saved = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(method, copy.deepcopy(student), tiny_llama, tmp_path / "cut", **saved).train()
    again = trainer_of(method, copy.deepcopy(student), tiny_llama, tmp_path / "cut", **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert float(again.soft_loss.calls) == 8
    assert float(again.soft_loss.t) == pytest.approx(float(whole.soft_loss.t), abs=1e-9)
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(name), msg=name)
    (tmp_path / "cut" / "checkpoint-8" / LOSS_FILE).write_bytes(b"no")
    with pytest.raises(UserError, match="holds no state of TaidLoss"):
        again.train(resume_from_checkpoint=True)


def test_the_trainers_loss_is_that_of_the_counted_positions(tiny_llama, student, tmp_path):
    trainer = trainer_of(Logits(temperature=1.0, hard=0.25), student, tiny_llama, tmp_path)
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        loss = trainer.compute_loss(student, {"input_ids": ids, "labels": labels})
        s, t = (model(ids).logits for model in (student, tiny_llama))
        s, t = (torch.cat([x[0, 3:5], x[1, :5]]) for x in (s, t))
        hard = torch.nn.functional.cross_entropy(s, torch.cat([ids[0, 4:], ids[1, 1:]]))
    expected = 0.75 * distillation_loss(s, t, 1.0) + 0.25 * hard
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_which_positions_count():
    logits = torch.arange(24.0).view(2, 3, 4)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    assert torch.equal(counted(logits, labels, causal=True), torch.stack([logits[0, 0], logits[0, 1], logits[1, 1]]))
    assert torch.equal(counted(logits, labels, causal=False), torch.stack([logits[0, 1], logits[0, 2], logits[1, 2]]))
    assert counted(logits, None, causal=True).shape == (6, 4)
    assert torch.equal(counted(logits[0], torch.tensor([1, 0, 3]), causal=False), logits[0])
