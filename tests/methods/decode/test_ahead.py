"""Rows ahead of the text: against blocks that are called one by one, and to the bit where nothing may change."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.decode import GatedLoraMtp
from lilliput.methods.decode._ahead import Reading, RowsBackend, check_rows, drawn_anchors, places_behind, with_rows
from lilliput.methods.decode._backends import TorchBackend
from lilliput.methods.decode._draft import NOTHING, Draft

TREE = Draft([10, 11, 12, 13, 14, 15], [-1, -1, 0, 1, 1, 4])
TEXT = [5, 6, 7, 8]
both = pytest.mark.parametrize("kind", ["masks", "streams"])


class Gated(nn.Module):
    """y = W x + g B A x, with the gate g (T,) as a factor."""

    def __init__(self, linear, down, up, gate):
        super().__init__()
        self.linear, self.down, self.up, self.gate = linear, down, up, gate

    def forward(self, x):
        return self.linear(x) + self.gate[: x.shape[1], None] * (x @ self.down.T @ self.up.T)


@torch.no_grad()
def ahead_of(model, part, text):
    """(k, d): what the head would read in the rows behind a text's last token; every block is called by itself."""
    gate = torch.tensor([0.0] * len(text) + [1.0] * part.count)
    gated = copy.deepcopy(model)
    for name, down, up in zip(part.sizes, part.down, part.up):
        gated.set_submodule(name, Gated(gated.get_submodule(name), down, up, gate))
    x = gated.model.embed_tokens(torch.tensor([text]))
    for i, block in enumerate(gated.model.layers):
        if i == part.entry:
            x = torch.cat([x, part.start(x[:, -1:])[:, 0]], 1)
        size = x.shape[1]
        mask = torch.full((size, size), torch.finfo(x.dtype).min).triu(1)[None, None]
        x = block(x, attention_mask=mask, position_embeddings=gated.model.rotary_emb(x, torch.arange(size)[None]))
    return gated.model.norm(x)[0, len(text) :]


def engine(model, part, choose=None):
    return RowsBackend(model, None, part, choose or (lambda read, draft: list(range(len(read)))))


def ways(text, draft):
    """The text before each answer."""
    found = [text]
    for token, parent in zip(draft.tokens, draft.parents):
        found.append([*found[parent + 1], token])
    return found


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_see_their_token_s_past_and_their_own():
    tree = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]).bool()  # one held token, three of the pass
    seen = with_rows(tree, torch.tensor([0, 2]), 2).int().tolist()
    assert seen == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 0, 1, 1],
    ]
    assert places_behind(torch.tensor([4, 9]), 3).tolist() == [5, 6, 7, 10, 11, 12]


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("held", [0, 3])
def test_rows_are_those_of_every_way_alone(kind, attention, held, model, make_rows):
    model.set_attn_implementation(attention)
    part = make_rows(kind, model)
    rows = engine(model, part)
    if held:
        rows.extend(torch.tensor(TEXT[:held]))
    plain = TorchBackend(model)
    near(rows.extend(torch.tensor(TEXT[held:]), TREE), plain.extend(torch.tensor(TEXT), TREE))
    near(torch.stack(list(rows.hidden)), torch.stack([ahead_of(model, part, way) for way in ways(TEXT, TREE)]))
    rows.gather(4, [1, 4, 5])
    rows.rewind(7)
    text = [*TEXT, 11, 14, 15, 50]
    near(rows.extend(torch.tensor([50])), model(torch.tensor([text])).logits[0, -1:].detach())
    near(rows.hidden[0], ahead_of(model, part, text))


@both
def test_what_rows_learned_changes_no_bit_of_the_model_s_own_answers(kind, model, make_rows, monkeypatch):
    """Logits, keys and values: with adapters as they are, a thousand times as large, and none at all."""
    found, tame = [], make_rows(kind, model)
    wild = make_rows(kind, model, std=500.0)
    nn.init.normal_(wild.first, std=100.0)
    for part in (tame, wild, None):
        if part is None:
            monkeypatch.setattr(type(tame), "gated", lambda *args: nullcontext())
        rows = engine(model, part or tame)
        answers = [rows.extend(torch.tensor(TEXT)), rows.extend(torch.tensor([9]), TREE)]
        rows.gather(5, [1, 4])
        rows.rewind(7)
        answers.append(rows.extend(torch.tensor([20, 21]), Draft.chain([3, 4])))
        kept = [tensor for layer in rows.cache.layers for tensor in (layer.keys, layer.values)]
        found.append((answers + kept, torch.stack(list(rows.hidden))))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*(tensors for tensors, _ in found)))
    assert not torch.allclose(found[0][1], found[1][1], atol=0.1)
    assert not torch.allclose(found[0][1], found[2][1], atol=0.1)


