"""Edits: what is compared, what is described, and that replaying gives an equal structure; hostile ones elsewhere."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lilliput.edits import build_module, describe, module_config, replay, set_module
from lilliput.errors import UserError
from lilliput.methods.layers._span_layers import ReusingAttention
from lilliput.methods.quantize._packed import PackedLinear

EVERY_KIND = [
    nn.Linear(3, 5),
    nn.Linear(3, 5, bias=False),
    nn.Embedding(7, 4),
    nn.Embedding(7, 4, padding_idx=2),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
    nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, bias=False),
    nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
    nn.BatchNorm1d(4, eps=1e-3),
    nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
    nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    nn.GroupNorm(2, 4, eps=1e-3),
    nn.LayerNorm(4, eps=1e-3),
    nn.LayerNorm((2, 4), bias=False),
    nn.LayerNorm(4, elementwise_affine=False),
    nn.Identity(),
    nn.Sequential(),
    PackedLinear(16, 8, 4, 8, bias=True),
]


def same_structure(a, b):
    """Names, classes, descriptions and shapes of both models are equal, and the same children are none."""
    nones = [{(n, k) for n, m in x.named_modules() for k, c in m._modules.items() if c is None} for x in (a, b)]
    assert nones[0] == nones[1]
    assert [(n, type(m), module_config(m)) for n, m in a.named_modules()] == [
        (n, type(m), module_config(m)) for n, m in b.named_modules()
    ]
    first, second = a.state_dict(), b.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {k: (v.shape, v.dtype) for k, v in second.items()}


def through_json(edits):
    return json.loads(json.dumps(edits))


def rebuilt(new, old):
    """`old` made into `new` by edits that went through a file, with the tensors of `new`."""
    made = replay(copy.deepcopy(old), through_json(describe(new, old)))
    same_structure(made, new)
    made.load_state_dict(new.state_dict())
    return made.train(new.training)


# --- single modules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", EVERY_KIND, ids=str)
def test_a_module_is_built_again_from_its_description(module):
    described = through_json(module_config(module))
    again = build_module(described["type"], described["config"])
    same_structure(again, module)
    assert repr(again) == repr(module)


@pytest.mark.parametrize("module", EVERY_KIND, ids=str)
def test_it_is_built_without_memory_on_the_meta_device(module):
    described = module_config(module)
    with torch.device("meta"):
        again = build_module(described["type"], described["config"])
    assert all(t.is_meta for t in again.state_dict().values())


def test_modules_of_others_have_no_description():
    class Special(nn.Linear):
        pass

    assert module_config(Special(2, 2)) is None
    assert module_config(nn.GELU()) is None
    assert module_config(nn.MultiheadAttention(4, 2)) is None


# --- comparing -------------------------------------------------------------------------------------------------


def test_equal_models_need_no_edit(tiny_llama, tiny_cnn):
    for model in (tiny_llama, tiny_cnn):
        assert describe(model, copy.deepcopy(model)) == []


def test_only_what_changed_is_described(tiny_cnn):
    changed = copy.deepcopy(tiny_cnn)
    changed.conv1, changed.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    changed.conv2, changed.conv3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), tiny_cnn.conv3
    assert [e["module"] for e in describe(changed, tiny_cnn)] == ["conv1", "bn1", "conv2"]


def test_plain_attributes_are_compared_but_not_private_ones_and_not_the_mode(tiny_llama):
    changed = copy.deepcopy(tiny_llama).train()
    changed.model.layers[1].self_attn.num_key_value_groups = 1
    changed.model.layers[1]._private = 3
    assert describe(changed, tiny_llama) == [
        {"edit": "attributes", "module": "model.layers.1.self_attn", "values": {"num_key_value_groups": 1}}
    ]


class Nest(nn.Module):
    """A sequence, a list, a dictionary and a count."""

    def __init__(self, width=4, depth=3, extra=True):
        super().__init__()
        self.width = width
        self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth))
        self.parts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LayerNorm(4)})
        if extra:
            self.extra = nn.Linear(4, 4)

    def forward(self, x):
        x = self.parts["a"](self.body(x))
        for block in self.blocks:
            x = x + block(x)
        for name in ("b", "c"):
            x = self.parts[name](x) if name in self.parts else x
        return self.extra(x) if getattr(self, "extra", None) else x


def shorter(model):
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[2]])


def factored(model):
    model.extra = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Sequential(nn.Linear(2, 4), nn.Identity()))


def cut_sequence(model):
    model.body = nn.Sequential(model.body[0], nn.Identity())


def longer_sequence(model):
    model.body.append(nn.Linear(4, 4))


def without_part(model):
    del model.parts["b"]


def without_attribute(model):
    del model.extra


def attribute_of_none(model):
    model.extra = None


def new_part(model):
    model.parts["c"] = nn.Linear(4, 4)


def resized(model):
    model.body[0], model.body[2], model.width = nn.Linear(4, 9), nn.Linear(9, 4), 9


def packed(model):
    model.parts["a"] = PackedLinear(4, 4, 2, 4, bias=True)


CHANGES = [
    shorter,
    factored,
    cut_sequence,
    longer_sequence,
    without_part,
    without_attribute,
    attribute_of_none,
    new_part,
    resized,
    packed,
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_change_is_replayed(change):
    old, new = Nest().eval(), Nest().eval()
    change(new)
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(rebuilt(new, old)(x), new(x))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(CHANGES), unique=True), st.booleans())
def test_changes_are_replayed_together(changes, meta):
    old, new = Nest().eval(), Nest().eval()
    extra = [c for c in changes if c in (factored, without_attribute, attribute_of_none)]
    changes = [c for c in changes if c not in extra[1:]]
    if cut_sequence in changes and resized in changes:
        changes.remove(resized)
    for change in changes:
        change(new)
    assert bool(describe(new, old)) == bool(changes)
    if meta:
        with torch.device("meta"):
            same_structure(replay(Nest().eval(), through_json(describe(new, old))), new)
        return
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(rebuilt(new, old)(x), new(x))


def test_layers_replaced_inside_a_module_that_is_built_anew_are_described():
    """Its constructor makes plain layers; what later methods put in their place comes as edits of its children."""

    attention = ReusingAttention(16, heads=2, kv_heads=2, head_dim=8, layer_idx=1, scaling=1.0)
    old, new = nn.ModuleDict({"attention": nn.Identity()}), nn.ModuleDict({"attention": attention})
    assert len(describe(new, old)) == 1
    set_module(new, "attention.v_proj", PackedLinear(16, 16, 4, 8))
    set_module(new, "attention.o_proj", nn.Sequential(nn.Linear(16, 3, bias=False), nn.Linear(3, 16, bias=False)))
    rebuilt(new, old)
    del new["attention"].v_proj
    rebuilt(new, old)


def test_replaced_modules_take_the_mode_of_their_owner():
    old, new = Nest().eval(), Nest().eval()
    resized(new)
    made = replay(old, describe(new, old))
    assert not any(m.training for m in made.modules())


@pytest.mark.parametrize(("name", "module"), [("body.1", nn.GELU()), ("blocks", nn.ModuleDict())])
def test_what_cannot_be_built_again_is_refused_with_its_name(name, module):
    new = Nest()
    set_module(new, name, module)
    with pytest.raises(UserError, match=rf"module '{name}' became a {type(module).__name__}.*rebuild_config"):
        describe(new, Nest())


def test_a_list_that_grew_is_refused():
    with pytest.raises(UserError, match="module list 'blocks' grew from 2 to 3"):
        describe(Nest(depth=3), Nest(depth=2))


# --- replaying -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        {"edit": "remove", "module": "nowhere", "none": False},
        {"edit": "remove", "module": "extra.weight", "none": False},
        {"edit": "remove", "module": "", "none": False},
        {"edit": "remove", "module": "extra"},
        {"edit": "set", "module": "no.where", "type": "Identity", "config": {}},
        {"edit": "set", "module": "extra", "type": "Linear", "config": {"in_features": -1, "out_features": 2}},
        {"edit": "set", "module": "extra", "type": "Linear", "config": {"in_features": 2, "outs": 2}},
        {"edit": "set", "module": "extra", "type": "lilliput.edits.describe", "config": {}},
        {"edit": "set", "module": "extra", "type": "lilliput.no.Such", "config": {}},
        {"edit": "set", "module": "extra", "type": "torch.nn.Linear", "config": {"in_features": 2, "out_features": 2}},
        {"edit": "attributes", "module": "", "values": {"new": 3}},
        {"edit": "attributes", "module": "extra", "values": {"weight": 3}},
        {"edit": "length", "module": "body", "value": 1},
        {"edit": "length", "module": "blocks", "value": -1},
        {"edit": "length", "module": "blocks", "value": "1"},
    ],
    ids=str,
)
def test_edits_that_do_not_fit_are_refused(edit):
    with pytest.raises(UserError):
        replay(Nest(), [edit])


def test_a_module_is_put_where_its_name_points():
    model = Nest().eval()
    set_module(model, "parts.a", nn.Dropout())
    assert isinstance(model.parts["a"], nn.Dropout)
    assert not model.parts["a"].training
    set_module(model, "extra", nn.Identity())
    assert isinstance(model.extra, nn.Identity)
    with pytest.raises(AttributeError):
        set_module(model, "no.where", nn.Identity())
