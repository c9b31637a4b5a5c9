"""Packed layers: bytes against Python integers, products against the dequantized weights, and what is saved."""

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lilliput.edits import build_module, module_config
from lilliput.errors import UserError
from lilliput.methods.quantize._grid import choose_grid, round_to_grid
from lilliput.methods.quantize._packed import (
    PackedEmbedding,
    PackedLinear,
    pack_codes,
    quantizable,
    replace_linears_,
    unpack_codes,
)
from lilliput.metrics.memory import weight_bytes

BITS = (2, 3, 4, 8)
BF16 = 2.0**-8


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer(outputs, inputs, bits, group, bias=False, seed=0):
    """A packed layer and its nn.Linear."""
    linear = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(linear.weight, generator=generator(seed))
    w = linear.weight.detach()
    scale, zero = choose_grid(w, bits, group, symmetric=bits == 8)
    packed = PackedLinear.from_codes(round_to_grid(w, scale, zero, bits), scale, zero, bits, group, linear.bias)
    return packed, linear


def check_product(packed, x):
    """The product within what rounding the activations explains: half a step of 1/127 of the largest near one, times
    the coded part of the weights; the zero is multiplied with the activations as they were."""
    w = packed.dequantized().double()
    expected, reach = x.double() @ w.T, x.double().abs() @ w.abs().T
    if packed.bias is not None:
        expected = expected + packed.bias.double()
    groups = x.double().abs().reshape(-1, packed.columns // packed.group, packed.group)
    half_steps = (groups.amax(-1, keepdim=True) / 254).expand_as(groups).flatten(1)
    coded = w if packed.bits == 8 else w - packed.tensors()["zero"].double().repeat_interleave(packed.group, 1)
    allowed = half_steps @ coded.abs().T if x.numel() else torch.zeros(0, packed.rows)
    allowed = allowed.view(expected.shape) + 1e-5 * (reach + expected.abs()) + 1e-6
    assert ((packed(x).double() - expected).abs() <= allowed).all()


# --- codes -----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 4), st.integers(1, 40), st.integers(0, 2**30))
def test_codes_survive_packing(bits, rows, columns, seed):
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator(seed), dtype=torch.int32)
    packed = pack_codes(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 8) * bits)
    assert torch.equal(unpack_codes(packed, bits, columns), q)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.data())
def test_eight_codes_are_one_little_endian_integer(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8, max_size=8))
    word = sum(code << (bits * i) for i, code in enumerate(codes))
    assert bytes(pack_codes(torch.tensor([codes]), bits)[0].tolist()) == word.to_bytes(bits, "little")


# --- linear ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([1, 5, 16, 31, 48]),
    st.sampled_from([(8, 8), (24, 8), (32, 32), (96, 32), (64, 64), (7, 7), (31, 1)]),
    st.booleans(),
    st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0, 1)]),
    st.integers(0, 2**30),
)
@example(2, 16, (7, 7), False, (1,), 143)  # a zero as large as the coded part
def test_the_product_is_that_of_the_dequantized_weights(bits, outputs, shape, bias, batch, seed):
    inputs, group = shape
    packed, _ = layer(outputs, inputs, bits, inputs if bits == 8 else group, bias, seed)
    x = torch.randn(*batch, inputs, generator=generator(seed))
    assert packed(x).shape == (*batch, outputs)
    check_product(packed, x)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 64), (3, 32), (2, 32)])
def test_packed_weights_are_near_the_original(bits, group):
    packed, linear = layer(48, 64, bits, group)
    step = packed.scale.float().repeat_interleave(group, 1)
    assert ((packed.dequantized() - linear.weight).abs() <= step * (0.5 + 2**bits * BF16)).all()


def test_eight_bits_with_groups_run_too():
    check_product(layer(48, 64, 8, 32)[0], torch.randn(3, 64))


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (2, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_output_has_the_type_of_the_input(bits, group, dtype):
    packed, _ = layer(16, 32, bits, group, bias=True)
    assert packed(torch.randn(3, 32, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (3, 32)])
def test_inputs_may_be_strided(bits, group):
    packed, _ = layer(16, 32, bits, group)
    x = torch.randn(32, 5).T
    torch.testing.assert_close(packed(x), packed(x.contiguous()))


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (3, 32)])
def test_gradients_pass_to_the_input(bits, group):
    packed, _ = layer(16, 32, bits, group, bias=True)
    x = torch.randn(2, 3, 32, requires_grad=True)
    with torch.no_grad():
        expected = packed(x)
    y = packed(x)
    assert torch.equal(y, expected)
    slope = torch.randn(2, 3, 16)
    (y * slope).sum().backward()
    torch.testing.assert_close(x.grad, slope @ packed.dequantized(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_stay_zero(bits):
    linear = nn.Linear(32, 16, bias=False)
    nn.init.zeros_(linear.weight[3])
    w = linear.weight.detach()
    scale, zero = choose_grid(w, bits, 32, symmetric=bits == 8, search=5)
    packed = PackedLinear.from_codes(round_to_grid(w, scale, zero, bits), scale, zero, bits, 32)
    assert packed(torch.randn(4, 32))[:, 3].abs().max() < 1e-5


# --- saving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 64), (3, 32), (2, 32)])
@pytest.mark.parametrize("outputs", [16, 48, 80])
def test_a_forward_changes_neither_what_is_saved_nor_the_bytes_held(bits, group, outputs):
    packed, _ = layer(outputs, 64, bits, group, bias=True)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    held, weights = weight_bytes(packed), packed.dequantized()
    packed(torch.randn(2, 64))
    after = packed.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert torch.equal(packed.dequantized(), weights)
    assert weight_bytes(packed) == held == packed.weight_bytes + packed.bias.nbytes


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (3, 32)])
def test_copies_answer_alike_and_share_nothing(copied, ran, bits, group):
    packed, _ = layer(16, 32, bits, group, bias=True)
    x = torch.randn(2, 32)
    if ran:
        packed(x)
    again = copied(packed)
    expected = packed(x).clone()
    assert torch.equal(again(x), expected)
    for buffer in packed.buffers():
        buffer.zero_()
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (3, 32)])
def test_loading_into_a_layer_that_ran_replaces_its_weights(ran, bits, group):
    packed, _ = layer(16, 32, bits, group, bias=True, seed=1)
    other, _ = layer(16, 32, bits, group, bias=True, seed=2)
    x = torch.randn(2, 32)
    if ran:
        packed(x)
        other(x)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), other(x))


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (3, 32)])
def test_new_codes_replace_those_that_ran(bits, group):
    packed, _ = layer(16, 32, bits, group)
    other, linear = layer(16, 32, bits, group, seed=5)
    x = torch.randn(2, 32)
    packed(x)
    w = linear.weight.detach()
    scale, zero = choose_grid(w, bits, group, symmetric=bits == 8)
    packed.set_codes_(round_to_grid(w, scale, zero, bits), scale, zero)
    assert torch.equal(packed(x), other(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (3, 16), (2, 8)])
