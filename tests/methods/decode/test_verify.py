"""The verify loop against exact distributions and against transformers' own loops, and the calls that it refuses."""

import copy
import itertools
from functools import partial

import pytest
import torch
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList, TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from lilliput.errors import UserError
from lilliput.methods.decode import DraftModel, GatedLoraMtp, Medusa, Ngram, SpeculativeStreaming, Tally
from lilliput.methods.decode._draft import Draft
from lilliput.methods.decode._verify import Drafter, Loop, speculate
from lilliput.methods.decode.draft_model import _Small
from lilliput.methods.decode.medusa import MedusaHeads
from lilliput.serving import accelerated

WARPERS = {
    "as it is": [],
    "temperature": [TemperatureLogitsWarper(0.7)],
    "top-k": [TemperatureLogitsWarper(1.5), TopKLogitsWarper(3)],
    "top-p": [TopPLogitsWarper(0.8)],
}
START, NEW, DRAWS = [1, 2], 3, 4000


class Fixed(Drafter):
    """Always the same draft."""

    def __init__(self, draft):
        self.draft = draft

    def propose(self, ids, room, hidden):
        return self.draft


def joint(table, warpers):
    """Exact probabilities (V, V, V) of the three tokens after START."""
    p = torch.zeros(table.logits.shape, dtype=torch.float64)

    def after(*text):
        scores = LogitsProcessorList(warpers)(torch.tensor([text]), table.logits[text[-2], text[-1]][None].clone())
        return scores.softmax(-1)[0].double()

    for a, b in itertools.product(range(len(p)), repeat=2):
        p[a, b] = after(*START)[a] * after(*START, a)[b] * after(*START, a, b)
    return p


def drawn_joint(make_loop):
    counts = None
    for _ in range(DRAWS):
        loop = make_loop()
        text = loop.run(torch.tensor([START]), Tally())[0, len(START) :].tolist()
        counts = torch.zeros(loop.backend.logits.shape) if counts is None else counts
        counts[tuple(text)] += 1
    return counts


def loop_over(table, drafter, warpers):
    end = len(START) + NEW
    criteria = StoppingCriteriaList([MaxLengthCriteria(end)])
    return Loop(table, drafter, LogitsProcessorList(warpers), criteria, sample=True, longest=end)


def drafters(make_table):
    def small():
        drafter = _Small(DraftModel(tokens=3, sure=0.5), make_table(1), 100)
        drafter.warpers = LogitsProcessorList([])
        return drafter

    return {
        "drawn": small,
        "chosen chain": lambda: Fixed(Draft.chain([0, 3])),
        "chosen tree": lambda: Fixed(Draft([0, 1, 4, 2, 3], [-1, -1, 0, 0, 1])),
    }


@pytest.mark.parametrize("kind", ["drawn", "chosen chain", "chosen tree"])
@pytest.mark.parametrize("warped", WARPERS)
def test_sampled_texts_follow_the_models_own_distribution(kind, warped, make_table, likely):
    torch.manual_seed(0)
    table, make = make_table(0), drafters(make_table)[kind]

    def loop():
        table.rewind(0)
        return loop_over(table, make(), WARPERS[warped])

    assert likely(drawn_joint(loop), joint(table, WARPERS[warped]))


def test_the_check_of_distributions_sees_a_small_change(make_table, likely):
    torch.manual_seed(0)
    table = make_table(0)

    def loop():
        table.rewind(0)
        return loop_over(table, drafters(make_table)["drawn"](), [TemperatureLogitsWarper(0.9)])

    assert not likely(drawn_joint(loop), joint(table, []))


# --- the same texts as transformers ------------------------------------------------------------------------------


@pytest.fixture
def decoders(model, make_llama, make_rows):
    """Name -> (decoder, what generate takes with it); heads and small models are random: drafts hold or they do not."""
    heads = MedusaHeads(3, 32)
    torch.nn.init.normal_(heads.weight, std=0.05)
    small = make_llama(1)
    return {
        "n-gram": (Ngram(shortest=1), {}),
        "n-gram lean": (Ngram(shortest=1, runtime="lean"), {}),
        "draft model": (DraftModel(sure=0.0), {"draft_model": small}),
        "draft model lean": (DraftModel(sure=0.0, runtime="lean", draft_runtime="lean"), {"draft_model": small}),
        "draft itself": (DraftModel(tokens=6, sure=0.0, draft_runtime="lean"), {"draft_model": model}),
        "medusa": (Medusa(nodes=12), {"heads": heads}),
        "masks": (GatedLoraMtp(), {"adapters": make_rows("masks", model)}),
        "masks linear": (GatedLoraMtp(mode="linear"), {"adapters": make_rows("masks", model)}),
        "streams": (SpeculativeStreaming(nodes=12, kept=4), {"streams": make_rows("streams", model)}),
    }


