"""The measures of vulnerability where their values are known, and modules at the layers they name."""

import pytest
import torch
from torch import nn

from lilliput.methods.defend._redundancy import examples_of, sites
from lilliput.methods.defend.curtail import Curtail, overlap, report, sensitivity, unexplored, vulnerability_report

SMALL = Curtail(steps=5, rank=4)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_unexplored_is_the_share_of_directions_that_are_not_used():
    assert unexplored(drawn(4000, 10)) < 0.02
    assert unexplored(drawn(500, 1) * torch.ones(10)) == pytest.approx(0.9)
    half = torch.cat([drawn(4000, 5), torch.zeros(4000, 5)], 1)
    assert unexplored(half) == pytest.approx(0.5, abs=0.02)


def test_overlap_is_nothing_for_points_and_everything_for_one_cloud():
    labels = torch.arange(3000) % 3
    assert overlap(labels.float().view(-1, 1), labels) == pytest.approx(0)
    assert overlap(drawn(3000, 4), labels) == pytest.approx(1, abs=0.01)
    assert overlap(drawn(3000, 4) + labels.view(-1, 1) * 3, labels) == pytest.approx(1 / (1 + 9 * 2 / 3), abs=0.02)


class Two(nn.Module):
    """One layer whose output decides, and one whose output is not used."""

    def __init__(self, used):
        super().__init__()
        self.used, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.weight = float(used)

    def forward(self, x):
        self.idle(x)
        return self.head(self.weight * self.used(x))


def test_sensitivity_is_zero_where_nothing_depends_on_it():
    torch.manual_seed(0)
    model, x = Two(True), drawn(300, 4)
    assert sensitivity(model, "idle", "head", x, model.idle(x).detach()) == 0
    assert sensitivity(model, "used", "head", x, model.used(x).detach()) > 0.02
    assert sensitivity(Two(False), "used", "head", x, x) == 0
    assert not model.used._forward_hooks


def test_the_report_ranks_every_site_once(bars):
    found = report(bars.model, bars)
    assert {v.site for v in found} == {"stages.0", "stages.1", "head"}
    assert [v.rank for v in found] == sorted(v.rank for v in found)
    assert all(0 <= v.unexplored <= 1 and 0 <= v.overlap <= 1 and 0 <= v.sensitivity <= 1 for v in found)
    assert report(bars.model, bars) == found


def test_modules_stand_at_the_most_vulnerable_layers(bars, test_pictures):
    examples = examples_of(bars, bars.model, 400, "it")
    ranked = vulnerability_report(bars.model, sites(bars.model, "it"), examples)
    guard = SMALL.with_(latent=2, examples=400).wrap(bars.model, bars)
    assert [module.site for module in guard.watchers[:2]] == [v.site for v in ranked[:2]]
    x = test_pictures[0]
    assert torch.equal(guard(x), bars.model(x))
    assert guard.inspect(x).flagged.float().mean() < 0.15
