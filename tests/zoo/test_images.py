import gzip
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput import zoo
from lilliput.errors import UserError
from lilliput.zoo import images
from lilliput.zoo.fetch import folder_of


def idx(values, kind=8):
    header = bytes([0, 0, kind, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.tobytes()


# --- idx files -------------------------------------------------------------------------------------------------


def test_an_idx_file_is_read_as_written(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 7), np.uint8)
    (tmp_path / "f.gz").write_bytes(gzip.compress(idx(values)))
    assert np.array_equal(images.read_idx(tmp_path / "f.gz").numpy(), values)


@pytest.mark.parametrize("harm", ["shorter", "longer", "kind", "no gzip", "empty", "header", "cut gzip"])
def test_a_broken_idx_file_is_a_plain_error(tmp_path, harm):
    values = np.zeros((3, 5), np.uint8)
    whole = idx(values)
    content = {
        "shorter": gzip.compress(whole[:-1]),
        "longer": gzip.compress(whole + b"x"),
        "kind": gzip.compress(idx(values, kind=9)),
        "no gzip": whole,
        "empty": gzip.compress(b""),
        "header": gzip.compress(whole[:6]),
        "cut gzip": gzip.compress(whole)[:-9],
    }[harm]
    (tmp_path / "f.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"f\.gz"):
        images.read_idx(tmp_path / "f.gz")


# --- splits ----------------------------------------------------------------------------------------------------


def counted(pixels):
    return Counter(picture.tobytes() for picture in pixels.numpy())


def test_fashion_mnist_is_cut_without_overlap_or_loss():
    splits = images.fashion_mnist()
    assert {k: len(v) for k, v in splits.items()} == {
        "training": 55_000,
        "calibration": 1000,
        "validation": 4000,
        "test": 10_000,
    }
    parts = [splits[s] for s in ("training", "calibration", "validation")]
    official = images.read_idx(folder_of("fashion-mnist") / "train-images-idx3-ubyte.gz")
    assert sum((counted(p.pixels) for p in parts), Counter()) == counted(official)
    assert sum(p.labels.bincount() for p in parts).tolist() == [6000] * 10
    assert splits["test"].labels.bincount().tolist() == [1000] * 10
    assert splits["calibration"].labels.bincount().min() > 60


def test_labels_stay_with_their_pictures():
    folder = folder_of("fashion-mnist")
    pixels = images.read_idx(folder / "t10k-images-idx3-ubyte.gz")
    labels = images.read_idx(folder / "t10k-labels-idx1-ubyte.gz").tolist()
    known = {picture.tobytes(): label for picture, label in zip(pixels.numpy(), labels)}
    test = images.fashion_mnist()["test"]
    assert [known[p.tobytes()] for p in test.pixels.numpy()] == test.labels.tolist()


@pytest.mark.parametrize("dataset", ["fashion-mnist", "digits"])
def test_training_inputs_have_mean_0_and_deviation_1(dataset):
    pictures = images.DATASETS[dataset]()["training"]
    counts, levels = np.bincount(pictures.pixels.flatten().numpy(), minlength=256), np.arange(256) / 255
    mean = np.average(levels, weights=counts)
    std = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    x = pictures.first(3).inputs()
    assert x.dtype == torch.float32
    assert x.shape == (3, 1, 28, 28)
    np.testing.assert_allclose(x[:, 0], (pictures.pixels[:3].double() / 255 - mean) / std, atol=0.02)


def test_digits_are_those_of_the_package():
    splits = images.digits()
    assert {k: len(v) for k, v in splits.items()} == {
        "calibration": 500,
        "validation": 500,
        "test": 1000,
        "training": 8000,
    }
    counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert sum(p.labels.bincount() for p in splits.values()).tolist() == counts
    assert len(sum((counted(p.pixels) for p in splits.values()), Counter())) == 10_000


def test_the_splits_can_be_learned_from():
    """Nearest class mean, 81 % on digits and 68 % on clothes in the literature: wrong labels or pixels would show."""
    for name, least in (("digits", 75), ("fashion-mnist", 63)):
        splits = images.DATASETS[name]()
        x, y = splits["training"].first(5000).inputs().flatten(1), splits["training"].first(5000).labels
        means = torch.stack([x[y == c].mean(0) for c in range(10)])
        found = torch.cdist(splits["validation"].inputs().flatten(1), means).argmin(1)
        assert 100 * float((found == splits["validation"].labels).float().mean()) > least


# --- batches ---------------------------------------------------------------------------------------------------


def test_batches_are_a_sequence():
    pictures = images.digits()["validation"].first(10)
    batches = pictures.batches(4)
    assert [len(b["label"]) for b in batches] == [4, 4, 2]
    assert len(batches) == 3
    assert torch.equal(batches[-1]["input"], batches[2]["input"])
    assert [len(b["label"]) for b in batches[1:]] == [4, 2]
    assert torch.equal(torch.cat([b["input"] for b in batches]), pictures.inputs())
    assert torch.equal(torch.cat([b["label"] for b in batches]), pictures.labels)
    with pytest.raises(IndexError):
        batches[3]
    with pytest.raises(UserError, match="batch_size is 0"):
        pictures.batches(0)


def test_an_image_workload_scores_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    work = images.image_workload("mine", model, "digits", batch_size=100)
    assert work.source == {"kind": "zoo", "name": "mine"}
    assert work.example["input"].shape == (1, 1, 28, 28)
    score = work.score(model)
    assert (score.n, score.name) == (500, "accuracy")
    assert score.value < 40
    with pytest.raises(UserError, match="fashion-mnist, digits"):
        images.image_workload("mine", model, "cifar")


# --- MobileNetV2 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobilenet():
    return images.load_mobilenet_v2()


@torch.inference_mode()
def test_mobilenet_computes_what_its_weights_say(mobilenet):
    """One block against the formula by hand, in float64."""
    block, x = mobilenet.features[3], torch.randn(1, 24, 14, 14, generator=torch.Generator().manual_seed(0))
    w = {k: v.double() for k, v in block.state_dict().items()}

    def norm(y, name):
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        return (y - w[f"{name}.running_mean"].view(-1, 1, 1)) * scale.view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    y = norm(F.conv2d(x.double(), w["conv.0.0.weight"]), "conv.0.1").clamp(0, 6)
    y = norm(F.conv2d(y, w["conv.1.0.weight"], padding=1, groups=144), "conv.1.1").clamp(0, 6)
    y = x.double() + norm(F.conv2d(y, w["conv.2.weight"]), "conv.3")
    torch.testing.assert_close(block(x).double(), y, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_mobilenet_is_the_model_that_was_checked_by_hand(mobilenet):
    """These numbers come from the net that named 18 of foolbox's 20 ImageNet pictures right, all 20 in its top five."""
    assert sum(p.numel() for p in mobilenet.parameters()) == 3_504_872
    x = torch.sin(torch.arange(3 * 224 * 224) * 0.01).view(1, 3, 224, 224)
    top = mobilenet(x)[0].topk(3)
    assert top.indices.tolist() == [905, 789, 904]
    torch.testing.assert_close(top.values, torch.tensor([8.4573, 7.2495, 7.1247]), atol=2e-3, rtol=0)


def test_imagenet_inputs_are_upscaled_and_normalised():
    x = images.ImagenetInput()(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 28, 28))
    assert x.shape == (2, 3, 224, 224)
    np.testing.assert_allclose(x[0, :, 5, 9], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)
    np.testing.assert_allclose(x[1, :, 5, 9], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-5)


def test_mobilenet_agrees_with_itself_and_not_with_a_damaged_copy():
    work = zoo.load("mobilenet-v2", batch_size=4)
    sizes = {s: sum(len(b["label"]) for b in getattr(work, s)) for s in ("training", "calibration", "validation")}
    assert sizes == {"training": 512, "calibration": 64, "validation": 128}
    labels = torch.cat([b["label"] for b in work.test])
    assert len(labels) == 256
    assert labels.bincount().max() < 0.25 * len(labels)  # a constant answer would not look good
    work.validation = work.validation[:1]
    score = work.score(work.model)
    assert (score.name, score.value) == ("agreement", 100)
    with torch.no_grad():
        work.model.features[4].conv[0][0].weight.zero_()
    assert work.score(work.model).value < 100
    with torch.device("meta"):
        skeleton = zoo.build(work.source["name"])
    assert skeleton.state_dict().keys() == work.model.state_dict().keys()
