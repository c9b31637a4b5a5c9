"""The two papers of decoders that learn to guess: their rules can fail, their parts do what they say."""

import json

import pytest
import torch

from lilliput.method import find_method
from lilliput.methods.decode import Ngram, SpeculativeStreaming
from lilliput.paper import Evidence, Row, find_paper
from lilliput.papers import _drafting, gated_lora_mtp, speculative_streaming
from lilliput.papers._drafting import (
    MEDUSA,
    NGRAM,
    RIVALS,
    Contender,
    Effort,
    Found,
    margins,
    prompts_of,
    race,
    written,
)

MODULES = (gated_lora_mtp, speculative_streaming)
TINY = Effort(seconds=100, prompts=3, tokens=8, seeds=2, steps=1)


@pytest.fixture
def work(llama_work, monkeypatch):
    monkeypatch.setattr(_drafting, "PROMPT", 10)
    monkeypatch.setattr(speculative_streaming, "LAYERS", 2)
    return llama_work


@pytest.mark.parametrize("module", MODULES)
def test_papers_are_found_and_name_real_methods(module):
    slug = module.__name__.rpartition(".")[2]
    assert find_paper(slug).paper is module.paper
    assert [find_method(name).paper for name in module.paper.methods] == [slug]
    assert "Holds when" in module.experiment.__doc__


@pytest.mark.parametrize("module", MODULES)
def test_every_contender_writes_every_text_after_every_training(module, work):
    found = module.run(work, TINY, seed=0)
    ours = set(module.OURS.values()) if module is gated_lora_mtp else {module.OURS, module.PRUNED}
    assert set(found) == {*RIVALS, *ours}
    for name, one in found.items():
        assert {kind: len(values) for kind, values in one.tokens_per_pass.items()} == {"greedy": 6, "sampled": 6}
        assert len(one.same) == len(one.positions) == 12
        assert all(one.same), name
        assert one.updates == ([0, 0] if name == NGRAM else [1, 1])
    assert len({found[name].parameters for name in ours}) == 1
    assert found[NGRAM].parameters == 0
    assert found[MEDUSA].parameters == 4 * (32 * 32 + 32)


@pytest.mark.parametrize("module", MODULES)
def test_the_evidence_can_be_told(module, work, monkeypatch):
    monkeypatch.setattr(module, "Effort", lambda *args: TINY)
    monkeypatch.setattr(module.Workload, "from_name", lambda name: work)
    evidence = module.experiment(seed=3)
    assert isinstance(evidence, Evidence)
    assert json.loads(json.dumps(evidence.to_json()))["holds"] is evidence.holds
    assert "seed 3" in evidence.setup


def test_means_are_over_trainings_first():
    one = Found({"greedy": [1.0, 3.0, 2.0, 4.0], "sampled": [1.0] * 4}, [2.0], [True, True, True, False], 5, [7, 8])
    assert one.by_text("greedy", 2).tolist() == [1.5, 3.5]
    row = one.row("a", 2)
    assert row.values["tokens_per_pass_greedy"] == 2.5
    assert row.spread["tokens_per_pass_greedy"] == pytest.approx(1.0)
    assert row.values["same_text_percent"] == 75
    assert row.values["updates"] == 7.5
    other = Found({"greedy": [1.0, 2.0, 1.0, 2.0], "sampled": [1.0] * 4}, [1.0], [True])
    assert margins({"a": one, "b": other}, "a", ["b"], 2) == {"b": (1.0, pytest.approx(0.5))}


def test_a_text_that_is_not_plain_generation_s_is_seen(work):
    class Wrong(Ngram):
        def __call__(self, model, input_ids, tally=None, **call):
            return super().__call__(model, input_ids, tally, **call).flip(1)

    found = {}
    race(found, work, {"right": Contender(Ngram()), "wrong": Contender(Wrong())}, TINY, 0)
    assert all(found["right"].same)
    assert not any(found["wrong"].same)


def test_positions_of_rows_are_counted(work):
    prompt = prompts_of(work, 1, 0)[0]
    plain = written(work.model, prompt, "greedy", 8, 0)
    assert plain[2] == 1
    settings = SpeculativeStreaming(streams=3, layers=1, nodes=4)
    streams = settings.new(work.model)
    text, tally, positions = written(work.model, prompt, "greedy", 8, 0, Contender(settings, {"streams": streams}))
    assert torch.equal(text, plain[0])
    assert positions == pytest.approx((1 + 3) * (tally.steps + tally.drafted) / tally.steps)  # tokens, streams of each


def test_prompts_are_drawn_by_the_seed_from_the_test_text(work):
    first, again, other = (torch.cat(prompts_of(work, 4, seed)) for seed in (0, 0, 1))
    assert first.shape == (4, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    known = {tuple(row[:10].tolist()) for batch in work.test for row in batch["input_ids"]}
    assert {tuple(row) for row in first.tolist()} <= known


# --- the rules -------------------------------------------------------------------------------------------------


def rows_of(names, **changed):
    values = {"same_text_percent": 100.0, "extra_parameters": 100.0}
    return [Row(name, values | changed.get(name.partition(",")[0].replace(" ", "_"), {})) for name in names]


@pytest.mark.parametrize("weak", [None, NGRAM, MEDUSA, gated_lora_mtp.OURS["linear"]])
def test_masks_have_to_beat_every_rival_by_two_standard_errors(weak):
    names = list(gated_lora_mtp.OURS.values())
    gains = dict.fromkeys((NGRAM, MEDUSA, gated_lora_mtp.OURS["linear"]), (0.1, 0.04))
    assert gated_lora_mtp.judge(rows_of(names), gains | ({weak: (0.1, 0.06)} if weak else {})) is (weak is None)
    assert not gated_lora_mtp.judge(rows_of(names, gated_LoRA={"same_text_percent": 99.0}), gains)


@pytest.mark.parametrize(
    ("changed", "ngram", "medusa", "holds"),
    [
        ({}, (0.1, 0.04), (0.0, 0.2), True),
        ({}, (0.1, 0.06), (0.0, 0.2), False),
        ({}, (0.1, 0.04), (-0.01, 0.2), False),
        ({"streams": {"same_text_percent": 99.0, "extra_parameters": 50.0}}, (0.1, 0.04), (0.0, 0.2), False),
        ({"streams": {"extra_parameters": 100.0}}, (0.1, 0.04), (0.0, 0.2), False),
    ],
)
def test_streams_have_to_be_small_and_as_good_as_heads(changed, ngram, medusa, holds):
    rows = rows_of(
        (MEDUSA, speculative_streaming.OURS, speculative_streaming.PRUNED),
        **{"streams": {"extra_parameters": 50.0}} | changed,
    )
    assert speculative_streaming.judge(rows, {NGRAM: ngram, MEDUSA: medusa}) is holds
