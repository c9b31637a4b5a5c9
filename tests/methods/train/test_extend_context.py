import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.train import extend_context
from lilliput.methods.train._adapting import LORA, PARTS
from lilliput.methods.train.extend_context import ExtendContext, chunks, next_token_loss

SMALL = ExtendContext(window=32, lr=1e-2, rank=4)


@pytest.fixture
def document():
    return torch.randint(3, 64, (150,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def question():
    return torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [32, 33, 64, 100, 1000])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_chunks_cover_the_document_and_overlap_as_asked(length, overlap):
    ids = torch.arange(length)
    found = chunks(ids, 32, overlap)
    assert found.shape[1] == 32
    assert set(found.flatten().tolist()) == set(range(length))
    assert (found.diff(dim=1) == 1).all()
    steps = found[:, 0].diff()
    assert (steps[:-1] == round(32 * (1 - overlap))).all()
    assert (steps > 0).all()
    assert found[0, 0] == 0
    assert found[-1, -1] == length - 1


def test_a_short_document_is_one_chunk_and_one_token_is_none():
    assert chunks(torch.arange(5), 32, 0.5).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(UserError, match="has 1 tokens"):
        chunks(torch.arange(1), 32, 0.5)


def test_the_cost_grows_with_the_length_alone():
    counts = [len(chunks(torch.arange(n), 64, 0.5)) for n in (1024, 2048, 4096)]
    assert counts == [31, 63, 127]


def test_the_loss_is_that_of_transformers(tiny_llama, document):
    ids = document[:96].view(3, 32)
    torch.testing.assert_close(next_token_loss(tiny_llama, ids), tiny_llama(input_ids=ids, labels=ids).loss)


# --- the method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_inside_the_document_is_known_and_outside_it_is_forgotten(tiny_llama, document, question, part, fingerprint):
    if part == LORA:
        pytest.importorskip("peft")
    before, state = fingerprint(tiny_llama), torch.get_rng_state()
    answer = tiny_llama.generate(question, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        unread = float(next_token_loss(tiny_llama, document[None, :100]))
    with SMALL.with_(part=part).read(tiny_llama, document) as reader, torch.no_grad():
        assert reader is tiny_llama
        assert not reader.training
        assert float(next_token_loss(reader, document[None, :100])) < 0.95 * unread
        assert reader.generate(question, min_new_tokens=5, max_new_tokens=5, do_sample=False).shape == (1, 25)
    assert fingerprint(tiny_llama) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny_llama.generate(question, max_new_tokens=5, do_sample=False), answer)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_answer_that_fails_restores_too(tiny_llama, document, error, fingerprint):
    before = fingerprint(tiny_llama)
    with pytest.raises(error), SMALL.read(tiny_llama, document):
        raise error
    assert fingerprint(tiny_llama) == before


def test_nothing_leaks_from_one_document_to_the_next(tiny_llama, document, question):
    with SMALL.read(tiny_llama, document):
        alone = logits(tiny_llama, question)
    with SMALL.read(tiny_llama, document.flip(0)):
        assert not torch.equal(logits(tiny_llama, question), alone)
    with SMALL.read(tiny_llama, document):
        assert torch.equal(logits(tiny_llama, question), alone)


@pytest.mark.parametrize("part", ["ffn_out", LORA])
def test_a_memory_is_recalled_to_the_bit(tiny_llama, document, question, part, fingerprint, tmp_path):
    from safetensors.torch import load_file, save_file

    if part == LORA:
        pytest.importorskip("peft")
    before, method = fingerprint(tiny_llama), SMALL.with_(part=part)
    with method.read(tiny_llama, document):
        expected = logits(tiny_llama, question)
    save_file(method.memory(tiny_llama, document), tmp_path / "memory.safetensors")
    assert fingerprint(tiny_llama) == before
    with method.recall(tiny_llama, load_file(tmp_path / "memory.safetensors")):
        assert torch.equal(logits(tiny_llama, question), expected)
    assert fingerprint(tiny_llama) == before


def test_a_memory_of_other_settings_is_refused(tiny_llama, document, fingerprint):
    before, memory = fingerprint(tiny_llama), SMALL.memory(tiny_llama, document)
    with pytest.raises(UserError, match="part='attention'"), SMALL.with_(part="attention").recall(tiny_llama, memory):
        pytest.fail("the block must not run")
    assert fingerprint(tiny_llama) == before


def test_chunks_are_no_longer_than_the_model_reads(tiny_llama, monkeypatch):
    seen = []

    def spy(ids, window, overlap):
        seen.append(window)
        return chunks(ids, window, overlap)

    monkeypatch.setattr(extend_context, "chunks", spy)
    document = torch.arange(300) % 60
    for window in (1000, 16):
        with ExtendContext(window=window, epochs=1).read(tiny_llama, document):
            pass
    assert seen == [128, 16]


def test_a_document_of_another_vocabulary_is_refused(tiny_llama):
    with pytest.raises(UserError, match="the document holds token 99"), SMALL.read(tiny_llama, [1, 99]):
        pytest.fail("the block must not run")
