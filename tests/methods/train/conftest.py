"""What the tests of adapting share: everything about a model that must come back, values as bytes."""

import pytest
import torch


def raw(tensor):
    return None if tensor is None else tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def facts(tensor):
    grad = tensor.grad if tensor.is_leaf else None
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, id(grad), raw(grad), raw(tensor)


@pytest.fixture
def fingerprint():
    def of(model):
        return {
            "modules": [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
            "tensors": {name: facts(t) for kind in (model.named_parameters, model.named_buffers) for name, t in kind()},
            "hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
        }

    return of
