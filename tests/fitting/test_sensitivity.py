"""Damages judged on a few rows against those of the whole layer, and what a judgement leaves behind."""

import copy

import pytest
import torch
from torch import nn

from lilliput.fitting.sensitivity import ROWS, Trace, option_damage, option_damages, some_rows, trace
from lilliput.methods.prune.neurons import Neurons
from lilliput.methods.quantize.codebook import Codebook
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.workload import ACCURACY, Workload

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDINGS = (Int8(), Group(bits=4, group=32), Group(bits=3, group=32), Codebook(bits=4), Codebook(bits=3))


def layer_and_trace(rows=2000, columns=96, tokens=40, bias=True, tail=1.5):
    """A layer whose rows differ in size and matter very differently, and what it saw."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias)
    with torch.no_grad():
        layer.weight.mul_(torch.randn(rows, 1).mul(0.5).exp())
    inputs = [torch.randn(2, tokens // 2, columns) * torch.rand(columns).add(0.1)]
    with torch.no_grad():
        outputs = [layer(x) for x in inputs]
    weights = [(torch.randn_like(y) * torch.randn(rows).mul(tail).exp()).square().bfloat16() for y in outputs]
    return layer, Trace(inputs, outputs, weights)


def work_of(layer):
    model, batch = nn.Sequential(layer), {"input": torch.randn(2, layer.in_features)}
    return Workload(model, [batch], [batch], [batch], ACCURACY, batch)


@pytest.mark.parametrize("tail", [0.5, 1.5, 3.0])
def test_a_few_rows_say_what_the_whole_layer_says(tail):
    layer, seen = layer_and_trace(tail=tail)
    work, (few, its_trace) = work_of(layer), some_rows(layer, seen)
    assert 4 <= few.out_features <= ROWS
    whole = [option_damage(work, m, "0", seen) for m in ROUNDINGS]
    judged = [option_damage(work, m, "0", its_trace, few) for m in ROUNDINGS]
    assert judged == pytest.approx(whole, rel=0.25)
    ratios = [(a / judged[1]) / (b / whole[1]) for a, b in zip(judged, whole)]
    assert ratios == pytest.approx([1.0] * len(ratios), rel=0.2)  # options are compared on the same rows
    assert type(work.model[0]) is nn.Linear
    assert work.model[0] is layer


def test_a_row_that_matters_alone_is_taken():
    layer, seen = layer_and_trace()
    seen.weights[0][..., 1234] *= 1e9
    few, its_trace = some_rows(layer, seen)
    place = next(i for i, w in enumerate(few.weight) if torch.equal(w, layer.weight[1234]))
    assert torch.equal(few.bias[place], layer.bias[1234])
    assert torch.equal(its_trace.outputs[0][..., place], seen.outputs[0][..., 1234])
    standing = its_trace.weights[0][..., place] / seen.weights[0][..., 1234].float()
    assert standing.mean() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(("rows", "bias"), [(2 * ROWS, True), (7, False)])
def test_small_layers_are_judged_whole(rows, bias):
    layer, seen = layer_and_trace(rows=rows, bias=bias)
    assert some_rows(layer, seen) == (layer, seen)


def test_rows_without_any_gradient_are_judged_whole():
    layer, seen = layer_and_trace()
    seen.weights[0].zero_()
    assert some_rows(layer, seen) == (layer, seen)


def test_judging_leaves_the_model_and_is_remembered(llama_work, tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    monkeypatch.setattr("lilliput.fitting.sensitivity.ROWS", 16)
    before = copy.deepcopy(llama_work.model.state_dict())
    options = {
        "lm_head": [*ROUNDINGS],
        "model.layers.0.mlp.up_proj": [*ROUNDINGS],
        "model.layers.0.mlp": [Neurons(ratio=0.5, round_to=8)],
    }
    found = option_damages(llama_work, options, lambda text: None)
    assert all(damage > 0 for damage in found.values())
    after = llama_work.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert llama_work.model.config.tie_word_embeddings
    said = []
    assert option_damages(llama_work, options, said.append) == found
    assert not said
    seen = trace(llama_work, ["lm_head"], llama_work.calibration[:1])["lm_head"]
    for method in ROUNDINGS:
        whole = option_damage(llama_work, method, "lm_head", seen)
        assert found["lm_head", method] == pytest.approx(whole, rel=0.5)
