"""The parts of the experiments on split inference and on Bayesian mixtures, and their rules on made-up figures."""

import pytest
import torch
from torch import nn

from lilliput.papers import _leakage, bayesian_moe, information_obfuscation
from lilliput.papers._by_seed import BySeed
from lilliput.papers._eras import era_of, mixed
from lilliput.papers._leakage import (
    Part,
    Sender,
    explained_percent,
    first_good,
    inferred_percent,
    noisy,
    principal,
    principal_axes,
    some_features,
    trained_against,
)
from lilliput.zoo.images import Normalize, Pictures


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test."""


def test_figures_by_seed_are_paired():
    found = BySeed()
    for a, b in ((3.0, 1.0), (5.0, 2.0)):
        found.note("a", {"x": a})
        found.note("b", {"x": b})
    assert found.more("a", "b", "x") == (2.5, pytest.approx(0.5))
    assert found.mean("a", "x") == 4
    assert found.rows()[0].spread["x"] == pytest.approx(2**0.5)


# --- what is sent, and what is learned from it -------------------------------------------------------------------


@pytest.fixture
def part():
    """Ten features; the sign of the first is the task, that of the second is private, and so is the third's."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(600, 10, generator=generator)
    task, secret, other = ((z[:, i] > 0).long() for i in range(3))
    return Part(z, task, {"secret": secret, "other": other}, z[:, :4].clone())


def answer(z):
    return torch.stack([-z[:, 0], z[:, 0]], 1)


def halves_of(part):
    """The part twice: for the adversary, and for tests."""
    pick = torch.arange(len(part.task)) < 400
    return tuple(
        Part(part.features[m], part.task[m], {k: v[m] for k, v in part.private.items()}, part.pixels[m])
        for m in (pick, ~pick)
    )


def test_adversaries_find_what_is_sent_and_not_what_is_not(part):
    seen, test = halves_of(part)
    everything, first = Sender(lambda z: z, answer), Sender(lambda z: z[:, :1], answer)
    assert everything.accuracy_percent(test) == first.accuracy_percent(test) == 100
    assert inferred_percent(everything, seen, test, test, "secret", 150, 0) > 90
    assert inferred_percent(first, seen, test, test, "secret", 150, 0) < 65
    assert explained_percent(everything, seen, test) > 99
    assert explained_percent(first, seen, test) == pytest.approx(25, abs=8)


def test_an_adversary_of_noise_sees_it_drawn_anew(part):
    sender = noisy(answer, part.features, 1.0, 0)
    assert not torch.equal(sender.sent(part.features), sender.sent(part.features))
    spread = (sender.sent(part.features) - part.features).std(0)
    assert torch.allclose(spread, part.features.std(0), rtol=0.15)


def test_random_features_and_principal_components_go_back_to_features(part):
    some = some_features(lambda z: z, part.features, 4, 0)
    assert some.numbers(part) == 4
    back = some.logits(some.sent(part.features))
    same = (back == part.features).all(0)
    assert same.sum() == 4
    assert torch.allclose(back[:, ~same], part.features.mean(0)[~same].expand(len(back), -1))
    axes = principal_axes(part.features)
    whole = principal(lambda z: z, part.features.mean(0), axes)
    assert torch.allclose(whole.logits(whole.sent(part.features)), part.features, atol=1e-4)
    variances = ((part.features - part.features.mean(0)) @ axes).var(0)
    assert (variances.diff() <= 1e-4).all()


def test_the_one_that_hides_most_at_the_goal_is_chosen(part):
    counts = [some_features(answer, part.features, n, 0) for n in range(1, 11)]
    found = first_good(counts, part, 100.0)
    assert found.accuracy_percent(part) == 100
    assert all(one.accuracy_percent(part) < 100 for one in counts[: counts.index(found)])
    assert first_good(counts, part, 101.0) is counts[-1]