def test_its_description_builds_an_equal_shape_on_the_meta_device(bits, group, bias):
    packed, _ = layer(24, 64, bits, group, bias)
    described = module_config(packed)
    with torch.device("meta"):
        again = build_module(described["type"], described["config"])
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    shapes = {name: (t.shape, t.dtype) for name, t in packed.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in again.state_dict().items()} == shapes
    assert again.rebuild_config() == packed.rebuild_config()


# --- embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, 24), (4, 8), (3, 24), (2, 12)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_an_embedding_looks_up_dequantized_rows(bits, group, shape):
    head, _ = layer(20, 24, bits, group)
    table = PackedEmbedding(20, 24, bits, group, factor=2.0)
    for name, tensor in head.tensors().items():
        setattr(table, name, tensor)
    ids = torch.randint(0, 20, shape, generator=generator(0))
    assert torch.equal(table(ids), head.dequantized()[ids] * 2.0)
    with torch.device("meta"):
        again = PackedEmbedding(**table.rebuild_config())
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in table.state_dict().items()}


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def four_bits(name, linear, settings):
    w = linear.weight.detach()
    scale, zero = choose_grid(w, 4, 32)
    return round_to_grid(w, scale, zero, 4), scale, zero, 4, 32


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy], ids=["itself", "deepcopy"])
def test_a_tied_head_shares_its_codes_before_and_after_it_ran(copied):
    model = copied(replace_linears_(Tied(), {"head": None}, four_bits))
    assert isinstance(model.table, PackedEmbedding)
    ids = torch.arange(48)
    before = model(ids)
    for name in ("codes", "scale", "zero"):
        tensors = model.state_dict()
        assert tensors[f"head.{name}"].data_ptr() == tensors[f"table.{name}"].data_ptr()
    assert torch.equal(model.table.dequantized(), model.head.dequantized())
    assert torch.equal(copy.deepcopy(model)(ids), before)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PackedLinear, PackedEmbedding])
def test_a_group_that_does_not_divide_is_refused(kind):
    with pytest.raises(UserError, match="group 48 does not divide the 64 inputs"):
        kind(64, 64, 4, 48)
    with pytest.raises(UserError, match="group 0"):
        kind(64, 64, 4, 0)


def test_other_bit_widths_are_refused():
    with pytest.raises(UserError, match="bits is 5; choose 1, 2, 3, 4 or 8"):
        PackedLinear(64, 64, 5, 32)


def test_eight_bits_refuse_zero_points():
    w = torch.rand(4, 8) + 1
    scale, zero = choose_grid(w, 8, 8)
    with pytest.raises(UserError, match="symmetric=True"):
        PackedLinear.from_codes(round_to_grid(w, scale, zero, 8), scale, zero, 8, 8)


def test_a_weight_that_is_no_number_names_its_layer():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(32, 16))
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(UserError, match="layer '1': a weight is NaN"):
        replace_linears_(model, {"0": None, "1": None}, four_bits)


def test_only_plain_linear_layers_inside_a_model_can_be_packed():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Special(8, 8), "c": nn.Sequential(nn.Linear(8, 8), nn.ReLU())})
    assert quantizable(model) == ["a", "c.0"]
    assert quantizable(nn.Linear(8, 8)) == []


# --- products by lookup ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_both_products_execute_the_same_stored_weights(bits):
    torch.manual_seed(bits)
    w, x = torch.randn(70, 96), torch.randn(3, 96)
    scale, zero = choose_grid(w, bits, 32)
    layer = PackedLinear.from_codes(
        round_to_grid(w, scale, zero, bits), scale, zero, bits, 32, torch.randn(70), product="lookup"
    )
    state = layer.state_dict()
    expected = x @ layer.dequantized().T + layer.bias
    assert (layer(x) - expected).norm() < 0.01 * expected.norm()
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in state.items())  # the executed layout is not stored
    again = PackedLinear(**layer.rebuild_config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    if bits > 1:
        other = PackedLinear(**layer.rebuild_config() | {"product": "integer"})
        other.load_state_dict(layer.state_dict())
        assert (other(x) - layer(x)).norm() < 0.02 * expected.norm()


def test_a_product_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="product is 'magic'"):
        PackedLinear(32, 8, 4, 32, product="magic")
    with pytest.raises(UserError, match=r"lookup product takes .* not 8"):
        PackedLinear(32, 8, 8, 32, product="lookup")
    with pytest.raises(UserError, match=r"integer product takes .* not 1"):
        PackedLinear(32, 8, 1, 32)
