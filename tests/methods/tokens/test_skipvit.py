"""Tokens that skip blocks: against the block by block definition with gathering and scattering, trained and saved."""

import copy

import pytest
import torch

from lilliput.anatomy import anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.layers.gqkva import Gqkva
from lilliput.methods.prune.heads import Heads
from lilliput.methods.tokens._skipping import OrderingBlock, SkippedBlock, importance, kept_tokens, ordered
from lilliput.methods.tokens.skipvit import SkipViT, ordering
from lilliput.training import train
from lilliput.workload import Workload
from lilliput.zoo import nets


def build(layers=5):
    """Random, with attention that is not uniform."""
    torch.manual_seed(0)
    model = nets.vit(dim=32, layers=layers, heads=4, patch=4).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(6)
            block.attn.k.weight.mul_(6)
    return model


@pytest.fixture
def vit():
    return build()


@pytest.fixture
def x():
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def class_attention(block, x):
    """(B, T) of the first token, mean over heads, from the definition."""
    h = block.norm1(x)
    q, k = (layer(h).unflatten(-1, (block.attn.heads, -1)) for layer in (block.attn.q, block.attn.k))
    scores = torch.einsum("bhd,bthd->bht", q[:, 0], k) / q.shape[-1] ** 0.5
    return scores.softmax(-1).mean(1)


def by_definition(model, x, skipped, kept):
    """Logits when the tokens that block `skipped[0] - 1` looks at least are taken out, kept, and put back."""
    x = model.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat((model.cls.expand(len(x), -1, -1), x), 1) + model.pos
    chosen = None
    for i, block in enumerate(model.blocks):
        seen = class_attention(block, x)
        if i not in skipped:
            x = block(x)
            seen[:, 0] = 2.0
            chosen = seen.topk(kept, dim=1).indices.sort(1).values
            continue
        new = x.clone()
        for row in range(len(x)):
            new[row, chosen[row]] = block(x[row : row + 1, chosen[row]])[0]
        x = new
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize(
    ("skipped", "drop"), [([2, 3], 0.55), ([1], 0.9), ([1, 2, 3], 0.2), ([3, 4], 0.5), ([1, 3], 0.6)]
)
@torch.no_grad()
def test_logits_are_those_of_taking_out_and_putting_back(vit, x, skipped, drop):
    model = SkipViT(drop=drop).apply(vit, layers=[f"blocks.{i}" for i in skipped])
    expected = by_definition(vit, x, skipped, kept_tokens(50, drop))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), vit(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_without_dropping_nothing_changes(vit, x):
    torch.testing.assert_close(SkipViT(drop=0.0).apply(vit)(x), vit(x), rtol=1e-4, atol=1e-4)
    served = SkipViT(serving="all").apply(vit)
    assert torch.equal(served(x), vit(x))
    assert not torch.allclose(served.train()(x), vit(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.55, 0.95])
def test_so_many_tokens_run(vit, x, drop):
    model, seen = SkipViT(drop=drop).apply(vit), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    model(x)
    assert seen == [50, 50, kept_tokens(50, drop), kept_tokens(50, drop), 50]
    assert kept_tokens(50, drop) == pytest.approx(1 + (1 - drop) * 49, abs=0.51)


def test_one_patch_at_least_runs():
    assert kept_tokens(3, 0.95) == 2
    assert kept_tokens(2, 0.95) == 2


@pytest.mark.parametrize(
    ("layers", "skipped"), [(2, [1]), (3, [1]), (4, [2]), (5, [2, 3]), (6, [3, 4]), (12, [6, 7, 8, 9])]
)
def test_by_default_the_middle_is_skipped_and_the_last_block_sees_all(layers, skipped):
    model = SkipViT().apply(build(layers))
    assert [i for i, b in enumerate(model.blocks) if isinstance(b, SkippedBlock)] == skipped
    assert [i for i, b in enumerate(model.blocks) if isinstance(b, OrderingBlock)] == [skipped[0] - 1]


def test_the_block_before_each_run_orders():
    blocks = list("abcdef")
    assert ordering(blocks, ["b", "c", "e"]) == ["a", "d"]
    assert ordering(blocks, ["f"]) == ["e"]


def test_tokens_are_ordered_row_by_row_and_the_first_stays():
    x = torch.arange(8.0).view(2, 4, 1)
    found = ordered(x, torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.0, 0.9]]))
    assert found[..., 0].tolist() == [[0, 2, 3, 1], [4, 7, 5, 6]]


def test_importance_by_length_and_at_random(vit, x):
    tokens = torch.randn(2, 6, 8)
    torch.testing.assert_close(importance("norm", tokens, tokens, tokens, 1), tokens[:, 1:].square().sum(-1).sqrt())
    model = SkipViT(score="random", serving="all").apply(vit)
    assert torch.equal(model(x), vit(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_layers_may_drop_each_their_share(vit, x):
    model, seen = SkipViT().apply(vit, layers={"blocks.2": {"drop": 0.2}, "blocks.3": {"drop": 0.8}}), []
    for block in model.blocks:
        block.attn.out.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    model(x)
    assert seen == [50, 50, kept_tokens(50, 0.2), kept_tokens(50, 0.8), 50]


def test_weights_fit_with_and_without(vit, x):
    model = SkipViT().apply(vit)
    assert model.state_dict().keys() == vit.state_dict().keys()
    other = build()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), vit(x))
    assert len(anatomy(model).blocks) == len(anatomy(vit).blocks) == 5


@pytest.mark.parametrize("before", [None, Gqkva(), Heads(ratio=0.5)], ids=str)
def test_it_trains_saves_and_loads(vit, x, before, tmp_path):
    batches = [{"input": torch.randn(8, 1, 28, 28), "label": torch.arange(8)}]
    work = Workload.classifier(vit, batches, batches, batches, training=batches)
    model = SkipViT().apply(before.apply(vit, work) if before else vit)
    history = train(model, batches, work.loss, steps=60, lr=3e-3)
    assert history.losses[-1] < 0.5 * history.losses[0]
    again = load(save(model, tmp_path / "skipping", work), model=build())
    assert torch.equal(again(x), model(x))
    assert [type(b) for b in again.blocks] == [type(b) for b in model.blocks]


def test_every_weight_learns(vit, x):
    model = SkipViT().apply(vit)
    model(x).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == [name for name in silent if name.endswith("attn.k.bias")]  # which softmax does not see


def test_bad_input(vit, llama_work, cnn_work):
    with pytest.raises(UserError, match="'random', by which"):
        SkipViT(score="random")
    with pytest.raises(UserError, match=r"start is 0\.9, after end, 0\.85"):
        SkipViT(start=0.9)
    with pytest.raises(UserError, match=r"cannot change 'blocks\.0'"):
        SkipViT().apply(vit, layers=["blocks.0"])
    with pytest.raises(UserError, match="OrderingBlock, SkippedBlock, TransformerBlock"):
        SkipViT().apply(SkipViT().apply(vit))
    with pytest.raises(UserError, match="this is a LlamaForCausalLM"):
        SkipViT().apply(llama_work.model)
    with pytest.raises(UserError, match="works on transformer blocks"):
        SkipViT().apply(cnn_work.model)
    copied = copy.deepcopy(vit)
    SkipViT().apply(vit)
    assert repr(copied) == repr(vit)
