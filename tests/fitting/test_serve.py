"""Ways to serve what was fitted: what is tried, what is taken, what is left in the record, and resuming.

Times and memory are replaced by figures that follow from the model and its cache, so that nothing depends on a machine.
"""

import json
from types import SimpleNamespace

import pytest
import torch

import lilliput as lp
from lilliput.artifact import load, load_example, read_architecture, serving_of
from lilliput.fitting import serve
from lilliput.fitting.policies import full_cache, late_nats, mean_and_error, under_policy, worse
from lilliput.fitting.report.page import render
from lilliput.measuring import bare_workload, generator
from lilliput.methods.cache import LowBit, Sliding
from lilliput.methods.decode import Ngram
from lilliput.metrics.latency import Comparison
from lilliput.metrics.memory import weight_bytes
from lilliput.runtimes import find_runtime
from lilliput.served import prepare
from lilliput.serving import Served
from lilliput.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"minutes": 0.01, "trials": 20, "threads": 1, "recover": False, "rivals": False, "quiet": True}
BITS = FAST | {"families": ("quantize",)}  # a dropped block would take its keys and values with it
CONTEXT = 1024


@pytest.fixture
def long_work(tiny_llama):
    """A tiny Llama whose cache is larger than its weights, with windows as long as the context."""
    tiny_llama.config.max_position_embeddings = CONTEXT
    tiny_llama.config.eos_token_id = tiny_llama.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (2, CONTEXT), generator=generator) for _ in range(3)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(tiny_llama, *splits, name="tiny-llama", source=source)


def held(path, runtime, threads):
    """Bytes of the weights, and of the cache behind the example as the artifact is served."""
    model, example = load(path), load_example(path)
    work = bare_workload(model, example, "causal_lm")
    session = prepare(find_runtime(runtime), model, work, threads, serving_of(path))
    list(generator(session)(example["input_ids"], 8))
    return weight_bytes(model) + session.cache_bytes


@pytest.fixture
def counted(monkeypatch):
    """Memory that is counted; `counted` lists what was counted so."""
    seen = []

    def memory(path, runtime, threads):
        seen.append(serving_of(path))
        return held(path, runtime, threads)

    for place in ("measuring", "fitting.build", "fitting.verify", "fitting.serve"):
        monkeypatch.setattr(f"lilliput.{place}.fresh_process_memory", memory)
    return seen


@pytest.fixture
def drafts(monkeypatch):
    """`drafts(ratio)`: what drafts gain from now on."""

    def gain(ratio):
        found = Comparison(ratio, ratio - 0.05, ratio + 0.05, (10.0, 10.0 / ratio), 8)
        for place in ("fitting.build", "fitting.serve"):
            monkeypatch.setattr(f"lilliput.{place}.compare_drafting", lambda *_: (found, 8))

    return gain


def test_a_cache_in_fewer_bits_meets_a_limit_that_weights_alone_cannot(long_work, counted, tmp_path):
    fitted = lp.fit(long_work, "memory<=60%", context=CONTEXT, out=tmp_path / "run", **BITS)
    record, folder = fitted.record, tmp_path / "run"
    assert fitted.met, fitted.summary()
    assert "served with cache.low_bit" in fitted.summary()
    assert f"at {CONTEXT} tokens" in fitted.summary()
    rows = record["serving"]["rows"]
    assert rows[0]["serving"] is None
    cache = 2 * 2 * 2 * 8 * 4 * CONTEXT  # blocks, keys and values, heads, width, bytes
    assert rows[0]["cache_bytes"] == cache
    assert record["original"]["values"]["memory_bytes"] == weight_bytes(long_work.model) + cache
    chosen = next(row for row in rows if row["serving"] == record["serving"]["chosen"])
    assert chosen["cache_bytes"] < cache / 2
    assert chosen["measured"]["memory_bytes"] <= record["limits"]["memory_bytes"]
    assert record["verify"]["policy"]["tokens"] == CONTEXT
    assert isinstance(serving_of(folder / "fitted"), LowBit)
    assert read_architecture(folder / "fitted")["facts"] == {"context": CONTEXT}
    assert lp.Plan.load(folder / "plan.yaml").serving == fitted.plan.serving == serving_of(folder / "fitted")
    assert isinstance(lp.load(folder / "fitted").generate, Served)
    assert fitted.model.config._attn_implementation == "sdpa"
    assert "How it is served" in (folder / "report.html").read_text()
    again = fitted.save(tmp_path / "again")
    assert serving_of(again) == serving_of(folder / "fitted")


