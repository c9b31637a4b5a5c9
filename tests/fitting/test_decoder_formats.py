"""What a format takes on disk and in memory is what a layer built in it holds."""

import pytest
import torch
from torch import nn

from lilliput.device import Device
from lilliput.fitting.decoder_formats import FORMATS, held_bytes, stored_bytes
from lilliput.fitting.decoder_space import decoder_space
from lilliput.metrics.memory import weight_bytes
from lilliput.workload import ACCURACY, Workload

pytestmark = pytest.mark.usefixtures("one_thread")


def built(label, shape):
    """A layer in a format, after a product."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)), {"input": torch.randn(2, shape[1])}
    method = FORMATS[label]
    work = Workload(model, [batch], [batch], [batch], ACCURACY, batch)
    layer = model[0] if method is None else method.apply_(model, work, {"0": method})[0]
    layer(batch["input"])
    return layer


@pytest.mark.parametrize("label", FORMATS)
@pytest.mark.parametrize("shape", [(64, 64), (192, 96), (40, 48), (17, 136), (1, 8), (80, 7 * 32)])
def test_bytes_are_those_of_a_built_layer(label, shape):
    layer = built(label, shape)
    assert stored_bytes(label, shape) == sum(t.nbytes for t in layer.state_dict().values())
    assert held_bytes(label, shape) == weight_bytes(layer)


@pytest.mark.parametrize("label", FORMATS)
def test_a_tied_head_takes_what_it_and_its_embedding_hold(label, llama_work):
    method, model = FORMATS[label], llama_work.model
    if method is not None:
        model = method.apply(model, llama_work, layers=["lm_head"])
    llama_work.values(model, "test")
    both = nn.ModuleList([model.lm_head, model.model.embed_tokens])
    assert held_bytes(label, (64, 32), tied=True) == weight_bytes(both)


def test_formats_stand_by_falling_bits():
    bits = [stored_bytes(label, (1024, 1024)) * 8 / 2**20 for label in FORMATS]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 32


@pytest.mark.parametrize("families", [("quantize",), ("quantize", "prune", "factorize")])
def test_sizes_of_genomes_are_those_of_built_models(families, llama_work):
    """Differences from the original, since a space knows only the layers that it changes."""
    space = decoder_space(llama_work, families, 0.5, 1e6, 1, Device.load("raspberry-pi-4"))
    none, generator = (0,) * len(space.units), torch.Generator().manual_seed(1)
    before = space.costs(none)
    for _ in range(8):
        genome = tuple(int(torch.randint(n, (1,), generator=generator)) for n in space.sizes)
        dropped = sum(u.part == "block" and c > 0 for u, c in zip(space.units, genome))
        if dropped > 1:  # of two blocks
            continue
        model, found = space.plan(genome).apply(llama_work), space.costs(genome)
        llama_work.values(model, "test")
        norms = dropped * 2 * 32 * 4
        held = weight_bytes(llama_work.model) - weight_bytes(model) - norms
        assert before["memory_bytes"] - found["memory_bytes"] == held
        saved = sum(t.nbytes for t in distinct(llama_work.model)) - sum(t.nbytes for t in distinct(model)) - norms
        assert before["size_bytes"] - found["size_bytes"] == saved


def distinct(model):
    """Each stored tensor once."""
    return {t.data_ptr(): t for t in model.state_dict().values()}.values()


def test_every_format_is_judged_and_float_costs_nothing(llama_work):
    space = decoder_space(llama_work, ("quantize",), 0.5, 1e6, 1, Device.load("raspberry-pi-4"))
    for unit, damages in zip(space.units, space.damage):
        assert [o.label for o in unit.options] == list(FORMATS)
        assert damages[0] == 0
        assert (damages[1:] > 0).all()
        of = dict(zip(FORMATS, damages))
        assert of["int8"] < of["table4 g64"] < of["table3 g64"]
        assert of["int8"] < of["int4 g32"] < of["int3 g32"] < of["int2 g32"]
