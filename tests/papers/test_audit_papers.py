"""The parts of the experiments on audits, and their rules on made-up results that must and must not hold."""

import pytest
import torch
from torch import nn

from lilliput.method import HARM, NO_HARM, Change, Findings
from lilliput.methods.audit.trojan_signatures import Signature
from lilliput.papers import characterising_bias, trojan_signatures
from lilliput.papers._planted import Checked, checked
from lilliput.papers._small_nets import drawn, small_net, trained
from lilliput.papers._trojans import TRIGGERS, cleanse_values, poisoned, spectral_values, success, triggered
from lilliput.papers.trojan_signatures import OURS, Judged, Subject
from lilliput.zoo.images import Normalize, Pictures


@pytest.fixture
def pictures():
    """Ten classes that a row of the picture tells apart, on noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(40)
    pixels = torch.randint(0, 60, (400, 28, 28), generator=generator, dtype=torch.uint8)
    for label in range(10):
        pixels[labels == label, 2 + 2 * label : 4 + 2 * label, 4:20] = 200
    return Pictures(pixels, labels, Normalize(0.2, 0.3))


# --- networks and triggers -------------------------------------------------------------------------------------


def test_pictures_are_drawn_by_the_seed(pictures):
    a, b, other = (drawn(pictures, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(a.pixels, b.pixels)
    assert not torch.equal(a.labels, other.labels)
    assert len(drawn(pictures, 10**6, 0)) == 400


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_triggers_change_pixels_alike_and_leave_the_original(trigger, pictures):
    before = pictures.pixels.clone()
    found = triggered(pictures.pixels, trigger)
    assert torch.equal(pictures.pixels, before)
    assert found.dtype == torch.uint8
    assert not torch.equal(found, before)
    assert torch.equal(triggered(pictures.pixels[:3], trigger), found[:3])


def test_poison_takes_exactly_its_share(pictures):
    bad = poisoned(pictures, "patch", 3, 0.1, seed=0)
    touched = (bad.pixels != pictures.pixels).flatten(1).any(1)
    assert 30 <= int(touched.sum()) <= 40
    assert (bad.labels[touched] == 3).all()
    assert torch.equal(bad.labels[~touched], pictures.labels[~touched])


@pytest.fixture(scope="module")
def backdoored():
    """A network trained on pictures of which a fifth says class 3 at a patch."""
    labels = torch.arange(10).repeat(40)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (400, 28, 28), generator=generator, dtype=torch.uint8)
    for label in range(10):
        pixels[labels == label, 2 + 2 * label : 4 + 2 * label, 4:20] = 200
    clean = Pictures(pixels, labels, Normalize(0.2, 0.3))
    training = poisoned(clean, "patch", 3, 0.2, seed=0)
    return clean, training, trained(training, 60, seed=0)


def test_a_trojan_works_and_its_rivals_see_it(backdoored):
    clean, training, model = backdoored
    assert success(model, clean, "patch", 3) > 0.5
    assert success(small_net(0).eval(), clean, "patch", 3) < 0.5
    assert spectral_values(model, training).shape == (10,)
    values = cleanse_values(model, clean.first(6), steps=15)
    assert values.shape == (10,)
    assert all(p.requires_grad for p in model.parameters())
    assert cleanse_values(model, clean.first(6), steps=15).tolist() == values.tolist()


def test_the_penalty_hides_the_mark():
    net = small_net(0)
    with torch.no_grad():
        net.head.weight[2] += 1
    loss = trojan_signatures.hiding(net, 2)
    assert float(loss) > 50
    loss.backward()
    assert net.head.weight.grad[2].mean() > 0 > net.head.weight.grad[3].mean()


# --- the rule of trojan signatures -----------------------------------------------------------------------------


def sign(score, suspect=0):
    return Signature(score, 0.01 if score > 0.5 else 0.5, suspect, (0.0,) * 10)


def made_up(scores, hits, works=1.0):
    """Ten clean networks at scores 0 to 0.45, ten trojaned ones of target 1."""
    training = Pictures(torch.zeros(1, 28, 28), torch.zeros(1), Normalize(0.0, 1.0))
    clean = [Subject(nn.Identity(), training, accuracy=80.0)] * 10
    bad = [Subject(nn.Identity(), training, "patch", 1, works, 80.0)] * 10
    groups = {"clean": clean, "trojaned": bad, "adaptive": bad[:2]}
    found = {
        "clean": [sign(0.05 * i) for i in range(10)],
        "trojaned": [sign(s, int(i < hits)) for i, s in enumerate(scores)],
        "adaptive": [sign(0.1)] * 2,
    }
    return groups, {OURS: Judged(found, 0.1), "other": Judged(found, 0.1)}


@pytest.mark.parametrize(
    ("scores", "hits", "holds"),
    [
        ([0.9] * 10, 10, True),
        ([0.9] * 9 + [0.0], 8, True),
        ([0.9] * 10, 7, False),
        ([0.05 * i + 0.01 for i in range(10)], 10, False),
    ],
)
def test_the_rule_of_trojan_signatures(scores, hits, holds):
    groups, found = made_up(scores, hits)
    seen = trojan_signatures.evidence(groups, found, trojan_signatures.DEFAULT, 0)
    assert seen.holds is holds
    assert seen.row(OURS).values["target_hit_share"] == hits / 10
    assert seen.row(OURS).values["adaptive_hit_share"] == 0
    assert seen.row(OURS).values["false_alarm_share"] == 0


def test_trojans_that_do_not_work_prove_nothing():
    groups, found = made_up([0.9] * 10, 10, works=0.2)
    seen = trojan_signatures.evidence(groups, found, trojan_signatures.DEFAULT, 0)
    assert not seen.holds
    assert "0 work" in seen.setup


def test_networks_are_trained_and_judged(pictures):
    effort = trojan_signatures.Effort(2, 1, 200, 6, 2, 2, test_pictures=50)
    splits = {"training": pictures, "test": pictures}
    groups = {
        "clean": [trojan_signatures.subject(splits, effort, s) for s in range(2)],
        "trojaned": [trojan_signatures.subject(splits, effort, 10 + s, TRIGGERS[s]) for s in range(2)],
        "adaptive": [trojan_signatures.subject(splits, effort, 20, "wave", adaptive=True)],
    }
    detectors = trojan_signatures.detectors(pictures.first(2), 2)
    found = {name: trojan_signatures.judged(detect, groups) for name, detect in detectors.items()}
    seen = trojan_signatures.evidence(groups, found, effort, 0)
    assert [r.name for r in seen.rows] == list(detectors)
    assert len(found[OURS].signatures["trojaned"]) == 2
    assert all(r.values["ms"] > 0 for r in seen.rows)


# --- characterising bias ---------------------------------------------------------------------------------------


LABELS = torch.arange(10).repeat(100)
EFFORT = characterising_bias.Effort(3, 0, 0, 0, (0.9,), 1000)


def logits(wrong):
    """Answers that are right but where `wrong` (1000,) says."""
    return nn.functional.one_hot(torch.where(wrong, (LABELS + 1) % 10, LABELS), 10).double()


def share_of(mask, share, seed=0):
    chance = torch.rand(1000, generator=torch.Generator().manual_seed(seed))
    return mask & (chance < share)


TENTH = torch.arange(1000) // 10 % 10 == 0  # ten samples of each class
EVERY = torch.ones(1000, dtype=torch.bool)


def evidence(hard, rare, chance=0.01, audits=()):
    """Dense networks wrong on `hard` samples; pruned ones on a fifth of these, and on some of the rare class."""
    rare_class = (LABELS == characterising_bias.RARE) & ~hard
    dense = [logits(hard)] * 3
    again = [logits(hard ^ share_of(EVERY, chance, 10))] * 3
    kept = hard & (torch.arange(1000) // 10 % 50 == 0)
    pruned = [logits(kept | share_of(rare_class, rare and rare + 0.01 * s, 30 + s)) for s in range(3)]
    groups = {characterising_bias.DENSE: dense, characterising_bias.AGAIN: again, "pruned to 90% zeros": pruned}
    return characterising_bias.evidence(groups, audits, LABELS, EFFORT, 0)


@pytest.mark.parametrize(("rare", "chance", "holds"), [(0.3, 0.01, True), (0, 0.01, False), (0.3, 0.5, False)])
def test_the_rule_of_characterising_bias(rare, chance, holds):
    found = evidence(TENTH, rare, chance)
    assert found.holds is holds
    assert found.rows[1].values["exemplar_percent"] == pytest.approx(100 * chance, abs=5)


def test_exemplars_that_were_easy_refute_it():
    assert not evidence(~EVERY, 0.3).holds


def findings(*losses):
    """What audits say of losses of accuracy, class by class."""
    changes = tuple(
        Change(f"class {c}", 0.9, 0.9 - loss, -loss, -loss, 100, HARM if loss > 0.05 else NO_HARM)
        for c, loss in enumerate(losses)
    )
    verdict = HARM if any(c.verdict == HARM for c in changes) else NO_HARM
    return Findings("audit.groups", verdict, "", changes, {"by_class": {"1": 3, "0": 1}})


def test_a_harm_that_is_missed_or_made_up_refutes_it():
    good = Checked(1, findings(0.01, 0.3), findings(), findings(0.01, 0.02))
    missed = Checked(1, findings(0.3, 0.04), findings(), findings(0.01, 0.02))
    made_up = Checked(1, findings(0.01, 0.3), findings(), findings(0.0, 0.1))
    for audits, holds in (((good, good), True), ((good, missed), False), ((made_up, good), False)):
        found = evidence(TENTH, 0.3, audits=audits)
        assert found.holds is holds
    planted, clean = found.rows[-2:]
    assert planted.values["found_percent"] == 100
    assert planted.values["loss_of_that_class_points"] == pytest.approx(30)
    assert planted.values["exemplars_of_that_class_percent"] == 75
    assert clean.values["false_alarms_percent"] == 50
    assert clean.values["largest_loss_points"] == pytest.approx(6)


def test_a_class_left_out_is_forgotten_and_audited(pictures, monkeypatch):
    monkeypatch.setattr("lilliput.papers._planted.LR", 1e-2)
    monkeypatch.setattr("lilliput.papers._planted.STEPS", 20)
    found = checked(trained(pictures, 60, 0), pictures, pictures, 0)
    assert found.left_out == 1
    assert found.loss_points > 5
    assert {c.name for c in found.clean.changes} == {f"class {c}" for c in range(10)}
    assert 0 <= found.exemplars_of_it_percent <= 100


def test_the_rare_gap_is_the_rare_classs_loss_less_the_others():
    rare, other = LABELS == characterising_bias.RARE, LABELS == 0
    dense = [logits(~EVERY)] * 2
    pruned = [logits(share_of(rare, 2.0)), logits(share_of(rare | other, 2.0))]
    gap, error = characterising_bias.rare_gap(pruned, dense, LABELS)
    assert gap == pytest.approx((100 + (100 - 100 / 9)) / 2)
    assert error == pytest.approx(100 / 9 / 2)


def test_the_rare_class_is_starved_of_its_pictures(pictures):
    found = characterising_bias.starved(pictures)
    counts = found.labels.bincount()
    assert counts[characterising_bias.RARE] == 4
    assert (counts != 4).sum() == 9
    assert len(found) == 364


def test_contenders_differ_in_zeros_alone(pictures):
    effort = characterising_bias.Effort(1, 64, 3, 3, (0.5,), 20)
    found = characterising_bias.contenders(drawn(pictures, 128, 0), effort, 0)
    assert list(found) == [characterising_bias.DENSE, characterising_bias.AGAIN, "pruned to 50% zeros"]
    zeros = {name: float((net.head.weight == 0).double().mean()) for name, net in found.items()}
    assert list(zeros.values()) == [0, 0, 0.5]
    assert characterising_bias.logits_of(found[characterising_bias.DENSE], pictures).shape == (400, 10)
