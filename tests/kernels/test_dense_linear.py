"""dense_linear against float64 on every instruction set, and bad input."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.kernels.dense_linear import dense_linear, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 31), (64, 576), (700, 300), (0, 8), (5, 0)])
def test_values_on_any_number_of_threads(isa, dtype, rows, columns):
    weight, before = torch.randn(rows, columns).to(dtype), torch.get_num_threads()
    for tokens in (0, 1, 7):
        x = torch.randn(tokens, columns)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(dense_linear(x, weight))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        torch.testing.assert_close(found[0].double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[0], reference(x, weight), rtol=1e-4, atol=1e-4)


def test_it_passes_the_checks_of_operators():
    torch.library.opcheck(torch.ops.lilliput.dense_linear.default, (torch.randn(2, 8), torch.randn(3, 8)))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(8), torch.ones(3, 8), r"\(8,\)"),
        (torch.ones(2, 8).double(), torch.ones(3, 8), "float64"),
        (torch.ones(2, 8), torch.ones(3, 8).half(), "float16"),
        (torch.ones(2, 8), torch.ones(8, 3).T, "contiguous"),
        (torch.ones(2, 8), torch.ones(3, 9), r"\(3, 9\)"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, message):
    with pytest.raises(UserError, match=message):
        dense_linear(x, weight)
