"""Heads of tables and of seeds: one copy of the codes under a tied head, saved, reloaded and decoded to the bit."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lilliput.artifact import load, save
from lilliput.kernels.decoder import Decoder, decoder_for
from lilliput.methods.quantize._codebook import CodebookEmbedding, CodebookLinear, fit_codebook
from lilliput.methods.quantize._dkm import DKMEmbedding, DKMLinear
from lilliput.methods.quantize._kernel_linear import KernelEmbedding, KernelLinear
from lilliput.methods.quantize.codebook import Codebook
from lilliput.methods.quantize.dkm import Dkm, clustered_, finalise_
from lilliput.methods.quantize.group import Group
from lilliput.methods.quantize.seeds import SeedEmbedding, SeedLinear, Seeds
from lilliput.metrics.memory import weight_bytes
from lilliput.metrics.size import state_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {
    "4-bit tables": Codebook(bits=4, weighting=False),
    "3-bit tables of rows": Codebook(bits=3, table="rows", rounds=2, samples=64),
    "2-bit tables": Codebook(bits=2, weighting=False, rounds=1),
    "4-bit seeds": Seeds(bits=4, candidates=1),
    "3-bit seeds": Seeds(bits=3, candidates=1),
    "trained tables": Dkm(bits=3, steps=2),
}


@pytest.fixture(params=["tied", "untied"])
def any_work(request, llama_work):
    """The tiny Llama with a head of its own, or with the embedding's."""
    if request.param == "tied":
        return llama_work
    from transformers import LlamaConfig, LlamaForCausalLM

    old = llama_work.model
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**old.config.to_dict(), "tie_word_embeddings": False})).eval()
    model.load_state_dict({k: v for k, v in old.state_dict().items() if k != "lm_head.weight"}, strict=False)
    return dataclasses.replace(llama_work, model=model)


def random_layer(kind, rows, columns, bits, shared=True):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    if kind == "seeds":
        return SeedLinear.from_weight(w, None, bits, 1, False)
    return CodebookLinear.from_codes(*fit_codebook(w, bits, 32 if columns % 32 == 0 else columns, shared), bits, None)


# --- the rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bits", "shared"),
    [*(("tables", b, s) for b in (4, 3, 2) for s in (True, False)), ("seeds", 4, True), ("seeds", 3, True)],
)
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (37, 96), (5, 33), (1, 7)])
def test_looked_up_rows_are_those_of_the_weights(kind, bits, shared, rows, columns):
    layer = random_layer(kind, rows, columns, bits, shared)
    table = layer.embedding(2.0, "float32")
    expected = layer.dequantized()
    exact = {"rtol": 0, "atol": 0} if kind == "tables" else {}
    assert torch.equal(table.dequantized(), expected)
    for shape in ((), (3,), (2, 4), (0,)):
        ids = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(table(ids), 2.0 * expected[ids], **exact)
    for wrong in (-1, rows):
        with pytest.raises(IndexError, match=str(wrong)):
            table(torch.tensor([0, wrong]))


@pytest.mark.parametrize(("kind", "cls"), [("tables", CodebookEmbedding), ("seeds", SeedEmbedding)])
def test_an_embedding_holds_the_memory_of_its_head(kind, cls):
    layer = random_layer(kind, 48, 64, 4)
    table = layer.embedding(1.0, "bfloat16")
    assert type(table) is cls
    assert weight_bytes(nn.ModuleList([layer, table])) == layer.weight_bytes == table.weight_bytes
    assert table(torch.tensor([1])).dtype is torch.bfloat16
    with torch.device("meta"):
        again = cls(**table.rebuild_config())
    again.load_state_dict(table.state_dict(), assign=True)
    ids = torch.arange(48)
    assert torch.equal(again(ids), table(ids))
    layer.codes.zero_()
    assert torch.equal(table.codes, layer.codes)


