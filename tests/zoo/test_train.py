import math
import re
import tomllib

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from lilliput.errors import UserError
from lilliput.zoo import images, nets, texts, train


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Checkpoints and cache in a temporary folder."""
    monkeypatch.setattr(nets, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "checkpoints"


def shaded(count, seed):
    """Noise whose mean brightness is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randint(20, (count, 28, 28), generator=generator)
    return images.Pictures((noise + 25 * labels.view(-1, 1, 1)).byte(), labels, images.Normalize(0.5, 0.3))


def test_augment_keeps_shape_and_values_and_moves_every_picture_alike():
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 28, 28)
    x[:, :, 14, 4] = 1
    y = train.augment(x)
    assert y.shape == x.shape
    assert y.sum((1, 2, 3)).tolist() == [1.0] * 64
    places = {tuple(p.nonzero()[0].tolist()) for p in y[:, 0]}
    assert len(places) == 2  # mirrored and not
    (row, left), (same_row, right) = sorted(places)
    assert row == same_row
    assert abs(row - 14) <= 2
    assert abs(left - 4) <= 2
    assert right - left == 23 - 4


def test_augment_fills_with_the_darkest_value():
    torch.manual_seed(1)
    assert train.augment(torch.full((8, 1, 28, 28), -0.8)).eq(-0.8).all()


def test_accuracy_against_counting():
    class Fixed(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    pictures = shaded(1203, 0)
    assert train.accuracy(Fixed(), pictures) == pytest.approx(100 * (pictures.labels == 3).float().mean().item())


def test_a_classifier_is_trained_written_and_loaded(elsewhere, monkeypatch):
    splits = {"training": shaded(256, 0), "validation": shaded(100, 1), "test": shaded(100, 2)}
    monkeypatch.setattr(images, "fashion_mnist", lambda: splits)
    monkeypatch.setattr(nets, "_NETS", nets._NETS | {"resnet-small": lambda: nets.resnet(4, 8, stem_stride=4)})
    monkeypatch.setitem(train.RECIPES, "resnet-small", train.Recipe(epochs=4, batch_size=16, lr=1e-2))
    facts = train.make("resnet-small", seed=1)
    assert facts["test_accuracy_percent"] > 25
    assert facts["test_accuracy_percent"] == pytest.approx(train.accuracy(nets.load("resnet-small"), splits["test"]))
    noted = tomllib.loads((elsewhere / "hashes.toml").read_text())["resnet-small.safetensors"]
    assert noted == facts
    assert (noted["seed"], noted["size_bytes"]) == (1, (elsewhere / "resnet-small.safetensors").stat().st_size)
    first = (elsewhere / "resnet-small.safetensors").read_bytes()
    train.make("resnet-small", seed=1)
    assert (elsewhere / "resnet-small.safetensors").read_bytes() == first


def test_a_language_model_is_trained_without_the_other_splits(elsewhere, monkeypatch):
    words = re.findall(r"\w+", "the state of our union is strong and we will make it stronger for all people")
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (20, 700), generator=generator).tolist()
    documents = {f"doc{i}": " ".join(words[w] for w in line) for i, line in enumerate(picks)}
    corpus = texts.Corpus("sotu", documents)
    seen = []
    original = train.train_tokenizer
    monkeypatch.setattr(texts, "state_of_the_union", lambda: corpus)
    monkeypatch.setattr(train, "train_tokenizer", lambda d: (seen.extend(d), original(d, 300))[1])
    monkeypatch.setattr(nets, "_NETS", nets._NETS | {"llama-tiny": lambda: nets.llama(32, 1, 2, 1, 32)})
    monkeypatch.setitem(train.RECIPES, "llama-tiny", train.Recipe(epochs=1, batch_size=8, lr=1e-2))
    facts = train.make("llama-tiny")
    assert seen == list(corpus.split("training").values())
    assert facts["test_perplexity"] < 1000
    assert 0 < facts["validation_bits_per_byte"] < 8
    assert nets.load("llama-tiny").model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("text", ["not to be or to be", "né — 日本"])
def test_text_scores_of_a_uniform_model(text):
    class Uniform(nn.Module):
        def forward(self, input_ids, use_cache):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 300)})

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train.train_tokenizer(["to be or not to be " * 50], 270))
    ids = tokenizer(text)["input_ids"]
    first = len(tokenizer.decode(ids[:1]).encode())
    perplexity, bits = train.text_scores(Uniform(), tokenizer, torch.tensor([ids] * 3))
    assert perplexity == pytest.approx(300, rel=1e-4)
    assert bits == pytest.approx(math.log2(300) * (len(ids) - 1) / (len(text.encode()) - first), rel=1e-4)


def test_unknown_name():
    with pytest.raises(UserError, match="no net 'x'; there are: resnet-small"):
        train.make("x")


def test_every_net_has_a_recipe():
    assert set(train.RECIPES) == set(nets.NAMES)
