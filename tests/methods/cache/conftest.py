import pytest
import torch


@pytest.fixture
def text():
    """Tokens (35,) for the tiny llama."""
    return torch.randint(3, 64, (35,), generator=torch.Generator().manual_seed(5))
