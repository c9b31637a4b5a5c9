"""Relufied models: exact zeros, the shift that was asked for, norms found by what reads them, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.gguf_export import export_gguf
from lilliput.kernels.decoder_parts import refusals
from lilliput.methods.layers._rectified import RectifiedNorm, ShiftedReLU
from lilliput.methods.layers._sparsity import sparsity_report
from lilliput.methods.layers.relufy import Relufy, shift_for
from lilliput.plan import Plan, Step


def hidden(model, work):
    """Inputs of every down projection on the calibration data."""
    found, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: found.append(args[0])))
    with torch.no_grad():
        for batch in work.calibration:
            work.forward(model, batch)
    for handle in handles:
        handle.remove()
    return found


def test_stage_one_computes_what_a_relu_llama_computes(llama_work):
    from transformers import LlamaForCausalLM

    model = Relufy().apply(llama_work.model)
    config = type(llama_work.model.config)(**{**llama_work.model.config.to_dict(), "hidden_act": "relu"})
    twin = LlamaForCausalLM(config).eval()
    twin.load_state_dict(llama_work.model.state_dict())
    batch = llama_work.test[0]
    with torch.no_grad():
        torch.testing.assert_close(llama_work.forward(model, batch), llama_work.forward(twin, batch))


@pytest.mark.parametrize("sparsity", [0.6, 0.9])
def test_the_shift_silences_the_share_asked_for(llama_work, sparsity):
    model = Relufy(sparsity=sparsity).apply(llama_work.model, llama_work)
    shares = [layer.zeros for layer in sparsity_report(model, llama_work, (1,), "calibration")]
    assert shares[0] == pytest.approx(sparsity, abs=0.01)  # later blocks see what the first one changed
    assert all(share > sparsity - 0.15 for share in shares)


def test_a_shift_is_never_negative(llama_work):
    model = Relufy(sparsity=0.01).apply(llama_work.model, llama_work)
    assert float(model.model.layers[0].mlp.act_fn.shift) == 0


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.99])
def test_the_shift_is_numpys_quantile(sparsity):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 3
    expected = np.quantile(values.numpy(), sparsity, method="inverted_cdf")
    assert shift_for(values, sparsity) == pytest.approx(float(expected))


def test_blocks_may_differ(llama_work):
    model = Relufy().apply(llama_work.model, llama_work, layers={"*layers.1.mlp": {"sparsity": 0.95}})
    first, second = (layer.mlp.act_fn for layer in model.model.layers)
    assert type(first).__name__ == "SiLUActivation"
    assert float(second.shift) > 0


def test_stage_two_rectifies_what_attention_and_feed_forward_read(llama_work):
    model = Relufy(stage=2).apply(llama_work.model, llama_work)
    seen = {}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        layer = model.model.layers[1].get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))
    with torch.no_grad():
        llama_work.forward(model, llama_work.test[0])
    assert len(seen) == 4
    for x in seen.values():
        assert 0.2 < float((x == 0).float().mean()) < 0.8
        assert float(x.min()) == 0
    assert not isinstance(model.model.norm, RectifiedNorm)
    assert "ReLU" in refusals(model)[0]  # the native decoder must not run it as if nothing was behind the norms


def test_stage_two_knows_layer_norms():
    from transformers import GPT2Config, GPT2LMHeadModel

    from lilliput.workload import Workload

    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 64, (3, 2, 16))
    work = Workload.causal_lm(model, *ids)
    changed = Relufy(stage=2).apply(model, work)
    block = changed.transformer.h[0]
    assert isinstance(block.ln_1, RectifiedNorm)
    assert isinstance(block.ln_2, RectifiedNorm)
    x = torch.randn(3, 32)
    torch.testing.assert_close(block.ln_1(x), model.transformer.h[0].ln_1(x).relu())


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_a_rectified_norm_is_the_norm_behind_a_relu(kind):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = {"Llama": LlamaRMSNorm, "Gemma3": Gemma3RMSNorm}[kind](16, 1e-5)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
    x = torch.randn(3, 16)
    torch.testing.assert_close(RectifiedNorm.from_norm(norm)(x), norm(x).relu())


def test_both_stages_save_and_load_to_the_bit(llama_work, tmp_path):
    plan = Plan([Step(Relufy(stage=2, sparsity=0.8))])
    model = plan.apply(llama_work)
    again = load(save(model, tmp_path / "relu", llama_work, plan))
    batch = llama_work.test[0]
    with torch.no_grad():
        assert torch.equal(llama_work.forward(again, batch), llama_work.forward(model, batch))


def test_gguf_files_refuse_what_llama_cpp_would_not_compute(llama_work, tmp_path):
    with pytest.raises(UserError, match="ShiftedReLU"):
        export_gguf(Relufy().apply(llama_work.model), tmp_path / "model.gguf")


def test_functions_and_missing_data_are_refused(llama_work):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = Attention(), Part()

    with pytest.raises(UserError, match="call a function"):
        Relufy().apply(nn.Sequential(nn.Sequential(Block(), Block())))
    with pytest.raises(UserError, match="sparsity=0"):
        Relufy(sparsity=0.5).apply(llama_work.model)
    with pytest.raises(UserError, match="stage=1"):
        Relufy(stage=2).apply(llama_work.model)


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, torch.nan])])
def test_bad_pre_activations_are_refused(values):
    with pytest.raises(UserError, match="pre-activations"):
        shift_for(values, 0.5)


@pytest.mark.parametrize("shift", [float("nan"), float("inf")])
def test_a_shift_that_is_no_number_is_refused(shift):
    with pytest.raises(UserError, match="finite"):
        ShiftedReLU(shift)


def test_an_unknown_norm_is_refused():
    with pytest.raises(UserError, match="GroupNorm"):
        RectifiedNorm.from_norm(nn.GroupNorm(2, 4))
    with pytest.raises(UserError, match="median"):
        RectifiedNorm(4, 1e-5, "median")
