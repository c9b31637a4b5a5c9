import struct

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lilliput.errors import UserError
from lilliput.methods.distill import _views
from lilliput.methods.distill._store import FLOOR, Store, log_probabilities, sparse
from lilliput.methods.distill._views import COLUMNS, Views, erased, mixed, moved, pasted, uniforms
from lilliput.methods.distill.dataset_reinforcement import DatasetReinforcement, ReinforcedDataset
from lilliput.methods.distill.logits import distillation_loss

EVERYTHING = {"padding": 2, "flip": True, "erase": 0.5, "mix": "mixup"}


class Teacher(nn.Module):
    """Linear, and remembers what it saw."""

    def __init__(self, classes=10, seed=0, scale=0.1):
        super().__init__()
        weight = torch.randn(classes, 3 * 8 * 6, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(scale * weight)
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.dropout(x.flatten(1)) @ self.weight.T


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(30, 3, 8, 6, generator=generator), torch.arange(30) % 10)


def views_of(views, data, indices, draw=0, seed=0):
    return views.of(_views.pictures_of(data, indices)[0], data, indices, draw, seed)


# --- views -----------------------------------------------------------------------------------------------------


def splitmix(state, count):
    """The published generator with Python's whole numbers."""
    found, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_the_hash_is_that_of_splitmix64():
    assert splitmix(0, 1)[0] == 0xE220A8397B1DCDAF  # the first output of seed 0 in the reference implementation
    ours = _views._hash(np.array([0, 5], np.uint64))
    assert ours.tolist() == [splitmix(0, 1)[0], splitmix(5, 1)[0]]


def test_random_numbers_are_a_function_of_seed_draw_and_picture():
    u = uniforms(3, 1, torch.arange(500))
    assert u.shape == (500, COLUMNS)
    assert 0 <= float(u.min()) < float(u.max()) < 1
    assert torch.equal(u[torch.tensor([7, 3])], uniforms(3, 1, torch.tensor([7, 3])))
    others = (uniforms(4, 1, torch.arange(500)), uniforms(3, 2, torch.arange(500)), u.roll(1, 0), u.roll(1, 1))
    for other in others:
        assert not (other == u).any()
        assert abs(float(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1])) < 0.05
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)


def test_moving_is_a_crop_of_the_padded_picture():
    x, u = torch.randn(40, 2, 7, 5), uniforms(0, 0, torch.arange(40))
    found = moved(x, u, 3, flip=True)
    for i in range(40):
        padded = torch.nn.functional.pad(x[i], [3] * 4, value=float(x[i].min()))
        top, left = (int(u[i, c] * 7) for c in (_views.TOP, _views.LEFT))
        padded = padded.flip(-1) if u[i, _views.FLIP] < 0.5 else padded
        assert torch.equal(found[i], padded[:, top : top + 7, left : left + 5])
    assert torch.equal(moved(x, u, 0, flip=False), x)


def test_erasing_takes_one_rectangle_of_the_promised_size():
    x, u = torch.ones(200, 1, 20, 20), uniforms(1, 0, torch.arange(200))
    gone = erased(x, u, 1.0)[:, 0] == 0
    for one in gone:
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        assert int(one.sum()) == len(rows) * len(columns)
        assert int(rows[-1] - rows[0]) + 1 == len(rows)
    shares = gone.double().mean((1, 2))
    assert 0.01 < float(shares.min()) < 0.1 < 0.25 < float(shares.max()) < 0.4
    assert torch.equal(erased(x, u, 0.0), x)
    assert 0.2 < float((erased(x, u, 0.3) == 0).any(-1).any(-1).double().mean()) < 0.4


def test_mixing():
    x, other, u = torch.zeros(300, 1, 10, 10), torch.ones(300, 1, 10, 10), uniforms(2, 0, torch.arange(300))
    share = mixed(x, other, u)[:, 0, 0, 0].double()
    torch.testing.assert_close(share, 1 - u[:, _views.SHARE], rtol=0, atol=1e-6)
    shares = pasted(x, other, u).mean((1, 2, 3)).double()
    assert bool((shares <= 1 - u[:, _views.SHARE] + 0.22).all())
    assert set(pasted(x, other, u).unique().tolist()) == {0, 1}
    assert 0.2 < float(shares.mean()) < 0.5


@pytest.mark.parametrize("mix", _views.MIXES)
def test_a_view_does_not_depend_on_its_batch(data, mix):
    views = Views(**EVERYTHING | {"mix": mix})
    together = views_of(views, data, torch.arange(30), draw=3)
    for part in torch.randperm(30, generator=torch.Generator().manual_seed(0)).split(7):
        assert torch.equal(views_of(views, data, part, draw=3), together[part])
    assert not torch.equal(views_of(views, data, torch.arange(30), draw=4), together)


# --- the file --------------------------------------------------------------------------------------------------


