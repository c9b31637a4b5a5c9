"""Tiny models and workloads that many tests share; everything is made here, nothing is fetched."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from torch import nn

from lilliput._probe import torch_threads
from lilliput.workload import Workload, windows

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _no_waiting_for_a_quiet_machine(request, monkeypatch):
    """Tests judge no times, so they need not wait for other work to end; the tests of the waiting itself do wait."""
    if "metrics" not in request.path.parts:
        monkeypatch.setattr("lilliput.metrics.latency.wait_until_quiet", lambda *args, **options: 0.0)


@pytest.fixture
def one_thread():
    """One torch thread: for layers this small a second one only waits, on a busy machine a hundred times as long, and
    sums come out the same every time."""
    with torch_threads(1):
        yield


class TinyCnn(nn.Module):
    """conv-bn-relu, a residual pair, a classifier: (B, 1, 16, 16) -> (B, 10)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, input):
        x = torch.relu(self.bn1(self.conv1(input)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def tiny_cnn():
    torch.manual_seed(0)
    model = TinyCnn()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 1, 16, 16))
    return model.eval()


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture
def sharp_llama(tiny_llama):
    """The tiny llama with attention that looks at some tokens more than at others; as it comes it is nearly uniform."""
    with torch.no_grad():
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.mul_(4)
    return tiny_llama


@pytest.fixture
def cnn_work(tiny_cnn):
    """Random pictures labelled by the model itself, so that its accuracy is 100 %."""
    generator = torch.Generator().manual_seed(1)

    def batch():
        x = torch.randn(16, 1, 16, 16, generator=generator)
        with torch.no_grad():
            return {"input": x, "label": tiny_cnn(x).argmax(-1)}

    splits = [[batch() for _ in range(2)] for _ in range(4)]
    return Workload.classifier(tiny_cnn, *splits[:3], training=splits[3], name="tiny-cnn")


@pytest.fixture
def llama_work(tiny_llama):
    """Random token windows; the source lets an artifact rebuild the model from its own config."""
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    return Workload.causal_lm(
        tiny_llama,
        *splits[:3],
        training=windows(splits[3]),
        name="tiny-llama",
        source={"kind": "hf", "config": "config.json"},
    )


@pytest.fixture
def make_tokenizer():
    """`make_tokenizer(tokens=60)`: a byte-level BPE tokenizer that fits the tiny llama's 64 tokens."""

    def byte_level(tokens=60):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=tokens, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
        inner.train_from_iterator(["the cat and the other cat sat on 12 mats"], trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            chat_template="{{ messages[0]['content'] }}",
        )

    return byte_level