def test_what_was_tried_is_not_tried_again(long_work, counted, tmp_path):
    first = lp.fit(long_work, "memory<=60%", context=CONTEXT, out=tmp_path / "run", **BITS)
    steps = {path.name: path.read_bytes() for path in (tmp_path / "run" / "serving").iterdir()}
    assert steps
    (tmp_path / "run" / "record.json").unlink()
    lp.fit(long_work, "memory<=60%", context=CONTEXT, out=tmp_path / "run", resume=True, **BITS)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run" / "serving").iterdir()}
    assert steps.items() <= after.items()
    assert first.met
    with pytest.raises(lp.UserError, match="context"):
        lp.fit(long_work, "memory<=60%", context=CONTEXT - 1, out=tmp_path / "run", resume=True, **BITS)


def test_dropped_blocks_take_their_keys_and_values_with_them(long_work, counted, tmp_path):
    fitted = lp.fit(long_work, "memory<=60%", context=CONTEXT, serve=False, out=tmp_path / "run", **FAST)
    (best,) = (c for c in fitted.record["candidates"] if c["number"] == fitted.record["chosen"])
    assert fitted.met
    assert "drop" in best["labels"].values()
    assert best["measured"]["memory_bytes"] == pytest.approx(
        fitted.record["verify"]["measured"]["memory_bytes"], rel=0.1
    )


def test_without_serving_the_weights_alone_are_judged(long_work, counted, tmp_path):
    fitted = lp.fit(long_work, "memory<=60%", context=CONTEXT, serve=False, out=tmp_path / "run", **BITS)
    assert not fitted.met
    assert fitted.record["serving"] == {"rows": [], "chosen": None, "label": "plain"}
    assert counted
    assert set(counted) == {None}


@pytest.mark.parametrize(("ratio", "taken"), [(2.0, True), (1.02, False), (0.7, False)])
def test_drafts_are_taken_when_they_are_faster(llama_work, drafts, counted, tmp_path, ratio, taken):
    drafts(ratio)
    fitted = lp.fit(llama_work, "size<=60%, time_per_token<=10000%", out=tmp_path / "run", **FAST)
    plain, row = fitted.record["serving"]["rows"]
    assert row["measured"]["token_ms"] == pytest.approx(plain["measured"]["token_ms"] / ratio)
    assert row["same_text"] == "8 of 8"
    assert row["damage"] == plain["damage"]
    assert fitted.plan.serving == (Ngram(runtime="lean") if taken else None)
    assert isinstance(lp.load(tmp_path / "run" / "fitted").generate, Served) == taken
    assert fitted.record["verify"]["drop"] == pytest.approx(fitted.record["verify"]["measured"]["drop"])


def test_a_record_of_before_there_was_serving_still_makes_a_report(llama_work, counted, tmp_path):
    fitted = lp.fit(llama_work, "size<=60%", out=tmp_path / "run", **FAST)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["serving"]["rows"] == []
    del record["serving"], record["request"]["context"]
    assert "How it is served" not in render(record)
    assert fitted.record["request"]["context"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": CONTEXT + 1}, f"reads {CONTEXT} at most"),
        ({"context": CONTEXT, "runtime": "torch"}, "torch keeps no keys and values"),
    ],
)
def test_a_context_that_cannot_be_is_refused(long_work, options, message, tmp_path):
    with pytest.raises(lp.UserError, match=message):
        lp.fit(long_work, "size<=60%", out=tmp_path / "run", **FAST, **options)


def test_a_vision_model_has_no_context(cnn_work, tmp_path):
    with pytest.raises(lp.UserError, match="no language model"):
        lp.fit(cnn_work, "size<=60%", context=512, out=tmp_path / "run", **FAST)


# --- choosing ----------------------------------------------------------------------------------------------------


def built(number, memory, damage, token_ms=1.0):
    measured = {"memory_bytes": memory, "token_ms": token_ms}
    return {"number": number, "measured": measured, "damage": damage, "damage_error": 0.1, "plan": ""}


def job_of(candidates, budget, freed):
    """What the choice looks at in a fit; the first candidate is its best."""
    return SimpleNamespace(
        budget=lp.Budget(budget),
        freed=freed,
        options=SimpleNamespace(serve=True),
        runtime=SimpleNamespace(keeps_text=True),
        device=SimpleNamespace(measured=True),
        run=SimpleNamespace(candidates=lambda: candidates),
        best=lambda: candidates[0],
    )


