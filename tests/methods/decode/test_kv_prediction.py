"""Predicted keys and values: the maps, the cache they make, what is learned, what it costs, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList

from lilliput.errors import UserError
from lilliput.kernels.decoder_parts import parts_of, rotated
from lilliput.methods.decode import KvPrediction, Tally
from lilliput.methods.decode._backends import RUNTIMES
from lilliput.methods.decode._kv_predictor import (
    KvPredictor,
    LeastSquares,
    answer,
    key_value_names,
    keys_and_values,
    layer_map,
    rotated_back,
)
from lilliput.methods.decode.kv_prediction import chosen, first_token_flops
from lilliput.serving import accelerated
from lilliput.workload import Workload, windows

OPTIONS = {"max_new_tokens": 20, "do_sample": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


def gemma(layers=("sliding_attention", "full_attention")):
    """Norms of keys, two kinds of rotary positions, a window of 8, one key head."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=64, num_key_value_heads=1, sliding_window=8, max_position_embeddings=128,
                              num_hidden_layers=len(layers), layer_types=list(layers), pad_token_id=0, bos_token_id=1,
                              eos_token_id=None, **sizes)  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.add_(0.3 * torch.rand_like(parameter))
    return model


def qwen():
    """Biases of keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=64, num_hidden_layers=2, max_position_embeddings=128, pad_token_id=0,
                         bos_token_id=1, eos_token_id=None, **sizes)  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.add_(0.3 * torch.rand_like(parameter))
    return model


def itself(model):
    """A predictor whose auxiliary is the model: with the maps it begins with, its prediction is exact."""
    widths = [b.kv_heads * b.head_dim for b in parts_of(model).blocks]
    return KvPredictor(copy.deepcopy(model), widths).eval()


@pytest.fixture
def work(model):
    """Texts that count up in a circle, each from its own place."""
    circle = torch.arange(64).repeat(4)
    texts = torch.stack([circle[s : s + 24] for s in range(64)])[torch.randperm(64)]
    splits = texts.split(16)
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3], 8), name="circle")


# --- maps ------------------------------------------------------------------------------------------------------


def test_the_first_auxiliary_blocks_serve_one_more():
    assert layer_map(28, 20) == [i for i in range(8) for _ in range(2)] + list(range(8, 20))
    assert layer_map(6, 3) == [0, 0, 1, 1, 2, 2]
    assert layer_map(3, 3) == [0, 1, 2]
    assert layer_map(2, 3) == [0, 1]


def test_which_blocks_stay():
    assert chosen(8, 0.25, "spread") == [0, 4]
    assert chosen(8, 0.75, "spread") == [0, 1, 2, 4, 5, 6]
    assert chosen(8, 0.5, "first") == [0, 1, 2, 3]
    assert chosen(8, 0.01, "spread") == [0]
    assert chosen(3, 1.0, "spread") == [0, 1, 2]


def test_the_auxiliary_is_a_copy_of_those_blocks(make_llama):
    model = make_llama(4)
    small = KvPrediction(keep=0.5).auxiliary(model)
    assert small.config.num_hidden_layers == len(small.model.layers) == 2
    for mine, theirs in zip(small.model.layers, (model.model.layers[0], model.model.layers[2])):
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        assert mine.mlp.up_proj.weight is not theirs.mlp.up_proj.weight
    assert len(model.model.layers) == 4


def test_least_squares_finds_a_linear_map():
    torch.manual_seed(0)
    w, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    fit = LeastSquares()
    for _ in range(4):
        x = torch.randn(50, 5)
        fit.add(x, F.linear(x.double(), w, b))
    for found, expected in zip(fit.solved(), (w, b)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_predictor_begins_with_maps_that_no_other_linear_map_beats(work, make_llama):
    """By the normal equations: what is left is orthogonal to what was read, and to one."""
    method, small = KvPrediction(), make_llama(1, seed=5, num_key_value_heads=4)
    predictor = method.begin(work, small)
    ids = torch.cat([batch["input_ids"] for batch in work.training])
    with torch.no_grad():
        true = keys_and_values(work.model, key_value_names(work.model), ids)
        read = keys_and_values(predictor.auxiliary, predictor.names, ids)
        predicted, _ = predictor(ids)
    for kind in (0, 1):
        x = F.pad(read[0][kind].flatten(0, 1), (0, 1), value=1.0)
        for p, t in zip(predicted, true):
            left = (t[kind] - p[kind]).flatten(0, 1)
            assert p[kind].shape == t[kind].shape
            assert float((x.T @ left).abs().max()) < 1e-3 * float((x.norm(dim=0)[:, None] * t[kind].norm()).max())
            assert float(left.norm()) < float(t[kind].norm())


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_a_rotation_is_taken_back(scale):
    x, angles = torch.randn(5, 3, 8), torch.rand(5, 4).repeat(1, 2) * 6
    cos, sin = scale * angles.cos(), scale * angles.sin()
    torch.testing.assert_close(rotated_back(rotated(x, cos, sin), cos, sin), x, rtol=1e-4, atol=1e-5)


# --- the cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_an_exact_prediction_gives_the_models_own_text(name, runtime, make_llama, prompt):
    model = {"llama": make_llama, "qwen2": qwen, "gemma3": gemma}[name]()
    method, predictor = KvPrediction(runtime=runtime), itself(model)
    for length in (1, 2, 9, 20):
        ids = prompt(length, seed=length)
        if (name, runtime) == ("gemma3", "lean") and length > 1:
            with pytest.raises(UserError, match="runtime='torch'"):
                model.generate(ids, custom_generate=method, predictor=predictor, **OPTIONS)
            continue
        found = model.generate(ids, custom_generate=method, predictor=predictor, **OPTIONS)
        assert torch.equal(found, model.generate(ids, **OPTIONS))


@pytest.mark.parametrize("rope", [None, YARN])
def test_predicted_caches_are_those_that_the_model_fills(rope, make_llama, prompt):
    from transformers import DynamicCache

    model = make_llama(3, **({} if rope is None else {"rope_parameters": rope}))
    cache, ids = DynamicCache(), prompt(11)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for runtime in RUNTIMES:
        for layer, (keys, values) in zip(cache.layers, itself(model).predict(model, ids[0], runtime)):
            torch.testing.assert_close(keys, layer.keys[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values, layer.values[0], rtol=1e-4, atol=1e-4)


def test_both_runtimes_give_the_same_text_behind_a_wrong_prediction(model, make_llama, prompt):
    torch.manual_seed(0)
    predictor = KvPredictor(make_llama(1, seed=3, num_key_value_heads=1), [16, 16]).eval()
    for linear in (*predictor.key_maps, *predictor.value_maps):
        torch.nn.init.normal_(linear.weight)
        torch.nn.init.normal_(linear.bias)
    tokens, ids = [], prompt(12)
    for runtime in RUNTIMES:
        options = {"custom_generate": KvPrediction(runtime=runtime), "predictor": predictor, **OPTIONS}
        tokens.append(model.generate(ids, **options)[0, 12:].tolist())
    assert tokens[0] == tokens[1] != model.generate(ids, **OPTIONS)[0, 12:].tolist()


def test_one_block_is_exact_behind_predicted_keys(make_llama, prompt):
    """With a single block the last token's own keys are known without the others, so the logits can be checked."""
    model = make_llama(1)
    predictor = KvPredictor(make_llama(1, seed=3), [16]).eval()
    ids, names = prompt(12), key_value_names(model)
    with torch.no_grad():
        own, (predicted, _) = keys_and_values(model, names, ids), predictor(ids)
        mixed = [tuple(torch.cat([p[:, :-1], o[:, -1:]], 1) for p, o in zip(predicted[0], own[0]))]
        expected = answer(model, names, ids, mixed)[0, -1]
    for runtime in RUNTIMES:
        seen = []

        def note(ids, scores, seen=seen):
            seen.append(scores[0].clone())
            return scores

        model.generate(ids, custom_generate=KvPrediction(runtime=runtime), predictor=predictor,
                       logits_processor=LogitsProcessorList([note]), max_new_tokens=1, do_sample=False)  # fmt: skip
        torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_it_streams_and_counts_as_the_others_do(model, prompt, listener):
    tally, predictor = Tally(), itself(model)
    with accelerated(model, KvPrediction()):
        found = model.generate(prompt(), predictor=predictor, streamer=listener, tally=tally, **OPTIONS)
    assert listener.heard == found[0].tolist()
    assert (tally.steps, tally.drafted, tally.tokens) == (20, 0, 20)