def test_sparse_answers_spread_the_rest_evenly():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.06, 0.04], [0.0, 1.0, 0.0, 0.0, 0.0]])
    found = log_probabilities(*sparse(p, 2), 5).exp()
    expected = torch.tensor([[0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3], [0.0, 1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-7)
    assert float(found.min()) >= FLOOR * 0.99
    torch.testing.assert_close(log_probabilities(*sparse(p, 5), 5)[0].exp(), p[0], rtol=1e-3, atol=0)
    for count, kind in ((256, torch.uint8), (257, torch.int16), (40_000, torch.int32)):
        classes, _ = sparse(torch.arange(count)[None] / count, 1)
        assert classes.dtype == kind
        assert int(classes) == count - 1


@pytest.mark.parametrize("mix", _views.MIXES)
def test_a_student_gets_the_very_pictures_and_answers_of_the_teacher(data, tmp_path, mix):
    teacher = Teacher().train()
    method = DatasetReinforcement(samples=3, batch=8, seed=5, **EVERYTHING | {"mix": mix})
    file = method.reinforce(data, teacher, tmp_path / "answers.safetensors")
    assert teacher.training
    seen = torch.cat(teacher.seen[1:]).unflatten(0, (3, 30))  # the first is the look at its classes
    student = ReinforcedDataset(data, file, original=0.0)
    for epoch in (0, 1, 2, 3):
        student.set_epoch(epoch)
        picks = torch.tensor([17, 4, 29])
        batch = student.batch(picks)
        assert torch.equal(batch["input"], seen[epoch % 3, picks])
        assert torch.equal(batch["label"], picks % 10)
        expected = (batch["input"].flatten(1) @ teacher.weight.T).log_softmax(-1)
        torch.testing.assert_close(batch["taught"], expected, rtol=1e-2, atol=1e-2)
        assert float(distillation_loss(expected, batch["taught"], 1.0)) < 1e-5


def test_several_teachers_answer_with_their_mean(data, tmp_path):
    teachers = [Teacher(seed=s).eval() for s in range(3)]
    file = DatasetReinforcement(samples=1).reinforce(data, teachers, tmp_path / "a.safetensors")
    batch = ReinforcedDataset(data, file, original=0.0).batch(torch.arange(30))
    with torch.no_grad():
        mean = torch.stack([t(batch["input"]).softmax(-1) for t in teachers]).mean(0)
    torch.testing.assert_close(batch["taught"].exp(), mean, rtol=2e-3, atol=1e-6)


def test_few_probabilities_make_a_small_file(data, tmp_path):
    sizes = []
    for k in (2, 10):
        file = DatasetReinforcement(samples=50, top_k=k).reinforce(data, Teacher(), tmp_path / f"{k}.safetensors")
        sizes.append(file.stat().st_size)
    assert sizes[0] - 50 * 30 * 2 * 3 == pytest.approx(sizes[1] - 50 * 30 * 10 * 3, abs=64)


def test_a_file_is_continued_and_equals_one_made_at_once(data, tmp_path):
    teacher = Teacher()
    part, whole = (tmp_path / f"{name}.safetensors" for name in ("part", "whole"))
    DatasetReinforcement(samples=2).reinforce(data, teacher, part)
    teacher.seen.clear()
    DatasetReinforcement(samples=5).reinforce(data, teacher, part)
    assert len(teacher.seen) == 1 + 3
    DatasetReinforcement(samples=5).reinforce(data, teacher, whole)
    assert Store(part).header == Store(whole).header
    for draw in range(5):
        assert all(torch.equal(a, b) for a, b in zip(Store(part).read(draw), Store(whole).read(draw), strict=True))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["part.safetensors", "whole.safetensors"]
    DatasetReinforcement(samples=1).reinforce(data, teacher, part)
    assert Store(part).draws == 5


@pytest.mark.parametrize(
    ("settings", "teacher", "match"),
    [
        ({"seed": 1}, Teacher(), "settings"),
        ({"padding": 1}, Teacher(), "settings"),
        ({"top_k": 3}, Teacher(), "top_k"),
        ({}, Teacher(classes=9), "classes"),
        ({}, Teacher(seed=1, scale=1.0), "another teacher"),
    ],
)
def test_a_file_of_something_else_is_not_continued(data, tmp_path, settings, teacher, match):
    file = DatasetReinforcement(samples=1).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    before = file.read_bytes()
    with pytest.raises(UserError, match=match):
        DatasetReinforcement(samples=2, **settings).reinforce(data, teacher, file)
    assert file.read_bytes() == before


def test_other_pictures_are_refused(data, tmp_path):
    file = DatasetReinforcement(samples=1).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    other = TensorDataset(data.tensors[0] * 1.001, data.tensors[1])
    fewer = TensorDataset(data.tensors[0][:29], data.tensors[1][:29])
    for wrong in (other, fewer):
        with pytest.raises(UserError, match="other data"):
            ReinforcedDataset(wrong, file)


def test_truncated_and_damaged_files_are_refused(data, tmp_path):
    file = DatasetReinforcement(samples=2).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    good = file.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for length in (0, 5, header - 3, header, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(UserError, match="cannot be read"):
            ReinforcedDataset(data, file)
    for text, other in ((b'seed\\": 0', b'seed\\": 1'), (b'"format":"1"', b'"format":"7"')):
        assert text in good
        file.write_bytes(good.replace(text, other))
        with pytest.raises(UserError, match=r"checksum is another|version 7"):
            ReinforcedDataset(data, file)
    first, last = bytearray(good), bytearray(good)
    first[header] ^= 1
    last[-1] ^= 1
    for damaged in (first, last):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"draw . of .* is damaged"):
            _every_epoch(ReinforcedDataset(data, file))
    with pytest.raises(UserError, match="cannot be read"):
        ReinforcedDataset(data, tmp_path / "missing.safetensors")


def _every_epoch(dataset):
    for epoch in range(2):
        dataset.set_epoch(epoch)


# --- as a dataset ----------------------------------------------------------------------------------------------


def test_a_loader_gives_what_batch_gives(data, tmp_path):
    file = DatasetReinforcement(samples=2).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    dataset = ReinforcedDataset(data, file)
    dataset.set_epoch(1)
    whole = dataset.batch(torch.arange(30))
    for found in (next(iter(DataLoader(dataset, batch_size=30))), _stacked([dataset[i] for i in range(30)])):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[k], whole[k]) for k in whole)
    assert torch.equal(dataset[-1]["input"], dataset[29]["input"])
    with pytest.raises(IndexError):
        dataset[30]


