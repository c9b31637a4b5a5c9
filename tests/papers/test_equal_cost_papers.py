"""Trainings at equal cost, with contenders on tiny models, and the rules on figures that must hold or not."""

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.papers import _vision_cost, epas, gqkva, skipvit
from lilliput.papers._equal_cost import SECONDS, STEPS, Effort, Found, compare, faster_steps, margin, plain, tuned_rate
from lilliput.workload import Workload, windows

TINY = Effort(steps=3, seconds=0.02, seeds=2, rates=(1e-3,), rounds=4)
FEW = Effort(steps=2, seconds=0.01, seeds=1, rates=(1e-3,), rounds=4)


def pictures(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(16) % 10
    batches = [{"input": torch.randn(16, 1, 28, 28, generator=generator), "label": labels} for _ in range(4)]
    return Workload.classifier(nn.Identity(), *([b] for b in batches[:3]), training=batches[2:])


def words(seed):
    generator = torch.Generator().manual_seed(seed)
    splits = [torch.randint(3, 64, (4, 24), generator=generator) for _ in range(4)]
    return Workload.causal_lm(nn.Identity(), *splits[:3], training=windows(splits[3]))


def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


# --- equal cost ------------------------------------------------------------------------------------------------------


def test_every_contender_is_trained_for_the_same_steps_and_the_same_seconds():
    started = []

    def slow(fit):
        model = classifier()
        started.append(model)
        fit(model)
        return model

    found, models = compare({"a": plain(classifier), "b": slow}, pictures, TINY, seed=0)
    assert len(started) == 1 + 2 * 2  # one rate tried, two seeds in two ways
    for one in found.values():
        assert {way: len(values) for way, values in one.values.items()} == {STEPS: 2, SECONDS: 2}
        assert one.rate == 1e-3
        row = one.row("x", "accuracy_percent").values
        assert row["weights"] == 7850
        assert row["steps_in_equal_seconds"] >= 1
        assert row["seconds_of_equal_steps"] > 0
    assert torch.equal(*(one.values[STEPS][0] for one in found.values()))
    assert not any(m.training for m in models.values())
    ratio = faster_steps(found, models, pictures(0), "a", "b", rounds=4)
    assert ratio.ratio > 0
    assert found["a"].row("a", "x").values["two_training_steps_ms"] > 0


def test_the_rate_with_the_best_validation_score_is_taken_and_one_that_diverges_is_not():
    def contender(fit):
        model = classifier()
        fit(model)
        rate = fit.__self__.train.keywords["lr"]
        if rate > 1:
            raise UserError("the loss became nan")
        with torch.no_grad():  # as if it had learned the first class at this rate alone
            model[1].weight.zero_()
            model[1].bias.copy_(torch.eye(10)[0 if rate == 0.2 else 9])
        return model

    effort = Effort(steps=10, seconds=1, seeds=1, rates=(0.1, 0.2, 5.0), tuning=0.1)
    assert tuned_rate(contender, pictures(0), effort, 0) == 0.2


def test_a_margin_is_paired_and_its_error_the_larger_of_two():
    ours = Found(1.0, {STEPS: [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])], SECONDS: []})
    other = Found(1.0, {STEPS: [torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0])], SECONDS: []})
    found = {"a": ours, "b": other}
    assert margin(found, "a", "b", STEPS, higher_is_better=False) == pytest.approx((2.0, 1.0))
    assert margin(found, "b", "a", STEPS, higher_is_better=True) == pytest.approx((2.0, 1.0))
    other.values[STEPS] = [torch.tensor([2.0, 6.0])] * 2
    assert margin(found, "a", "b", STEPS, higher_is_better=False) == pytest.approx((2.5, 1.5))


# --- vision transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "rivals", "faster", "holds"),
    [
        ((-1.0, 0.4), [(0.0, 1.0), (0.1, 1.0)], 1.01, True),
        ((-1.0, 0.6), [(0.0, 1.0), (0.1, 1.0)], 1.01, False),
        ((-1.0, 0.4), [(0.0, 1.0), (-0.1, 1.0)], 1.01, False),
        ((-1.0, 0.4), [(0.0, 1.0), (0.1, 1.0)], 0.99, False),
    ],
)
def test_a_cheaper_net_has_to_stay_close_match_its_rivals_and_train_faster(full, rivals, faster, holds):
    assert _vision_cost.judge(full, rivals, faster) is holds