AHEAD = ("masks", "masks linear", "streams")
EVERY = ("n-gram", "n-gram lean", "draft model", "draft model lean", "draft itself", "medusa", *AHEAD)
OPTIONS = {
    "greedy": {"do_sample": False},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    "end": {"do_sample": False, "eos_token_id": list(range(3, 64, 7))},
    "one token": {"do_sample": False, "max_new_tokens": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", EVERY)
def test_greedy_texts_are_those_of_transformers(name, options, model, decoders, prompt):
    decoder, parts = decoders[name]
    given = {"max_new_tokens": 40} | OPTIONS[options]
    for seed in range(4):
        expected = model.generate(prompt(9, seed), **given)
        found = model.generate(prompt(9, seed), custom_generate=decoder, **parts, **given)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", EVERY)
def test_texts_part_only_where_two_tokens_are_level(name, model, decoders, prompt):
    """Every token has a twin whose row in the vocabulary is the same but for rounding: chunks may choose the other."""
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[32:] = rows[:32] * (1 + 1e-7 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    decoder, parts = decoders[name]
    exact = copy.deepcopy(model).double()
    options = {"max_new_tokens": 40, "do_sample": False}
    for seed in range(6):
        plain = model.generate(prompt(9, seed), **options)[0]
        found = model.generate(prompt(9, seed), custom_generate=decoder, **parts, **options)[0]
        if torch.equal(found, plain):
            continue
        first = int((found != plain).nonzero()[0])
        with torch.no_grad():
            logits = exact(found[None, :first]).logits[0, -1]
        assert abs(logits[found[first]] - logits[plain[first]]) < 1e-3
        assert logits.max() - logits[found[first]] < 1e-3


def test_drafts_save_passes(model, decoders, prompt):
    for name in ("n-gram", "n-gram lean", "draft itself"):
        tally, (decoder, parts) = Tally(), decoders[name]
        model.generate(prompt(), custom_generate=decoder, tally=tally, max_new_tokens=60, do_sample=False, **parts)
        assert tally.tokens == 60
        assert tally.tokens_per_step > 3
        assert tally.drafted >= tally.tokens - tally.steps


def test_trees_read_what_chains_read(model, prompt):
    """A tree that holds the true text on crooked ways is followed to its end, in both attentions."""
    options = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.3}
    text = model.generate(prompt(), **options)[0].tolist()

    class Crooked(Drafter):
        def propose(self, ids, room, hidden):
            right = [*text, 0, 0, 0][len(ids) : len(ids) + 3]
            wrong = [(token + 1) % 64 for token in right]
            return Draft([wrong[0], right[0], wrong[0], wrong[1], right[1], right[2]], [-1, -1, 0, 1, 1, 4])

    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        tally = Tally()
        assert run_with(model, Crooked(), prompt(), tally, **options)[0].tolist() == text
        assert tally.tokens_per_step > 2.5


def run_with(model, drafter, ids, tally, **options):
    def loop(model, input_ids, **call):
        return speculate(model, input_ids, drafter, "torch", tally=tally, **call)

    return model.generate(ids, custom_generate=loop, **options)


@pytest.mark.parametrize("name", ["n-gram", "n-gram lean", "medusa", *AHEAD])
def test_chosen_drafts_leave_the_draws_of_a_seed_as_they_are(name, model, decoders, prompt):
    decoder, parts = decoders[name]
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.5, "top_k": 10, "top_p": 0.9}
    for seed in range(4):
        torch.manual_seed(seed)
        expected = model.generate(prompt(), **options)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(prompt(), custom_generate=decoder, **parts, **options), expected)


def test_processors_are_called_once_per_token_in_its_order(model, prompt):
    lengths = []

    def note(ids, scores):
        lengths.append(ids.shape[1])
        return scores

    options = {"max_new_tokens": 30, "do_sample": False, "logits_processor": LogitsProcessorList([note])}
    model.generate(prompt(9), custom_generate=Ngram(shortest=1), **options)
    assert lengths == list(range(9, 39))


@pytest.mark.parametrize("name", EVERY)
def test_a_streamer_hears_every_token(name, model, decoders, prompt, listener):
    decoder, parts = decoders[name]
    with accelerated(model, decoder):
        found = model.generate(prompt(), streamer=listener, max_new_tokens=20, do_sample=False, **parts)
    assert listener.heard == found[0].tolist()
    assert listener.ended
    bound = partial(decoder, streamer=listener)
    model.generate(prompt(), custom_generate=bound, max_new_tokens=5, do_sample=False, **parts)
    assert len(listener.heard) == found.shape[1] + 5


