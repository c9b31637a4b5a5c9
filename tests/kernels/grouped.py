"""Weights in groups of a row's inputs, as `group_linear` and `lookup_linear` store them, and what both have to do."""

from contextlib import contextmanager

import torch

from lilliput import kernels
from lilliput.methods.quantize._packed import pack_codes


@contextmanager
def executing(isa):
    """That instruction set for a while."""
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        yield
    finally:
        kernels.set_isa(before)


def weights(rows, columns, group, bits, seed=0):
    """Random codes (N, K), scale and zero (N, K / group); 8 bits have no zero."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = (torch.rand(rows, columns // group, generator=generator) + 0.1).bfloat16()
    zero = None if bits == 8 else torch.randn(rows, columns // group, generator=generator).bfloat16()
    return q, scale, zero


def stored(q, bits):
    """Codes as a model keeps them."""
    return (q - 128).to(torch.int8) if bits == 8 else pack_codes(q, bits)


def laid_out(kernel, product, rows, columns, group, bits, seed=0):
    """Random codes and grids, and a function of x that multiplies with their layout."""
    q, scale, zero = weights(rows, columns, group, bits, seed)
    layout = kernel.pack(stored(q, bits), scale, zero, columns, bits)
    return (q, scale, zero), lambda x: product(x, *layout, rows, group, bits)


def dequantized(q, scale, zero, bits):
    """The weights (N, K) that codes and grids stand for, float64."""
    group = q.shape[1] // scale.shape[1]
    w = (q - 2 ** (bits - 1)) * scale.double().repeat_interleave(group, 1)
    return w if zero is None else w + zero.double().repeat_interleave(group, 1)


def activations(tokens, columns, seed=1):
    """Normal values (M, K)."""
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


# --- what both have to do --------------------------------------------------------------------------------------


def check_round_trip(kernel, rows, group, groups, bits, seed):
    """A layout gives the stored weights back."""
    columns = group * groups
    q, scale, zero = weights(rows, columns, group, bits, seed)
    layout = kernel.pack(stored(q, bits), scale, zero, columns, bits)
    given_back = kernel.unpack(*layout, rows, columns, group, bits)
    expected = [part for part in (stored(q, bits), scale, zero) if part is not None]
    if not groups:  # a width of nothing leaves the group unknown
        expected = [part.reshape(rows, 0) for part in expected]
    assert [part.dtype for part in given_back] == [part.dtype for part in expected]
    assert all(torch.equal(a, b) for a, b in zip(given_back, expected))


def check_against_reference(kernel, packed, multiply, bits, counts):
    """Products of as many tokens are those of the reference, up to the order of sums."""
    rows, columns = packed[0].shape
    for tokens in counts:
        x = activations(tokens, columns)
        y, expected = multiply(x), kernel.reference(x, *packed, bits)
        assert y.shape == (tokens, rows)
        assert ((y - expected).abs() <= 2e-6 * (x.abs().sum(-1, keepdim=True) * 2**bits + 1)).all()


def check_extremes(kernel, product, rows, bits):
    """All codes and activations at their limits, signs alike and mixed, do not overflow."""
    for code in (0, 2**bits - 1):
        q, zero = torch.full((rows, 4096), code), None if bits == 8 else torch.zeros(rows, 1)
        layout = kernel.pack(stored(q, bits), torch.ones(rows, 1), zero, 4096, bits)
        for x in (torch.ones(1, 4096), -torch.ones(1, 4096)):
            y = product(x, *layout, rows, 4096, bits)
            assert torch.allclose(y, x.sum() * (code - 2 ** (bits - 1)) * torch.ones(rows), rtol=1e-5)


def check_spoilt_tokens(kernel, packed, multiply, bits, places, values):
    """A token with such values at some places is NaN, by the reference too, and the others stay as they were."""
    x = activations(4, 64)
    expected = multiply(x)
    for bad in values:
        spoilt = x.clone()
        spoilt[2, places] = bad
        y = multiply(spoilt)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
        assert kernel.reference(spoilt, *packed, bits)[2].isnan().all()


def check_alone_and_together(multiply, x, counts):
    """A token has the same bits alone, in batches and on 1, 2 and 3 threads."""
    expected = torch.cat([multiply(row) for row in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in counts:
            assert torch.equal(multiply(x[:tokens]), expected[:tokens])
    torch.set_num_threads(before)


def repeated_on_threads(run, repeats):
    """What `run` gives, several times on each of 1, 2 and 3 threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found += [run() for _ in range(repeats)]
    torch.set_num_threads(before)
    return found


def check_operator(packed, operator, group, bits):
    """A packed layer of 64 inputs compiles whole, exports for any number of tokens, and its fake kernel is right."""
    x, model = activations(3, 64), torch.nn.Sequential(packed)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
        assert torch.equal(program.module()(x), expected)
        longer = activations(7, 64)
        assert torch.equal(program.module()(longer), packed(longer))
    parts = (x, packed._codes, packed._grid, packed.out_features, group, bits)
    torch.library.opcheck(operator, parts, test_utils="test_faketensor")
