"""The experiments on fused, stitched, expanded and layer-wise scaled nets, on tiny ones, and their rules."""

import dataclasses

import pytest
import torch

from lilliput.papers import openelm, ot_fusion, stitchable, tleg
from lilliput.papers._healed import Effort as Data
from lilliput.papers._pictures import Table
from lilliput.workload import Workload, windows
from lilliput.zoo import nets
from lilliput.zoo.images import Pictures

SURE, UNSURE = (0.1, 0.04), (0.1, 0.06)
DATA = Data(0, 1, length=24, training_windows=8, test_windows=8)


@pytest.fixture
def work():
    torch.manual_seed(0)
    model = nets.llama(dim=32, layers=6, heads=4, kv_heads=2, hidden=48, vocab=64).eval()
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]))


# --- OpenELM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", [openelm.SMALL, openelm.FULL])
def test_contenders_have_as_many_weights_within_a_percent(effort):
    found = {name: one.weights(*effort.sizes) for name, one in openelm.contenders(effort).items()}
    assert {openelm.UNIFORM, openelm.OURS, openelm.REVERSED} <= set(found)
    assert max(found.values()) / min(found.values()) < 1.01


def test_every_shape_is_trained_and_measured(work):
    effort = dataclasses.replace(openelm.SMALL, seconds=0.05, dim=64, layers=3, data=DATA, also=(openelm.ATTENTION,))
    table = Table()
    for name, settings in openelm.contenders(effort).items():
        assert openelm.run(table, name, settings, work, effort, 0) > 0
    rows = {row.name: row.values for row in table.rows()}
    assert len(rows) == 4
    assert all(values["tokens_seen"] >= 96 for values in rows.values())
    assert rows[openelm.OURS]["cache_bytes_per_token"] < rows[openelm.UNIFORM]["cache_bytes_per_token"]
    assert rows[openelm.OURS]["cache_bytes_per_token"] == rows[openelm.REVERSED]["cache_bytes_per_token"]


def test_order_of_contenders_changes_with_the_seed():
    assert openelm.rotated(["a", "b", "c"], 4) == ["b", "c", "a"]


# --- fusion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, "mlp", "cnn"])
def test_fusion_has_to_win_on_both_nets_at_once_and_tuned(weak):
    good = dict.fromkeys(("mlp", "cnn"), SURE)
    bad = good | ({weak: UNSURE} if weak else {})
    assert ot_fusion.judge(good, bad) is (weak is None)
    assert ot_fusion.judge(bad, good) is (weak is None)


def test_better_net_is_chosen_for_each_seed():
    found = {ot_fusion.FIRST: [90.0, 80.0], ot_fusion.SECOND: [85.0, 88.0]}
    assert ot_fusion.better(found) == [90.0, 88.0]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_every_contender_of_fusion_runs(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 28, 28), generator=generator, dtype=torch.uint8)
    made = Pictures(pixels, torch.randint(10, (64,), generator=generator), lambda x: x.float().unsqueeze(1) / 255)
    splits = dict.fromkeys(("training", "calibration", "validation", "test"), made)
    monkeypatch.setattr(ot_fusion.images, "fashion_mnist", lambda: splits)
    scores = ot_fusion.compare(kind, ot_fusion.Effort(steps=3, tuning=2, seeds=1, pictures=64, batch_size=16), 0)
    assert len(scores) == 1 + 2 * 6
    assert all(0 <= value <= 100 for value in scores.values())
    table, found = Table(), {}
    ot_fusion.note(table, found, kind, scores)
    assert len(table.rows()) == 13
    assert found[kind][ot_fusion.OURS] == [scores[ot_fusion.OURS]]


def test_ensemble_of_equal_nets_is_the_net(cnn_work):
    assert ot_fusion.ensemble_accuracy((cnn_work.model, cnn_work.model), cnn_work) == 100.0


# --- learngenes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, tleg.CUT, tleg.RANDOM])
def test_expansion_has_to_beat_both_rivals(weak):
    gains = dict.fromkeys((tleg.CUT, tleg.RANDOM), SURE) | ({weak: UNSURE} if weak else {})
    assert tleg.judge(gains) is (weak is None)


def test_every_contender_of_every_depth_costs_the_same(work):
    effort = tleg.Effort(0.3, 0.1, 1, DATA, also=(tleg.DRAWN,))
    found = {}
    tleg.compare(found, work, effort, 0)
    assert set(found) == set(tleg.RATES)
    rows = {name: one.row(name, 1) for name, one in found.items()}
    assert all(len(one.end) == 3 for one in found.values())
    assert all(f"{d}_blocks_trained_nats_per_token" in row.values for row in rows.values() for d in tleg.DEPTHS)
    assert effort.whole * 3 == pytest.approx(effort.gene_seconds + 3 * effort.seconds)


def test_new_blocks_stand_between_the_parents_other_parts(work):
    model = tleg.fresh(work.model, 2, 0)
    assert len(model.model.layers) == 2
    assert torch.equal(model.model.embed_tokens.weight, work.model.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    old = work.model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, old)


# --- stitches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "inside", "holds"),
    [((0.1, 0.01), [True] * 3, True), ((-0.01, 0.01), [True] * 3, True), ((-0.03, 0.01), [True] * 3, False),
     ((0.1, 0.01), [True, False, True], False)],
)  # fmt: skip
def test_routes_have_to_be_as_good_as_cut_nets_and_lie_between_their_anchors(gain, inside, holds):
    assert stitchable.judge(gain, inside) is holds


def test_every_route_has_a_cut_net_of_no_more_weights(work, monkeypatch):
    tiny = {"dim": 16, "layers": 4, "heads": 2, "kv_heads": 1, "hidden": 24}
    monkeypatch.setattr(stitchable, "SMALL_NET", tiny)
    found = {}
    stitchable.compare(found, work, stitchable.Effort(0.1, 0.1, 1, DATA), 0)
    weights = {name: one.weights for name, one in found.items()}
    routes, cuts = ([weights[name] for name in found if name.startswith(kind)] for kind in ("route", "cut"))
    assert len(routes) == len(cuts) == 3
    assert all(cut <= route for route, cut in zip(sorted(routes), sorted(cuts)))
    assert weights[stitchable.LARGE] > max(routes)
    assert weights[stitchable.SMALL_ANCHOR] < min(routes)
    assert all(len(one.losses) == 1 for one in found.values())
    assert found[stitchable.LARGE].row("x").values["seconds"] > 0
