"""`model.generate` by the native decoder: the tokens of transformers' own loop, or that loop itself with a warning."""

import warnings
from functools import partial

import pytest
import torch

from lilliput.errors import UserError
from lilliput.serving import accelerated, native_sampling

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