@pytest.mark.parametrize("module", [gqkva, skipvit])
def test_an_experiment_gives_rows_and_says_the_gains(module, monkeypatch):
    monkeypatch.setattr(_vision_cost, "fashion", lambda effort, seed: pictures(seed))
    monkeypatch.setattr(module, "Effort", lambda *args, **named: FEW)
    evidence = module.experiment(seed=1)
    assert len(evidence.rows) == 4 + (module is gqkva)
    assert "seeds from 1" in evidence.setup
    assert evidence.figure.count("±") == (6 if module is gqkva else 4)
    assert isinstance(evidence.holds, bool)


def test_pictures_are_drawn_by_the_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(_vision_cost, "pictures_work", lambda model, seed, drawn: seen.append((seed, drawn)))
    _vision_cost.fashion(TINY, 3)
    assert seen[0][0] == 3
    assert seen[0][1].steps * seen[0][1].batch_size == TINY.training_samples
    assert seen[0][1].test_pictures == TINY.test_samples


# --- GQKVA -----------------------------------------------------------------------------------------------------------


def test_every_contender_with_grouped_heads_runs():
    found, models = compare(gqkva.contenders(gqkva.PAIRS | gqkva.FURTHER), pictures, FEW, seed=0)
    sizes = {name: one.facts["weights"][0] for name, one in found.items()}
    assert sizes[gqkva.NARROWER] == pytest.approx(sizes[gqkva.OURS], rel=0.01)
    assert sizes[gqkva.OURS] < sizes[gqkva.MULTI_QUERY] < sizes[gqkva.GROUPED] < sizes[gqkva.FULL]
    attention = models[gqkva.OURS].blocks[0].attn
    assert attention.q.out_features == 32
    assert attention.k.out_features == 16


# --- EPAS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "fixed", "step", "prompt", "holds"),
    [
        ((-0.01, 0.01), (0.0, 0.1), 1.01, 1.01, True),
        ((-0.04, 0.01), (0.0, 0.1), 1.01, 1.01, False),
        ((-0.01, 0.01), (-0.01, 0.1), 1.01, 1.01, False),
        ((-0.01, 0.01), (0.0, 0.1), 0.99, 1.01, False),
        ((-0.01, 0.01), (0.0, 0.1), 1.01, 0.99, False),
    ],
)
def test_sharing_has_to_stay_close_beat_the_fixed_and_be_faster_twice(full, fixed, step, prompt, holds):
    assert epas.judge(full, fixed, step, prompt) is holds


def test_every_training_that_shares_runs(monkeypatch):
    monkeypatch.setattr(epas, "SHAPE", {"dim": 32, "layers": 4, "heads": 4, "kv_heads": 4, "hidden": 48})
    found, models = compare(epas.contenders(), words, FEW, seed=0)
    kinds = {name: [type(layer.self_attn).__name__ for layer in model.model.layers] for name, model in models.items()}
    assert kinds[epas.FULL] == ["LlamaAttention"] * 4
    assert kinds[epas.OURS] == kinds[epas.FIXED] == ["LlamaAttention", "LeadingAttention"] + ["ReusingAttention"] * 2
    work = words(0)
    assert epas.faster_prompts(found, models, work, rounds=4).ratio > 0
    assert found[epas.OURS].facts["prompt_ms"][0] > 0
    lost = epas.shared_afterwards(models, work)
    assert lost == lost
    assert kinds[epas.FULL] == [type(layer.self_attn).__name__ for layer in models[epas.FULL].model.layers]


def test_text_comes_in_batches_of_its_own(monkeypatch):
    work = words(0)
    monkeypatch.setattr(epas, "language_work", lambda name, effort, seed: work)
    assert [len(b["input_ids"]) for b in epas.text(TINY, 0).training] == [4]


# --- SkipViT ---------------------------------------------------------------------------------------------------------


def test_every_contender_that_skips_runs():
    found, models = compare(skipvit.contenders(), pictures, FEW, seed=0)
    sizes = {name: one.facts["weights"][0] for name, one in found.items()}
    assert sizes[skipvit.OURS] == sizes[skipvit.RANDOM] == sizes[skipvit.FULL] > sizes[skipvit.SMALLER]
    assert [type(b).__name__ for b in models[skipvit.OURS].blocks] == [
        "TransformerBlock", "TransformerBlock", "OrderingBlock", "SkippedBlock", "SkippedBlock", "TransformerBlock",
    ]  # fmt: skip
