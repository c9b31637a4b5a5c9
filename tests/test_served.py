"""Sessions that serve with drafts or a policy's cache: the text of plain decoding, or that of transformers."""

import pytest
import torch
from transformers import DynamicCache

from lilliput.errors import UserError
from lilliput.measuring import compare_behind, compare_drafting, measure
from lilliput.methods.cache import H2O, LowBit, Sliding
from lilliput.methods.decode import Ngram
from lilliput.methods.quantize.group import Group
from lilliput.runtimes import find_runtime
from lilliput.served import Caching, Drafting, attention_as_before, label, prepare, read

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(length, seed=0):
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def packed(llama_work):
    """Packed layers on the native decoder: texts with and without drafts are equal to the bit."""
    return Group(bits=4, group=32).apply(llama_work.model)


def session(work, model, setting=None, runtime="lean"):
    return prepare(find_runtime(runtime), model, work, 1, setting)


@pytest.mark.parametrize("prompt", [1, 2, 9, 40])
@pytest.mark.parametrize("tokens", [0, 1, 2, 30])
def test_drafts_give_the_text_of_plain_decoding(llama_work, packed, prompt, tokens):
    plain = list(session(llama_work, packed).generate(ids(prompt), tokens))
    drafting = session(llama_work, packed, Ngram())
    assert list(drafting.generate(ids(prompt), tokens)) == plain
    assert list(drafting.generate(ids(prompt), tokens, reuse=True)) == plain
    if tokens == 30:
        assert drafting.tally.tokens == 60
        assert drafting.tally.steps < 60


def test_a_prompt_that_is_held_is_not_read_again(llama_work, packed):
    lean = session(llama_work, packed)
    first = list(lean.generate(ids(20), 5))
    asked = []
    lean.decoder = lambda row, *rest, own=lean.decoder, **o: asked.append(len(row)) or own(row, *rest, **o)
    assert list(lean.generate(ids(20), 5, reuse=True)) == first
    assert asked == [1] * 5
    assert list(lean.generate(ids(20), 5)) == first
    assert asked[5:] == [20, 1, 1, 1, 1]
    other = list(lean.generate(ids(20, seed=1), 5, reuse=True))
    assert asked[10] == 20
    lean({"input_ids": ids(20)})  # logits of a batch go through the same cache
    assert list(lean.generate(ids(20, seed=1), 5, reuse=True)) == other


@pytest.mark.parametrize("policy", [LowBit(bits=8, residual=8, group=16), Sliding(budget=64), H2O(budget=64)])
def test_a_roomy_policy_gives_the_text_of_transformers(llama_work, policy):
    model = llama_work.model
    model.generation_config.eos_token_id = None
    expected = model.generate(ids(12), max_new_tokens=10, do_sample=False)[0, 12:].tolist()
    served = session(llama_work, model, policy)
    found = list(served.generate(ids(12), 10))
    assert found == expected or isinstance(policy, LowBit)
    assert served.cache.get_seq_length() == 21
    assert list(served.generate(ids(12), 10)) == found, "a cache is new for each text"


def test_a_policy_forgets_and_holds_less(llama_work):
    served = session(llama_work, llama_work.model, Sliding(budget=16, sinks=2))
    list(served.generate(ids(60), 4))
    assert served.cache.layers[0].keys.shape[2] <= 17
    assert served.cache_bytes < session(llama_work, llama_work.model).cache_bytes


def test_reading_in_pieces_changes_nothing(llama_work):
    model, text = llama_work.model, ids(30)
    with torch.inference_mode():
        expected = model(text).logits
    for piece in (4, 30, 100):
        every = read(model, text, DynamicCache(), piece, every=True)
        torch.testing.assert_close(every, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read(model, text, DynamicCache(), piece), every[:, -1:], rtol=1e-4, atol=1e-4)


def test_logits_of_whole_texts_are_those_of_the_model(llama_work):
    batch = llama_work.calibration[0]
    with torch.inference_mode():
        expected = llama_work.forward(llama_work.model, batch)
    for setting in (Ngram(), Sliding()):
        served = session(llama_work, llama_work.model, setting)
        torch.testing.assert_close(llama_work.forward(served, batch), expected, rtol=1e-4, atol=1e-4)


def test_the_attention_is_put_back(llama_work):
    model = llama_work.model
    with attention_as_before(model):
        session(llama_work, model, H2O())
        assert model.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_where_no_text_is_kept_nothing_is_drafted(llama_work):
    plain = session(llama_work, llama_work.model, Ngram(), runtime="torch")
    assert not isinstance(plain, Drafting | Caching)


def test_a_policy_for_another_kind_of_model_is_refused(llama_work, tiny_cnn):
    with pytest.raises(UserError, match="decoders that generate text"):
        session(llama_work, tiny_cnn, Sliding())


def test_settings_are_named_with_what_matters():
    assert label(None) == "plain"
    assert label(Ngram(runtime="lean")) == "decode.ngram"
    assert label(LowBit()) == "cache.low_bit (bits 4)"
    assert label(Sliding(budget=64, sinks=2)) == "cache.sliding (budget 64, sinks 2)"


def test_sessions_are_compared_behind_a_prompt_that_one_holds(llama_work):
    work = llama_work.at_context(128)
    plain = session(work, work.model)
    asked = []
    plain.decoder = lambda row, *rest, own=plain.decoder, **o: asked.append(len(row)) or own(row, *rest, **o)
    for _ in range(2):
        found, first_ms = compare_behind(work, plain, session(work, work.model, Sliding(budget=16)), rounds=6)
        assert found.rounds == 6
        assert first_ms > 0
    assert asked.count(64) == 1


@pytest.mark.parametrize("context", [None, 256])
def test_drafts_are_timed_on_validation_prompts(llama_work, packed, context):
    packed.config.eos_token_id = None
    packed.config.max_position_embeddings = 256
    work = llama_work
    work.model.config.max_position_embeddings = 256
    if context:
        work.texts = lambda split, length, count: torch.randint(3, 64, (count, length))
        work = work.at_context(context)
    work.model = packed
    gain, same = compare_drafting(work, session(work, packed, Ngram()))
    assert gain.rounds == same == (4 if context else 8)
    assert gain.low <= gain.ratio <= gain.high


def test_texts_that_end_at_once_show_no_gain(llama_work, packed):
    packed.config.eos_token_id = list(range(64))
    llama_work.model = packed
    gain, same = compare_drafting(llama_work, session(llama_work, packed, Ngram()))
    assert (gain.ratio, gain.gain, same) == (1.0, False, 0)


@pytest.mark.parametrize("setting", [Ngram(), Sliding(budget=16)])
def test_a_model_is_measured_as_it_is_served(llama_work, setting, monkeypatch):
    monkeypatch.setattr("lilliput.measuring._measure_energy", lambda *_: None)
    found = measure(llama_work, threads=1, fresh_memory=False, split=None, serving=setting)
    assert f"served with {label(setting)}" in found.notes
    assert {"first_token_ms", "token_ms"} <= set(found.values)
