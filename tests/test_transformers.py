"""An artifact loads with transformers' own call after `import lilliput`, equal to the bit."""

import subprocess
import sys

import pytest
import torch

from lilliput.artifact import load, save
from lilliput.methods.factorize.low_rank import LowRank
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.plan import Plan, Step


@pytest.mark.parametrize("layers", [None, {"model.layers.1.*": {}}, {"lm_head": {}}])
def test_auto_model_loads_what_load_loads(layers, llama_work, tmp_path, recwarn):
    from transformers import AutoModelForCausalLM

    plan = Plan([Step(Int8(), layers)])
    save(plan.apply(llama_work), tmp_path / "a", llama_work, plan)
    ours, theirs = load(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.inference_mode():
        assert torch.equal(*(llama_work.forward(m, llama_work.example) for m in (ours, theirs)))
    ids = llama_work.example["input_ids"][:, :8]
    tokens = [m.generate(ids, max_new_tokens=5, do_sample=False).tolist() for m in (ours, theirs)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [[], [Step(Int8(), {"model.layers.*": {}})], [Step(LowRank(whiten="none"))]], ids=str)
def test_half_precision_loads_in_its_own_type(steps, dtype, llama_work, tmp_path):
    from transformers import AutoModelForCausalLM

    llama_work.model.to(dtype)
    plan = Plan(steps)
    model = plan.apply(llama_work)
    save(model, tmp_path / "a", llama_work, plan)
    for again in (load(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        mine, theirs = model.state_dict(), again.state_dict()
        assert {n: t.dtype for n, t in theirs.items()} == {n: t.dtype for n, t in mine.items()}
        assert all(torch.equal(theirs[n], t) for n, t in mine.items())
        assert again.model.norm.weight.dtype == again.config.dtype == dtype
        with torch.inference_mode():
            assert torch.equal(*(llama_work.forward(m, llama_work.example) for m in (model, again)))


def test_layers_of_different_shapes_load(llama_work, tmp_path):
    from transformers import AutoModelForCausalLM

    from lilliput.methods.prune.depth import Depth
    from lilliput.methods.prune.neurons import Neurons

    plan = Plan(
        [
            Step(Neurons(ratio=0.5, round_to=8), {"model.layers.0.mlp": {}}),
            Step(Group(bits=3, group=32), {"model.layers.1.mlp.up_proj": {}}),
        ]
    )
    model = plan.apply(llama_work)
    save(model, tmp_path / "a", llama_work, plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.model.layers[0].mlp.up_proj.out_features < again.model.layers[1].mlp.up_proj.out_features
    with torch.inference_mode():
        assert torch.equal(*(llama_work.forward(m, llama_work.example) for m in (model, again)))
    shallow = Depth(blocks=1).apply(llama_work.model, llama_work)
    save(shallow, tmp_path / "b", llama_work)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "b").model.layers) == 1


@pytest.mark.parametrize("first", ["import lilliput, transformers", "import transformers.quantizers.auto, lilliput"])
def test_import_registers_in_either_order(first):
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'lilliput' in m"
    subprocess.run([sys.executable, "-c", f"{first}\n{check}"], check=True, timeout=120)


def test_import_is_light():
    code = "import lilliput, sys; assert not {'torch', 'transformers', 'openvino'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