@pytest.mark.parametrize(
    ("budget", "freed", "expected"),
    [
        ("memory<=100B", 20.0, [2, 1]),  # 3 is beyond what twice the bytes would mend, 4 is worse
        ("memory<=100B", 60.0, [3, 2, 1]),
        ("memory<=100B", 0.0, []),
        ("memory<=100B, time_per_token<=3ms", 20.0, [2, 5, 1]),
        ("memory<=200B, time_per_token<=3ms", 0.0, [5, 1]),
        ("memory<=200B, time_per_token<=2ms", 0.0, [1]),
    ],
)
def test_plans_that_lost_less_are_served_too_where_that_may_mend_them(budget, freed, expected):
    candidates = [built(1, 90, 0.5), built(2, 130, 0.2), built(3, 150, 0.1), built(4, 101, 0.6), built(5, 90, 0.3, 5.0)]
    if "time" not in budget:
        candidates = candidates[:4]
    if "200B" in budget:
        candidates = [candidates[0], candidates[4]]
    assert [c["number"] for c in serve.plans_to_serve(job_of(candidates, budget, freed))] == expected


def test_a_policy_must_lose_less_than_the_best_plan_that_needs_none():
    entry = {"method": "cache.low_bit", "settings": {}}
    rows = [
        {"candidate": 1, "serving": None, "damage": 0.5},
        {"candidate": 2, "serving": entry, "refused": "no"},
        *({"candidate": 2, "serving": entry, "damage": d, "speedup": {"low": 0.4}} for d in (0.39, 0.41)),
    ]
    inside, outside = ([built(1, memory, 0.5), built(2, 130, 0.2)] for memory in (90, 110))
    (taken,) = serve.choices(job_of(inside, "memory<=100B", 20.0), rows)
    assert (taken["number"], taken["damage"], taken["weights_damage"], taken["serving"]) == (2, 0.39, 0.2, entry)
    assert len(serve.choices(job_of(outside, "memory<=100B", 20.0), rows)) == 2


# --- parts -------------------------------------------------------------------------------------------------------


def test_a_cache_with_room_costs_nothing_and_one_that_forgets_does(sharp_llama):
    texts = torch.randint(3, 64, (3, 100), generator=torch.Generator().manual_seed(0))
    full = late_nats(sharp_llama, texts, full_cache)
    with torch.inference_mode():
        logits = sharp_llama(texts).logits[:, 74:99]
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 75:], reduction="none").mean(1)
    torch.testing.assert_close(full, expected.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(late_nats(sharp_llama, texts, Sliding(budget=256).cache), full, rtol=1e-4, atol=1e-4)
    assert (late_nats(sharp_llama, texts, Sliding(budget=8).cache) - full).abs().max() > 1e-3


def test_drops_go_on_top_of_each_other():
    assert worse(0.1, 0.0) == pytest.approx(0.1)
    assert worse(0.0, 0.1) == pytest.approx(0.105170918)
    assert mean_and_error(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert mean_and_error(torch.tensor([1.0]))[1] == float("inf")


def test_what_a_policy_adds_is_counted_in_perplexity_drop_and_difference(long_work):
    score = {"name": "perplexity", "value": 10.0, "low": 9.0, "high": 11.0, "n": 8, "unit": ""}
    found = {
        "score_before": score,
        "score_after": score | {"value": 11.0},
        "drop": 0.1,
        "difference": {"mean": 0.095, "low": 0.09, "high": 0.1},
    }
    policy = Sliding(budget=32)
    work = long_work.at_context(256)
    after = under_policy(found, work, work.model, policy)
    nats = after["policy"]["nats"]
    texts = torch.cat([b["input_ids"] for b in work.test])[:, :256]
    expected = late_nats(work.model, texts, policy.cache) - late_nats(work.model, texts, full_cache)
    assert nats == pytest.approx(float(expected.mean()), rel=1e-3)
    assert after["score_after"]["value"] == pytest.approx(11.0 * 2.718281828**nats)
    assert after["drop"] == pytest.approx(after["score_after"]["value"] / 10.0 - 1)
    assert after["difference"]["mean"] == pytest.approx(0.095 + nats)
    assert found["drop"] == 0.1


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_guess_of_a_low_bit_cache_is_near_what_it_holds(long_work, bits):
    policy = LowBit(bits=bits)
    session = prepare(find_runtime("lean"), long_work.model, long_work, 1, policy)
    list(session.generate(long_work.test[0]["input_ids"][:1, :1000], 2))
    whole = 2 * 2 * 2 * 8 * 4 * 1001
    assert session.cache_bytes == pytest.approx(serve.low_bit_share(policy, 1001, 8) * whole, rel=0.1)
