"""The module against the paper's formula, its symmetries and gradients, and what it replaces."""

import pytest
import torch
from torch import nn

import lilliput as lp
from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.methods.distill.logits import Logits
from lilliput.methods.layers.separable_attention import SeparableAttention, SeparableSelfAttention
from lilliput.workload import Workload
from lilliput.zoo import nets


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return SeparableSelfAttention(6, 8).double()


def by_the_paper(m, x, source):
    """Token by token: scores over tokens, the sum of the keys, values that were rectified."""
    out = torch.empty_like(x)
    for b in range(len(x)):
        scores = [float(m.score.weight[0] @ token) for token in source[b]]
        top = max(scores)
        weights = [torch.tensor(s - top).exp() for s in scores]
        keys = [m.key.weight @ token + m.key.bias for token in source[b]]
        context = sum(w * k for w, k in zip(weights, keys)) / sum(weights)
        for n, token in enumerate(x[b]):
            value = (m.value.weight @ token + m.value.bias).clamp_min(0)
            out[b, n] = m.out.weight @ (value * context) + m.out.bias
    return out


def test_it_is_the_formula_of_the_paper(module):
    x, other = randn(2, 5, 6), randn(2, 9, 6, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_the_paper(module, x, x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(module(x, other), by_the_paper(module, x, other), rtol=1e-6, atol=1e-6)


def test_tokens_in_another_order_give_the_same_in_that_order(module):
    x, order = randn(2, 7, 6), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    changed = x.clone()
    changed[:, 6] += 1
    assert not torch.allclose(module(changed)[:, 0], module(x)[:, 0])  # every token sees every other


def test_leading_dimensions_have_contexts_of_their_own(module):
    x = randn(2, 4, 5, 6)
    torch.testing.assert_close(module(x)[:, 2], module(x[:, 2]))


def test_gradients_reach_every_parameter(module):
    assert torch.autograd.gradcheck(module, randn(1, 3, 6).requires_grad_())
    module(randn(2, 3, 6)).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in module.parameters())


# --- in a model --------------------------------------------------------------------------------------------------


def vit_work(seed=0):
    """A tiny vision transformer and pictures that it labels itself."""
    torch.manual_seed(seed)
    model = nets.vit(dim=16, layers=2, heads=2, mlp_ratio=2, size=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
        inputs = [torch.randn(32, 1, 16, 16) for _ in range(4)]
        batches = [{"input": x, "label": model(x).argmax(-1)} for x in inputs]
    return Workload.classifier(model, batches[:1], batches[:1], batches[:1], training=batches, name="tiny-vit")


def test_every_attention_goes_and_keeps_its_projections():
    work = vit_work()
    model = SeparableAttention().apply(work.model)
    for i in range(2):
        old, new = work.model.blocks[i].attn, model.blocks[i].attn
        assert type(new) is SeparableSelfAttention
        for a, b in ((old.k, new.key), (old.v, new.value), (old.out, new.out)):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.bias, b.bias)
    assert [b.attention for b in anatomy(model).blocks] == [None, None]  # nothing takes it for heads
    assert model(work.test[0]["input"]).shape == (32, 10)


def test_fused_projections_are_taken_apart():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.qkv, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

        def forward(self, x):
            raise AssertionError

    model = vit_work().model
    for block in model.blocks:
        block.attn = Fused()
    made = SeparableAttention().apply(model).blocks[0].attn
    qkv = model.blocks[0].attn.qkv.weight
    assert torch.equal(made.key.weight, qkv[16:32])
    assert torch.equal(made.value.weight, qkv[32:])
    assert torch.equal(made.value.bias, torch.zeros(16))
    assert torch.equal(made.out.bias, model.blocks[0].attn.proj.bias)


def test_fresh_weights_depend_on_the_seed_alone():
    work = vit_work()
    one, same, other = (SeparableAttention(start="fresh", seed=s).apply(work.model).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["blocks.0.attn.key.weight"], other["blocks.0.attn.key.weight"])
    assert not torch.equal(one["blocks.0.attn.key.weight"], work.model.blocks[0].attn.k.weight)


def test_distillation_brings_the_answers_back(one_thread):
    work = vit_work()
    model = SeparableAttention().apply(work.model)
    healed = Logits(steps=60, lr=3e-3).apply(model, work)

    def distance(m):
        with torch.no_grad():
            return float((m(work.test[0]["input"]) - work.model(work.test[0]["input"])).square().mean())

    assert distance(healed) < 0.5 * distance(model)


def test_an_artifact_gives_it_back(tmp_path):
    work, plan = vit_work(), lp.Plan([lp.Step(SeparableAttention())])
    folder = lp.save(plan.apply(work), tmp_path / "vit", work, plan)
    again = lp.load(folder, model=nets.vit(dim=16, layers=2, heads=2, mlp_ratio=2, size=16))
    assert type(again.blocks[1].attn) is SeparableSelfAttention


def test_text_and_attention_with_more_to_it_are_refused(llama_work, cnn_work):
    with pytest.raises(UserError, match="later ones"):
        SeparableAttention().apply(llama_work.model)
    with pytest.raises(UserError, match="transformer blocks"):
        SeparableAttention().apply(cnn_work.model)
    model = vit_work().model
    model.blocks[0].attn.position_bias = nn.Parameter(torch.zeros(2, 17, 17))
    assert list(SeparableAttention().targets(model)) == ["blocks.1.attn"]
    with pytest.raises(UserError, match="start"):
        SeparableAttention(start="old")