def _stacked(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_accelerate_sets_the_epoch(data, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    file = DatasetReinforcement(samples=2).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    dataset = ReinforcedDataset(data, file)
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=30))
    loader.set_epoch(3)
    assert (dataset.epoch, dataset.draw) == (3, 1)


def test_some_items_are_the_pictures_themselves_with_their_labels(data, tmp_path):
    file = DatasetReinforcement(samples=1).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    batch = ReinforcedDataset(data, file, original=1.0).batch(torch.arange(30))
    assert torch.equal(batch["input"], data.tensors[0])
    assert torch.equal(batch["taught"].argmax(-1), data.tensors[1])
    assert float(batch["taught"].exp().max(-1).values.min()) == 1
    dataset = ReinforcedDataset(data, file, original=0.3)
    plain = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        plain.append((dataset.batch(torch.arange(30))["input"] == data.tensors[0]).flatten(1).all(1))
    assert float(torch.stack(plain).double().mean()) == pytest.approx(0.3, abs=0.06)
    unlabelled = [{"input": x} for x, _ in data]
    file = DatasetReinforcement(samples=1).reinforce(unlabelled, Teacher(), tmp_path / "b.safetensors")
    batch = ReinforcedDataset(unlabelled, file, original=1.0).batch(torch.arange(30))
    assert not torch.equal(batch["input"], data.tensors[0])


def test_our_loop_reads_a_draw_an_epoch_and_teaches(data, tmp_path):
    torch.manual_seed(0)
    file = DatasetReinforcement(samples=4, erase=0.0).reinforce(data, Teacher(), tmp_path / "a.safetensors")
    dataset, student, epochs = ReinforcedDataset(data, file, original=0.0), nn.Linear(144, 10), []

    def loss(model, batch):
        epochs.append(dataset.epoch)
        return distillation_loss(model(batch["input"].flatten(1)), batch["taught"], 1.0)

    history = dataset.learn_(student, loss, batch_size=10, seed=0, steps=180, lr=1e-2)
    assert epochs == [i // 3 for i in range(180)]
    assert sum(history.losses[-12:]) < 0.3 * sum(history.losses[:12])


# --- mistakes --------------------------------------------------------------------------------------------------


def test_wrong_use(data, tmp_path):
    file = tmp_path / "a.safetensors"
    method = DatasetReinforcement(samples=1)
    for settings, match in (({"samples": 0}, "samples is 0"), ({"top_k": 2.5}, "whole number"), ({"mix": "x"}, "mix")):
        with pytest.raises(UserError, match=match):
            DatasetReinforcement(**settings)
    with pytest.raises(UserError, match="0 teachers"):
        method.reinforce(data, [], file)
    with pytest.raises(UserError, match=r"give float pictures"):
        method.reinforce(data.tensors[0], Teacher(), file)
    with pytest.raises(UserError, match=r"give float pictures"):
        method.reinforce(TensorDataset(torch.zeros(3, 3, 8, 6, dtype=torch.uint8), torch.zeros(3)), Teacher(), file)
    with pytest.raises(UserError, match="one finite row"):
        method.reinforce(data, nn.Identity(), file)
    with pytest.raises(UserError, match="one finite row"):
        method.reinforce(data, Teacher(scale=float("nan")), file)
    assert not file.exists()
    method.reinforce(data, Teacher(), file)
    with pytest.raises(UserError, match="original is 2"):
        ReinforcedDataset(data, file, original=2)
    other = DatasetReinforcement(samples=1).reinforce(data, Teacher(classes=9), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"label 9, .* 9 classes; set original=0"):
        ReinforcedDataset(data, other, original=1.0).batch(torch.arange(30))
