"""Models that answer what a test says, so that harm can be planted by construction."""

import pytest
import torch
from torch import nn

from lilliput.workload import Workload


class Scripted(nn.Module):
    """Answers logits (n, classes) in the order of the samples: the input is their index."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, input):
        return self.logits[input.flatten().long()]


@pytest.fixture
def scripted():
    """`scripted(labels, before, after, **beside)`: workload and changed model from answered classes or logits."""

    def logits(answers, classes):
        return answers if answers.ndim == 2 else 4 * nn.functional.one_hot(answers, classes).float()

    def make(labels, before, after, batch_size=64, **beside):
        labels = torch.as_tensor(labels)
        classes = max(int(labels.max()) + 1, 2) if len(labels) else 2
        old, new = (Scripted(logits(torch.as_tensor(a), classes)) for a in (before, after))
        columns = {"input": torch.arange(len(labels)).view(-1, 1), "label": labels}
        columns |= {k.replace("__", "."): torch.as_tensor(v) for k, v in beside.items()}
        cuts = range(0, max(len(labels), 1), batch_size)
        batches = [{k: v[i : i + batch_size] for k, v in columns.items()} for i in cuts]
        return Workload.classifier(old, batches, batches, batches, name="scripted"), new

    return make


@pytest.fixture
def noisy_answers():
    """`noisy_answers(labels, wrong, seed)`: the labels, but for a share `wrong` of them that move to the next class."""

    def draw(labels, wrong, seed):
        chance = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
        return torch.where(chance < wrong, (labels + 1) % (int(labels.max()) + 1), labels)

    return draw