def test_a_stopping_criterion_ends_the_text_inside_a_draft(model, prompt):
    stops = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 22])])
    options = {"max_new_tokens": 60, "do_sample": False, "stopping_criteria": stops}
    found = model.generate(prompt(9), custom_generate=Ngram(shortest=1, tokens=16), **options)
    assert found.shape[1] == 22
    assert torch.equal(found, model.generate(prompt(9), max_new_tokens=13, do_sample=False))


def test_a_cache_of_the_user_goes_on_where_it_was(model, prompt):
    from transformers import DynamicCache

    cache, options = DynamicCache(config=model.config), {"max_new_tokens": 25, "do_sample": False}
    decoder = Ngram(shortest=1)
    first = model.generate(prompt(), past_key_values=cache, custom_generate=decoder, **options)
    assert cache.get_seq_length() == first.shape[1] - 1
    longer = torch.cat([first, prompt(5, 3)], 1)
    second = model.generate(longer, past_key_values=cache, custom_generate=decoder, **options)
    assert torch.equal(second, model.generate(longer, **options))


def test_windows_of_attention_can_be_rewound(prompt):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "num_attention_heads": 4,
    }
    config = Gemma3TextConfig(vocab_size=64, num_key_value_heads=2, sliding_window=8, max_position_embeddings=128,
                              layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                              pad_token_id=0, bos_token_id=1, eos_token_id=None, **sizes)  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    options = {"max_new_tokens": 40, "do_sample": False}
    for length in (4, 9, 20):
        expected = model.generate(prompt(length), **options)
        for decoder in (Ngram(shortest=1), Ngram(shortest=1, runtime="lean")):
            assert torch.equal(model.generate(prompt(length), custom_generate=decoder, **options), expected)
    with pytest.raises(UserError, match="sliding window"):
        model.generate(prompt(), custom_generate=Medusa(), heads=MedusaHeads(2, 32), **options)
    with pytest.raises(UserError, match="sliding window"):
        model.generate(prompt(), custom_generate=GatedLoraMtp(), adapters=GatedLoraMtp().new(model), **options)


def test_other_architectures_are_decoded_too(prompt):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 31, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt(9), **options)
    assert torch.equal(model.generate(prompt(9), custom_generate=Ngram(shortest=1), **options), expected)
    found = model.generate(prompt(9), custom_generate=Medusa(), heads=MedusaHeads(2, 32), **options)
    assert torch.equal(found, expected)
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        model.generate(prompt(9), custom_generate=Ngram(runtime="lean"), **options)


# --- refusals ----------------------------------------------------------------------------------------------------


def refused_calls():
    from transformers import StaticCache

    padded = torch.ones(1, 9, dtype=torch.long)
    padded[0, :3] = 0
    return {
        "two prompts": ({"inputs": torch.full((2, 9), 5)}, "one prompt"),
        "two answers": ({"num_return_sequences": 2, "do_sample": True}, "one answer"),
        "padding": ({"attention_mask": padded}, "without padding"),
        "beams": ({"num_beams": 2}, "beam search"),
        "dictionary": ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        "no cache": ({"use_cache": False}, "use_cache=True"),
        "static cache": ({"past_key_values": lambda m: StaticCache(m.config, max_cache_len=64)}, "DynamicCache"),
        "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 32), "inputs": None}, "input_ids"),
        "too long": ({"inputs": torch.full((1, 129), 5)}, "reads 128"),
    }


@pytest.mark.parametrize("name", refused_calls())
def test_what_it_cannot_do_is_refused_with_the_way_out(name, model, prompt):
    given, message = refused_calls()[name]
    call = {"inputs": prompt(9), "max_new_tokens": 5} | {k: v(model) if callable(v) else v for k, v in given.items()}
    with pytest.raises(UserError, match=message):
        model.generate(custom_generate=Ngram(), **call)


def test_a_model_in_training_mode_is_refused(model, prompt):
    with pytest.raises(UserError, match=r"model\.eval"):
        model.train().generate(prompt(), custom_generate=Ngram(), max_new_tokens=5)


def test_a_cache_of_the_user_is_refused_by_lean(model, prompt):
    from transformers import DynamicCache

    with pytest.raises(UserError, match="runtime='torch'"):
        model.generate(prompt(), custom_generate=Ngram(runtime="lean"), past_key_values=DynamicCache())
