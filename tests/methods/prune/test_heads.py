import copy

import pytest
import torch

from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.prune.heads import Heads, choose, head_scores, norm_scores, rows_of
from lilliput.methods.quantize.int8 import Int8
from lilliput.workload import Workload
from lilliput.zoo import nets

IDS = torch.arange(3, 43).view(2, 20)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_score_is_the_expected_error_of_removing_one_head():
    x, output = torch.randn(300, 12).double(), torch.randn(5, 12).double()
    per_head = x.reshape(300, 3, 4)
    scores = head_scores(output, torch.einsum("nuv,nuw->uvw", per_head, per_head) / 300)
    for u in range(3):
        part = x[:, 4 * u : 4 * u + 4] @ output[:, 4 * u : 4 * u + 4].T
        assert float(scores[u]) == pytest.approx(float(part.square().sum(1).mean()), rel=1e-4)


def test_norm_score_is_the_product_of_squared_norms():
    output, value = torch.randn(5, 8), torch.randn(8, 6)
    expected = [output[:, r].square().sum() * value[r].square().sum() for r in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(norm_scores(output, value, 2), torch.stack(expected))


def test_rows_of_heads():
    assert rows_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_choice_by_groups_and_evenly(tiny_llama):
    attention = anatomy(tiny_llama).blocks[0].attention
    scores = torch.tensor([5.0, 1.0, 2.0, 3.0])
    assert [t.tolist() for t in choose(attention, Heads(ratio=0.5), scores)] == [[0, 1], [0]]
    assert [t.tolist() for t in choose(attention, Heads(ratio=0.5, unit="query"), scores)] == [[0, 3], [0, 1]]
    assert [t.tolist() for t in choose(attention, Heads(ratio=0.95, unit="query"), scores)] == [[0, 3], [0, 1]]


def scores_by_hand(model, work):
    """Expected squared error of each head of each block, head by head."""
    inputs, blocks = {}, anatomy(model).blocks
    handles = [
        model.get_submodule(b.attention.o).register_forward_pre_hook(
            lambda m, args, i=b.index: inputs.setdefault(i, []).append(args[0].detach())
        )
        for b in blocks
    ]
    with torch.no_grad():
        for batch in work.calibration:
            work.forward(model, batch)
    for handle in handles:
        handle.remove()
    scores = []
    for block in blocks:
        a, x = block.attention, torch.cat([x.flatten(0, -2) for x in inputs[block.index]])
        output = model.get_submodule(a.o).weight.detach()
        parts = [rows_of(torch.tensor([h]), a.head_dim) for h in range(a.heads)]
        scores.append(torch.stack([(x[:, p] @ output[:, p].T).square().sum(1).mean() for p in parts]))
    return scores


def masked(model, kept):
    """The dense model with the other heads' output columns at zero."""
    model = copy.deepcopy(model)
    for block in anatomy(model).blocks:
        a = block.attention
        gone = torch.tensor([h for h in range(a.heads) if h not in kept[block.index].tolist()])
        model.get_submodule(a.o).weight.data[:, rows_of(gone, a.head_dim)] = 0
    return model


def check(model, work, unit, per_group):
    """Cutting half the heads equals zeroing those of the smallest scores; returns the cut model."""
    dense = Heads(ratio=0.0).apply(model)
    kept = []
    for scores in scores_by_hand(dense, work):
        heads = torch.arange(len(scores)).reshape(-1, per_group)
        best = scores.reshape(-1, per_group)
        if unit == "group":
            kept.append(heads[best.sum(1).topk(len(heads) // 2).indices.sort().values].flatten())
        else:
            kept.append(torch.cat([h[b.topk(per_group // 2).indices] for h, b in zip(heads, best)]))
    small = Heads(ratio=0.5, unit=unit).apply(model, work)
    with torch.no_grad():
        for batch in work.test:
            expected = work.forward(masked(dense, kept), batch)
            torch.testing.assert_close(work.forward(small, batch), expected, atol=1e-5, rtol=1e-5)
    return small


@pytest.mark.parametrize("unit", ["group", "query"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llama_equals_masked_reference_and_generates(tiny_llama, llama_work, unit, implementation):
    tiny_llama.set_attn_implementation(implementation)
    small = check(tiny_llama, llama_work, unit, 2)
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.out_features == attention.o_proj.in_features == 16
    assert attention.k_proj.out_features == (8 if unit == "group" else 16)
    assert attention.num_key_value_groups == (2 if unit == "group" else 1)
    texts = [
        small.generate(IDS[:, :5], max_new_tokens=8, do_sample=False, use_cache=c, pad_token_id=0, eos_token_id=None)
        for c in (True, False)
    ]
    assert torch.equal(*texts)
    assert anatomy(small).blocks[0].attention.heads == 2


def test_gemma_with_one_key_value_head(llama_work):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=8)).eval()
    small = check(model, llama_work, "query", 4)
    assert small.model.layers[1].self_attn.q_proj.out_features == 32
    assert Heads(ratio=0.9).apply(model, llama_work).model.layers[0].self_attn.q_proj.out_features == 64


def test_gpt2_fused_projection(llama_work):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
    small = check(GPT2LMHeadModel(config).eval(), llama_work, "group", 1)
    assert small.transformer.h[0].attn.c_attn.out_features == 48
    assert anatomy(small).blocks[0].attention.heads == 2


def test_bert(llama_work):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES)).eval()
    work = Workload.causal_lm(model, IDS, IDS, IDS)
    work.forward = lambda model, batch: model(input_ids=batch["input_ids"]).logits
    small = check(model, work, "group", 1)
    assert small.bert.encoder.layer[1].attention.self.all_head_size == 16


def test_own_vit():
    torch.manual_seed(0)
    model = nets.vit(dim=16, layers=2, heads=4, size=8, patch=4).eval()
    data = [{"input": torch.randn(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.long)}]
    small = check(model, Workload.classifier(model, data, data, data), "group", 1)
    assert small.blocks[0].attn.heads == 2


def test_extremes_and_own_ratios(tiny_llama, llama_work):
    same = Heads(ratio=0.0).apply(tiny_llama)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), tiny_llama.parameters(), strict=True))
    least = Heads(ratio=0.95).apply(tiny_llama, llama_work)
    assert [b.attention.kv_heads for b in anatomy(least).blocks] == [1, 1]
    one = Heads().apply(tiny_llama, layers={"model.layers.1.self_attn": {"ratio": 0.5}})
    assert [b.attention.heads for b in anatomy(one).blocks] == [4, 2]
    assert torch.isfinite(one(IDS).logits).all()


def test_bad_input(tiny_cnn, tiny_llama):
    with pytest.raises(UserError, match=r"prune\.heads works on transformer blocks"):
        Heads().apply(tiny_cnn)
    with pytest.raises(UserError, match="ratio is -1"):
        Heads(ratio=-1)
    with pytest.raises(UserError, match="'row'"):
        Heads(unit="row")
    with pytest.raises(UserError, match="cannot change 'lm_head'"):
        Heads().apply(tiny_llama, layers=["lm_head"])


@pytest.mark.parametrize("change", [LowRank(whiten="none"), Int8()], ids=["low-rank factors", "a PackedLinear"])
def test_layers_that_were_replaced_are_refused_with_the_order(change, llama_work, request):
    model = change.apply(llama_work.model)
    kind = request.node.callspec.id
    with pytest.raises(UserError, match=rf"prune\.heads .*has become {kind}; prune first, then factorize"):
        Heads().apply(model, llama_work)
    one = change.apply(llama_work.model, layers=["model.layers.0.*"])
    before = list(Heads().targets(llama_work.model))
    assert list(Heads().targets(one)) == [n for n in before if n.startswith("model.layers.1.")]
