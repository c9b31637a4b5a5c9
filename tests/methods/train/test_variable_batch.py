import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lilliput.errors import UserError
from lilliput.methods.train.variable_batch import VariableBatch, epoch_plan, picture_sizes, resized, sized_batch

N, BATCH = 200, 8
CARD = [(16, 16), (20, 20), (24, 24), (28, 28), (32, 32)]


@pytest.fixture(scope="module")
def data():
    x = torch.randn(N, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(N))


def batches_of(data, **settings):
    return VariableBatch(**settings).batches(data, (28, 28), BATCH)


# --- sizes and batches -----------------------------------------------------------------------------------------


def test_sizes_are_spaced_rounded_and_hold_the_base():
    assert picture_sizes(VariableBatch(), (28, 28)) == CARD
    assert picture_sizes(VariableBatch(low=1.0, high=1.0, sizes=1, multiple=32), (30, 30)) == [(30, 30), (32, 32)]
    assert picture_sizes(VariableBatch(low=0.05, high=1.0, sizes=2, multiple=8), (16, 32)) == [(8, 8), (16, 32)]


def test_the_pixels_of_a_batch_stay_the_same(data):
    base = BATCH * 28 * 28
    for (height, width), count in batches_of(data).table.items():
        assert abs(height * width * count - base) <= height * width / 2
    assert set(batches_of(data, varies=False).table.values()) == {BATCH}
    assert VariableBatch(high=10.0).batches(data, (28, 28), 1).table[(280, 280)] == 1


