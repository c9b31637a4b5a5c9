"""The experiments on smaller key-value caches, on tiny models; their rules on figures that must hold or not."""

import pytest
import torch

from lilliput.papers import _healed, echo_llama, kv_heads, shared_attention
from lilliput.papers._healed import Effort, Found, close, margin, matched
from lilliput.workload import Workload, windows
from lilliput.zoo import nets

TINY = Effort(steps=3, seeds=1, length=24, training_windows=8, test_windows=8)
SURE, UNSURE = (0.1, 0.04), (0.1, 0.06)


@pytest.fixture
def work():
    torch.manual_seed(0)
    model = nets.llama(dim=32, layers=6, heads=4, kv_heads=2, hidden=48, vocab=64).eval()
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]))


def test_difference_is_paired_by_window_and_averaged_over_seeds():
    ours = Found(healed=[torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])])
    other = Found(healed=[torch.tensor([2.0, 4.0]), torch.tensor([3.0, 5.0])])
    assert margin({"a": ours, "b": other}, "a", "b") == pytest.approx((1.0, 0.0))
    assert close((-0.03, 0.01), 0.05)
    assert not close((-0.03, 0.02), 0.05)
    assert matched((-0.02, 0.01))
    assert not matched((-0.03, 0.01))


def test_spread_is_over_seeds_or_else_over_windows():
    one = [torch.tensor([1.0, 2.0])]
    assert Found(one, one).row("x").spread["healed_nats_per_token"] == pytest.approx(0.5)
    two = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])]
    assert Found(two, two).row("x").spread["healed_nats_per_token"] == pytest.approx(0.5**0.5)


# --- key-value heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, kv_heads.TINY, kv_heads.OWN])
def test_fitted_heads_have_to_beat_the_mean_on_both_models(weak):
    gains = dict.fromkeys((kv_heads.TINY, kv_heads.OWN), SURE) | ({weak: UNSURE} if weak else {})
    assert kv_heads.judge(gains, (-0.01, 0.01)) is (weak is None)


def test_fitted_heads_must_not_lose_much_to_the_original():
    gains = dict.fromkeys((kv_heads.TINY, kv_heads.OWN), SURE)
    assert not kv_heads.judge(gains, (-0.06, 0.0))


def test_every_contender_with_fewer_heads_runs(work, monkeypatch):
    monkeypatch.setattr(kv_heads, "TRAINING", {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 4, "hidden": 48})
    found = {}
    kv_heads.compare(found, kv_heads.TINY, work, TINY, 0)
    kv_heads.compare(found, kv_heads.OWN, kv_heads.multi_head(work, 2, 0), TINY, 0)
    rows = {name: one.row(name).values for name, one in found.items()}
    ratios = {n: rows[n]["cache_bytes_per_token"] / rows[n.split(": ")[0]]["cache_bytes_per_token"] for n in rows}
    assert set(ratios.values()) == {1.0, 0.5}
    assert len(rows) == 3 + 4
    assert rows[f"{kv_heads.TINY}: {kv_heads.OURS}"]["weight_bytes"] < rows[kv_heads.TINY]["weight_bytes"]


# --- shared attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "original", "holds"),
    [(SURE, (-0.01, 0.01), True), (UNSURE, (-0.01, 0.01), False), (SURE, (-0.04, 0.01), False)],
)
def test_shared_attention_has_to_beat_none_and_stay_close(removed, original, holds):
    assert shared_attention.judge(removed, original) is holds


def test_every_contender_that_shares_attention_runs(work):
    found = {}
    reusing = shared_attention.compare(found, work, TINY, 0)
    assert len(reusing) == 2
    kept = {n: one.values["cache_bytes_per_token"] for n, one in found.items()}
    full = kept.pop(shared_attention.ORIGINAL)
    assert {n: round(12 * b / full) for n, b in kept.items()} == {
        shared_attention.OURS: 10,
        shared_attention.DROPPED: 8,
        shared_attention.ELSEWHERE: 10,
        shared_attention.LENT: 8,
    }


def test_removed_attention_adds_nothing(work):
    model = shared_attention.without_attention(work.model, ["model.layers.2.self_attn"])
    expected = work.model
    with torch.no_grad():
        expected.model.layers[2].self_attn.o_proj.weight.zero_()
        ids = work.test[0]["input_ids"]
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


# --- ECHO-LLaMA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "grouped", "faster", "holds"),
    [
        ((-0.01, 0.01), (0.0, 0.1), 1.1, True),
        ((-0.04, 0.01), (0.0, 0.1), 1.1, False),
        ((-0.01, 0.01), (-0.01, 0.1), 1.1, False),
        ((-0.01, 0.01), (0.0, 0.1), 0.99, False),
    ],
)
def test_shared_keys_and_values_have_to_stay_close_beat_fewer_heads_and_train_faster(original, grouped, faster, holds):
    assert echo_llama.judge(original, grouped, faster) is holds


def test_every_conversion_to_shared_keys_and_values_runs(work):
    found = {}
    model = echo_llama.compare(found, work, TINY, 0)
    bytes_ = {name: one.values["cache_bytes_per_token"] for name, one in found.items()}
    full = bytes_.pop(echo_llama.ORIGINAL)
    assert {b / full for b in bytes_.values()} == {0.5}
    kinds = [type(layer.self_attn).__name__ for layer in model.model.layers]
    assert kinds == ["LlamaAttention"] * 2 + ["LendingAttention"] + ["BorrowingAttention"] * 3
    assert echo_llama.timed(found, work, model).ratio > 0
    assert found[echo_llama.OURS].values["two_training_steps_ms"] > 0


def test_training_windows_are_drawn_by_the_seed(monkeypatch, work):
    monkeypatch.setattr(_healed.Workload, "from_name", lambda name, **options: work)
    ids = torch.cat([batch["input_ids"] for batch in work.training])
    for seed in (0, 1):
        work.training = windows(ids)
        drawn = _healed.language_work("tiny", TINY, seed)
        assert sorted(map(tuple, torch.cat([b["input_ids"] for b in drawn.training]).tolist())) == sorted(
            map(tuple, ids.tolist())
        )
