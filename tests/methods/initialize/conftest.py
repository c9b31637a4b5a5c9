"""Tiny transformers of many kinds with lively weights, and workloads around them."""

import pytest
import torch
import transformers
from torch import nn

from lilliput.workload import Workload

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
PICTURES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 4}
KINDS = {
    "llama": ("Llama", LLAMA),
    "tied llama": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "single key-value head": ("Llama", LLAMA | {"num_key_value_heads": 1}),
    "biased llama": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),  # norms of queries and keys
    "gemma": ("Gemma", LLAMA | {"head_dim": 8}),  # embeddings times the root of the width, norms of 1 + weight
    "gemma3": ("Gemma3", LLAMA | {"head_dim": 8}),
    "phi3": ("Phi3", LLAMA | {"pad_token_id": 0}),  # fused q | k | v and gate | up
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", SIZES | {"ffn_dim": 48, "max_position_embeddings": 64}),  # its last norm stands before the blocks
    "vit": ("ViT", PICTURES | {"num_attention_heads": 4, "intermediate_size": 48}),
    "bert": ("Bert", SIZES | {"intermediate_size": 48}),
}
CLASSES = {"ViT": "ViTForImageClassification", "GPT2": "GPT2LMHeadModel", "Bert": "BertForSequenceClassification"}


def build(kind: str) -> nn.Module:
    """A random model whose norms and biases matter too."""
    torch.manual_seed(0)
    family, sizes = KINDS[kind]
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")(**sizes)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(4)
    return model.eval()


def work_of(model: nn.Module) -> Workload:
    """Random data of the right kind."""
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        batches = [{"input": torch.randn(4, 1, 8, 8, generator=generator), "label": torch.zeros(4).long()}]
        return Workload.classifier(model, batches, batches, batches)
    ids = torch.randint(3, 64, (4, 16), generator=generator)
    return Workload.causal_lm(model, ids, ids, ids, source={"kind": "hf", "config": "config.json"})


def logits(work: Workload, model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return work.forward(model, work.calibration[0])


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


@pytest.fixture(params=list(KINDS))
def any_work(request):
    return work_of(build(request.param))


@pytest.fixture
def work():
    return work_of(build("llama"))


@pytest.fixture
def make_work():
    """`make_work(kind)`: a workload of one of KINDS."""
    return lambda kind: work_of(build(kind))