def test_an_epoch_has_every_sample_once_and_every_size_equally_often(data):
    batches = batches_of(data, seed=3)
    first, second = list(batches), list(batches)
    for epoch in (first, second):
        assert len(epoch) == len(batches)
        assert sorted(entry.index for batch in epoch for entry in batch) == list(range(N))
        assert all(len({entry.size for entry in batch}) == 1 for batch in epoch)
        counts = Counter(batch[0].size for batch in epoch)
        assert {counts[size] for size in CARD if size != (28, 28)} == {N // sum(batches.table.values())}
    assert [b[0].size for b in first] != [b[0].size for b in second]
    assert len(batches) < len(batches_of(data, varies=False))


def test_a_last_batch_that_is_not_full_can_be_dropped():
    table = {(14, 14): 8, (28, 28): 2}
    assert epoch_plan(table, (28, 28), 25, False) == [((14, 14), 8)] * 2 + [((28, 28), 2)] * 4 + [((28, 28), 1)]
    assert epoch_plan(table, (28, 28), 25, True) == [((14, 14), 8)] * 2 + [((28, 28), 2)] * 4
    assert epoch_plan(table, (28, 28), 1, False) == [((28, 28), 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_pictures_of_the_size_with_their_labels(data, workers):
    batches = batches_of(data)
    expected = batches.order(0)
    loader = batches.loader(num_workers=workers)
    assert len(loader) == len(expected)
    for (x, y), entries in zip(loader, expected, strict=True):
        assert y.tolist() == [entry.index for entry in entries]
        assert tuple(x.shape) == (len(entries), 1, *entries[0].size)
        whole = data.tensors[0][y]
        if entries[0].size == (28, 28):
            assert torch.equal(x, whole)
        else:
            torch.testing.assert_close(x, F.interpolate(whole, entries[0].size, mode="bilinear", antialias=True))


def test_smaller_pictures_keep_their_mean():
    ramp = torch.linspace(0, 1, 32).view(1, 1, 1, 32).expand(2, 3, 32, 32)
    small = resized(ramp.clone(), (8, 8))
    torch.testing.assert_close(small.mean(), ramp.mean(), atol=1e-3, rtol=0)


def test_it_also_works_as_the_parts_of_a_loader_of_ones_own(data):
    batches = batches_of(data)
    loader = DataLoader(batches.dataset, batch_sampler=batches, collate_fn=sized_batch)
    assert sum(len(y) for _, y in loader) == N
    assert torch.equal(batches.dataset[3][0], data[3][0])


def test_dictionaries_keep_what_is_no_picture():
    batch = {"pixel_values": torch.zeros(2, 1, 8, 8), "labels": torch.arange(2), "ids": torch.zeros(2, 1, 8, 8).long()}
    found = resized(batch, (4, 6))
    assert found["pixel_values"].shape == (2, 1, 4, 6)
    assert found["labels"] is batch["labels"]
    assert found["ids"] is batch["ids"]


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "batch_size"), [((28, 28), 0), ((0, 28), 8)])
def test_empty_sizes_and_batches_are_refused(data, base, batch_size):
    with pytest.raises(UserError, match="at least 1"):
        VariableBatch().batches(data, base, batch_size)


def test_too_few_samples_are_refused(data):
    with pytest.raises(UserError, match="0 samples"):
        VariableBatch().batches([], (28, 28), 8)
    with pytest.raises(UserError, match="3 samples fill no batch of 8"):
        VariableBatch(drop_last=True).batches([1, 2, 3], (28, 28), 8)


@pytest.mark.parametrize("batch", [torch.zeros(2, 8, 8), {"x": torch.zeros(2, 1, 8, 8).byte()}, [torch.arange(3)]])
def test_batches_without_pictures_are_refused(batch):
    with pytest.raises(UserError, match="float tensor"):
        resized(batch, (4, 4))


# --- going on after a kill -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.norm(self.conv(pixel_values)).relu().mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


class Run:
    """A plain loop that can be stopped after any step."""

    def __init__(self, data):
        torch.manual_seed(0)
        self.model, self.losses = Net(), []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.batches = batches_of(data, seed=5)

    def go(self, steps):
        while len(self.losses) < steps:
            for x, y in self.batches.loader():
                value = F.cross_entropy(self.model(x), y % 10)
                self.optimizer.zero_grad()
                value.backward()
                self.optimizer.step()
                self.losses.append(float(value.detach()))
                if len(self.losses) == steps:
                    return self
        return self

    PARTS = ("model", "optimizer", "batches")

    def restored(self, other):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(copy.deepcopy(getattr(other, name).state_dict()))
        self.losses = list(other.losses)
        return self


@pytest.mark.parametrize("killed", [1, 10, 20, 21])
def test_a_killed_run_has_the_losses_of_an_uninterrupted_one(data, killed):
    steps = 2 * len(batches_of(data)) + 3
    expected = Run(data).go(steps).losses
    assert Run(data).restored(Run(data).go(killed)).go(steps).losses == expected


def test_a_state_of_other_data_is_refused(data):
    with pytest.raises(UserError, match="200 samples, here are 3"):
        VariableBatch().batches([1, 2, 3], (28, 28), 8).load_state_dict(batches_of(data).state_dict())


def test_a_trainer_of_transformers_uses_it_and_resumes(data, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments, default_data_collator

    samples = [{"pixel_values": x, "labels": int(y) % 10} for x, y in zip(*data.tensors)]

    def trained(steps, resume=None):
        torch.manual_seed(0)
        batches = VariableBatch(seed=5).batches(samples, (28, 28), BATCH)
        seen = []

        class Varied(Trainer):
            def get_train_dataloader(self):
                return self.accelerator.prepare(batches.loader(collate=default_data_collator))

            def training_step(self, model, inputs, *rest):
                seen.append(tuple(inputs["pixel_values"].shape))
                return super().training_step(model, inputs, *rest)

        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, report_to=[], use_cpu=True, save_steps=5, logging_steps=1,
            disable_tqdm=True, lr_scheduler_type="constant", learning_rate=0.01,
        )  # fmt: skip
        trainer = Varied(Net(), arguments, train_dataset=samples, callbacks=[batches.for_trainer()])
        trainer.train(resume_from_checkpoint=resume)
        return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}, seen

    steps = len(batches_of(data)) + 4
    whole, shapes = trained(steps)
    assert len(whole) == steps
    assert {tuple(s[2:]) for s in shapes} == set(CARD)
    resumed, again = trained(steps, str(tmp_path / "checkpoint-5"))
    assert again == shapes[5:]
    assert resumed == whole