def test_an_embedding_compiles_and_exports():
    table, ids = random_layer("tables", 48, 64, 3).embedding(1.0, "float32"), torch.arange(5)
    assert torch.equal(torch.compile(table, backend="aot_eager", fullgraph=True)(ids), table(ids))
    program = torch.export.export(table, (ids,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert torch.equal(program.module()(torch.arange(9)), table(torch.arange(9)))


# --- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_head_is_packed_and_shared_where_it_was_tied(name, any_work):
    tied = any_work.model.config.tie_word_embeddings
    model = METHODS[name].apply(any_work.model, any_work)
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, KernelLinear)
    assert sum(isinstance(m, KernelLinear) for m in model.modules()) == 15
    assert isinstance(table, KernelEmbedding) is tied
    assert any_work.model.config.tie_word_embeddings is tied
    with torch.inference_mode():
        batch = any_work.test[0]
        if tied:
            assert model.config.tie_word_embeddings is False
            assert table.codes.data_ptr() == head.codes.data_ptr()
            assert torch.equal(table.dequantized(), head.dequantized())
            whole = copy.deepcopy(any_work.model)  # the same model with the packed weights as float ones
            for module, layer in zip(whole.modules(), model.modules()):
                if isinstance(layer, KernelLinear | KernelEmbedding):
                    module.weight.copy_(layer.dequantized())
            expected, found = (any_work.forward(m, batch) for m in (whole, model))
            assert (found - expected).norm() < 0.03 * expected.norm()
            assert state_bytes(model.state_dict()) < 0.5 * state_bytes(any_work.model.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_it_is_saved_and_loads_in_both_ways_to_the_bit(name, any_work, tmp_path):
    from transformers import AutoModelForCausalLM

    model = METHODS[name].apply(any_work.model, any_work)
    save(model, tmp_path / "a", any_work)
    ids = any_work.example["input_ids"][:1, :8]
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    for again in (load(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        mine, theirs = model.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert weight_bytes(again) == weight_bytes(model)
        with torch.inference_mode():
            assert torch.equal(*(any_work.forward(m, any_work.example) for m in (model, again)))
        assert again.generate(ids, max_new_tokens=5, do_sample=False).tolist() == tokens


@pytest.mark.parametrize("name", METHODS)
def test_it_decodes_natively(name, any_work):
    model = METHODS[name].apply(any_work.model, any_work)
    decoder, ids = decoder_for(model), any_work.example["input_ids"][0]
    assert isinstance(decoder, Decoder)
    with torch.no_grad():
        expected = any_work.forward(model, {"input_ids": ids.unsqueeze(0)})[0]
    found = decoder(ids, decoder.cache(len(ids)), every=True)
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_two_formats_in_a_model_and_a_head_of_one_of_them(llama_work):
    model = Group(bits=4, group=32).apply(llama_work.model, layers=["model.layers.0.*"])
    model = Codebook(weighting=False).apply(model, layers=["lm_head", "model.layers.1.*"])
    assert isinstance(model.model.embed_tokens, CodebookEmbedding)
    assert torch.isfinite(llama_work.values(model, "test")).all()


# --- training --------------------------------------------------------------------------------------------------


def test_a_tied_head_trains_with_its_embedding(llama_work):
    """Both parts give a gradient to one weight, and the embedding moves no centroid."""
    model = copy.deepcopy(llama_work.model)
    method = Dkm(bits=2)
    layers = method.resolve(model)
    clustered_(model, layers).train()
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, DKMLinear)
    assert isinstance(table, DKMEmbedding)
    assert sum(p is head.weight for p in model.parameters()) == 1
    before = head.centroids.clone()
    rows = table(torch.tensor([[3, 5, 3]]))
    assert rows.shape == (1, 3, 32)
    assert torch.equal(rows[0, 0], rows[0, 2])
    assert torch.equal(head.centroids, before)
    head.eval()
    torch.testing.assert_close(rows[0], head.soft_weight()[[3, 5, 3]])
    rows.sum().backward()
    assert head.weight.grad[[3, 5]].abs().sum(1).gt(0).all()
    assert head.weight.grad[torch.arange(64) % 64 > 5].eq(0).all()
    model.zero_grad()
    llama_work.loss(model.train(), llama_work.training[0]).backward()
    assert head.weight.grad.abs().sum() > 0
    packed = finalise_(model, layers)
    assert isinstance(packed.model.embed_tokens, CodebookEmbedding)
    torch.testing.assert_close(packed.model.embed_tokens.dequantized(), packed.lm_head.dequantized())
