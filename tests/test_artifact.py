"""Artifacts reload to the bit, replay every kind of edit, and refuse what is broken or hostile."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lilliput.artifact import ARCHITECTURE, WEIGHTS, load, save, serving_of, write_serving
from lilliput.edits import build_module, describe, replay
from lilliput.errors import UserError
from lilliput.methods.cache.sliding import Sliding
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.int8 import Int8
from lilliput.plan import Plan, Step
from lilliput.workload import Workload


def logits(model, work):
    with torch.inference_mode():
        return work.forward(model, work.example)


@pytest.mark.parametrize("method", [Int8(), Group(bits=4, group=32), Group(bits=3, group=32), Group(bits=2, group=32)])
def test_quantized_llama_reloads_to_the_bit(method, llama_work, tmp_path):
    plan = Plan([Step(method)])
    model = plan.apply(llama_work)
    before = logits(model, llama_work)  # the packed operator has laid the weights out
    save(model, tmp_path / "fitted", llama_work, plan)
    again = load(tmp_path / "fitted")
    assert torch.equal(logits(again, llama_work), before)
    assert Plan.load(tmp_path / "fitted" / "plan.yaml") == plan
    assert not torch.equal(before, logits(llama_work.model, llama_work))


def test_an_artifact_says_how_it_is_served(llama_work, tmp_path):
    save(llama_work.model, tmp_path / "a", llama_work, Plan(serving=Sliding(budget=32)))
    assert serving_of(tmp_path / "a") == Sliding(budget=32)
    assert Plan.load(tmp_path / "a" / "plan.yaml").serving == Sliding(budget=32)
    write_serving(tmp_path / "a", None)
    assert serving_of(tmp_path / "a") is None
    architecture = json.loads((tmp_path / "a" / ARCHITECTURE).read_text())
    del architecture["serving"]  # as artifacts were before
    (tmp_path / "a" / ARCHITECTURE).write_text(json.dumps(architecture))
    assert serving_of(tmp_path / "a") is None
    assert torch.equal(logits(load(tmp_path / "a"), llama_work), logits(llama_work.model, llama_work))


def test_tied_head_is_stored_once(llama_work, tmp_path):
    save(Int8().apply(llama_work.model, layers=["lm_head"]), tmp_path / "a", llama_work)
    architecture = json.loads((tmp_path / "a" / ARCHITECTURE).read_text())
    assert set(architecture["aliases"]) == {"lm_head.codes", "lm_head.scale"}
    again = load(tmp_path / "a")
    assert again.lm_head.codes.data_ptr() == again.model.embed_tokens.codes.data_ptr()


def test_dropped_block_and_head_attributes_are_replayed(llama_work, tmp_path):
    model = llama_work.model
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1
    save(model, tmp_path / "a", llama_work)
    assert torch.equal(logits(load(tmp_path / "a"), llama_work), logits(model, llama_work))


def test_own_class_needs_its_skeleton(cnn_work, tmp_path):
    model = Int8().apply(cnn_work.model)
    save(model, tmp_path / "a", cnn_work)
    with pytest.raises(UserError, match="model=YourModel"):
        load(tmp_path / "a")
    again = load(tmp_path / "a", model=type(cnn_work.model)())
    assert torch.equal(logits(again, cnn_work), logits(model, cnn_work))


def test_foreign_folder_is_not_overwritten(cnn_work, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not an artifact"):
        save(cnn_work.model, tmp_path / "mine", cnn_work)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_plain_chain_of_layers_loads_without_its_class(tmp_path):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    chain = torch.nn.Sequential(torch.nn.Sequential(*layers), torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    batch = {"input": torch.randn(2, 1, 6, 6), "label": torch.zeros(2, dtype=torch.int64)}
    work = Workload.classifier(chain, [batch], [batch], [batch])
    again = load(save(chain, tmp_path / "a", work))
    assert repr(again) == repr(chain)
    assert torch.equal(again(batch["input"]), chain(batch["input"]))
    chain.append(torch.nn.Softmax(-1))  # which no edit builds
    with pytest.raises(UserError, match="own class"):
        load(save(chain, tmp_path / "b", work))


def test_full_disk_keeps_the_old_artifact(llama_work, tmp_path, monkeypatch):
    save(llama_work.model, tmp_path / "a", llama_work)
    before = (tmp_path / "a" / WEIGHTS).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lilliput.artifact.save_file", full)
    with pytest.raises(UserError, match="free some space"):
        save(Int8().apply(llama_work.model), tmp_path / "a", llama_work)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_keeps_its_type(dtype, llama_work, tmp_path):
    model = llama_work.model.to(dtype)
    model.model.rotary_emb.float()  # as transformers loads it: a mixture comes back as it was
    save(model, tmp_path / "a", llama_work)
    again = load(tmp_path / "a")
    everything = dict(model.state_dict()) | dict(model.named_buffers())
    found = dict(again.state_dict()) | dict(again.named_buffers())
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in everything.items()}
    assert all(torch.equal(found[n], t) for n, t in everything.items())
    assert torch.equal(logits(again, llama_work), logits(model, llama_work))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_of_an_own_class_goes_into_a_float32_instance(dtype, cnn_work, tmp_path):
    cnn_work.model.to(dtype)
    cnn_work.example = {"input": cnn_work.example["input"].to(dtype)}
    save(cnn_work.model, tmp_path / "a", cnn_work)
    again = load(tmp_path / "a", model=type(cnn_work.model)())
    assert again.conv1.weight.dtype == dtype
    assert again.bn1.num_batches_tracked.dtype == torch.int64
    assert torch.equal(logits(again, cnn_work), logits(cnn_work.model, cnn_work))


def test_integers_in_the_place_of_floats_are_refused(llama_work, tmp_path):
    save(llama_work.model, tmp_path / "a", llama_work)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.norm\.weight.*int32.*expected torch\.float32"):
        load(tmp_path / "a")


def change(folder, **fields):
    path = folder / ARCHITECTURE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


HOSTILE = [
    {"edit": "set", "module": "lm_head", "type": "os.system", "config": {"command": "touch /tmp/owned"}},
    {"edit": "set", "module": "lm_head", "type": "lilliput.cli.main", "config": {}},
    {"edit": "set", "module": "lm_head", "type": "Linear", "config": {"in_features": 2**40, "out_features": 2**40}},
    {"edit": "set", "module": "lm_head", "type": "Linear", "config": {"in_features": 2**31, "out_features": 2**31}},
    {"edit": "set", "module": "", "type": "Identity", "config": {}},
    {"edit": "attributes", "module": "lm_head", "values": {"forward": "x"}},
    {"edit": "attributes", "module": "lm_head", "values": {"in_features": [1]}},
    {"edit": "length", "module": "model.layers", "value": 99},
    {"edit": "teleport", "module": "model"},
    {"module": "model"},
]


@pytest.mark.parametrize("edit", HOSTILE, ids=[str(e)[:60] for e in HOSTILE])
def test_hostile_edits_are_refused(edit, llama_work, tmp_path):
    save(llama_work.model, tmp_path / "a", llama_work)
    change(tmp_path / "a", edits=[edit])
    with pytest.raises(UserError):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"aliases": {"lm_head.weight": "../../etc/passwd"}},
        {"aliases": {"nowhere.weight": "model.norm.weight"}},
        {"version": 99},
        {"version": "1"},
        {"edits": "all"},
        {"edits": [1, 2]},
        {"source": {"kind": "zoo", "name": "../../etc"}},
        {"source": {}},
    ],
)
def test_broken_architecture_is_refused(fields, llama_work, tmp_path):
    save(llama_work.model, tmp_path / "a", llama_work)
    change(tmp_path / "a", **fields)
    with pytest.raises(UserError):
        load(tmp_path / "a")


def test_truncated_weights_are_refused(llama_work, tmp_path):
    save(llama_work.model, tmp_path / "a", llama_work)
    path = tmp_path / "a" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(tmp_path / "a")
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(tmp_path / "a")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {"edit": st.sampled_from(["set", "length", "attributes"]), "module": st.sampled_from(["0", "", "9", "x.y"])},
        optional={
            "type": st.sampled_from(["Linear", "Conv2d", "Sequential", "lilliput.edits.replay", "os.x"]),
            "config": json_values,
            "children": json_values,
            "value": json_values,
            "values": json_values,
        },
    )
)
def test_fuzzed_edits_never_raise_anything_else(edit):
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        try:
            replay(model, [edit])
        except UserError:
            return
    describe(model, model)


def test_build_module_on_meta_takes_no_memory():
    with torch.device("meta"):
        layer = build_module("Linear", {"in_features": 2**15, "out_features": 2**15, "bias": False})
    assert layer.weight.is_meta
