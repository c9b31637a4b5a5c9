"""A language model's context: the example that stands for it, long texts, and what is refused."""

import dataclasses

import pytest
import torch

from lilliput.errors import UserError
from lilliput.workload import ROOM


def test_the_example_leaves_room_for_what_a_measurement_writes(llama_work):
    work = llama_work.at_context(128)
    assert work.example["input_ids"].shape == (1, 128 - ROOM)
    assert llama_work.example["input_ids"].shape == (1, 24)
    assert type(work) is type(llama_work)
    assert work.validation is llama_work.validation


@pytest.mark.parametrize("tokens", [0, -5, ROOM, 100.0, True, None])
def test_a_context_that_is_none_is_refused(llama_work, tokens):
    with pytest.raises(UserError, match=f"context is {tokens}.*above {ROOM}"):
        llama_work.at_context(tokens)


def test_a_context_beyond_the_positions_is_refused(llama_work):
    with pytest.raises(UserError, match="129 tokens, but tiny-llama reads 128"):
        llama_work.at_context(129)


def test_a_vision_model_has_no_context(cnn_work):
    with pytest.raises(UserError, match="tiny-cnn is no language model"):
        cnn_work.at_context(128)


def test_long_text_is_put_together_from_short_windows_and_said_to_be(llama_work):
    text, whole = llama_work.long_text("validation", 100, 3)
    assert text.shape == (1, 100)
    assert not whole
    rows = torch.cat([b["input_ids"] for b in llama_work.validation])
    assert torch.equal(text[0], rows.flatten()[:100])
    assert llama_work.long_text("validation", 1000, 1)[0].shape == (1, 1000)


def test_windows_that_are_long_enough_are_texts(llama_work):
    text, whole = llama_work.long_text("test", 20, 3)
    assert whole
    assert torch.equal(text, llama_work.test[0]["input_ids"][:3, :20])


def test_texts_of_the_data_come_first_and_failing_them_windows(llama_work):
    def texts(split, length, count):
        if length > 50:
            raise UserError("no document is as long")
        return torch.full((count, length), len(split))

    work = dataclasses.replace(llama_work, texts=texts)
    assert torch.equal(work.long_text("test", 50, 2)[0], torch.full((2, 50), 4))
    assert work.long_text("test", 51, 2)[1] is False
