import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lilliput.errors import UserError
from lilliput.methods.train.swiftlearn import SwiftLearn, change, el2n, loss, most_important, outputs_of

N, CLASSES = 40, 4


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator)
    return TensorDataset(x, x[:, :CLASSES].argmax(1), torch.arange(N))


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def sampler_for(data, model=None, note=False, **settings):
    scorer = None if model is None else lambda: outputs_of(model, data)
    return SwiftLearn(**settings).sampler(data.tensors[1], scorer)


def log_probabilities(seed, n=N):
    return torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(1)


# --- what makes a sample important -----------------------------------------------------------------------------


def test_measures_are_those_of_numpy():
    now, before = log_probabilities(0), log_probabilities(1)
    labels = torch.arange(N) % CLASSES
    p, q, y = now.exp().numpy(), before.exp().numpy(), np.eye(CLASSES)[labels.numpy()]
    np.testing.assert_allclose(change(now, before), ((p - q) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(loss(now, labels), -np.log(p[np.arange(N), labels]), rtol=1e-5)
    np.testing.assert_allclose(el2n(now, labels), np.sqrt(((p - y) ** 2).sum(1)), rtol=1e-5)


def test_the_most_important_are_chosen_and_equals_in_their_order():
    assert most_important(torch.tensor([1.0, 3, 2, 3, 0]), 3).tolist() == [1, 2, 3]
    assert most_important(torch.zeros(5), 2).tolist() == [0, 1]


def test_balanced_takes_the_best_of_each_class_first():
    importance, classes = torch.tensor([9.0, 8, 7, 6, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 2])
    assert most_important(importance, 3, classes).tolist() == [0, 4, 5]
    assert most_important(importance, 4, classes).tolist() == [0, 1, 4, 5]
    assert most_important(importance, 6, classes).tolist() == list(range(6))


# --- which samples come when -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.3, 1.0])
def test_a_warm_up_pass_shows_everything_and_epochs_are_equally_long(data, keep):
    sampler = sampler_for(data, network(), keep=keep, warmup=2)
    parts = math.ceil(N / len(sampler))
    epochs = [list(sampler) for _ in range(2 * parts + 3)]
    assert {len(e) for e in epochs} == {len(sampler)} == {round(keep * N)}
    for turn in (0, 1):
        assert {i for epoch in epochs[turn * parts : (turn + 1) * parts] for i in epoch} == set(range(N))
    for epoch in epochs[2 * parts :]:
        assert sorted(epoch) == sampler.chosen.tolist()
    if keep < 1:
        assert epochs[2 * parts] != epochs[2 * parts + 1]  # the same samples in another order


def test_it_looks_before_and_after_the_last_warm_up_pass_and_then_every_few_epochs(data):
    sampler = sampler_for(data, network(), keep=0.25, warmup=2, refresh=3)
    passes = []
    for _ in range(16):
        list(sampler)
        passes.append(sampler.scoring_passes)
    assert passes == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert sampler.scoring_seconds > 0


@pytest.mark.parametrize(("score", "passes"), [("loss", 1), ("el2n", 1), ("random", 0)])
def test_other_measures_need_one_look_or_none(data, score, passes):
    sampler = sampler_for(data, network(), keep=0.25, warmup=1, refresh=100, score=score)
    for _ in range(6):
        list(sampler)
    assert sampler.scoring_passes == passes
    assert len(set(sampler.chosen.tolist())) == 10


def test_the_samples_whose_outputs_changed_most_are_kept(data):
    model = network().eval()
    before = outputs_of(model, data).softmax(1)
    sampler = sampler_for(data, model, keep=0.2, warmup=1, refresh=5)
    for _ in range(5):
        list(sampler)
    with torch.no_grad():
        model[-1].weight.add_(torch.randn(model[-1].weight.shape, generator=torch.Generator().manual_seed(3)))
    moved = (outputs_of(model, data).softmax(1) - before).square().sum(1)
    list(sampler)
    assert sorted(moved.argsort(descending=True)[:8].tolist()) == sampler.chosen.tolist()


def test_dropped_samples_return_when_they_matter(data):
    labels, logits = data.tensors[1], torch.zeros(N, CLASSES)
    sampler = SwiftLearn(keep=0.25, warmup=0, refresh=2, score="loss").sampler(labels, lambda: logits)
    logits[torch.arange(N), labels] = torch.where(torch.arange(N) < 10, -5.0, 5.0)  # the first ten are wrong
    list(sampler)
    assert sampler.chosen.tolist() == list(range(10))
    logits[torch.arange(N), labels] = torch.where(torch.arange(N) >= 30, -5.0, 5.0)
    list(sampler)
    assert sampler.chosen.tolist() == list(range(10))
    list(sampler)
    assert sampler.chosen.tolist() == list(range(30, 40))


def test_outputs_of_training_replace_the_passes_of_the_warm_up(data):
    sampler = sampler_for(data, None, keep=0.25, warmup=2, refresh=100)
    model = network().eval()
    for _ in range(10):
        for index in torch.tensor(list(sampler)).split(5):
            sampler.note(index, model(data.tensors[0][index]))
    assert sampler.scoring_passes == 0
    assert len(sampler.chosen) == 10


def test_a_missing_output_is_told_when_there_is_no_scorer(data):
    sampler = sampler_for(data, None, keep=0.25, warmup=2)
    for _ in range(4):
        list(sampler)
    with pytest.raises(UserError, match="40 samples have no fresh output"):
        list(sampler)


def test_outputs_are_those_of_evaluation_mode_in_the_order_of_the_data(data):
    model = network(dropout=0.5).train()
    statistics = model[1].running_mean.clone()
    random = torch.get_rng_state()
    found = outputs_of(model, data, batch_size=7)
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    torch.testing.assert_close(found, model(data.tensors[0]).detach())


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 41}, r"size=41 asks for 41 of 40 samples"),
        ({"keep": 0.001}, r"keep=0.001 asks for 0 of 40 samples"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(data, settings, message):
    with pytest.raises(UserError, match=message):
        sampler_for(data, None, **settings)


def test_no_samples_no_classes_and_no_warm_up_are_refused():
    with pytest.raises(UserError, match=r"\(0,\)"):
        SwiftLearn().sampler([])
    with pytest.raises(UserError, match="least is -1"):
        SwiftLearn().sampler([3, -1])
    with pytest.raises(UserError, match="warmup is 0"):
        SwiftLearn(warmup=0)


def test_outputs_that_are_not_finite_are_refused_with_their_sample(data):
    model = network()
    with torch.no_grad():
        data.tensors[0][7] = float("nan")
    sampler = sampler_for(data, model.eval(), warmup=0, score="loss")
    with pytest.raises(UserError, match=r"1 of 40 samples are not finite.*sample 7"):
        list(sampler)


@pytest.mark.parametrize(
    ("indices", "logits", "message"),
    [([0, 1], torch.zeros(3, 4), "shape"), ([0], torch.zeros(4), "shape"), ([40], torch.zeros(1, 4), "index 40")],
)
def test_wrong_notes_are_refused(data, indices, logits, message):
    with pytest.raises(UserError, match=message):
        sampler_for(data).note(indices, logits)


@pytest.mark.parametrize("score", ["loss", "el2n"])
def test_labels_beyond_the_outputs_are_refused(score):
    sampler = SwiftLearn(warmup=0, score=score).sampler([0, 1, 4], lambda: torch.zeros(3, 4))
    with pytest.raises(UserError, match="a label is 4, but outputs have 4 classes"):
        list(sampler)


def test_another_training_starts_without_the_last_ones_subset(data):
    model = network()
    sampler = sampler_for(data, model, keep=0.5, warmup=1)
    first = [list(sampler) for _ in range(4)]
    chosen = sampler.chosen.tolist()
    sampler.set_epoch(3)
    assert list(sampler) == first[3]
    with torch.no_grad():
        model[-1].weight.neg_()
    sampler.set_epoch(0)
    assert [list(sampler) for _ in range(2)] == first[:2]
    with torch.no_grad():
        model[-1].weight.add_(torch.randn(model[-1].weight.shape, generator=torch.Generator().manual_seed(3)))
    list(sampler)
    assert sampler.scoring_passes == 4
    assert sampler.chosen.tolist() != chosen


def test_a_state_of_other_data_and_a_late_start_are_refused(data):
    with pytest.raises(UserError, match="40 samples, here are 3"):
        SwiftLearn().sampler([0, 1, 2]).load_state_dict(sampler_for(data).state_dict())
    for epoch in (1000, 1001):
        late = sampler_for(data, network())
        late.set_epoch(epoch)
        with pytest.raises(UserError, match=f"epoch {epoch} .*load_state_dict"):
            list(late)


# --- going on after a kill -------------------------------------------------------------------------------------


class Run:
    """A plain loop that can be stopped after any step, and its checkpoint."""

    def __init__(self, data):
        self.model = network(dropout=0.3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.sampler = sampler_for(data, self.model, keep=0.3, warmup=1, refresh=2)
        self.data, self.losses = data, []

    def go(self, steps):
        while len(self.losses) < steps:
            loader = DataLoader(self.data, batch_size=5, sampler=self.sampler, generator=torch.Generator())
            for x, y, index in loader:
                logits = self.model(x)
                self.sampler.note(index, logits)
                value = nn.functional.cross_entropy(logits, y)
                self.optimizer.zero_grad()
                value.backward()
                self.optimizer.step()
                self.losses.append(float(value.detach()))
                if len(self.losses) == steps:
                    return self
        return self

    def saved(self):
        parts = [self.model.state_dict(), self.optimizer.state_dict(), self.sampler.state_dict()]
        buffer = io.BytesIO()
        torch.save([parts, torch.get_rng_state(), self.losses], buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    def restored(self, saved):
        (model, optimizer, sampler), random, self.losses = saved
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.sampler.load_state_dict(sampler)
        torch.set_rng_state(random)
        return self


@pytest.mark.parametrize("killed", [1, 4, 12, 13, 18, 21])
def test_a_killed_run_has_the_losses_of_an_uninterrupted_one(data, killed):
    expected = Run(data).go(36).losses
    saved = Run(data).go(killed).saved()
    assert Run(data).restored(saved).go(36).losses == expected


def test_the_state_that_a_loop_counts_is_that_of_a_loader_without_workers(data):
    sampler = sampler_for(data, network(), keep=0.5, warmup=1)
    iterator = iter(sampler)
    taken = [next(iterator) for _ in range(10)]  # fetched ahead: the loop has used 6
    again = sampler_for(data, network(), keep=0.5, warmup=1)
    again.load_state_dict(sampler.state_dict(at=(0, 6)))
    assert list(again)[:4] == taken[6:]
    again.load_state_dict(sampler.state_dict(at=(0, 20)))
    assert (again.epoch, again.position) == (1, 0)


def test_a_trainer_uses_it_and_resumes(tiny_llama, tmp_path):
    pytest.importorskip("accelerate")
    import copy

    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (24, 8), generator=generator)
    texts = [{"input_ids": row, "labels": row} for row in ids]

    def trained(folder, steps, resume=None):
        model = copy.deepcopy(tiny_llama)
        pairs = TensorDataset(ids, ids[:, 0] % 4)

        def last(model, batch):
            return model(input_ids=batch[0]).logits[:, -1, :CLASSES]

        sampler = SwiftLearn(keep=0.25, warmup=1, refresh=2).sampler(
            pairs.tensors[1], lambda: outputs_of(model, pairs, forward=last)
        )

        class Chosen(Trainer):
            def _get_train_sampler(self, train_dataset=None):
                return sampler

        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=3, report_to=[], use_cpu=True,
            save_steps=7, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-3,
        )  # fmt: skip
        trainer = Chosen(model, arguments, train_dataset=texts, callbacks=[sampler.for_trainer()])
        trainer.train(resume_from_checkpoint=resume)
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        return losses, sampler

    whole, sampler = trained(tmp_path / "whole", 18)
    assert len(whole) == 18
    assert sampler.scoring_passes == 4  # at the epochs 0, 4, 6 and 8 of two steps each
    for step in (7, 14):
        resumed, again = trained(tmp_path / "whole", 18, str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.chosen.tolist() == sampler.chosen.tolist()
        assert resumed == whole
    with pytest.raises(UserError, match="resume with the output_dir"):
        trained(tmp_path / "elsewhere", 18, str(tmp_path / "whole" / "checkpoint-7"))
