"""`model.generate` by the native decoder: the tokens of transformers' own loop, or that loop itself with a warning."""

import copy
import warnings
from functools import partial

import pytest
import torch

import lilliput as lp
from lilliput.artifact import save
from lilliput.errors import UserError
from lilliput.methods.cache import Sliding
from lilliput.methods.cache._cache import PolicyCache
from lilliput.methods.decode import Ngram
from lilliput.plan import Plan
from lilliput.serving import Served, accelerated, native_sampling, stream_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_llama):
    tiny_llama.generation_config.pad_token_id = 0
    return tiny_llama


def ids(rows, length, seed=0):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def natively(model, *args, **options):
    """Generate and fail when the native decoder was not used."""
    with warnings.catch_warnings(), accelerated(model):
        warnings.simplefilter("error")
        return model.generate(*args, **options)


class Listener:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, tokens):
        self.heard += tokens.flatten().tolist()

    def end(self):
        self.ended = True


OPTIONS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "with processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_those_of_transformers(model, name, rows):
    prompts = ids(rows, 9)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = model.generate(prompts, max_new_tokens=20, **OPTIONS[name])
        torch.manual_seed(seed)
        assert torch.equal(natively(model, prompts, max_new_tokens=20, **OPTIONS[name]), expected)


def test_prompts_of_different_lengths_are_padded_on_the_left(model):
    prompts, mask = ids(4, 12), torch.ones(4, 12, dtype=torch.long)
    for row, padding in enumerate((0, 5, 11, 2)):
        prompts[row, :padding] = mask[row, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(natively(model, prompts, **options), model.generate(prompts, **options))


def test_a_finished_row_is_filled_and_the_others_go_on(model):
    prompts = ids(3, 6)
    model.generation_config.eos_token_id = None
    free = model.generate(prompts, max_new_tokens=12, do_sample=False)
    end = int(free[1, 9])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    expected = model.generate(prompts, **options)
    assert torch.equal(natively(model, prompts, **options), expected)


def test_a_streamer_hears_the_prompt_and_every_token(model):
    listener = Listener()
    found = natively(model, ids(1, 5), max_new_tokens=8, do_sample=False, streamer=listener)
    assert listener.heard == found[0].tolist()
    assert listener.ended


def test_it_is_a_custom_loop_of_transformers(model):
    prompts, listener = ids(1, 5), Listener()
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompts, **options)
    loop = partial(native_sampling, streamer=listener)
    assert torch.equal(model.generate(prompts, custom_generate=loop, **options), expected)
    assert listener.heard == expected[0, 5:].tolist()


def test_the_model_is_as_before_afterwards(model):
    with pytest.raises(ZeroDivisionError), accelerated(model):
        1 / 0  # noqa: B018
    assert "generate" not in vars(model)


def left_to_transformers():
    from transformers import StaticCache

    holes = torch.ones(2, 6, dtype=torch.long)
    holes[0, 2] = 0
    return {
        "beams": ({"num_beams": 2}, "no beam search"),
        "dictionaries": ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        "holes": ({"attention_mask": holes}, "padding on the left"),
        "no cache": ({"use_cache": False}, "NoneType"),
        "a static cache": ({"past_key_values": lambda m: StaticCache(m.config, max_cache_len=16)}, "StaticCache"),
    }


@pytest.mark.parametrize("name", left_to_transformers())
def test_what_it_cannot_do_is_left_to_transformers_with_a_warning(model, name):
    given, reason = left_to_transformers()[name]
    prompts = ids(2, 6)

    def options():
        return {"max_new_tokens": 6, "do_sample": False} | {k: v(model) if callable(v) else v for k, v in given.items()}

    expected = model.generate(prompts, **options())
    with pytest.warns(UserWarning, match=reason), accelerated(model):
        found = model.generate(prompts, **options())
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))


def test_other_models_are_left_to_transformers_with_the_reason():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="GPT2LMHeadModel"), accelerated(model):
        found = model.generate(ids(1, 4), streamer=Listener(), **options)
    assert torch.equal(found, model.generate(ids(1, 4), **options))


