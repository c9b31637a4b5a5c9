"""What the contract tests share: a third tiny model, and each method applied once."""

from dataclasses import dataclass, replace

import pytest
import torch
from small import VISION, small_method, targets
from torch import nn

from lilliput.method import Method
from lilliput.methods.factorize.targeted import Targeted
from lilliput.workload import Workload
from lilliput.zoo.nets import VisionTransformer


class Pointwise(nn.Module):
    """Two 1x1 convolutions with nothing between them, which can be merged: (B, 1, 16, 16) -> (B, 10)."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, input):
        x = torch.relu(self.norm(self.stem(input)))
        return self.head(torch.relu(self.second(self.first(x))).mean((2, 3)))


class TinyVit(VisionTransformer):
    """Sixteen patches and a class token: (B, 1, 16, 16) -> (B, 10)."""

    def __init__(self):
        super().__init__(dim=32, layers=4, heads=4, hidden=64, patch=4, size=16, channels=1, classes=10)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


@pytest.fixture(autouse=True)
def weights_for_a_clock(monkeypatch):
    """`factorize.targeted` asks a clock; here a layer takes a millisecond per weight, on any machine."""
    monkeypatch.setattr(
        Targeted, "clock", lambda self: lambda module, shape: sum(p.numel() for p in module.parameters())
    )


def own_answers(model, name):
    """A workload of random pictures labelled by the model itself."""
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 1, 16, 16))
        model.eval()
        inputs = [torch.randn(16, 1, 16, 16) for _ in range(8)]
        batches = [{"input": x, "label": model(x).argmax(-1)} for x in inputs]
    return Workload.classifier(model, batches[:2], batches[2:4], batches[4:6], training=batches[6:], name=name)


@pytest.fixture
def pointwise_work():
    torch.manual_seed(0)
    return own_answers(Pointwise(), "pointwise")


@pytest.fixture
def vit_work():
    torch.manual_seed(0)
    return own_answers(TinyVit(), "tiny-vit")


@pytest.fixture
def relu_work(llama_work):
    """The tiny Llama with an activation that is exactly zero half of the time, as its config says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    old = llama_work.model
    model = LlamaForCausalLM(LlamaConfig(**{**old.config.to_dict(), "hidden_act": "relu"})).eval()
    model.load_state_dict(old.state_dict())
    return replace(llama_work, model=model, name="tiny-relu-llama")


@dataclass
class Applied:
    """One method on one tiny workload, done once for all tests that look at it."""

    method: Method
    work: Workload
    targets: list[str]
    before: dict
    layout: str
    model: nn.Module


@pytest.fixture(scope="session")
def shelf():
    return {}


@pytest.fixture
def applied(request, shelf):
    """`applied(method, work)`: its result; skips where the method has no targets. Nobody may change what it gives."""

    def look(name: str, work_name: str) -> Applied:
        if work_name == "vit_work" and name not in VISION:
            pytest.skip(f"{name} is tried on other models")
        key = name, work_name
        if key not in shelf:
            work, method = request.getfixturevalue(work_name), small_method(name)
            found = targets(method, work.model)
            before = {k: v.clone() for k, v in work.model.state_dict().items()}
            layout = repr(work.model)
            model = method.apply(work.model, work) if found else work.model
            shelf[key] = Applied(method, work, found, before, layout, model)
        if not shelf[key].targets:
            pytest.skip(f"{name} has nothing to change in the model of {work_name}")
        return shelf[key]

    return look
