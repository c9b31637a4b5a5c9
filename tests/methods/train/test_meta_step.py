import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.train.meta_step import MetaStep, halves

A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=torch.float64)


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, hessian):
        return 0.5 * self.w @ hessian @ self.w


@pytest.mark.parametrize("inner", [0.0, 1.0, 3.0])
def test_a_step_on_two_bowls_is_the_formula(inner):
    model = Bowl()
    optimizer = MetaStep(inner=inner).wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    w = model.w.detach().clone()
    expected = w - 0.1 * (A @ w + B @ (w - inner * 0.1 * A @ w))
    model(A).backward()
    with optimizer.ahead():
        torch.testing.assert_close(model.w.detach(), w - inner * 0.1 * A @ w)
        model(B).backward()
    assert torch.equal(model.w, w)
    optimizer.step()
    torch.testing.assert_close(model.w.detach(), expected)


def test_the_step_ahead_has_the_rate_of_its_group():
    w, v = (nn.Parameter(torch.ones(2)) for _ in range(2))
    base = torch.optim.SGD([{"params": [w], "lr": 0.1}, {"params": [v], "lr": 0.5}])
    (w.sum() + v.sum()).backward()
    with MetaStep().wrap(base).ahead():
        torch.testing.assert_close(w.detach(), torch.full((2,), 0.9))
        torch.testing.assert_close(v.detach(), torch.full((2,), 0.5))


def test_halves_are_the_whole_batch():
    x, y = torch.arange(10).view(5, 2), torch.arange(5)
    for batch in ((x, y), [x, y], {"x": x, "y": y}):
        first, second = halves(batch)
        assert type(first) is type(second) is type(batch)
        parts = zip(*(b.values() if isinstance(b, dict) else b for b in (first, second, batch)))
        for a, b, whole in parts:
            assert (len(a), len(b)) == (2, 3)
            assert torch.equal(torch.cat([a, b]), whole)


@pytest.mark.parametrize("batch", [torch.zeros(1, 3), {"x": torch.tensor(1.0)}, {"x": "text"}])
def test_what_has_no_halves_is_refused(batch):
    with pytest.raises(UserError, match="at least 2 samples"):
        halves(batch)
