import signal
import sys

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.quantize.group import Group
from lilliput.methods.train._adapting import LORA, PARTS, adapting, layers_of, learn_, token_ids
from lilliput.methods.train.extend_context import ExtendContext

IDS = torch.arange(3, 35).view(2, 16)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize(
    ("part", "projections"),
    [
        ("ffn_out", {"mlp.down_proj"}),
        ("ffn_in", {"mlp.gate_proj", "mlp.up_proj"}),
        ("attention", {f"self_attn.{p}_proj" for p in "qkvo"}),
    ],
)
def test_a_part_is_these_layers_of_every_block(tiny_llama, part, projections):
    expected = {f"model.layers.{i}.{p}" for i in range(2) for p in projections}
    assert set(layers_of(tiny_llama, part)) == expected
    with adapting(tiny_llama, part) as learning:
        assert set(learning) == {f"{name}.weight" for name in expected}
        assert [n for n, p in tiny_llama.named_parameters() if p.requires_grad] == list(learning)


def test_everything_is_every_parameter(tiny_llama):
    names = [name for name, _ in tiny_llama.named_parameters()]
    with adapting(tiny_llama, "all") as learning:
        assert list(learning) == names


def test_adapters_sit_on_every_linear_layer_and_begin_as_nothing(tiny_llama, fingerprint):
    pytest.importorskip("peft")
    before, layout = fingerprint(tiny_llama), repr(tiny_llama)
    state = torch.get_rng_state()
    logits = tiny_llama(input_ids=IDS).logits
    with adapting(tiny_llama, LORA, rank=3) as learning:
        assert len(learning) == 2 * 2 * 7  # two matrices, two blocks, q k v o gate up down
        assert {min(p.shape) for p in learning.values()} == {3}
        assert all("lora_" in name for name in learning)
        assert torch.equal(tiny_llama(input_ids=IDS).logits, logits)
        learn_(tiny_llama, [IDS], loss_of, steps=3, lr=1e-2)
        assert not torch.equal(tiny_llama(input_ids=IDS).logits, logits)
    assert repr(tiny_llama) == layout
    assert fingerprint(tiny_llama) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_draws_the_adapters(tiny_llama):
    pytest.importorskip("peft")
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)
        with adapting(tiny_llama, LORA, seed=seed) as learning:
            drawn.append(next(iter(learning.values())).detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_missing_peft_is_named_with_the_line_that_installs_it(tiny_llama, fingerprint, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    before = fingerprint(tiny_llama)
    with pytest.raises(UserError, match=r"pip install 'lilliput\[peft\]'"), adapting(tiny_llama, LORA):
        pytest.fail("the block must not run")
    assert fingerprint(tiny_llama) == before


@pytest.mark.parametrize("part", ["ffn_out", "ffn_in", "attention", LORA])
def test_packed_weights_cannot_learn(tiny_llama, part, fingerprint):
    pytest.importorskip("peft")
    packed = Group().apply(tiny_llama)
    before = fingerprint(packed)
    with pytest.raises(UserError, match="before it was packed"), adapting(packed, part):
        pytest.fail("the block must not run")
    assert fingerprint(packed) == before


@pytest.mark.parametrize("part", PARTS)
def test_a_model_without_blocks_is_refused(tiny_cnn, part):
    with pytest.raises(UserError, match="TinyCnn"), adapting(tiny_cnn, part):
        pytest.fail("the block must not run")


# --- learning --------------------------------------------------------------------------------------------------


def test_learning_takes_its_random_numbers_from_its_seed_and_gives_torchs_back(tiny_llama):
    torch.manual_seed(5)
    state, losses = torch.get_rng_state(), []
    for module in tiny_llama.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    for _ in range(2):
        with adapting(tiny_llama, "ffn_out"):
            losses.append(learn_(tiny_llama, [IDS], loss_of, steps=4, lr=1e-3, seed=3))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        state = torch.get_rng_state()
    assert losses[0] == losses[1]


def test_learning_lowers_the_loss_by_the_learning_parameters_alone(tiny_llama):
    with adapting(tiny_llama, "ffn_out") as learning:
        before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
        losses = learn_(tiny_llama, [IDS], loss_of, steps=10, lr=1e-2)
        moved = {name for name, p in tiny_llama.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(learning)
        assert losses[-1] < 0.8 * losses[0]


def test_an_interrupt_while_it_learns_is_raised_and_the_model_restored(tiny_llama, fingerprint):
    before, seen = fingerprint(tiny_llama), []

    def loss(model, ids):
        seen.append(len(seen))
        if len(seen) == 2:
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)  # a real one that goes astray ends the test run
        return loss_of(model, ids)

    with pytest.raises(KeyboardInterrupt), adapting(tiny_llama, "all"):
        learn_(tiny_llama, [IDS], loss, steps=50, lr=1e-2)
    assert len(seen) == 2
    assert fingerprint(tiny_llama) == before


def test_a_rate_that_is_too_high_is_told_and_undone(tiny_llama, fingerprint):
    before = fingerprint(tiny_llama)

    def diverging(model, ids):
        return loss_of(model, ids) * float("nan")

    with pytest.raises(UserError, match="loss became nan"), adapting(tiny_llama, "ffn_out"):
        learn_(tiny_llama, [IDS], diverging, steps=2, lr=1e-2)
    assert fingerprint(tiny_llama) == before


# --- input -----------------------------------------------------------------------------------------------------


def test_ids_come_as_a_list_a_row_or_a_vector(tiny_llama):
    for given in ([3, 4, 5], torch.tensor([3, 4, 5]), torch.tensor([[3, 4, 5]]), torch.tensor([3, 4, 5]).int()):
        found = token_ids(given, tiny_llama, "the text")
        assert found.dtype is torch.int64
        assert found.tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the text has the shape"),
        ([[1, 2], [3, 4]], r"\(2, 2\)"),
        ([0.5, 1.0], "float32"),
        ([3, 64], "token 64, but the model knows 64"),
        ([3, -1], "token -1"),
    ],
)
def test_other_ids_are_refused(tiny_llama, ids, message):
    with pytest.raises(UserError, match=message):
        token_ids(ids, tiny_llama, "the text")


def test_a_model_that_embeds_no_tokens_is_refused(tiny_cnn):
    with pytest.raises(UserError, match="TinyCnn is no language model"):
        token_ids([1], tiny_cnn, "the text")


def test_counts_are_whole_numbers():
    with pytest.raises(UserError, match=r"epochs is 1\.5; give a whole number"):
        ExtendContext(epochs=1.5)
    assert ExtendContext(overlap=0).overlap == 0