# --- training --------------------------------------------------------------------------------------------------


def test_training_brings_the_predicted_answers_nearer_and_leaves_the_model_alone(work, prompt):
    model = work.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = KvPrediction(keep=0.5, steps=60, lr=3e-3)
    predictor = method.begin(work)
    given = {k: v.clone() for k, v in predictor.state_dict().items()}
    predictor, history = method.train_(predictor, work)
    assert sum(history.losses[-10:]) < 0.9 * sum(history.losses[:10])
    assert not predictor.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    changed = {k.split(".")[0] for k, v in predictor.state_dict().items() if not torch.equal(v, given[k])}
    assert changed == {"auxiliary", "key_maps", "value_maps"}


def test_the_loss_is_the_sum_of_its_three_parts(work):
    method, ids = KvPrediction(keep=0.5, steps=1, lr=1e-6, distance=0.5), work.training[0]["input_ids"]
    work.training = work.training[:1]
    predictor, model = method.begin(work), work.model
    names = key_value_names(model)
    with torch.no_grad():
        predicted, small = predictor(ids)
        true = keys_and_values(model, names, ids)
        told = answer(model, names, ids, predicted)
        ce = [F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in (told, small)]
        away = sum((p - t).abs().mean() for ps, ts in zip(predicted, true) for p, t in zip(ps, ts))
    _, history = method.train_(predictor, work)
    assert history.losses == [pytest.approx(float(sum(ce) + 0.5 * away), rel=1e-5)]


def test_a_smaller_model_is_trained_as_a_copy(work, make_llama):
    small = make_llama(1, seed=4, hidden_size=16, intermediate_size=32)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    predictor = KvPrediction(steps=2).train(work, small)
    assert predictor.sources == [0, 0]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in predictor.auxiliary.state_dict().items())


