"""Convolutions of signs on every instruction set: values, padding, memory formats, bad input, threads."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.kernels import binary_conv2d as conv
from lilliput.kernels import binary_linear as kernel

LEVELS = (1.0, 0.5, 0.3)
SHAPES = [  # x, filters, kernel, stride, padding, dilation
    ((1, 1, 5, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 20, 9, 11), 17, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 33, 7, 6), 40, (3, 2), (2, 1), (2, 0), (1, 1)),
    ((1, 64, 8, 8), 16, (3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 8, 4, 4), 5, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 16, 3, 3), 16, (5, 5), (1, 1), (4, 3), (1, 2)),  # some filters see nothing of the picture
    ((1, 40, 20, 21), 16, (3, 3), (2, 3), (1, 1), (1, 1)),
    ((0, 8, 4, 4), 5, (3, 3), (1, 1), (1, 1), (1, 1)),
]


def case(size, filters, window, planes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, shift = torch.randn(size, generator=generator), torch.randn(size[1], generator=generator)
    signs = torch.where(torch.rand(filters, size[1], *window, generator=generator) < 0.5, 1.0, -1.0)
    codes = kernel.pack((signs > 0).flatten(2).transpose(1, 2))
    return x, signs, codes, torch.rand(filters, generator=generator) + 0.1, torch.tensor(LEVELS[:planes]), shift


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_products_are_those_of_the_reference(isa, shape, planes, memory_format):
    size, filters, window, *places = shape
    x, signs, codes, scale, levels, shift = case(size, filters, window, planes)
    x = x.to(memory_format=memory_format)
    for moved in (None, shift):
        for by_mean in (False, True):
            y = conv.binary_conv2d(x, codes, scale, levels, window, moved, by_mean, *places)
            expected = conv.reference(x, signs, scale, levels, moved, by_mean, *places)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            assert y.is_contiguous(memory_format=memory_format) or size[0] == 0 or size[1] == 1


def test_places_outside_are_neither_plus_nor_minus_one(isa):
    """Ones over ones with padding count the places inside: 4 in corners, 6 at edges, 9 within."""
    codes = kernel.pack(torch.ones(1, 9, 1, dtype=torch.bool))
    y = conv.binary_conv2d(torch.ones(1, 1, 4, 4), codes, torch.ones(1), torch.ones(1), (3, 3), padding=(1, 1))
    assert y[0, 0].tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]
    for x in (torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)):  # with K, outside places count 0 of 9
        y = conv.binary_conv2d(x, codes, torch.ones(1), torch.ones(1), (3, 3), None, True, padding=(1, 1))
        assert y[0, 0, 0, 0] == pytest.approx(float(x[0, 0, 0, 0]) * 4 * 4 / 9)


def test_a_picture_is_answered_alike_whatever_is_beside_it(isa):
    x, _, codes, scale, levels, shift = case((5, 40, 13, 9), 100, (3, 3), 2)

    def run(part):
        return conv.binary_conv2d(part, codes, scale, levels, (3, 3), shift, True, padding=(1, 1))

    expected = torch.cat([run(picture) for picture in x.split(1)])
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(x), expected)
        assert torch.allclose(run(x.to(memory_format=torch.channels_last)), expected, rtol=1e-6)
    torch.set_num_threads(before)


def test_no_filters_give_nothing(isa):
    x, _, codes, scale, levels, _ = case((2, 8, 4, 4), 0, (3, 3))
    assert conv.binary_conv2d(x, codes, scale, levels, (3, 3)).shape == (2, 0, 2, 2)


def test_strided_pictures_are_copied(isa):
    x, _, codes, scale, levels, _ = case((2, 16, 6, 6), 8, (3, 3))
    expected = conv.binary_conv2d(x, codes, scale, levels, (3, 3))
    assert torch.equal(conv.binary_conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), codes, scale, levels, (3, 3)),
                       expected)  # fmt: skip


def test_what_does_not_fit_is_refused():
    x, _, codes, scale, levels, shift = case((1, 16, 6, 6), 5, (3, 3))

    def refused(match, *arguments, **options):
        with pytest.raises(UserError, match=match):
            conv.binary_conv2d(*arguments, **options)

    refused("float16", x.half(), codes, scale, levels, (3, 3))
    refused("shape", x[0], codes, scale, levels, (3, 3))
    refused("not the layout", x, codes, scale, levels, (3, 2))
    refused("not the layout", x[:, :4], codes, scale, levels, (3, 3))
    refused("does not fit", x[:, :, :2], codes, scale, levels, (3, 3))
    refused("does not fit", x, codes, scale, levels, (3, 3), dilation=(1, 3))
    refused("shift", x, codes, scale, levels, (3, 3), shift[:4])
    refused("4 levels", x, codes, scale, torch.ones(4), (3, 3))
    for name, value in [("stride", (0, 1)), ("padding", (-1, 0)), ("dilation", (1,)), ("padding", (1 << 40, 1))]:
        refused(name, x, codes, scale, levels, (3, 3), **{name: value})
    refused("kernel", x, codes, scale, levels, (0, 3))


def test_the_operator_compiles_and_exports():
    x, _, codes, scale, levels, shift = case((2, 16, 8, 8), 24, (3, 3))

    class Product(torch.nn.Module):
        def forward(self, x):
            return conv.binary_conv2d(x, codes, scale, levels, (3, 3), shift, padding=(1, 1))

    model = Product()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(compiled(given), model(given))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("pictures", min=2)},))
    assert torch.equal(program.module()(x.repeat(2, 1, 1, 1)), model(x.repeat(2, 1, 1, 1)))
