"""factorize.low_rank on real modules."""

import pytest
import torch
from torch import nn

from lilliput.edits import describe, replay
from lilliput.errors import UserError
from lilliput.methods.factorize.low_rank import LowRank


def test_every_linear_becomes_two_and_the_tied_head_stays(llama_work):
    model = LowRank(rank=0.5).apply(llama_work.model, llama_work)
    pairs = [m for m in model.modules() if type(m) is nn.Sequential]
    assert len(pairs) == 2 * 7
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(type(m) is nn.Linear for pair in pairs for m in pair)
    layer, factors = llama_work.model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    kept = sum(p.numel() for p in factors.parameters()) / layer.weight.numel()
    assert 0.4 < kept <= 0.5
    assert torch.isfinite(llama_work.score(model).value * torch.ones(1)).all()


def output_error(work, model, name):
    """Squared error of a layer's output on the calibration inputs of the original."""
    seen = []
    layer, ours = work.model.get_submodule(name), model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for batch in work.calibration:
        with torch.no_grad():
            work.forward(work.model, batch)
    handle.remove()
    return sum(float((layer(x) - ours(x)).square().sum()) for x in seen)


def test_activations_keep_the_outputs_better_than_plain(llama_work):
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    white = LowRank(rank=0.3).apply(llama_work.model, llama_work, names)
    plain = LowRank(rank=0.3, whiten="none").apply(llama_work.model, None, names)
    for name in names:
        assert output_error(llama_work, white, name) < 0.97 * output_error(llama_work, plain, name)


def test_a_layer_that_never_runs_gets_the_plain_decomposition(cnn_work):
    class Idle(type(cnn_work.model)):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(32, 24)

    cnn_work.model = Idle().eval()
    model = LowRank(rank=0.5).apply(cnn_work.model, cnn_work)
    plain = LowRank(rank=0.5, whiten="none").apply(cnn_work.model)
    for mine, theirs in zip(model.idle, plain.idle):
        assert torch.equal(mine.weight, theirs.weight)
    assert not torch.equal(model.fc[0].weight, plain.fc[0].weight)


def test_snap_settings_and_bias():
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    model = LowRank(rank=0.6, whiten="none", snap=16).apply(model)
    assert model[0][0].out_features == 32
    assert model[0][-1].bias is not None
    assert model[0][0].bias is None
    per_layer = LowRank(whiten="none").apply(nn.Sequential(nn.Linear(64, 64)), layers={"0": {"rank": 0.25}})
    assert per_layer[0][0].out_features == 8


def test_edits_rebuild_the_model(llama_work):
    model = LowRank(rank=0.5).apply(llama_work.model, llama_work)
    skeleton = type(llama_work.model)(llama_work.model.config)
    rebuilt = replay(skeleton, describe(model, skeleton))
    rebuilt.load_state_dict(model.state_dict())
    batch = llama_work.test[0]
    assert torch.equal(llama_work.forward(rebuilt.eval(), batch), llama_work.forward(model, batch))


def test_wrong_calls_are_refused(llama_work):
    with pytest.raises(UserError, match=r"whiten='none'"):
        LowRank().apply(llama_work.model)
    with pytest.raises(UserError, match=r"rank is 1\.5"):
        LowRank(rank=1.5)
    with pytest.raises(UserError, match="finds no layer"):
        LowRank().apply(nn.Sequential(nn.ReLU()))
    llama_work.model.model.embed_tokens.weight.data[5:10] = float("nan")
    with pytest.raises(UserError, match="calibration"):
        LowRank().apply(llama_work.model, llama_work)
