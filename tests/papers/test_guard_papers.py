"""The rules of the experiments on guards with figures made up for them, and each experiment once, very small."""

import dataclasses

import pytest
import torch

from lilliput.methods.audit._adversarial import without_toolbox
from lilliput.papers import _adversaries, cleann, curtail, deepfense
from lilliput.papers._adversaries import Attacked
from lilliput.papers._pictures import Table
from lilliput.papers._trojans import TRIGGERS, poisoned, triggered
from lilliput.zoo.images import Normalize, Pictures

needs_toolbox = pytest.mark.skipif(without_toolbox() is not None, reason="the extra `attacks` is not there")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this file."""


@pytest.fixture
def pictures():
    """Ten kinds of bars, which a net learns in a few steps."""
    labels = torch.arange(600) % 10
    pixels = torch.zeros(600, 28, 28, dtype=torch.uint8)
    for i, c in enumerate(labels.tolist()):
        pixels[i, 2 * c : 2 * c + 6, 4:20] = 150 + i % 100
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    return Pictures(pixels[order], labels[order], Normalize(0.2, 0.3))


@pytest.fixture
def splits(pictures, monkeypatch):
    found = dict.fromkeys(("training", "calibration", "validation", "test"), pictures)
    for module in (cleann, deepfense, curtail):
        monkeypatch.setattr(module.images, "fashion_mnist", lambda: found)
    return found


# --- CLEANN ----------------------------------------------------------------------------------------------------


def cleann_evidence(ours, blur, still=2.0, lost=1.0):
    table = Table()
    for name, right in ((cleann.NONE, 5.0), (cleann.OURS, ours), (cleann.BLUR, blur), (cleann.VOTES, 20.0)):
        table.add(name, "clean_percent", 85.0 - (lost if name == cleann.OURS else 0))
        for kind in TRIGGERS:
            table.add(name, f"recovered_{kind}_percent", right)
            table.add(name, f"success_{kind}_percent", still)
            table.add(cleann.NONE, f"working_{kind}_nets", 1.0)
    recovered = {
        name: [v - 1, v, v + 1] for name, v in ((cleann.OURS, ours), (cleann.BLUR, blur), (cleann.VOTES, 20.0))
    }
    recovered[cleann.BLUR] = [blur, blur - 1, blur + 1]
    return cleann.evidence(table, recovered, cleann.DEFAULT, 0)


@pytest.mark.parametrize(
    ("ours", "blur", "still", "lost", "holds"),
    [
        (80, 60, 2, 1, True),
        (60, 80, 2, 1, False),
        (60.5, 60, 2, 1, False),
        (80, 60, 30, 1, False),
        (80, 60, 2, 5, False),
    ],
)
def test_the_rule_of_cleann(ours, blur, still, lost, holds):
    found = cleann_evidence(float(ours), float(blur), still, lost)
    assert found.holds is holds
    assert cleann.BLUR in found.figure


def test_triggers_may_be_functions(pictures):
    marked = triggered(pictures.pixels, lambda pixels: pixels + 1)
    assert torch.equal(marked, pictures.pixels + 1)
    found = poisoned(pictures, cleann.natural(pictures), 3, 0.1, 0)
    assert (found.labels != pictures.labels).sum() <= 60
    assert (cleann.lightened(pictures.pixels, 99)[:, -4:-1, -4:-1] >= 99).all()


def test_a_faint_patch_is_as_bright_as_the_guard_lets_pass(pictures):
    patch = cleann.faint_patch(pictures.first(200), pictures)
    level = int(patch(torch.zeros(1, 28, 28, dtype=torch.uint8)).max())
    assert 0 <= level < 255
    guard = cleann.shield(cleann.small_net(1), pictures.first(200))
    shares = []
    for bright in (level, 255):
        doubt = guard.clean(pictures.prepare(cleann.lightened(pictures.pixels, bright)))[1]
        shares.append(float((doubt > 1).double().mean()))
    assert shares[0] <= cleann.PASSED < shares[1]


def test_rivals_of_cleann_do_what_they_say(pictures):
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 9
    assert cleann.median_blur(x).abs().sum() == 0
    seen = []
    assert cleann.votes(lambda v: seen.append(v) or v[:, 0, 0, :2], torch.ones(2, 1, 28, 28), 0.0).shape == (2,)
    assert [float(v.mean()) for v in seen] == pytest.approx([0.5] * cleann.COPIES)
    assert len({tuple(v[0].flatten().tolist()) for v in seen}) > 10
    sure, unsure = (lambda v, s=s: s * v.flatten(1)[:, :3] for s in (100.0, 0.0))
    x, others = torch.randn(4, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    assert (cleann.calmness(sure, x, others) > cleann.calmness(unsure, x, others)).all()


def test_cleann_runs(splits, monkeypatch):
    small = dataclasses.replace(cleann.DEFAULT, nets=1, pictures=500, steps=60, benign=200, test_pictures=200)
    monkeypatch.setattr(cleann, "DEFAULT", small)
    found = cleann.experiment()
    assert {row.name for row in found.rows} >= {cleann.NONE}
    assert "nets" in found.setup


# --- DeepFense and CuRTAIL ---------------------------------------------------------------------------------------


def rows_of(names, **quantities):
    table = Table()
    for name in names:
        for key, value in quantities.items():
            table.add(name, key, value)
    return table


@pytest.mark.parametrize(
    ("ours", "best", "alarms", "holds"),
    [(0.97, 0.9, 5, True), (0.97, 0.969, 5, False), (0.8, 0.6, 5, False), (0.97, 0.9, 12, False)],
)
def test_the_rule_of_deepfense(ours, best, alarms, holds):
    names = (deepfense.OURS, *deepfense.RIVALS)
    table = rows_of(
        names, false_alarm_percent=alarms, caught_percent=50.0, adaptive_evades_percent=40.0, fooled_percent=9
    )
    areas = {name: [0.5, 0.5, 0.5] for name in names}
    areas[deepfense.OURS] = [ours - 0.01, ours, ours + 0.01]
    areas[deepfense.SQUEEZING] = [best, best - 0.01, best + 0.01]
    found = deepfense.evidence(table, areas, deepfense.DEFAULT, 0)
    assert found.holds is holds
    assert deepfense.SQUEEZING in found.figure


@pytest.mark.parametrize(("top", "random", "holds"), [(0.9, 0.8, True), (0.8, 0.9, False), (0.9, 0.899, False)])
def test_the_rule_of_curtail(top, random, holds):
    names = (curtail.TOP, curtail.LAST, curtail.RANDOM, curtail.BEST, curtail.SOFTMAX)
    table = rows_of(names, rank_correlation=0.3, **{curtail.key(share): 5.0 for share in curtail.SHARES})
    areas = {name: [0.6, 0.6, 0.6] for name in names}
    areas |= {curtail.TOP: [top, top - 0.01, top + 0.01], curtail.RANDOM: [random, random + 0.005, random]}
    assert curtail.evidence(table, curtail.Found(areas), curtail.DEFAULT, 0).holds is holds


class Steep(torch.nn.Module):
    """Class 1 where the mean is above 0, and a suspicion that grows with a value that does not matter."""

    def forward(self, x):
        score = 20 * (x[..., 1:].mean((1, 2, 3)))
        return torch.stack([-score, score], 1)


def test_an_attacker_who_knows_the_detector_evades_what_he_can():
    x = torch.full((4, 1, 3, 3), 0.05)
    found = Attacked(x, torch.ones(4, dtype=torch.long), {}, x, torch.tensor(-1.0), torch.tensor(2.0))
    effort = dataclasses.replace(deepfense.DEFAULT, eps=0.1, adaptive_steps=20)

    def blind(v):
        return Steep()(v), (v[..., 0] - 0.05).square().sum((1, 2))

    def awake(v):
        return Steep()(v), (v - 0.05).square().sum((1, 2, 3)) * 1e6

    assert _adversaries.evading(blind, 1.0, found, effort) == 100
    assert _adversaries.evading(awake, 1.0, found, effort) == 0
    assert _adversaries.evading(blind, 1.0, found, dataclasses.replace(effort, eps=0.01)) == 0


@needs_toolbox
@pytest.mark.parametrize("module", [deepfense, curtail])
def test_they_run(module, splits, monkeypatch):
    small = dataclasses.replace(module.DEFAULT, victims=2, pictures=400, steps=40, calibration=200, attacked=60,
                                attack_steps=3, adaptive_steps=3, module_steps=3)  # fmt: skip
    monkeypatch.setattr(module, "DEFAULT", small)
    found = module.experiment()
    assert len(found.rows) == 5
    assert found.row(module.OURS if module is deepfense else module.TOP).values["caught_percent"] >= 0
    assert "evades" in str(found.rows)
