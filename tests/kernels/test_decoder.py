"""The native decoder against transformers and its plain torch reference, in all formats and instruction sets."""

import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.kernels import _native, group_linear
from lilliput.kernels.decoder import Decoder, Reference, decoder_for, foreign_layers
from lilliput.kernels.decoder_parts import parts_of
from lilliput.kernels.native_weights import NativeWeights
from lilliput.methods.quantize.codebook import Codebook
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.seeds import Seeds

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, odd sizes": ("Llama", {"hidden_size": 36, "intermediate_size": 52, "head_dim": 10, "vocab_size": 37}),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 72}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 24,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 20,
        },
    ),
}


def build(kind, changes):
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def any_model(request):
    return build(*FAMILIES[request.param])


@pytest.fixture(params=[1, 2, 3])
def any_threads(request, one_thread):
    torch.set_num_threads(request.param)
    return request.param


def tokens(count, seed=0, vocabulary=37):
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=2e-5):
    return float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


class Packed(nn.Module):
    """A layer of random codes in the layout of group_linear."""

    def __init__(self, linear, bits, group):
        super().__init__()
        self.rows, self.columns, self.bits = linear.out_features, linear.in_features, bits
        self.group = self.columns if bits == 8 else group
        self.out_features, self.bias = linear.out_features, linear.bias
        width = self.columns if bits == 8 else -(-self.columns // 8) * bits
        stored = torch.randint(0, 256, (self.rows, width), dtype=torch.uint8)
        scale = torch.rand(self.rows, self.columns // self.group) * 0.3 / 2**bits
        zero = None if bits == 8 else torch.randn_like(scale) * 0.02
        self.parts = group_linear.pack(stored, scale, zero, self.columns, bits)

    def native_weights(self):
        return NativeWeights("integer", (self.rows, self.columns), *self.parts, group=self.group, bits=self.bits)

    def forward(self, x):
        rows = x.reshape(-1, self.columns).contiguous()
        y = group_linear.group_linear(rows, *self.parts, self.rows, self.group, self.bits)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.rows)


class Halves(nn.Linear):
    """Weights in bfloat16, computed in float32, as the native decoder does."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float(), self.bias)


class NativeSteps(Reference):
    """The steps of the native decoder one by one, in the reference's order: what a walk must be to the bit."""

    def linear(self, layer, x):
        for part in layer if isinstance(layer, nn.Sequential) else [layer]:
            if isinstance(part, nn.Linear):
                x, weight = x.contiguous(), part.weight
                y = torch.empty(len(x), len(weight))
                sizes = (*weight.shape, weight.dtype == torch.bfloat16)
                _native.dense_rows(weight.data_ptr(), *sizes, x.data_ptr(), len(x), y.data_ptr())
                x = y if part.bias is None else y + part.bias
            else:
                x = part(x)
        return x

    def norm(self, x, norm):
        if norm is None:
            return x
        y = x.clone().contiguous()
        row = (norm.weight.data_ptr(), norm.epsilon, norm.offset)
        _native.norm_rows(y.data_ptr(), y.numel() // y.shape[-1], y.shape[-1], row)
        return y

    def gate(self, b, gate, up):
        _native.gate_values(b.activation, gate.data_ptr(), up.data_ptr(), gate.numel())
        return gate

    def rotate(self, x, cos, sin, scaling=1.0):
        y = x.clone().contiguous()
        _native.rotate_heads(y.data_ptr(), *y.shape, cos.data_ptr(), sin.data_ptr(), scaling)
        return y

    def attend(self, q, keys, values, start, window):
        out, (kv_heads, length, _) = torch.empty_like(q), keys.shape
        addresses = keys.data_ptr(), values.data_ptr(), kv_heads, length, window, out.data_ptr()
        _native.attend_heads(q.data_ptr(), *q.shape, start, *addresses)
        return out


def by_method(method):
    """A layer as a quantization method leaves it."""

    def wrap(layer):
        holder = nn.Sequential(layer)
        return method.apply_(holder, None, {"0": method})[0]

    return wrap


def chained(linear, rank=11, wrap=lambda layer: layer):
    first = nn.Linear(linear.in_features, rank, bias=False)
    last = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    return nn.Sequential(wrap(first), wrap(last))


def mix_formats(model):
    """Another format for each projection, changing from block to block."""
    torch.manual_seed(1)
    wraps = [
        lambda layer: Packed(layer, 4, 4),
        lambda layer: Packed(layer, 8, 0),
        chained,
        lambda layer: layer,
        lambda layer: Packed(layer, 3, layer.in_features),
        lambda layer: chained(layer, 16, lambda part: Packed(part, 4, 8) if part.in_features == 16 else part),
        lambda layer: Packed(layer, 2, 2),
    ]
    turn = 0
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                wrap = wraps[turn % len(wraps)]
                setattr(part, f"{name}_proj", wrap(getattr(part, f"{name}_proj")))
                turn += 1
        turn += 1
    model.lm_head = Packed(model.lm_head, 4, 4)
    return model


@torch.no_grad()
def test_logits_are_those_of_transformers(any_model, isa):
    decoder = Decoder(any_model)
    for length in (1, 2, 5, 33):
        ids = tokens(length)
        expected = any_model(ids[None], use_cache=False).logits[0]
        assert close(decoder(ids, decoder.cache(length), every=True), expected)
        assert close(decoder(ids, decoder.cache(40)), expected[-1:])


@torch.no_grad()
def test_token_by_token_is_the_whole_prompt(any_model, isa, any_threads):
    decoder, ids = Decoder(any_model), tokens(23)
    expected = any_model(ids[None], use_cache=False).logits[0]
    cache = decoder.cache(23)
    parts = [decoder(part, cache, every=True) for part in (ids[:9], *ids[9:20].split(1), ids[20:])]
    assert close(torch.cat(parts), expected)


def test_a_long_prompt_goes_in_parts_that_fit_together():
    model = build("Gemma3Text", FAMILIES["gemma3"][1] | {"sliding_window": 50})
    ids = tokens(300)
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        decoder = Decoder(model)
        assert close(decoder(ids, decoder.cache(300), every=True), expected)
        assert close(decoder(ids, decoder.cache(300)), expected[-1:])


def test_mixed_formats_are_those_of_the_reference(any_model, isa, any_threads):
    mixed = mix_formats(any_model)
    assert foreign_layers(parts_of(mixed)) == []
    native, ids = Decoder(mixed), tokens(40)
    for kind, tolerance in ((NativeSteps, 0.0), (Reference, 0.02)):
        # in torch a last bit differs before a product, and an activation may round the other way to 8 bits
        other = kind(mixed)
        mine, theirs = native.cache(40), other.cache(40)
        for part in (ids[:7], ids[7:8], ids[8:]):
            found, expected = native(part, mine, every=True), other(part, theirs, every=True)
            assert close(found, expected, tolerance) if tolerance else torch.equal(found, expected)


def test_a_few_packed_tokens_at_once_are_what_each_is_alone(isa, any_threads):
    """To the bit: last bits would grow where activations are rounded, and a checked draft would change the text."""
    model = build("Llama", {})
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                setattr(part, f"{name}_proj", Packed(getattr(part, f"{name}_proj"), 4, 4))
    model.lm_head = Packed(model.lm_head, 4, 4)
    decoder, ids = Decoder(model), tokens(40)
    together, apart = decoder.cache(40), decoder.cache(40)
    for cache in (together, apart):
        decoder(ids[:20], cache)
    for part in (ids[20:35], ids[35:]):
        alone = torch.cat([decoder(token, apart) for token in part.split(1)])
        assert torch.equal(decoder(part, together, every=True), alone)


OTHERS = {
    "lookup": lambda group: Group(bits=3, group=group, product="lookup"),
    "one codebook": lambda group: Codebook(bits=4, group=32, table="layer", weighting=False),
    "codebooks": lambda group: Codebook(bits=3, group=64, table="rows", weighting=False),
    "seeds": lambda group: Seeds(bits=4, candidates=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_codes_are_those_of_the_reference(name, isa, any_threads):
    """Each kind beside dense and packed ones that read the same input."""
    model = build("Llama", {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 150})
    wrap, int4 = by_method(OTHERS[name](32)), lambda layer: Packed(layer, 4, 32)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj, attention.k_proj = wrap(attention.q_proj), int4(attention.k_proj)
        mlp.up_proj, mlp.down_proj = wrap(mlp.up_proj), wrap(mlp.down_proj)
        if i == 0:
            attention.o_proj = chained(attention.o_proj, 64, wrap)
    model.lm_head = wrap(model.lm_head)
    assert foreign_layers(parts_of(model)) == []
    native, other, ids = Decoder(model), NativeSteps(model), tokens(40)
    mine, theirs = native.cache(40), other.cache(40)
    for part in (ids[:7], ids[7:8], ids[8:]):
        assert torch.equal(native(part, mine, every=True), other(part, theirs, every=True))


@torch.no_grad()
def test_halved_weights_stay_where_they_are(isa):
    model = build("Llama", {})
    reference = build("Llama", {})
    for mlp, other in ((a.mlp, b.mlp) for a, b in zip(model.model.layers, reference.model.layers)):
        mlp.up_proj.weight.data = mlp.up_proj.weight.data.bfloat16()
        other.up_proj.weight.data = other.up_proj.weight.data.bfloat16().float()
    ids = tokens(9)
    decoder = Decoder(model)
    assert close(decoder(ids, decoder.cache(9), every=True), reference(ids[None]).logits[0])


def greedy(decoder, ids, count):
    cache = decoder.cache(len(ids) + count)
    found, row = [], ids
    for _ in range(count):
        row = decoder(row, cache).argmax(-1)
        found.append(int(row))
    return found


@pytest.mark.parametrize("mixed", [False, True])
def test_greedy_tokens_over_20_prompts_do_not_depend_on_threads(mixed):
    model = build("Llama", {})
    decoder = Decoder(mix_formats(model) if mixed else model)
    plain = Reference(model)
    for seed in range(20):
        ids, found = tokens(1 + seed, seed), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(greedy(decoder, ids, 40))
        assert found[0] == found[1] == found[2]
        if not mixed:
            assert found[0] == greedy(plain, ids, 40)


@pytest.mark.parametrize("kind", [Decoder, Reference])
def test_several_sequences_step_together(kind):
    decoder = kind(mix_formats(build("Llama", {})))
    prompts = [tokens(length, length) for length in (3, 9, 1)]
    apart, together = ([decoder.cache(16) for _ in prompts] for _ in range(2))
    for caches in (apart, together):
        for ids, cache in zip(prompts, caches):
            decoder(ids, cache)
    for seed in range(4):
        ids = tokens(3, seed)
        alone = torch.cat([decoder(ids[i : i + 1], cache) for i, cache in enumerate(apart)])
        assert close(decoder.step(ids, together), alone, 1e-4)


def test_weights_are_borrowed():
    model = build("Llama", {})
    decoder, ids = Decoder(model), tokens(5)
    before = decoder(ids, decoder.cache(5))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
        expected = model(ids[None]).logits[0, -1:]
    after = decoder(ids, decoder.cache(5))
    assert close(after, expected)
    assert not close(before, expected)


def test_the_memory_lives_as_long_as_the_decoder():
    model = build("Llama", {})
    ids = tokens(5)
    with torch.no_grad():
        expected = model(ids[None]).logits[0, -1:]
    decoder = Decoder(model)
    for block in model.model.layers:
        block.mlp.up_proj = nn.Linear(32, 96)
    assert close(decoder(ids, decoder.cache(5)), expected)


def test_nan_stays_in_its_sequence():
    model = build("Llama", {})
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    decoder = Decoder(model)
    caches = [decoder.cache(4), decoder.cache(4)]
    logits = decoder.step(torch.tensor([7, 8]), caches)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.long), "at least one"),
        (torch.zeros(1, 3, dtype=torch.long), "in a row"),
        (torch.zeros(3), "float32"),
        (torch.tensor([3, 200]), "3 .. 200 is not in the vocabulary"),
        (torch.zeros(9, dtype=torch.long), "9 tokens do not fit the cache of 8"),
    ],
)
def test_tokens_it_cannot_read_are_refused(ids, message):
    decoder = Decoder(build("Llama", {}))
    cache = decoder.cache(8)
    with pytest.raises(UserError, match=message):
        decoder(ids, cache)
    assert cache.filled == 0


def test_a_step_needs_a_token_for_each_sequence():
    decoder = Decoder(build("Llama", {}))
    with pytest.raises(UserError, match="2 caches"):
        decoder.step(tokens(3), [decoder.cache(4), decoder.cache(4)])
    with pytest.raises(UserError, match="length of a cache is 0"):
        decoder.cache(0)


def test_a_layer_without_a_native_product_runs_on_the_reference():
    model = build("Llama", {})
    layer = model.model.layers[1].mlp
    halves = Halves(32, 96, bias=False)
    layer.up_proj = halves
    with pytest.raises(UserError, match="up of block 1: a Halves"):
        Decoder(model)
    with pytest.warns(UserWarning, match="plain torch: .* up of block 1: a Halves"):
        assert type(decoder_for(model)) is Reference
    layer.up_proj = nn.Linear(32, 96, bias=False).half()
    with pytest.raises(UserError, match="float16"):
        Decoder(model)
    with pytest.raises(UserError, match="bfloat16"):
        Decoder(build("Llama", {}).bfloat16())
