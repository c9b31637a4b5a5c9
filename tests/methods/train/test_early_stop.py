import math

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.train.early_stop import EarlyStop, by_tries, forecast
from lilliput.training import train

QUESTIONS = 40


def scores(single, more):
    """Accuracies of one and of four tries: the first questions are right."""

    def right(share):
        return (torch.arange(QUESTIONS) < round(share * QUESTIONS)).double()

    return {1: right(single), 4: right(more)}


def saturating(share):
    return 0.8 * (1 - math.exp(-4 * share))


def run(settings, looks=20, more=1.4):
    """All decisions of a training whose accuracy saturates and where four tries give `more` times as much."""
    stopper = settings.with_(draws=10).stopper(lambda model: None)
    for i in range(1, looks + 1):
        value = saturating(i / looks)
        stopper.see(i / looks, scores(value, min(more * value, 1)))
    return stopper


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)


def loss(model, batch):
    return (model.dropout(model.weight) * batch).sum().square()


def evaluator(steps, seen=None):
    """Accuracies by the number of calls, as if they came from the model."""
    calls = []

    def evaluate(model):
        calls.append(model)
        if seen is not None:
            seen.append((model.training, torch.is_grad_enabled()))
        value = saturating(len(calls) * 5 / steps)
        return scores(value, min(1.4 * value, 1))

    return evaluate


# --- the decision ----------------------------------------------------------------------------------------------


def test_it_stops_at_the_first_look_whose_tries_reach_the_forecast():
    stopper = run(EarlyStop(most_tries=4))
    decision, truth = stopper.decision, saturating(1.0)
    assert 0.25 <= decision.share < 0.6
    assert decision.forecast == pytest.approx(truth, abs=0.1)
    assert decision.low <= decision.forecast <= decision.high
    assert 1 < decision.tries <= 4
    assert 1.4 * decision.accuracy >= truth - 0.1
    before = [d for d in stopper.decisions if 0.25 <= d.share < decision.share]
    assert all(d.tries is None for d in before)


def test_more_tries_allow_an_earlier_end():
    shares = [run(EarlyStop(most_tries=k)).decision.share for k in (2, 4, 64)]
    assert shares[0] >= shares[1] >= shares[2]
    assert shares[0] > shares[2]


def test_the_earliest_end_is_kept():
    assert run(EarlyStop(most_tries=64, earliest=0.7)).decision.share == pytest.approx(0.7)


def test_tries_that_do_not_help_do_not_end_it_while_it_still_improves():
    stopper = run(EarlyStop(most_tries=64), more=1.0)
    assert stopper.decision is None or stopper.decision.share >= 0.75
    assert not stopper.decisions[-1].stop  # nothing is left to save


def test_more_confidence_needs_as_many_tries_or_more():
    needed = [run(EarlyStop(most_tries=64, confidence=c)).decisions[8].tries for c in (0.1, 0.5, 0.95)]
    needed = [math.inf if n is None else n for n in needed]
    assert needed == sorted(needed)


def test_two_looks_decide_nothing():
    stopper = run(EarlyStop(earliest=0.0), looks=4)
    assert [d.stop for d in stopper.decisions[:2]] == [False, False]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([0.5, 0.4, 0.3], 0.5), ([0.2, 0.3], 0.3), ([0.4, 0.4, 0.4], 0.4), ([0.3, 0.6, 0.9, 1.2], 1.0)],
)
def test_forecasts_at_the_edges(accuracies, expected):
    shares = [0.1 * (i + 1) for i in range(len(accuracies))]
    assert forecast(shares, accuracies) == pytest.approx(expected)


def test_what_is_saved_and_when_it_is_used_up():
    decision = run(EarlyStop(most_tries=4)).decision
    left = 1 - decision.share
    assert decision.saved_operations(10, 1000) == pytest.approx(6 * 10 * 1000 * left)
    extra = 2 * 10 * 7 * (decision.tries - 1)
    assert decision.breakeven(10, 1000, 7) == pytest.approx(60 * 1000 * left / extra)


# --- what evaluate gives ---------------------------------------------------------------------------------------


