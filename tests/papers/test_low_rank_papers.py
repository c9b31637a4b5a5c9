"""The three low-rank papers: their rules can fail, their parts do what they say. The experiments run in `reproduce`."""

import pytest
import torch
from torch import nn

from lilliput.method import find_method
from lilliput.methods.factorize._factors import factored_layers
from lilliput.methods.factorize.targeted import Choice, multiplications
from lilliput.paper import find_paper
from lilliput.papers import accelerated_lrd, lrd_freezing, targeted_lrd
from lilliput.papers._low_rank import Contender, about_as_accurate, depth, difference, interleave, middle, speedup
from lilliput.workload import Workload
from lilliput.zoo.nets import bottleneck_resnet

MODULES = (targeted_lrd, lrd_freezing, accelerated_lrd)


@pytest.fixture
def bottleneck_work(cnn_work):
    torch.manual_seed(0)
    model = bottleneck_resnet(width=8, depth=11).eval()
    splits = (cnn_work.calibration, cnn_work.validation, cnn_work.test)
    return Workload.classifier(model, *splits, training=cnn_work.training)


@pytest.mark.parametrize("module", MODULES)
def test_papers_are_found_and_name_real_methods(module):
    slug = module.__name__.rpartition(".")[2]
    assert find_paper(slug).paper is module.paper
    assert all(find_method(name) for name in module.paper.methods)
    assert module.experiment.__doc__ is not None
    assert "Holds when" in module.experiment.__doc__ or "Holds when" in module.experiment.__doc__.replace("\n", " ")


def contender(accuracy, n=1000, seed=0):
    right = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < accuracy).float() * 100
    return Contender([right], {}, {})


def test_accuracy_counts_as_equal_only_with_certainty():
    base = contender(0.9)
    same, worse = Contender([base.right[0].clone()], {}, {}), contender(0.8, seed=0)
    assert difference(same, base) == (0.0, 0.0)
    assert about_as_accurate(same, base)
    assert not about_as_accurate(worse, base)
    few = [Contender([c.right[0][:20]], {}, {}) for c in (contender(0.9, seed=1), contender(0.9, seed=2))]
    assert not about_as_accurate(*few)  # too few pictures to know
    points, error = difference(worse, base)
    assert points == pytest.approx(worse.accuracy - base.accuracy)
    assert 0 < error < 2


def test_rows_carry_the_spread():
    one, many = contender(0.8), Contender([contender(0.8, seed=s).right[0] for s in range(3)], {"weights": 5}, {})
    assert one.row("x").spread["accuracy_percent"] == pytest.approx(100 * (0.8 * 0.2 / 1000) ** 0.5, rel=0.2)
    assert many.row("x").values["weights"] == 5
    assert many.row("x").spread["accuracy_percent"] > 0


def test_times_are_taken_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleave(runs, 6, min_ms=0.0)
    assert calls[-12:] == list("ab") * 6
    assert {len(t) for t in times.values()} == {6}
    comparison = speedup({"fast": [1.0, 1.1, 1.0, 1.2, 1.0], "slow": [2.0, 2.3, 2.0, 2.2, 2.1]}, "fast", "slow")
    assert comparison.gain
    assert comparison.ratio == pytest.approx(2.0, rel=0.1)
    assert middle([1.0, 2.0, 3.0]) == (2.0, 2.0)


def test_rival_choices(bottleneck_work):
    model = bottleneck_work.model
    shapes = {"blocks.0.conv2": (1, 8, 16, 16), "blocks.1.conv2": (1, 16, 16, 16), "blocks.2.conv2": (1, 32, 8, 8)}
    table = [Choice(n, s, (4, 4), 1.0, 0.5, kept=n.startswith("blocks.0")) for n, s in shapes.items()]
    assert (
        len({multiplications(model.get_submodule(n), s) for n, s in shapes.items()}) == 1
    )  # so the smallest map saves most
    assert [c.kept for c in targeted_lrd.all_layers(table)] == [True] * 3
    assert [c.kept for c in targeted_lrd.flop_guided(model, table)] == [False, False, True]
    assert targeted_lrd.predicted_ms(table, 10.0) == 9.5


def test_each_switch_changes_what_it_should(bottleneck_work):
    model = bottleneck_work.model
    nets = {s: accelerated_lrd.build(model, bottleneck_work, s) for s in ((), ("merging",), ("branching",))}
    plain, merged, branched = nets.values()
    assert depth(plain) == depth(model) + 6
    assert depth(merged) == depth(model)
    cores = [f[1].groups for f in factored_layers(branched).values()]
    assert cores == [4, 4, 4]
    both = accelerated_lrd.build(model, bottleneck_work, ("merging", "branching"))
    assert depth(both) == depth(model)
    assert both.blocks[0].conv2[1].groups == 4


def test_freezing_finds_the_outer_factors_before_and_after_merging(bottleneck_work):
    plain = accelerated_lrd.build(bottleneck_work.model, bottleneck_work, ())
    merged = accelerated_lrd.build(bottleneck_work.model, bottleneck_work, ("merging",))
    [names] = accelerated_lrd.around_cores(plain)
    assert set(names) == {f"blocks.{b}.conv2.{i}.weight" for b in range(3) for i in (0, 2)}
    [names] = accelerated_lrd.around_cores(merged)
    assert set(names) == {f"blocks.{b}.conv{i}.weight" for b in range(3) for i in (1, 3)}
    assert accelerated_lrd.callbacks_of(("ranks",)) == []
    assert len(accelerated_lrd.callbacks_of(("freezing",))) == 1


def test_progressive_stages_end_at_the_last_ratio(bottleneck_work):
    model = accelerated_lrd.progressive(bottleneck_work.model, bottleneck_work, (0.8, 0.4), seed=0, steps=4)
    direct = accelerated_lrd.build(bottleneck_work.model, bottleneck_work, (), 0.4)
    shapes = [[p.shape for p in f.parameters()] for f in factored_layers(model).values()]
    assert shapes == [[p.shape for p in f.parameters()] for f in factored_layers(direct).values()]


def test_lrd_decomposes_every_layer_it_can(bottleneck_work):
    model = lrd_freezing.decompose(bottleneck_work.model, bottleneck_work, snap=False)
    rest = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not n.rpartition(".")[2].isdigit()]
    assert len(rest) == 1  # the stem, which has one input channel
