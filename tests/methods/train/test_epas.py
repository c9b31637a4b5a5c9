"""Layers that begin to share while a model trains: when, which, and that what is trained is what serves."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.kernels.decoder_parts import refusals
from lilliput.methods.layers.shared_attention import SharedAttention
from lilliput.methods.layers.shared_kv import SharedKv
from lilliput.methods.train.epas import Epas
from lilliput.training import Callback, constant, train
from lilliput.workload import Workload, windows

KINDS = {"qk": SharedAttention, "kv": SharedKv}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture
def work():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    splits = [torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]), source=source)


def kinds(model):
    return [type(layer.self_attn).__name__.removesuffix("Attention") for layer in model.model.layers]


def names(*layers):
    return [f"model.layers.{i}.self_attn" for i in layers]


def learn(model, work, sharing, steps=20, lr=1e-3, **options):
    return train(
        model, list(work.training), work.loss, steps=steps, lr=lr, schedule=constant, callbacks=[sharing], **options
    )


class Watch(Callback):
    """How many layers share after each step."""

    def __init__(self):
        self.seen = []

    def on_step(self, state):
        self.seen.append(kinds(state.model).count("Reusing") + kinds(state.model).count("Borrowing"))


# --- when and which --------------------------------------------------------------------------------------------------


def test_layers_switch_evenly_from_start_to_end():
    epas = Epas(start=0.2, end=0.6, group=1)
    assert [epas.sharing_at(done / 10, 5) for done in range(11)] == [0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert [epas.with_(group=2).sharing_at(done / 10, 5) for done in range(8)] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert epas.with_(start=0.0, end=0.0).sharing_at(0.0, 5) == 5
    assert epas.with_(group=9).sharing_at(0.2, 5) == 5


@every_kind
def test_from_the_last_layer_up_each_takes_from_the_nearest_that_computes(work, kind):
    leading, following = ("Leading", "Reusing") if kind == "qk" else ("Lending", "Borrowing")
    sharing = Epas(kind=kind, share=0.5).callback(work.model)
    for count in (1, 3, 2):
        sharing.share_(work.model, count)
        assert kinds(work.model) == ["Llama"] * (5 - count) + [leading] + [following] * count
    sharing.share_(work.model, 0)
    assert kinds(work.model) == ["Llama"] * 6


@every_kind
def test_a_training_lets_one_more_share_when_it_is_time(work, kind):
    watch = Watch()
    sharing = Epas(kind=kind, start=0.2, end=0.6).callback(work.model)
    train(work.model, list(work.training), work.loss, steps=20, lr=1e-3, callbacks=[sharing, watch])
    assert watch.seen == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 9


def test_named_layers_are_those_that_share(work):
    sharing = Epas().callback(work.model, names(2, 5))
    assert sharing.order == names(5, 2)
    sharing.share_(work.model, 2)
    assert kinds(work.model) == ["Llama", "Leading", "Reusing", "Llama", "Leading", "Reusing"]


# --- what is trained and served --------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_serves_is_the_model_with_so_many_layers_made_to_share(work, kind, count):
    sharing = Epas(kind=kind).callback(work.model)
    learn(work.model, work, sharing)
    served = sharing.served(work.model, count)
    sharing.share_(work.model, 0)
    expected = KINDS[kind]().apply(work.model, layers=names(*range(6 - count, 6))) if count else work.model
    ids = work.test[0]["input_ids"]
    assert torch.equal(served(ids).logits, expected(ids).logits)
    assert served.state_dict().keys() == expected.state_dict().keys()


@every_kind
def test_the_model_that_trains_answers_as_the_one_that_serves(work, kind):
    sharing = Epas(kind=kind).callback(work.model)
    learn(work.model, work, sharing)
    served, ids = sharing.served(work.model), work.test[0]["input_ids"]
    assert torch.equal(work.model(ids).logits, served(ids).logits)
    assert sum(p.numel() for p in served.parameters()) < sum(p.numel() for p in work.model.parameters())
    assert "no attention of its own" in refusals(work.model)[0]


def test_what_is_no_longer_called_stays_as_it_was_and_the_rest_learns(work):
    """Weight decay would shrink the queries and keys of layers that share."""
    sharing, plain = Epas(start=0.0, end=0.0).callback(work.model), copy.deepcopy(work.model)
    learn(work.model, work, sharing, lr=1e-2)
    sharing.share_(work.model, 0)
    for i, (new, old) in enumerate(zip(work.model.model.layers, plain.model.layers)):
        for letter in "qkvo":
            pair = (getattr(layer.self_attn, f"{letter}_proj").weight for layer in (new, old))
            assert torch.equal(*pair) is (i >= 3 and letter in "qk")


def test_before_the_first_switch_the_training_is_the_plain_one(work):
    models = [copy.deepcopy(work.model) for _ in range(2)]
    late = Epas(start=1.0, end=1.0).callback(models[0])
    learn(models[0], work, late)
    train(models[1], list(work.training), work.loss, steps=20, lr=1e-3, schedule=constant)
    late.share_(models[0], 0)
    state, other = (m.state_dict() for m in models)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state)


def test_as_a_method_it_trains_a_copy_that_saves_and_loads(work, tmp_path):
    before = work.loss(work.model, work.training[0]).item()
    model = Epas(steps=40, lr=3e-3).apply(work.model, work)
    assert kinds(work.model) == ["Llama"] * 6
    assert kinds(model) == ["Llama"] * 2 + ["Leading"] + ["Reusing"] * 3
    assert work.loss(model, work.training[0]).item() < before
    assert not any(m.training for m in model.modules())
    again = load(save(model, tmp_path / "shared", work))
    ids = work.test[0]["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    plain = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(ids[:1], **plain), model.generate(ids[:1], use_cache=False, **plain))


# --- killed and resumed, and in transformers -------------------------------------------------------------------------


def test_a_killed_training_goes_on_to_the_same_weights(work, tmp_path):
    whole, file = copy.deepcopy(work.model), tmp_path / "run.safetensors"
    learn(whole, work, Epas().callback(whole))
    killed = copy.deepcopy(work.model)
    calls = []

    class Killed(Exception):
        pass

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 9:
            raise Killed
        return work.loss(model, batch)

    options = {"steps": 20, "lr": 1e-3, "schedule": constant, "checkpoint": file}
    with pytest.raises(Killed):
        train(killed, list(work.training), loss, callbacks=[Epas().callback(killed)], checkpoint_every_s=0, **options)
    resumed = copy.deepcopy(work.model)
    sharing = Epas().callback(resumed)
    history = train(resumed, list(work.training), work.loss, callbacks=[sharing], **options)
    assert history.steps == 20
    assert len(calls) == 9
    state, other = whole.state_dict(), resumed.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state)


def test_a_trainer_of_transformers_switches_at_the_same_steps(work, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **options):
            seen.append(kinds(model).count("Reusing"))

    data = [{"input_ids": row, "labels": row} for batch in work.training for row in batch["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    sharing = Epas(start=0.2, end=0.6).callback(work.model)
    Trainer(work.model, arguments, train_dataset=data, callbacks=[sharing.for_trainer(), Look()]).train()
    assert seen == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 8
    assert kinds(sharing.served(work.model)) == ["Llama"] * 2 + ["Leading"] + ["Reusing"] * 3


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_input(work, cnn_work):
    with pytest.raises(UserError, match=r"start is 0\.7, after end, 0\.5"):
        Epas(start=0.7)
    with pytest.raises(UserError, match=r"group is 1\.5; give a whole number"):
        Epas(group=1.5)
    with pytest.raises(UserError, match="needs a workload whose data"):
        Epas().apply(work.model)
    with pytest.raises(UserError, match="works on transformer blocks"):
        Epas().apply(cnn_work.model, cnn_work)
    sharing = Epas().callback(work.model)
    with pytest.raises(UserError, match="layers is 4; this training lets up to 3"):
        sharing.served(work.model, 4)
    with pytest.raises(UserError, match="made for another model"):
        learn(copy.deepcopy(work.model), work, sharing)
