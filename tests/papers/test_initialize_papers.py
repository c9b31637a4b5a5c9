"""The experiments on initialization, on tiny models; their rules on figures that must hold or not."""

import pytest
import torch

from lilliput.papers import _started, hypercloning, weight_selection, weight_subcloning
from lilliput.papers._started import Curve, Run, as_many_more, gain, learned, learned_tuned, row, times_as_fast
from lilliput.training import History, State
from lilliput.workload import Workload, windows
from lilliput.zoo import nets

SURE, UNSURE = (0.1, 0.04), (0.1, 0.06)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this file."""


def text_work(seed):
    torch.manual_seed(0)
    model = nets.llama(dim=32, layers=6, heads=4, kv_heads=2, hidden=48, vocab=64).eval()
    generator = torch.Generator().manual_seed(seed)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]))


@pytest.fixture
def works():
    return [text_work(0), text_work(1)]


def made_up(losses, seconds=10.0, start_s=0.0, curve=((10, 1.0),)):
    curve = list(curve)
    return Run(torch.nn.Identity(), 1e-3, torch.tensor(losses), curve[-1][1], start_s, seconds, 80, curve)


# --- what they share -------------------------------------------------------------------------------------------------


def test_losses_are_less_for_the_better_in_text_and_pictures(works, cnn_work):
    text, right = (_started.losses(w, w.model, "test") for w in (works[0], cnn_work))
    assert torch.equal(text, works[0].values(works[0].model, "test"))
    assert torch.equal(right, torch.zeros(32))  # its labels are its own answers


def test_a_run_trains_for_so_many_steps_and_looks_as_often(works):
    run = learned(lambda work, seed: _started.anew(work.model, seed), works[0], 7, 1e-2, 0, every=3)
    assert [steps for steps, _ in run.curve] == [3, 6, 7]
    assert run.validation == run.curve[-1][1]
    assert (run.steps, run.samples, len(run.losses)) == (7, 28, 8)
    assert 0 < run.seconds == run.step_s * 7
    assert run.start_s > 0
    assert not any(m.training for m in run.model.modules())


def test_looking_does_not_count_as_training(works, monkeypatch):
    """Each look takes a made-up hour."""
    clock = iter(range(0, 10**6, 3600))
    monkeypatch.setattr(_started.time, "perf_counter", lambda: float(next(clock)))
    curve = Curve(works[0], 1)
    model = works[0].model
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1), History([1.0]), 1)
    curve.on_step(state)
    curve.on_end(state)  # looked at this step already
    assert curve.seconds == [3600.0]


def test_the_rate_of_the_lowest_validation_loss_is_taken_for_all_seeds(works, monkeypatch):
    asked = []

    def fake(make, work, steps, lr, seed, every):
        asked.append((lr, seed))
        validation = abs(lr - 3e-3)
        return Run(torch.nn.Identity(), lr, torch.ones(2), validation, 0.0, 1.0, 8, [(steps, validation)])

    monkeypatch.setattr(_started, "learned", fake)
    runs = learned_tuned(lambda work, seed: work.model, works, 5, seed=4)
    assert asked == [(1e-3, 4), (3e-3, 4), (9e-3, 4), (3e-3, 5)]
    assert [run.lr for run in runs] == [3e-3, 3e-3]


def test_a_new_model_has_the_config_and_weights_of_its_seed(works):
    model = works[0].model
    one, same, other = (_started.anew(model, seed) for seed in (1, 1, 2))
    assert one.config.to_dict() == model.config.to_dict()
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_gains_are_paired_and_their_error_is_over_seeds_or_else_over_samples():
    ours, other = [made_up([1.0, 2.0]), made_up([2.0, 3.0])], [made_up([2.0, 3.0]), made_up([4.0, 5.0])]
    assert gain(ours, other) == pytest.approx((1.5, 0.5))
    assert gain([made_up([1.0, 1.0])], [made_up([1.0, 3.0])]) == pytest.approx((1.0, 1.0))
    assert row("x", ours, "nats").values["nats"] == pytest.approx(2.0)
    assert row("x", ours, "nats").spread["nats"] == pytest.approx(0.5**0.5)
    assert row("x", ours[:1], "nats").spread["nats"] == pytest.approx(0.5)


def test_time_of_the_start_is_given_to_others_as_steps():
    assert as_many_more([made_up([1.0], seconds=10.0, start_s=1.0)], 100) == 110
    assert as_many_more([made_up([1.0], seconds=10.0, start_s=0.01)], 100) == 101


def test_sooner_counts_starts_and_is_nothing_when_never():
    slow = made_up([1.0], seconds=20.0, curve=((10, 3.0), (20, 2.0)))
    quick = made_up([1.0], seconds=20.0, start_s=1.0, curve=((4, 2.0), (20, 1.0)))
    assert times_as_fast([quick], [slow]) == pytest.approx(20 / 5)
    assert times_as_fast([slow], [quick]) == 0


# --- growing ---------------------------------------------------------------------------------------------------------


def test_grown_has_to_beat_random_weights_surely():
    assert hypercloning.judge(SURE)
    assert not hypercloning.judge(UNSURE)


def test_steps_fill_the_time():
    steps = hypercloning.steps_of(hypercloning.Effort(seconds=10.0, seeds=1), {"narrow": 0.1, "wide": 0.5})
    assert steps == {"small": 30, "grown": 14, "narrow": 100, "wide": 20}


def test_every_contender_that_grows_runs(works, monkeypatch):
    monkeypatch.setattr(hypercloning, "SMALL", {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 24})
    monkeypatch.setattr(hypercloning, "step_seconds", lambda work, rounds: {"narrow": 0.1, "wide": 0.25})
    found = hypercloning.compare(works, hypercloning.Effort(seconds=1.0, seeds=2), 0)
    names = (hypercloning.OURS, hypercloning.PLAIN, hypercloning.RANDOM, hypercloning.TOKENS, hypercloning.NARROW)
    assert set(found) == set(names)
    assert {name: found[name][0].samples for name in names} == dict(zip(names, (24, 24, 16, 24, 40)))
    assert {found[name][0].model.config.hidden_size for name in names[:4]} == {32}
    assert found[hypercloning.OURS][1].start_s > found[hypercloning.RANDOM][1].start_s
    assert hypercloning.likeness(found[hypercloning.PLAIN][0]) == pytest.approx(1.0, abs=1e-3)
    assert hypercloning.likeness(found[hypercloning.OURS][0]) < 0.99


def test_steps_are_timed(works, monkeypatch):
    monkeypatch.setattr(hypercloning, "SMALL", {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 24})
    times = hypercloning.step_seconds(works[0], rounds=2)
    assert set(times) == {"narrow", "wide"}
    assert all(0 < t < 10 for t in times.values())


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("random", "selected", "faster", "holds"),
    [
        (SURE, (0.01, 0.1), 3.0, True),
        (UNSURE, (0.01, 0.1), 3.0, False),
        (SURE, (-0.01, 0.0), 3.0, False),
        (SURE, SURE, 1.9, False),
    ],
)
def test_subcloned_has_to_beat_random_weights_soon_and_not_lose_to_selection(random, selected, faster, holds):
    assert weight_subcloning.judge(random, selected, faster) is holds


def test_every_contender_that_is_cut_runs(works):
    found = weight_subcloning.compare(works, weight_subcloning.Effort(steps=4, seeds=2, every=2), 0)
    assert len(found) == 4
    assert {run.model.config.hidden_size for runs in found.values() for run in runs} == {16}
    assert {run.model.config.num_hidden_layers for runs in found.values() for run in runs} == {3}
    assert {len(runs) for runs in found.values()} == {2}
    for rival in (weight_subcloning.RANDOM, weight_subcloning.SELECTED):  # the time of ranking goes to them
        assert found[rival][0].samples > found[weight_subcloning.OURS][0].samples


@pytest.mark.parametrize(
    ("random", "shuffled", "holds"), [(SURE, SURE, True), (UNSURE, SURE, False), (SURE, UNSURE, False)]
)
def test_selected_has_to_beat_random_and_shuffled_weights(random, shuffled, holds):
    assert weight_selection.judge(random, shuffled) is holds


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nets.vit(dim=32, layers=2, heads=4, mlp_ratio=2, patch=4, size=8, classes=5).eval()


def test_the_zoos_vision_transformer_is_the_same_in_transformers(net):
    x = torch.randn(3, 1, 8, 8)
    torch.nn.init.normal_(net.cls)
    with torch.no_grad():
        torch.testing.assert_close(weight_selection.as_transformers(net)(x).logits, net(x), rtol=1e-4, atol=1e-5)


def test_every_contender_that_is_selected_runs(net):
    model = weight_selection.as_transformers(net)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        batches = [
            {"input": torch.randn(8, 1, 8, 8, generator=generator), "label": torch.arange(8) % 5} for _ in range(2)
        ]
        return Workload.classifier(model, batches, batches, batches, training=batches)

    found = weight_selection.compare([work(0), work(1)], weight_selection.Effort(steps=3, seeds=2), 0)
    assert len(found) == 4
    assert {run.model.config.hidden_size for runs in found.values() for run in runs} == {16}
    assert {len(run.losses) for runs in found.values() for run in runs} == {16}


def test_shuffling_keeps_the_elements_of_each_tensor(net):
    before = [p.detach().clone() for p in net.parameters()]
    after = list(weight_selection.shuffled_(net, 0).parameters())
    assert all(torch.equal(a.flatten().sort().values, b.flatten().sort().values) for a, b in zip(before, after))
    assert not torch.equal(before[-2], after[-2])


def test_the_pictures_are_drawn_by_the_seed():
    effort = weight_selection.Effort(steps=2, seeds=1, test_pictures=100, validation_pictures=50)
    a, b = (weight_selection.pictures_work(seed, effort) for seed in (0, 1))
    assert [len(batch["label"]) for batch in a.training] == [64, 64]
    assert not torch.equal(a.training[0]["input"], b.training[0]["input"])
    assert torch.equal(a.test[0]["input"], b.test[0]["input"])
    assert _started.losses(a, a.model, "test").mean() < 25
