"""The experiments' parts on made-up pictures and tiny models, and their rules on figures that must (not) hold."""

import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn
from torch.utils.data import TensorDataset

from lilliput.papers import _students, dataset_reinforcement, label_refinery, taid, task_oriented_transfer
from lilliput.papers._students import STUDENTS, Found
from lilliput.zoo import images
from lilliput.zoo.images import Normalize, Pictures


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this file."""


@pytest.fixture
def pictures(monkeypatch):
    """Made-up clothes and digits, so that nothing needs to be fetched."""

    def made(seed, sizes, normalize):
        generator = torch.Generator().manual_seed(seed)
        return {
            split: Pictures(
                torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8),
                torch.arange(n) % 10,
                normalize,
            )
            for split, n in sizes.items()
        }

    sizes = {"training": 300, "validation": 40, "test": 60}
    monkeypatch.setattr(images, "fashion_mnist", lambda: made(0, sizes, Normalize(0.2860, 0.3530)))
    monkeypatch.setattr(images, "digits", lambda: made(1, sizes, Normalize(0.1307, 0.3081)))


# --- students --------------------------------------------------------------------------------------------------


def test_pictures_are_drawn_by_the_seed(pictures):
    splits = images.fashion_mnist()
    first, again, other = (_students.labelled(splits["training"], 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first.tensors[0], again.tensors[0])
    assert not torch.equal(first.tensors[1], other.tensors[1])
    assert torch.equal(_students.held_out("test", 20).tensors[0], splits["test"].inputs()[:20])


def test_right_answers_are_counted_in_evaluation_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9))
    data = TensorDataset(torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))
    assert _students.right(model.train(), data).tolist() == [100, 100, 100, 0]
    assert model.training


def test_rows_have_an_accuracy_for_each_architecture():
    one = Found()
    for seed, share in enumerate((0.5, 1.0)):
        one.add("ResNet-8", torch.tensor([100.0, 100 * (share > 0.5)]), 2.0 + seed, 10)
        one.add("MobileNet", torch.tensor([0.0, 0.0]), 4.0, 20)
    row = one.row("a")
    assert row.values == {
        "seconds": 3.25, "updates": 15, "resnet_8_accuracy_percent": 75, "mobilenet_accuracy_percent": 0
    }  # fmt: skip
    assert row.spread["resnet_8_accuracy_percent"] == pytest.approx(50 / 2**0.5)
    assert len(one.contender().right) == 4
    assert len(one.contender("MobileNet").right) == 2


# --- dataset reinforcement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, *dataset_reinforcement.RIVALS, dataset_reinforcement.ONLINE])
def test_stored_answers_have_to_beat_labels_on_every_architecture(weak):
    names = (*dataset_reinforcement.RIVALS, dataset_reinforcement.ONLINE)
    gains = {(name, student): (0.5, 0.2) for name in names for student in STUDENTS}
    gains |= {(dataset_reinforcement.ONLINE, student): (-0.3, 0.2) for student in STUDENTS}
    worse = (-0.5, 0.2) if weak == dataset_reinforcement.ONLINE else (0.5, 0.3)
    gains |= {(weak, "MobileNet"): worse} if weak else {}
    assert dataset_reinforcement.judge(gains) is (weak is None)


def test_every_student_is_given_the_same_seconds(pictures, tmp_path):
    effort = dataset_reinforcement.Effort(pictures=48, seconds=0.02, seeds=1, test_pictures=30)
    setting = dataset_reinforcement.prepared(effort, 0, tmp_path)
    rates = dataset_reinforcement.tuned(setting, effort)
    found = {}
    dataset_reinforcement.compare(found, setting, effort, 0, rates)
    ours = found.pop(dataset_reinforcement.OURS)
    share = setting.storing_s / len(STUDENTS)
    assert ours.seconds == pytest.approx([0.02 + share] * len(STUDENTS))
    assert found.pop(dataset_reinforcement.ALL_PAID).seconds == pytest.approx([0.02 + setting.storing_s] * 2)
    for one in found.values():
        assert one.seconds == ours.seconds
        assert set(one.right) == set(STUDENTS)
        assert min(one.steps) > 0
    assert set(rates.values()) <= set(dataset_reinforcement.RATES)


# --- label refinery --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, *label_refinery.RIVALS])
def test_the_chain_has_to_beat_every_rival(weak):
    gains = dict.fromkeys(label_refinery.RIVALS, (0.5, 0.2)) | ({weak: (0.5, 0.3)} if weak else {})
    assert label_refinery.judge(gains) is (weak is None)


def test_a_tenth_of_the_labels_is_drawn_anew(pictures):
    data = TensorDataset(torch.zeros(20_000, 1), torch.arange(20_000) % 10)
    noisy = label_refinery.noisy(data, 0).tensors[1]
    assert float((noisy != data.tensors[1]).double().mean()) == pytest.approx(0.09, abs=0.01)
    assert torch.equal(noisy, label_refinery.noisy(data, 0).tensors[1])


def test_the_rivals_of_the_chain_train_as_long_as_all_of_it(pictures):
    effort = label_refinery.Effort(pictures=64, generations=3, steps=2, seeds=1, test_pictures=30)
    found, rates = {}, label_refinery.tuned(effort, 5)
    assert label_refinery.compare(found, effort, 0, rates) > 0
    assert set(found) == {label_refinery.OURS, *label_refinery.RIVALS}
    chain, first = found[label_refinery.OURS], found[label_refinery.FIRST]
    assert chain.seconds == found[label_refinery.PLAIN].seconds == found[label_refinery.SMOOTHED].seconds
    assert first.seconds[0] < chain.seconds[0]
    assert (first.steps, chain.steps) == ([2], [6])


# --- TAID ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, taid.FORWARD, taid.REVERSE, taid.LINEAR])
def test_taid_has_to_beat_both_divergences_and_not_lose_to_the_line(weak):
    gains = dict.fromkeys((taid.FORWARD, taid.REVERSE, taid.LINEAR), (0.05, 0.02))
    worse = (-0.01, 0.02) if weak == taid.LINEAR else (0.05, 0.03)
    assert taid.judge(gains | ({weak: worse} if weak else {})) is (weak is None)


def test_reverse_divergence_against_float64():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 4, 5)) * 3
    expected = np.sum(softmax(s, -1) * (log_softmax(s, -1) - log_softmax(t, -1)), -1).mean()
    assert taid.reverse_divergence(torch.tensor(s), torch.tensor(t)).item() == pytest.approx(expected, rel=1e-5)


def test_every_loss_of_taid_teaches_a_student_of_fewer_blocks(llama_work, monkeypatch):
    monkeypatch.setattr(taid, "KEPT", (0,))
    batches = taid.taught(llama_work, 2) * 3  # the share moves from the second step on
    student = taid.student_of(llama_work.model)
    assert len(student.model.layers) == 1
    assert len(llama_work.model.model.layers) == llama_work.model.config.num_hidden_layers == 2
    found = {}
    for name, loss in taid.losses(6).items():
        one, seconds = taid.learned(llama_work, batches, loss(), 1e-2, 0)
        taid.note(found, name, one, llama_work, llama_work.values(student, "test"))
        assert seconds > 0
        assert not torch.equal(one.lm_head.weight, student.lm_head.weight)
    healed = torch.stack([one.healed[0] for one in found.values()])
    assert len(healed.unique(dim=0)) == 4
    fresh = taid.losses(2)[taid.OURS]
    assert fresh() is not fresh()


def test_taid_is_tuned_on_another_seed(llama_work, monkeypatch):
    asked = []
    monkeypatch.setattr(taid, "KEPT", (0,))
    monkeypatch.setattr(taid, "language_work", lambda name, effort, seed: asked.append(seed) or llama_work)
    rates = taid.tuned(taid.Effort(steps=2, seeds=1), 7)
    assert asked == [7]
    assert set(rates) == set(taid.losses(2))
    assert set(rates.values()) <= set(taid.RATES)


# --- task-oriented transfer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, *task_oriented_transfer.BEATEN, *task_oriented_transfer.MATCHED])
def test_task_answers_have_to_beat_their_rivals(weak):
    gains = dict.fromkeys(task_oriented_transfer.BEATEN, (0.5, 0.2))
    gains |= dict.fromkeys(task_oriented_transfer.MATCHED, (-0.3, 0.2))
    worse = (-0.5, 0.2) if weak in task_oriented_transfer.MATCHED else (0.5, 0.3)
    assert task_oriented_transfer.judge(gains | ({weak: worse} if weak else {})) is (weak is None)


class Flat(nn.Module):
    """Stands for the large model: every tenth pixel."""

    def forward(self, x):
        return x.flatten(1)[:, ::10]


SMALL = task_oriented_transfer.Effort(
    gallery=40, retrieved=30, per_class=2, steps=3, tuning_steps=1, seeds=1, test_pictures=40
)


def test_labels_are_drawn_evenly_and_from_outside_of_the_gallery(pictures):
    labelled = task_oriented_transfer.few_labels(SMALL, 0)
    assert torch.bincount(labelled["label"]).tolist() == [2] * 10
    gallery = task_oriented_transfer.gathered(Flat(), SMALL)
    assert gallery.pictures.shape == (80, 1, 28, 28)
    known = {tuple(p.flatten().tolist()) for p in gallery.pictures}
    assert not known & {tuple(p.flatten().tolist()) for p in labelled["input"]}
    assert not torch.equal(labelled["input"], task_oriented_transfer.few_labels(SMALL, 1)["input"])


def test_every_contender_of_the_transfer_is_trained(pictures):
    gallery = task_oriented_transfer.gathered(Flat(), SMALL)
    rates = task_oriented_transfer.tuned(Flat(), gallery, SMALL, 5)
    found, test = {}, _students.held_out("test", 40)
    share = task_oriented_transfer.compare(found, Flat(), gallery, SMALL, 0, rates, test)
    assert 0 <= share <= 1
    assert set(found) == set(task_oriented_transfer.CONTENDERS)
    ours, alone = (found[n].seconds[0] for n in (task_oriented_transfer.OURS, task_oriented_transfer.SCRATCH))
    assert alone >= ours > 0
    answers = torch.tensor([[3.0, 1, 2], [0.0, 5, 4]])
    torch.testing.assert_close(task_oriented_transfer.certain(answers).softmax(-1), torch.eye(3)[[0, 1]])


# --- whole -----------------------------------------------------------------------------------------------------


def test_an_experiment_on_pictures_gives_evidence(pictures, monkeypatch):
    small = {
        dataset_reinforcement: dataset_reinforcement.Effort(48, 0.02, 2, 40),
        label_refinery: label_refinery.Effort(48, 2, 2, 2, 40),
        task_oriented_transfer: SMALL,
    }
    monkeypatch.setattr(task_oriented_transfer, "Foundation", Flat)
    for module, effort in small.items():
        monkeypatch.setattr(module, "Effort", lambda *args, effort=effort: effort)
        evidence = module.experiment(seed=3)
        assert json.loads(json.dumps(evidence.to_json()))["rows"]
        assert isinstance(evidence.holds, bool)
        assert len(evidence.rows) >= 4
        assert evidence.row(module.OURS).values["seconds"] > 0


def test_the_experiment_on_text_gives_evidence(llama_work, monkeypatch):
    monkeypatch.setattr(taid, "KEPT", (0,))
    monkeypatch.setattr(taid, "language_work", lambda name, effort, seed: llama_work)
    evidence = taid.experiment(seed=3)
    assert json.loads(json.dumps(evidence.to_json()))["rows"]
    assert {row.name for row in evidence.rows} == {taid.OURS, taid.LINEAR, taid.FORWARD, taid.REVERSE}