def test_a_trained_encoder_hides_what_it_was_trained_against(part):
    seen, test = halves_of(part)
    torch.manual_seed(0)
    layer = nn.Linear(10, 2)
    found = trained_against(layer, lambda x: x, seen, "secret", 2, 1.0, 300, 0)
    assert found.accuracy_percent(test) > 90
    assert found.numbers(test) == 2
    assert inferred_percent(found, seen, test, test, "secret", 150, 0) < 75


# --- information obfuscation -------------------------------------------------------------------------------------


@pytest.fixture
def digits(monkeypatch):
    """Ten classes of bright rows for every split."""

    def pictures(count, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 10
        pixels = torch.randint(0, 60, (count, 28, 28), generator=generator, dtype=torch.uint8)
        for label in range(10):
            pixels[labels == label, 2 + 2 * label : 4 + 2 * label, 6:22] = 200
        return Pictures(pixels, labels, Normalize(0.2, 0.3))

    splits = {"training": 640, "validation": 100, "calibration": 100, "test": 100}
    made = {name: pictures(count, i) for i, (name, count) in enumerate(splits.items())}
    monkeypatch.setattr(information_obfuscation.images, "digits", lambda: made)


SMALL = information_obfuscation.Effort(seeds=1, pictures=320, steps=40, attack_steps=10, test_pictures=60)


def test_marked_pictures_differ_in_a_corner_alone(digits):
    parts = information_obfuscation.marked_parts(SMALL, 0)
    assert {name: len(p.mark) for name, p in parts.items()} == {
        "training": 320,
        "adversary": 320,
        "validation": 200,
        "test": 60,
    }
    one = parts["training"]
    bright = (one.pictures.pixels[:, :4, :4] == 255).flatten(1).all(1)
    assert torch.equal(bright.long(), one.mark)
    assert 0.3 < one.mark.double().mean() < 0.7


def test_every_contender_is_attacked(digits, monkeypatch):
    monkeypatch.setattr(information_obfuscation, "COUNTS", (1, 8, 64, 512))
    monkeypatch.setattr(information_obfuscation, "NOISES", (2.0, 0.5, 0.1))
    monkeypatch.setattr(_leakage, "WIDTHS", ((), (16,)))
    found = BySeed()
    information_obfuscation.compare(found, SMALL, 0)
    ours, rows = information_obfuscation.OURS, {row.name: row.values for row in found.rows()}
    assert set(information_obfuscation.RIVALS) < set(rows)
    assert rows[information_obfuscation.RAW]["numbers_sent"] == 1568
    assert rows[information_obfuscation.EXACT]["numbers_sent"] == 64
    assert rows[information_obfuscation.EQUAL]["numbers_sent"] == rows[ours]["numbers_sent"] < 64
    assert rows[information_obfuscation.EACH]["numbers_sent"] < 64
    assert rows[information_obfuscation.EXACT]["task_accuracy_percent"] == pytest.approx(
        rows[information_obfuscation.RAW]["task_accuracy_percent"], abs=2
    )
    assert all(0 <= v <= 100 for row in rows.values() for k, v in row.items() if k.endswith("percent"))
    assert "digit_inferred_naively_percent" in rows[ours]


@pytest.mark.parametrize(
    ("lost", "gain", "holds"), [(0.5, (5, 2), True), (1.5, (5, 2), False), (0.5, (5, 3), False), (0.5, (-5, 1), False)]
)
def test_ours_has_to_hide_more_than_every_rival_at_the_same_accuracy(lost, gain, holds):
    gains = dict.fromkeys(information_obfuscation.RIVALS, (10, 1))
    for weak in gains:
        assert information_obfuscation.judge(lost, gains | {weak: gain}) is holds


# --- Bayesian mixtures -------------------------------------------------------------------------------------------


def test_times_follow_the_year_of_a_document():
    names = ("1790_a", "1849_b", "1850_c", "1899_d", "1950_e", "2021_f")
    assert [era_of(name) for name in names] == [0, 0, 1, 1, 3, 3]
    batches = mixed([torch.full((5, 3), time) for time in range(4)], 0)
    assert all(torch.equal(b["input"][:, 0], b["label"]) for b in batches)
    assert torch.cat([b["label"] for b in batches]).bincount().tolist() == [5] * 4


class Scripted(nn.Module):
    """Logits (n, 2): the input and its negative."""

    def forward(self, input):
        return torch.stack([input, -input], 1)


def test_answers_are_made_milder_until_they_are_likely():
    x = torch.tensor([4.0, 4.0, 4.0, 4.0])
    batch = {"input": x, "label": torch.tensor([0, 0, 0, 1])}
    mild, plain = bayesian_moe.tempered(Scripted(), [batch])(batch), bayesian_moe.plain_answer(Scripted())(batch)
    assert float(mild[0, 0].exp()) == pytest.approx(0.75, abs=0.05)
    assert float(plain[0, 0].exp()) > 0.999
    both = bayesian_moe.averaged([lambda b: plain, lambda b: plain.flip(1)])(batch)
    assert torch.allclose(both.exp(), torch.full((4, 2), 0.5))


def test_figures_of_probabilities():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    found = bayesian_moe.judged(p.log(), torch.tensor([0, 1, 1, 1]), torch.tensor([[0.5, 0.5], [0.65, 0.35]]).log())
    assert found["accuracy_percent"] == 75
    assert found["accuracy_of_the_surest_half_percent"] == 100
    assert found["nll"] == pytest.approx(-float(torch.tensor([0.9, 0.4, 0.8, 0.7]).log().mean()), rel=1e-5)
    assert found["area_against_other_text"] == pytest.approx(7 / 8)
    assert found["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("gain", "temperature", "holds"),
    [
        ((0.1, 0.04), (-0.01, 0.004), True),
        ((0.1, 0.06), (0.1, 0.01), False),
        ((-0.1, 0.01), (0.1, 0.01), False),
        ((0.1, 0.04), (-0.01, 0.006), False),
    ],
)
def test_laplace_has_to_beat_all_but_temperature_scaling_and_to_be_near_that(gain, temperature, holds):
    near = {bayesian_moe.TEMPERATURE: temperature}
    for key in ("calibration_error", "nll"):
        for weak in bayesian_moe.RIVALS:
            gains = {k: dict.fromkeys(bayesian_moe.RIVALS, (0.1, 0.01)) | near for k in ("calibration_error", "nll")}
            gains[key][weak] = gain
            assert bayesian_moe.judge(gains) is holds


def test_contenders_answer_the_same_texts(tiny_llama):
    from lilliput.methods.experts.upcycle import Upcycle
    from lilliput.papers._eras import Eras

    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(8) % 4
        return {"input": torch.randint(3, 64, (8, 6), generator=generator), "label": labels}

    effort = bayesian_moe.Effort(seeds=1, training=2, steps=2, validation=2, test=2, rank=4)
    data = Eras([text(0)], [text(1)], [text(2)], [{"input": text(3)["input"]}])
    mixture = Upcycle(experts=2, top_k=1, how="copy", steps=0).apply(tiny_llama)
    model = bayesian_moe.AnswerTokens(mixture, [4, 5, 6, 7])
    model = bayesian_moe.tuned_model(model, data, effort, 0)
    made = bayesian_moe.contenders(model, [model] * 3, data, effort)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = BySeed()
    bayesian_moe.note(found, made, data)
    names = (bayesian_moe.TEMPERATURE, *bayesian_moe.RIVALS, bayesian_moe.OURS, bayesian_moe.TUNED)
    assert set(found.found) == set(names)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    first = made[bayesian_moe.DROPOUT](data.test[0])
    assert torch.equal(made[bayesian_moe.DROPOUT](data.test[0]), first)
    assert torch.allclose(made[bayesian_moe.ENSEMBLE](data.test[0]), made[bayesian_moe.POINT](data.test[0]), atol=1e-5)