def test_samples_become_pass_at_powers_of_two():
    found = by_tries(torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]))
    assert list(found) == [1, 2, 4]
    assert torch.stack(list(found.values())).flatten().tolist() == pytest.approx([0.2, 0, 0.4, 0, 0.8, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(0, 3), r"\(0, 3\)"),
        (torch.ones(3, 1), r"tries \[1\]"),
        ({2: torch.ones(3), 4: torch.ones(3)}, r"tries \[2, 4\]"),
        ({1: torch.ones(3), 4: torch.ones(2)}, "one number per question"),
        ({1: torch.ones(3), 4: torch.full((3,), 1.5)}, "outside of 0 to 1"),
        ({1: torch.ones(3), 4: torch.full((3,), float("nan"))}, "outside of 0 to 1"),
    ],
)
def test_other_things_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        by_tries(given)


def test_questions_that_change_between_looks_are_refused():
    stopper = EarlyStop().stopper(lambda model: None)
    stopper.see(0.1, scores(0.1, 0.2))
    with pytest.raises(UserError, match=r"tries \[1, 2\] now and \[1, 4\] before"):
        stopper.see(0.2, {1: torch.ones(QUESTIONS), 2: torch.ones(QUESTIONS)})


# --- in a training ---------------------------------------------------------------------------------------------


def test_our_loop_ends_where_it_decides(fingerprint):
    expected = run(EarlyStop(most_tries=4)).decision.share
    seen = []
    stopper = EarlyStop(most_tries=4, every=5, draws=10).stopper(evaluator(100, seen))
    history = train(Net(), [torch.ones(3)], loss, steps=100, callbacks=[stopper])
    assert history.stopped
    assert history.steps == round(expected * 100) == round(stopper.decision.share * 100)
    assert set(seen) == {(False, False)}


def test_it_can_watch_without_ending_and_without_changing_the_training():
    weights = []
    for callbacks in ([], [EarlyStop(every=5, draws=10).stopper(evaluator(50), stops=False)]):
        torch.manual_seed(0)
        net = Net()
        assert train(net, [torch.ones(3)], loss, steps=50, callbacks=callbacks).steps == 50
        weights.append(net.weight.detach().clone())
    assert torch.equal(*weights)
    assert len(callbacks[0].decisions) == 10
    assert callbacks[0].decision is not None


def test_a_killed_training_goes_on_with_what_was_seen(tmp_path):
    whole = EarlyStop(every=5, draws=10).stopper(evaluator(100), stops=False)
    train(Net(), [torch.ones(3)], loss, steps=100, callbacks=[whole])
    evaluate = evaluator(100)

    class Killed(Exception):
        pass

    def killing(model, batch):
        if len(first.decisions) == 7:
            raise Killed
        return loss(model, batch)

    first = EarlyStop(every=5, draws=10).stopper(evaluate, stops=False)
    file = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(Net(), [torch.ones(3)], killing, steps=100, callbacks=[first], checkpoint=file, checkpoint_every_s=0)
    second = EarlyStop(every=5, draws=10).stopper(evaluate, stops=False)
    train(Net(), [torch.ones(3)], loss, steps=100, callbacks=[second], checkpoint=file)
    assert second.decisions == whole.decisions


def test_a_trainer_of_transformers_ends_where_our_loop_does(tiny_llama, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 40
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    seen = []
    stopper = EarlyStop(most_tries=4, every=5, draws=10).stopper(evaluator(40, seen))
    trainer = Trainer(tiny_llama, arguments, train_dataset=data, callbacks=[stopper.for_trainer()])
    trainer.train()
    ours = EarlyStop(most_tries=4, every=5, draws=10).stopper(evaluator(40))
    history = train(Net(), [torch.ones(3)], loss, steps=40, callbacks=[ours])
    assert trainer.state.global_step == history.steps < 40
    assert ours.decisions == stopper.decisions
    assert set(seen) == {(False, False)}


def test_in_a_trainer_it_can_watch_without_ending(tiny_llama):
    from types import SimpleNamespace

    callback = EarlyStop(most_tries=4, every=5, draws=10).stopper(evaluator(40), stops=False).for_trainer()
    control = SimpleNamespace(should_training_stop=False)
    for step in range(1, 41):
        state = SimpleNamespace(global_step=step, max_steps=40)
        callback.on_step_end(None, state, control, model=tiny_llama)
    assert not control.should_training_stop
    assert callback.stopper.decision is not None