def test_assisted_generation_is_refused_with_the_way_out(model):
    with pytest.raises(UserError, match="without custom_generate"):
        model.generate(ids(1, 8), custom_generate=native_sampling, prompt_lookup_num_tokens=2, max_new_tokens=4)


# --- as a fit chose ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, llama_work, make_tokenizer, tmp_path):
    """`saved(serving, **facts)`: the folder of an artifact that is served so."""
    llama_work.model, llama_work.tokenizer = model, make_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = None

    def make(serving, **facts):
        return save(model, tmp_path / "fitted", llama_work, Plan(serving=serving), facts)

    return make


def test_a_loaded_model_writes_as_it_is_served_and_plainly_when_told(model, saved):
    folder = saved(Ngram(runtime="lean"))
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids(1, 9), **options)
    served, listener = lp.load(folder), Listener()
    assert isinstance(served.generate, Served)
    assert torch.equal(served.generate(ids(1, 9), streamer=listener, **options), expected)
    assert listener.heard == expected[0].tolist()
    assert torch.equal(served.generate(input_ids=ids(1, 9), **options), expected)
    plain = lp.load(folder, serve=False)
    assert "generate" not in vars(plain)
    assert torch.equal(plain.generate(ids(1, 9), **options), expected)


def test_several_texts_and_padding_are_not_drafted(model, saved):
    served, options = lp.load(saved(Ngram(runtime="lean"))), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(served.generate(ids(3, 6), **options), model.generate(ids(3, 6), **options))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    given = options | {"attention_mask": mask}
    assert torch.equal(served.generate(ids(1, 6), **given), model.generate(ids(1, 6), **given))


def test_what_a_call_asks_for_itself_comes_first(model, saved):
    served = lp.load(saved(Ngram(runtime="lean")))
    beams = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(served.generate(ids(1, 6), **beams), model.generate(ids(1, 6), **beams))
    cache = Sliding(budget=8).cache(served)
    served.generate(ids(1, 6), max_new_tokens=6, past_key_values=cache)
    assert cache.get_seq_length() == 11


def test_a_copy_of_a_served_model_serves_itself(saved):
    served = lp.load(saved(Ngram(runtime="lean")))
    again = copy.deepcopy(served)
    assert again.generate.model is again
    assert again.generate.setting == served.generate.setting


def test_a_policy_has_a_new_cache_for_each_call(model, saved, monkeypatch):
    served = lp.load(saved(Sliding(budget=8, sinks=2)))
    made, cache = [], Sliding.cache
    monkeypatch.setattr(Sliding, "cache", lambda self, model: made.append(cache(self, model)) or made[-1])
    first, second = (served.generate(ids(1, 30), max_new_tokens=8, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    assert len(made) == 2
    assert all(isinstance(c, PolicyCache) and c.layers[0].keys.shape[2] <= 9 for c in made)


@pytest.mark.parametrize("serving", [Ngram(runtime="lean"), Sliding(budget=64)])
def test_streamed_text_is_that_of_plain_decoding(saved, serving):
    folder = saved(serving)
    plain = "".join(stream_text(folder, "the cat", 12, plain=True))
    assert plain
    assert "".join(stream_text(folder, "the cat", 12)) == plain


def test_a_policy_is_heard_in_streamed_text(saved, monkeypatch):
    folder, asked = saved(Sliding(budget=8, sinks=2)), []
    cache = Sliding.cache
    monkeypatch.setattr(Sliding, "cache", lambda self, model: asked.append(self) or cache(self, model))
    "".join(stream_text(folder, "the cat and the other cat sat on 12 mats", 4, plain=True))
    assert asked == []
    "".join(stream_text(folder, "the cat and the other cat sat on 12 mats", 4))
    assert Sliding(budget=8, sinks=2) in asked


def test_a_text_longer_than_the_positions_is_refused_and_one_beyond_the_context_told(saved):
    folder = saved(None, context=65)
    with pytest.raises(UserError, match=r"the model reads 128; shorten the prompt"):
        list(stream_text(folder, "cat " * 200, 4))
    with pytest.raises(UserError, match="fewer tokens"):
        list(stream_text(folder, "the cat", 128))
    with pytest.warns(UserWarning, match="measured for 65"):
        list(stream_text(folder, "the cat", 70))