def test_bits_are_those_of_the_plain_model_with_as_many_rows(model, make_rows):
    """The pass as transformers makes it when masks are mere embeddings behind the text, without hooks and adapters."""
    part, seen = make_rows("masks", model), []
    hook = model.lm_head.register_forward_pre_hook(lambda layer, args: seen.append(args[0].flatten(0, -2)[-1].clone()))
    engine(model, part).extend(torch.tensor(TEXT))
    hook.remove()
    x = torch.cat([model.model.embed_tokens(torch.tensor([TEXT])), part.first[None]], 1).detach()
    mask = torch.full((7, 7), torch.finfo(x.dtype).min).triu(1)[None, None]
    with torch.no_grad():
        out = model.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(seen[0], out[0, 3])


@both
def test_rows_leave_nothing_behind(kind, model, make_rows):
    rows, before = engine(model, make_rows(kind, model)), {k: v.clone() for k, v in model.state_dict().items()}
    rows.extend(torch.tensor(TEXT))
    rows.extend(torch.tensor([9]), TREE)
    assert rows.filled == 11
    assert {layer.get_seq_length() for layer in rows.cache.layers} == {11}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@both
def test_hooks_are_taken_out_when_a_pass_fails(kind, model, make_rows):
    with pytest.raises(IndexError):
        engine(model, make_rows(kind, model)).extend(torch.tensor([64]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@both
def test_rows_stand_only_where_they_are_wanted(kind, model, make_rows):
    part = make_rows(kind, model)
    every, some = engine(model, part), engine(model, part, lambda read, draft: [0, 4, 6][: len(read)])
    for rows in (every, some):
        rows.extend(torch.tensor(TEXT[:3]))
    near(every.extend(torch.tensor([8]), TREE), some.extend(torch.tensor([8]), TREE))
    assert [i for i, hidden in enumerate(some.hidden) if hidden is not None] == [0, 4, 6]
    for i in (0, 4, 6):
        near(some.hidden[i], every.hidden[i])


@both
def test_rows_learn_in_the_state_in_which_they_are_read(kind, model, make_rows, prompt):
    part, ids = make_rows(kind, model), torch.cat([prompt(9, 0), prompt(9, 1)])
    anchors = torch.tensor([2, 3, 5])
    reading = Reading(model, ids, part.entry)
    found = reading.ahead(part, anchors).unflatten(1, (3, 3))
    for row, column in ((0, 0), (0, 2), (1, 1)):
        text = ids[row, : int(anchors[column]) + 1].tolist()
        near(found[row, column].detach(), ahead_of(model, part, text))
    with torch.no_grad():
        near(reading.logits, model(ids).logits)
        near(model.lm_head(reading.hidden), reading.logits)
    found.sum().backward()
    assert all(p.grad is not None for name, p in part.named_parameters() if name.startswith(("first", "down", "up")))


def test_anchors_have_enough_tokens_behind_them():
    draws, ids = torch.Generator().manual_seed(0), torch.zeros(4, 10, dtype=torch.long)
    assert drawn_anchors(ids, 3, 1000, draws).tolist() == list(range(7))
    assert len(drawn_anchors(ids, 3, 8, draws)) == 2
    assert len(drawn_anchors(ids, 3, 1, draws)) == 1
    with pytest.raises(UserError, match="10 tokens teach nothing 10 tokens ahead"):
        drawn_anchors(ids, 10, 8, draws)


def test_other_architectures_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel; draft by decode\.medusa"):
        GatedLoraMtp().new(GPT2LMHeadModel(config))


def test_qwen_is_read_ahead_too(prompt, make_rows):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=64, num_hidden_layers=2, max_position_embeddings=128, **sizes)
    model = Qwen2ForCausalLM(config).eval()
    for kind in ("masks", "streams"):
        part = make_rows(kind, model)
        rows = engine(model, part)
        rows.extend(torch.tensor(TEXT), TREE)
        near(rows.hidden[0], ahead_of(model, part, TEXT))
        near(rows.hidden[6], ahead_of(model, part, [*TEXT, 11, 14, 15]))


def test_parts_of_another_model_are_refused(model, make_llama, make_rows):
    part = make_rows("masks", model)
    assert check_rows(part, model, "Some", "adapters") is part
    with pytest.raises(UserError, match=r"custom_generate=Some\(\), adapters=adapters\) with those"):
        check_rows(None, model, "Some", "adapters")
    with pytest.raises(UserError, match=r"adapter for 'model\.layers\.1\.self_attn\.q_proj'"):
        check_rows(part, make_llama(layers=1), "Some", "adapters")
    with pytest.raises(UserError, match=r"gate_proj' of 32 inputs and 96 outputs"):
        check_rows(part, make_llama(intermediate_size=80), "Some", "adapters")


def test_an_empty_draft_has_rows_behind_the_text(model, make_rows):
    rows = engine(model, make_rows("streams", model))
    assert rows.extend(torch.tensor(TEXT), NOTHING).shape == (1, 64)
    assert [tuple(hidden.shape) for hidden in rows.hidden] == [(3, 32)]
