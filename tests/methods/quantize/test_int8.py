"""Int8: every output channel on 255 levels of its own range, against numpy."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.quantize._packed import PackedEmbedding, PackedLinear
from lilliput.methods.quantize.int8 import Int8

BF16 = 2.0**-8


def reference(w):
    """Rounding to 255 levels per row in float64, without the bfloat16 scale."""
    w = w.double().numpy()
    scale = np.abs(w).max(1, keepdims=True) / 127
    return np.round(w / scale) * scale


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (5, 31), (1, 1), (48, 64)])
def test_weights_come_near_the_reference(outputs, inputs):
    model = nn.Sequential(nn.Linear(inputs, outputs))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-3, 3, outputs).unsqueeze(1))  # rows of very different size
    found = Int8().apply(model)[0].dequantized().double().numpy()
    largest = model[0].weight.detach().abs().amax(1, keepdim=True).double().numpy()
    assert (np.abs(found - reference(model[0].weight.detach())) <= largest * (1 / 127 + BF16)).all()
    assert (np.abs(found - model[0].weight.detach().double().numpy()) <= largest * (0.5 / 127 + BF16)).all()


def test_every_linear_layer_and_nothing_else_is_packed(llama_work, cnn_work):
    model = Int8().apply(llama_work.model)
    kinds = {type(m) for m in model.modules()}
    assert nn.Linear not in kinds
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.config.tie_word_embeddings is False
    assert llama_work.model.config.tie_word_embeddings is True
    cnn = Int8().apply(cnn_work.model)
    assert isinstance(cnn.fc, PackedLinear)
    assert type(cnn.conv2) is nn.Conv2d


def test_logits_move_little(llama_work):
    batch = llama_work.calibration[0]
    with torch.no_grad():
        before = llama_work.forward(llama_work.model, batch)
        after = llama_work.forward(Int8().apply(llama_work.model), batch)
    assert (after - before).norm() < 0.05 * before.norm()
    assert not torch.equal(after, before)


def test_the_search_lowers_the_squared_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(0, 0.01)
        model[0].weight[:, 0] = 0.05
    errors = [float((Int8(search=n).apply(model)[0].dequantized() - model[0].weight).square().sum()) for n in (0, 40)]
    assert errors[1] <= errors[0]


def test_a_bias_is_kept_exactly():
    model = nn.Sequential(nn.Linear(16, 8))
    packed = Int8().apply(model)[0]
    assert torch.equal(packed.bias, model[0].bias)
    assert torch.equal(packed(torch.zeros(16)), model[0].bias)


def test_nothing_to_pack_is_said():
    with pytest.raises(UserError, match=r"quantize.int8 finds no layer it can change in Conv2d"):
        Int8().apply(nn.Conv2d(1, 1, 1))


def test_a_bfloat16_model_with_a_packed_tied_head_runs_and_reloads(tiny_llama, llama_work, tmp_path):
    work = dataclasses.replace(llama_work, model=tiny_llama.bfloat16())
    model = Int8().apply(work.model, work, ["lm_head"])
    ids = work.example["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert model.model.embed_tokens(ids).dtype == logits.dtype == torch.bfloat16
    again = load(save(model, tmp_path / "model", work))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
