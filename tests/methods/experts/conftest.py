"""A tiny Llama of four blocks and a mixture of experts made of it."""

import pytest
import torch

from lilliput.methods.experts.upcycle import Upcycle
from lilliput.workload import Workload, windows


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small run faster on one thread, and their sums come out the same every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deep_work():
    """A workload of a random Llama of four blocks with 96 neurons, large enough that texts are not one word."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    generator = torch.Generator().manual_seed(2)
    splits = [torch.randint(3, 64, (8, 24), generator=generator) for _ in range(4)]
    source = {"kind": "hf", "config": "config.json"}
    return Workload.causal_lm(model, *splits[:3], training=windows(splits[3]), name="deep", source=source)


@pytest.fixture
def mixture(deep_work):
    """Four mixtures of 8 experts, of which a token uses 2."""
    return Upcycle(experts=8, top_k=2, steps=0).apply(deep_work.model, deep_work)


@pytest.fixture
def ids(deep_work):
    """A text (24,)."""
    return deep_work.test[0]["input_ids"][0]