# --- files -----------------------------------------------------------------------------------------------------


def test_it_saves_and_loads_to_the_bit(work, prompt, tmp_path):
    predictor = KvPrediction(keep=0.5, steps=2).train(work)
    again = KvPredictor.load(predictor.save(tmp_path / "predictor"))
    mine, theirs = predictor.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    options = {"custom_generate": KvPrediction(), **OPTIONS}
    found = [work.model.generate(prompt(), predictor=p, **options) for p in (predictor, again)]
    assert torch.equal(*found)


def test_its_tokenizer_is_kept_and_compared(work, prompt, tmp_path, make_words):
    work.tokenizer = make_words()
    saved = KvPrediction(keep=0.5, steps=0).train(work).save(tmp_path / "predictor")
    again, options = KvPredictor.load(saved), {"custom_generate": KvPrediction(), **OPTIONS}
    model, other = work.model, make_words([*range(63, -1, -1)])
    model.generate(prompt(), predictor=again, tokenizers=(make_words(), None), **options)
    with pytest.raises(UserError, match="token 0 is 'word0' for the auxiliary model and 'word63' for the model"):
        model.generate(prompt(), predictor=again, tokenizers=(other, None), **options)


def test_damaged_folders_are_refused(work, tmp_path):
    with pytest.raises(UserError, match=r"predictor\.save"):
        KvPredictor.load(tmp_path)
    saved = KvPrediction(keep=0.5, steps=0).train(work).save(tmp_path / "predictor")
    file = saved / "kv_maps.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="no predictor of keys and values that loads"):
        KvPredictor.load(saved)


# --- costs -----------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_products(make_llama, prompt):
    """The linear layers against what hooks count, attention against its formula."""
    from lilliput.metrics.roofline import layer_costs

    model = make_llama(3)
    counted = sum(c.ops for c in layer_costs(model, input_ids=prompt(10), use_cache=False, logits_to_keep=1))
    assert first_token_flops(model, 10) == counted + 3 * 4 * 32 * (10 * 11 // 2)
    predictor = KvPredictor(make_llama(1, num_key_value_heads=1), [16] * 3)
    body = sum(c.ops for c in layer_costs(predictor.auxiliary.model, input_ids=prompt(9), use_cache=False))
    one = sum(c.ops for c in layer_costs(model, input_ids=prompt(1), use_cache=False))
    attention = 4 * 32 * (9 * 10 // 2) + 3 * 4 * 32 * 10
    assert first_token_flops(model, 10, predictor) == body + 9 * 6 * 2 * 8 * 16 + one + attention
    assert first_token_flops(model, 1, predictor) == first_token_flops(model, 1)
    with pytest.raises(UserError, match="0 tokens"):
        first_token_flops(model, 0)


# --- refusals --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_the_way_out(model, make_llama, prompt):
    small = make_llama(1)
    cases = {
        r"predictor=predictor": None,
        r"predictor\.eval": itself(model).train(),
        r"of 3 blocks and 16 numbers, this model has 2 blocks and 16": KvPredictor(small, [16] * 3).eval(),
        r"2 blocks and 8, 16 numbers": KvPredictor(small, [16, 8]).eval(),
        r"has 65 tokens, the model 64": KvPredictor(make_llama(1, vocabulary=65), [16, 16]).eval(),
        r"has 20 tokens, but the auxiliary model reads 16": KvPredictor(
            make_llama(1, max_position_embeddings=16), [16, 16]
        ).eval(),
    }
    for message, predictor in cases.items():
        with pytest.raises(UserError, match=message):
            model.generate(prompt(20), custom_generate=KvPrediction(), predictor=predictor, **OPTIONS)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_calls_that_it_cannot_follow_are_refused(runtime, model, prompt):
    from transformers import DynamicCache

    padded, used = torch.ones(1, 9, dtype=torch.long), DynamicCache(config=model.config)
    padded[0, :3] = 0
    with torch.no_grad():
        model(prompt(4), past_key_values=used)
    calls = {
        "without padding": {"inputs": prompt(9), "attention_mask": padded},
        "one prompt": {"inputs": prompt(9).repeat(2, 1)},
        "reads 128": {"inputs": prompt(129)},
        "holds 4 tokens already|keeps its own keys": {"inputs": prompt(9), "past_key_values": used},
    }
    options = {"custom_generate": KvPrediction(runtime=runtime), "predictor": itself(model), **OPTIONS}
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            model.generate(**call, **options)


def test_models_without_keys_of_their_own_are_refused(cnn_work, work, prompt):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(UserError, match="TinyCnn"):
        KvPrediction().train(cnn_work)
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        KvPrediction().train(Workload.causal_lm(other, *[prompt(9)] * 3))
    other.config.bos_token_id, other.config.eos_token_id = 1, None
    with pytest.raises(UserError, match="a layer for keys"):
        KvPrediction().train(work, other)
    work.model.bfloat16()
    with pytest.raises(UserError, match="float32"):
        KvPrediction().train(work)
