"""Parts of the experiments on subnetworks, and their rules on made-up results that must and must not hold."""

import pytest
import torch
from torch import nn

from lilliput.methods.prune.hidden_networks import HiddenConv2d, HiddenLinear
from lilliput.papers import compressible_subspaces, hidden_networks
from lilliput.papers._low_rank import Effort
from lilliput.papers.compressible_subspaces import ALPHAS, ANEW, LINE, POINT, SEPARATE, Found
from lilliput.papers.hidden_networks import CONTENDERS, DENSE, PRUNED, RANDOM, WIDE, Fitted


def fitted(value, spread=0.1):
    return Fitted([value - spread, value, value + spread], hidden_networks.network(4), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("wide", "random", "holds"), [(89.5, 60.0, True), (88.0, 60.0, False), (89.5, 89.5, False), (91.0, 60.0, True)]
)
def test_the_rule_of_hidden_networks(wide, random, holds):
    found = {name: fitted(90.0) for name in CONTENDERS} | {WIDE: fitted(wide), RANDOM: fitted(random)}
    seen = hidden_networks.evidence(found, hidden_networks.EFFORT, 0)
    assert seen.holds is holds
    assert {r.name for r in seen.rows} == set(CONTENDERS)
    assert seen.row(DENSE).values["training_seconds"] == 2.0


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_trains_and_has_its_bytes(name, cnn_work, one_thread):
    torch.manual_seed(0)
    contender, work = CONTENDERS[name], images_of(cnn_work)
    model = contender.fit(hidden_networks.network(4), work, 3, contender.rate, 0)
    hidden = [m for m in model.modules() if isinstance(m, HiddenConv2d | HiddenLinear)]
    assert len(hidden) == (5 if contender.fit in (hidden_networks.fit_hidden, hidden_networks.fit_norms) else 0)
    weights = sum(p.numel() for p in hidden_networks.network(4).parameters() if p.ndim > 1)
    stored = hidden_networks.stored_bytes(model)
    if name == DENSE:
        assert stored > 4 * weights
    elif name == PRUNED:
        assert 4 * weights / 2 < stored < 4 * weights * 0.7
    else:
        assert weights / 8 <= stored < weights


def images_of(work):
    """Pictures of the size that Conv-4 takes."""
    for split in ("training", "calibration"):
        padded = [{**b, "input": nn.functional.pad(b["input"], (6, 6, 6, 6))} for b in getattr(work, split)]
        setattr(work, split, padded)
    return work


def test_seeds_make_different_networks_of_one_experiment():
    effort = Effort(steps=2, test_pictures=100, rounds=0, seeds=2)
    found = hidden_networks.fitted(CONTENDERS[hidden_networks.HIDDEN], 3, effort)
    assert len(found.accuracies) == len(found.seconds) == 2
    assert all(0 <= a <= 100 for a in found.accuracies)


# --- compressible subspaces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separate", "anew", "holds"), [(90.5, 90.5, True), (91.5, 90.0, False), (90.0, 91.5, False), (80.0, 80.0, True)]
)
def test_the_rule_of_compressible_subspaces(separate, anew, holds):
    def found(value):
        nets = {alpha: nn.Identity() for alpha in ALPHAS}
        return Found({alpha: [value - 0.1, value, value + 0.1] for alpha in ALPHAS}, {"stored_bytes": 1.0}, nets)

    every = {name: found(90.0) for name in compressible_subspaces.CONTENDERS}
    every |= {SEPARATE: found(separate), ANEW: found(anew)}
    times = {"width 0.25": [1.0, 1.1, 1.0, 1.1, 1.0], "width 1.00": [3.0, 3.1, 3.0, 3.1, 3.0]}
    seen = compressible_subspaces.evidence(every, times, 1.0, hidden_networks.EFFORT, 0)
    assert seen.holds is holds
    assert seen.row(LINE).values["mean_accuracy_percent"] == pytest.approx(90)
    assert "2.8" in seen.figure.rpartition("is ")[2]


def test_an_uncertain_margin_does_not_hold():
    assert not compressible_subspaces.judge((0.0, 0.6), (0.0, 0.1))
    assert not compressible_subspaces.judge((0.0, 0.1), (0.0, float("inf")))


def test_every_contender_serves_every_width():
    found = {name: Found() for name in compressible_subspaces.CONTENDERS}
    effort = Effort(steps=20, test_pictures=100, rounds=3, seeds=1, batch_size=8)
    compressible_subspaces.compare(found, 0, 0.3, effort)
    weights = [[sum(p.numel() for p in one.networks[a].parameters()) for a in ALPHAS] for one in found.values()]
    assert len({counts[2] for counts in weights}) == 1
    assert all(counts[0] < 0.1 * counts[2] and counts == sorted(counts) for counts in weights)
    stored = {name: one.values["stored_bytes"] for name, one in found.items()}
    assert 1.9 * stored[POINT] < stored[LINE] < 2.1 * stored[POINT]
    assert all(set(one.accuracies) == set(ALPHAS) for one in found.values())
    for name, kind in ((LINE, nn.GroupNorm), (POINT, nn.GroupNorm), (ANEW, nn.BatchNorm2d), (SEPARATE, nn.BatchNorm2d)):
        assert {type(m) for m in found[name].networks[0.0].modules() if "Norm" in type(m).__name__} == {kind}
    times = compressible_subspaces.timed(found[LINE].networks, 3, 0)
    assert {name: len(taken) for name, taken in times.items()} == {"width 0.25": 3, "width 1.00": 3}
