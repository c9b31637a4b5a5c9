"""The layers that are timed are those that a plan would build, but for their values."""

import pytest
import torch

from lilliput.fitting.decoder_formats import FORMATS, held_bytes
from lilliput.fitting.latency_table import ROWS, _layer
from lilliput.metrics.memory import weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("label", FORMATS)
@pytest.mark.parametrize("shape", [(ROWS, 64), (3 * ROWS, 96), (40, 32)])
def test_rows_are_repeated_in_the_layout_of_the_format(label, shape):
    layer = _layer(shape, FORMATS[label])
    y = layer(torch.randn(1, shape[1]))
    assert y.shape == (1, shape[0])
    assert torch.isfinite(y).all()
    assert weight_bytes(layer) == held_bytes(label, shape)
    if FORMATS[label] is not None:
        few = _layer((ROWS, shape[1]), FORMATS[label]).dequantized()
        assert torch.equal(layer.dequantized(), few.repeat(-(-shape[0] // ROWS), 1)[: shape[0]])
