"""The scan against the recurrence, causality through the re-ordering, the balance against counted operations."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lilliput.errors import UserError
from lilliput.methods.layers._hybrid import AttentionBranch, SsmBranch, scan
from lilliput.methods.layers.flowhn import (
    ATTENTION,
    HYBRID,
    SSM,
    FlowHN,
    HybridBlock,
    HybridModel,
    attends,
    balanced,
)
from lilliput.training import train


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_recurrence(x, decay, b, c):
    """Token by token."""
    state = torch.zeros(x.shape[0], x.shape[2], b.shape[-1], x.shape[-1], dtype=x.dtype)
    found = []
    for t in range(x.shape[1]):
        state = decay[:, t].exp()[..., None, None] * state + b[:, t, None, :, None] * x[:, t, :, None]
        found.append((state * c[:, t, None, :, None]).sum(2))
    return torch.stack(found, 1)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_the_scan_in_chunks_is_the_recurrence(tokens, chunk):
    x, decay = randn(2, tokens, 3, 4), -randn(2, tokens, 3, seed=1).abs() * 3
    b, c = randn(2, tokens, 5, seed=2), randn(2, tokens, 5, seed=3)
    torch.testing.assert_close(scan(x, decay, b, c, chunk), by_recurrence(x, decay, b, c))


def test_the_scan_has_finite_gradients_where_everything_fades():
    x, decay = randn(1, 20, 2, 3).requires_grad_(), torch.full((1, 20, 2), -500.0, dtype=torch.float64).requires_grad_()
    scan(x, decay, randn(1, 20, 4), randn(1, 20, 4, seed=1), 8).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(decay.grad).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_no_token_sees_a_later_one(share, shift):
    torch.manual_seed(0)
    block = HybridBlock(32, 2, state=4, chunk=4, share=share, shift=shift).double()
    x = randn(2, 21, 32)
    whole = block(x)
    for t in (1, 2, 11, 20):
        torch.testing.assert_close(block(x[:, :t]), whole[:, :t])
    changed = x.clone()
    changed[:, 11] += 1
    moved = (block(changed) - whole).abs().amax((0, 2)) > 1e-9
    assert not moved[:11].any()
    assert moved[11]


def test_tokens_run_through_their_own_branch_and_come_back_in_order():
    torch.manual_seed(0)
    block = HybridBlock(32, 2, share=0.4, shift=3)
    x, chosen = torch.randn(2, 30, 32), attends(30, 0.4, 3)
    nn.init.zeros_(block.ssm.out.weight)
    unchanged = (block(x) - x).abs().amax((0, 2)) == 0
    assert torch.equal(unchanged, ~chosen)
    places = chosen.nonzero().squeeze(1)
    expected = block.mix(block.norm_attention(block.attention(x[:, places], places)))
    torch.testing.assert_close((block(x) - x)[:, places], expected)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.9])
def test_tokens_are_spread_evenly_and_change_branches(share):
    for shift in range(5):
        chosen = attends(400, share, shift).double()
        runs = chosen.unfold(0, 40, 1).sum(1)
        assert chosen.sum() == pytest.approx(400 * share, abs=1)
        assert runs.max() - runs.min() <= 1
        assert torch.equal(attends(100, share, shift), attends(400, share, shift)[:100])
    visits = torch.stack([attends(400, share, shift) for shift in range(10)]).sum(0)
    assert visits.min() >= 1
    assert visits.max() <= 9


def test_the_balance_is_the_best_there_is():
    attention, ssm = AttentionBranch(32, 2), SsmBranch(32)
    for tokens in (2, 3, 17, 300):
        apart = [abs(attention.operations(n) - ssm.operations(tokens - n)) for n in range(tokens + 1)]
        assert apart[balanced(tokens, attention.operations, ssm.operations)] == min(apart)


def test_attention_gets_less_of_longer_texts():
    settings = FlowHN()
    shares = [settings.balance(96, n).attention_tokens / n for n in (64, 256, 1024, 4096, 16384)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]
    assert all(settings.balance(96, n).idle_share < 0.05 for n in (64, 256, 1024, 4096))
    half = FlowHN(split="half").balance(96, 4096)
    assert half.attention_tokens == 2048
    assert half.idle_share > 0.3
    assert FlowHN(length=1024).share(96) == settings.balance(96, 1024).attention_tokens / 1024


def test_operations_are_those_that_torch_counts():
    ssm, x = SsmBranch(64, chunk=16), torch.randn(1, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ssm(x)
    assert ssm.operations(64) == pytest.approx(counter.get_total_flops(), rel=0.05)
    attention = AttentionBranch(64, 4)
    matrices = sum(p.numel() for p in attention.parameters() if p.ndim > 1)
    assert attention.operations(10) == 10 * 2 * matrices + 4 * 10**2 * 64


def test_attention_turns_by_the_positions_in_the_text():
    """Only distances count: the same tokens further on give the same, further apart another result."""
    torch.manual_seed(0)
    branch, x = AttentionBranch(32, 2).double(), randn(1, 6, 32)
    places = torch.tensor([0, 2, 3, 7, 8, 12])
    torch.testing.assert_close(branch(x, places), branch(x, places + 90), rtol=1e-4, atol=1e-4)
    assert (branch(x, places) - branch(x, 2 * places)).abs().max() > 1e-3


def test_branches_at_the_same_time_give_the_same():
    torch.manual_seed(0)
    block = HybridBlock(32, 2, share=0.5)
    beside = HybridBlock(**{**block.rebuild_config(), "parallel": True})
    beside.load_state_dict(block.state_dict())
    x = torch.randn(2, 40, 32)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(beside(x), block(x))
    assert beside(x).requires_grad  # with gradients one after the other


@pytest.mark.parametrize("kinds", [(HYBRID, HYBRID), (ATTENTION, SSM)])
def test_a_language_model_learns(kinds, one_thread):
    torch.manual_seed(0)
    model = HybridModel(20, 32, kinds, FlowHN(length=16, heads=2, chunk=8))
    ids = torch.arange(16).repeat(4, 1) + torch.arange(4)[:, None]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    history = train(model, [ids], loss, steps=60, lr=1e-2)
    assert history.losses[-1] < 0.3 * history.losses[0]


def test_layers_of_a_model_shift_by_one():
    model = FlowHN().language_model(64, 32, 3)
    assert [block.shift for block in model.blocks] == [0, 1, 2]
    assert model(torch.zeros(1, 5, dtype=torch.long), use_cache=False).shape == (1, 5, 64)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="length"):
        FlowHN(length=1)
    with pytest.raises(UserError, match="whole number"):
        FlowHN(heads=2.0)
    with pytest.raises(UserError, match="heads"):
        AttentionBranch(30, 4)
    with pytest.raises(UserError, match="48"):
        SsmBranch(24)
    with pytest.raises(UserError, match="share"):
        HybridBlock(32, share=1.5)
    with pytest.raises(UserError, match="mamba"):
        HybridModel(8, 32, ["mamba"])
