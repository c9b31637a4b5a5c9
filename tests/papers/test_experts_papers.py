"""The experiments' parts on a tiny mixture, and their rules on made-up figures that must and must not hold."""

import pytest
import torch

from lilliput.methods.experts._policies import POLICIES
from lilliput.methods.experts.specmd import expert_bytes
from lilliput.methods.experts.upcycle import Upcycle
from lilliput.papers import roe, specmd
from lilliput.papers._mixtures import text_of


@pytest.fixture
def mixture(llama_work):
    """Two blocks of 8 experts, 2 of them a token."""
    llama_work.model.config.eos_token_id = None
    return Upcycle(experts=8, top_k=2, steps=0).apply(llama_work.model, llama_work)


# --- SpecMD --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "ours", "lru", "holds"),
    [
        ((0.1, 0.04), 3, 30, True),
        ((0.1, 0.06), 3, 30, False),
        ((0.1, 0.04), 4, 30, False),
        ((0.1, 0.04), 0, 0, False),
        ((-0.1, 0.01), 3, 30, False),
    ],
)
def test_least_stale_has_to_hit_more_than_all_and_to_collide_less(margin, ours, lru, holds):
    for weak in specmd.RIVALS:
        margins = dict.fromkeys(specmd.RIVALS, (0.2, 0.01)) | {weak: margin}
        collisions = dict.fromkeys(POLICIES, 5) | {specmd.OURS: ours, specmd.LRU: lru}
        assert specmd.judge(margins, collisions) is holds


def test_every_policy_meets_the_same_text(mixture, llama_work, monkeypatch):
    monkeypatch.setattr(specmd, "PROMPT", 6)
    monkeypatch.setattr(specmd, "JUDGED", 0.5)
    monkeypatch.setattr(specmd, "SHARES", (0.25, 0.5))
    size = expert_bytes(mixture)
    tuning, test = (specmd.traces(mixture, text_of(llama_work, s, 2)) for s in ("validation", "test"))
    chosen = {policy: specmd.tuned(policy, tuning, size) for policy in POLICIES}
    for settings in chosen.values():
        best = specmd.hit_rates(specmd.run(settings, tuning, 0.5, size)).mean()
        assert best >= specmd.hit_rates(specmd.run(settings.with_(width=2), tuning, 0.5, size)).mean()
    found = specmd.contenders(chosen, test, size)
    rows = {row.name: row.values for row in (specmd.row(name, reports, 36) for name, reports in found.items())}
    assert set(rows) == {
        *(f"{p}, fetched ahead" for p in POLICIES),
        *(f"{p}, nothing fetched ahead" for p in ("Belady", *POLICIES)),
    }
    nothing = {name: v["decode_hit_rate_at_50%"] for name, v in rows.items() if "nothing" in name}
    assert nothing["Belady, nothing fetched ahead"] == max(nothing.values())
    margins, collisions = specmd.judged(found)
    rates = [specmd.hit_rates(found[name][0.5]) for name in (specmd.OURS, "fifo")]
    assert margins["fifo"][0] == pytest.approx(float((rates[0] - rates[1]).mean()))
    assert set(collisions) == set(POLICIES)
    times = specmd.modelled("lru", chosen["lru"], test, size).values
    assert times["modelled_token_ms_memory_card"] > times["modelled_token_ms_bus"] > 1


def test_from_disk_it_is_as_replayed(mixture, llama_work, monkeypatch):
    monkeypatch.setattr(specmd, "PROMPT", 6)
    monkeypatch.setattr(specmd, "JUDGED", 0.3)
    ids = text_of(llama_work, "test", 1)[0]
    found = specmd.from_disk(mixture, specmd.SpecMD(), ids, expert_bytes(mixture)).values
    assert found["replay_agrees"] == 1
    assert found["largest_difference_of_logits"] < 1e-2
    assert found["bytes_read"] >= found["bytes_of_experts"] > 0


# --- RoE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, *roe.RIVALS])
def test_routes_have_to_beat_every_rival_and_to_be_right_as_often(weak):
    margins = dict.fromkeys(roe.RIVALS, (0.1, 0.04)) | ({weak: (0.1, 0.06)} if weak else {})
    assert roe.judge(margins, 0.0) is (weak is None)
    assert not roe.judge(margins, -0.01)


def test_every_contender_is_scored_on_every_window(mixture, llama_work, monkeypatch):
    monkeypatch.setattr(roe, "MORE", (4, 8))
    monkeypatch.setattr(roe, "TOP_K", 2)
    effort = roe.Effort(steps=0, windows=6, tuning=4, trials=4, samples=(2, 3))
    found = {}
    tuning, test = text_of(llama_work, "validation", 4), text_of(llama_work, "test", 6)
    taus = roe.compare(found, mixture, tuning, test, effort, 0)
    assert len(taus) == 2
    assert list(found) == [roe.PLAIN, "RoE, 2 routes", "RoE, 3 routes", *roe.RIVALS[1:], roe.VOTED]
    with torch.no_grad():
        ids = text_of(llama_work, "test", 6)
        logits = mixture(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for name, one in found.items():
        row = one.row(name).values
        assert 0 <= row["accuracy_percent"] <= 100
        assert len(one.right[0]) == 6
        if name != roe.VOTED:
            assert row["perplexity"] == pytest.approx(2.718281828 ** row["nats_per_token"])
    assert found[roe.PLAIN].row("").values["nats_per_token"] == pytest.approx(float(expected), rel=1e-4)
    assert found[roe.WIDER].compute > 1
    assert roe.margin(found, roe.PLAIN, roe.PLAIN)[0] == 0


def test_dropout_leaves_the_first_row_of_each_text(mixture, llama_work):
    ids = text_of(llama_work, "test", 4)[:2]
    with torch.no_grad():
        plain = mixture(ids.repeat_interleave(3, 0)).logits
        with roe.dropping(mixture, 0.3, 3, torch.Generator().manual_seed(0)):
            dropped = mixture(ids.repeat_interleave(3, 0)).logits
    torch.testing.assert_close(dropped[::3], plain[::3], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(dropped[1], plain[1], atol=1e-2)


def test_temperatures_are_averaged_and_losses_are_those_of_windows():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]])
    found = roe.losses(logits, ids, (1.0, 2.0))
    expected = -(logits[1, :-1] / 2).log_softmax(-1)[torch.arange(4), ids[1, 1:]].mean()
    assert found.shape == (2, 2)
    assert float(found[1, 1]) == pytest.approx(float(expected), rel=1e-5)
    mixed = roe.temperatures(lambda text: logits[: len(text)], ids, 3)(ids).softmax(-1)
    by_hand = [torch.stack([(logits / t).softmax(-1) for t in (1 / s, 1.0, s)]).mean(0) for s in roe.SPREADS]
    assert any(torch.allclose(mixed, each, atol=1e-4) for each in by_hand)
