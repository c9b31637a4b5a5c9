import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lilliput.errors import UserError
from lilliput.methods.cache import LowBit
from lilliput.methods.cache._cache import held_bytes
from lilliput.methods.cache.low_bit import decode, encode


@pytest.fixture
def wide_llama():
    """Heads of 32, so that a value has two groups of 16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def numpy_rounded(x, bits, axis):
    """To the nearest of 2^bits levels between the ends of the axis, whose lower end and step are float16."""
    low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float64)
    step = ((x.max(axis, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    return low + step * np.clip(np.round((x - low) / np.where(step == 0, 1, step)), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", [-1, -2])
def test_numbers_are_rounded_as_in_numpy_and_packed(bits, dim):
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(bits)) * 5 + 2
    codes, low, step = encode(x, bits, dim)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 3, 16, bits)  # 8 numbers of `bits` bits
    found = decode(codes, low, step, bits, torch.float32).numpy()
    np.testing.assert_allclose(found, numpy_rounded(x.double().numpy(), bits, dim), rtol=1e-5, atol=1e-4)


def test_constants_and_extremes_survive():
    x = torch.tensor([[-3.0] * 8, [0.0] * 8, [6e4] * 8, [1e-7] * 8])
    found = decode(*encode(x, 2, -1), 2, torch.float32)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="float16"):
        encode(torch.full((1, 8), 1e6), 4, -1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_older_keys_share_a_grid_by_channel_and_older_values_by_token(wide_llama, text, bits):
    cache, plain = LowBit(bits=bits, group=16, residual=2).cache(wide_llama), DynamicCache()
    with torch.no_grad():
        for used in (cache, plain):
            wide_llama(text[None, :21], past_key_values=used)
    layer, exact = cache.layers[0], plain.layers[0]
    keys, values = layer._decoded(layer.keys, layer.values)
    assert layer.keys.shape[2] == 5  # 21 less one group of 16
    assert torch.equal(keys[:, :, 16:], exact.keys[:, :, 16:])
    assert torch.equal(values[:, :, 16:], exact.values[:, :, 16:])
    expected = numpy_rounded(exact.keys[:, :, :16].double().numpy(), bits, 2)
    np.testing.assert_allclose(keys[:, :, :16].numpy(), expected, atol=1e-4)
    by_group = exact.values[:, :, :16].double().numpy().reshape(1, 1, 16, 2, 16)
    expected = numpy_rounded(by_group, bits, -1).reshape(1, 1, 16, 32)
    np.testing.assert_allclose(values[:, :, :16].numpy(), expected, atol=1e-4)


def test_steps_see_the_decoded_past_and_the_exact_residual(wide_llama, text):
    """Each step equals one of a plain cache that holds the same rounded numbers."""
    cache = LowBit(bits=2, group=16, residual=3).cache(wide_llama)
    with torch.no_grad():
        wide_llama(text[None, :20], past_key_values=cache)
        for token in text[20:]:
            plain = DynamicCache()
            for i, layer in enumerate(cache.layers):
                plain.update(*layer._decoded(layer.keys, layer.values), i)
            expected = wide_llama(token[None, None], past_key_values=plain).logits
            found = wide_llama(token[None, None], past_key_values=cache).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    layer = cache.layers[0]
    assert layer.key_codes.shape == (1, 1, 2, 16, 8)  # two groups of 16 tokens, 32 channels of 2 bits
    assert layer.keys.shape[2] == 3
    assert cache.get_seq_length() == 35


@pytest.mark.parametrize(("bits", "share"), [(8, 0.33), (4, 0.2), (2, 0.14)])
def test_its_bytes_are_codes_grids_and_the_residual(wide_llama, bits, share):
    cache, plain = LowBit(bits=bits, group=32, residual=0).cache(wide_llama), DynamicCache()
    ids = torch.randint(3, 64, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for used in (cache, plain):
            wide_llama(ids, past_key_values=used)
    codes = 2 * 2 * 256 * 32 * bits // 8  # layers, keys and values
    grids = 2 * (256 // 32 * 32 + 256) * 2 * 2  # layers, groups of keys and of values, low and step, float16
    assert cache.nbytes == codes + grids
    assert held_bytes(plain) == 2 * 2 * 256 * 32 * 4
    assert cache.nbytes < share * held_bytes(plain)


def test_more_bits_are_closer(wide_llama, text):
    errors = []
    with torch.no_grad():
        exact = wide_llama(text[None]).logits[:, -1]
        for bits in (8, 4, 2):
            cache = LowBit(bits=bits, group=16, residual=0).cache(wide_llama)
            wide_llama(text[None, :-1], past_key_values=cache)
            errors.append(float((wide_llama(text[None, -1:], past_key_values=cache).logits[:, -1] - exact).norm()))
    assert 0 < errors[0] < errors[1] < errors[2]


def test_a_group_that_does_not_divide_a_head_is_refused():
    config = LlamaConfig(
        hidden_size=96, num_attention_heads=2, num_hidden_layers=1, vocab_size=64, intermediate_size=64
    )
    with pytest.raises(UserError, match=r"group is 32.*heads of 48"):
        LowBit(group=32).cache(LlamaForCausalLM(config))
