import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.prune.depth import Depth, block_influences, influence
from lilliput.workload import Workload
from lilliput.zoo import nets

IDS = torch.arange(3, 43).view(2, 20)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def decoder(kind):
    import transformers as t

    torch.manual_seed(0)
    gqa = {**SIZES, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**gqa))
    elif kind == "qwen":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**gqa))
    elif kind == "gemma":
        config = t.Gemma3TextConfig(**gqa, head_dim=16, sliding_window=8, layer_types=kinds)
        model = t.Gemma3ForCausalLM(config)
    else:
        config = t.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
        model = t.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def skip_(model, names):
    """The dense model whose named blocks hand their input on."""
    for name in names:
        block = model.get_submodule(name)
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


def test_influence_against_numpy():
    x, y = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    a, b = x.double().numpy(), y.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert float(influence(x, y)) == pytest.approx(1 - cosine.mean(), abs=1e-6)
    assert float(influence(x, 3 * x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2"])
def test_dropped_blocks_equal_skipped_ones_and_the_cache_works(kind):
    model = decoder(kind)
    path = "transformer.h" if kind == "gpt2" else "model.layers"
    small = Depth().apply(model, layers=[f"{path}.1", f"{path}.2"])
    with torch.no_grad():
        expected = skip_(copy.deepcopy(model), [f"{path}.1", f"{path}.2"])(IDS, use_cache=False).logits
        torch.testing.assert_close(small(IDS, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    texts = [
        small.generate(IDS[:, :6], max_new_tokens=16, do_sample=False, use_cache=c, pad_token_id=0, eos_token_id=None)
        for c in (True, False)
    ]
    assert texts[0].shape == (2, 22)
    assert torch.equal(*texts)
    assert small.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4


def test_indices_and_lists_per_layer_are_renumbered():
    small = Depth().apply(decoder("gemma"), layers=["model.layers.0", "model.layers.2"])
    assert small.config.layer_types == ["full_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert [name for name, _ in small.model.layers.named_children()] == ["0", "1"]
    assert len(small.model.layers) == 2


def test_weakest_block_goes_first(llama_work):
    model = decoder("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(name).weight.mul_(1e-3)
    scores = block_influences(model, llama_work)
    assert min(scores, key=scores.get) == "model.layers.2"
    assert scores["model.layers.2"] < 1e-3 < scores["model.layers.0"]
    small = Depth(blocks=1).apply(model, llama_work)
    expected = Depth().apply(model, layers=["model.layers.2"])
    assert torch.equal(small(IDS).logits, expected(IDS).logits)
    assert [len(Depth(blocks=n).apply(model, llama_work).model.layers) for n in (0, 2, 3)] == [4, 2, 1]


def test_influences_match_the_hidden_states_of_the_model(llama_work):
    model = decoder("llama")
    batch = llama_work.calibration[:1]
    llama_work.calibration = batch
    with torch.no_grad():
        states = model(batch[0]["input_ids"], output_hidden_states=True).hidden_states
    scores = list(block_influences(model, llama_work).values())
    for i in range(3):  # the last hidden state has passed the final norm
        assert scores[i] == pytest.approx(float(influence(states[i], states[i + 1])), abs=1e-5)


def test_blocks_of_a_sequential_become_identities():
    torch.manual_seed(0)
    model = nets.vit(dim=16, layers=3, heads=2, size=8, patch=4).eval()
    data = [{"input": torch.randn(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.long)}]
    small = Depth(blocks=1).apply(model, Workload.classifier(model, data, data, data))
    assert sum(isinstance(b, nn.Identity) for b in small.blocks) == 1
    exact = Depth().apply(model, layers=["blocks.1"])
    reference = copy.deepcopy(model)
    reference.blocks = nn.Sequential(model.blocks[0], model.blocks[2])
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(exact(x), reference(x))
    assert list(Depth().targets(exact)) == ["blocks.0", "blocks.2"]


def test_bert_and_hf_vit_run_after_the_cut():
    import transformers as t

    torch.manual_seed(0)
    bert = t.BertForSequenceClassification(t.BertConfig(**SIZES)).eval()
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size" and "token" not in k}
    vit = t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    pictures = torch.randn(1, 3, 16, 16)
    for model, x, path in ((bert, IDS, "bert.encoder.layer"), (vit, pictures, "vit.layers")):
        small = Depth().apply(model, layers=[f"{path}.0", f"{path}.3"])
        reference = skip_(copy.deepcopy(model), [f"{path}.0", f"{path}.3"])
        with torch.no_grad():
            torch.testing.assert_close(small(x).logits, reference(x).logits, atol=1e-5, rtol=1e-5)


def pictures(model, n=16):
    torch.manual_seed(1)
    data = [{"input": torch.randn(n, 1, 28, 28), "label": torch.zeros(n, dtype=torch.long)}]
    return Workload.classifier(model, data, data, data)


@pytest.mark.parametrize(
    ("net", "keeping"),
    [
        (partial(nets.resnet, width=8, depth=14), [0, 1, 3, 5]),
        (partial(nets.bottleneck_resnet, width=8, depth=20), [1, 3, 5]),
        (partial(nets.mobilenet, width=8), [0, 2, 4, 5, 7, 8]),
    ],
)
def test_convolutional_blocks_that_keep_the_shape_can_go(net, keeping):
    torch.manual_seed(0)
    model = net().eval()
    names = [f"blocks.{i}" for i in keeping]
    assert list(Depth().targets(model)) == names
    reference = copy.deepcopy(model)
    for name in names[1:]:
        reference.set_submodule(name, nn.Identity())
    work = pictures(model)
    x = work.example["input"]
    assert torch.equal(Depth().apply(model, layers=names[1:])(x), reference(x))
    without = Depth(blocks=len(names)).apply(model, work)
    assert [i for i, block in enumerate(without.blocks) if type(block) is nn.Identity] == keeping


def test_the_convolutional_block_that_changes_least_goes_first():
    torch.manual_seed(0)
    model = nets.mobilenet(width=8).eval()
    with torch.no_grad():
        model.blocks[5].project[1].weight.mul_(1e-4)
        model.blocks[5].project[1].bias.mul_(1e-4)
    scores = block_influences(model, pictures(model))
    assert scores["blocks.5"] < 1e-4 < min(value for name, value in scores.items() if name != "blocks.5")
    assert type(Depth(blocks=1).apply(model, pictures(model)).blocks[5]) is nn.Identity


def test_bad_input(tiny_cnn, tiny_llama, llama_work):
    with pytest.raises(UserError, match=r"prune\.depth works on transformer blocks"):
        Depth().apply(tiny_cnn)
    with pytest.raises(UserError, match="blocks is 2, but the model has 2; give at most 1"):
        Depth(blocks=2).apply(tiny_llama, llama_work)
    with pytest.raises(UserError, match="name the blocks"):
        Depth(blocks=1).apply(tiny_llama)
    with pytest.raises(UserError, match="blocks is -1"):
        Depth(blocks=-1)
