import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lilliput.errors import UserError
from lilliput.metrics.size import folder_bytes, state_bytes


def test_folder_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 7)
    assert folder_bytes(tmp_path) == 17
    assert folder_bytes(tmp_path / "a") == 10
    assert folder_bytes(tmp_path / "sub") == 7


def test_linked_files_count_once(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    os.link(tmp_path / "a", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(tmp_path / "a")
    assert folder_bytes(tmp_path) == 10


def test_empty_and_missing_folders(tmp_path):
    assert folder_bytes(tmp_path) == 0
    with pytest.raises(UserError, match="nothing_here"):
        folder_bytes(tmp_path / "nothing_here")


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64]


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"\\'), min_size=1, max_size=12),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
        max_size=8,
    ).filter(lambda tensors: "__metadata__" not in tensors)
)
def test_state_bytes_are_those_of_the_file(tensors):
    state = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    assert state_bytes(state) == len(save(state))


def test_a_large_state_to_the_byte(tiny_cnn):
    state = tiny_cnn.state_dict()
    assert state_bytes(state) == len(save(state))


def test_types_that_no_file_holds_are_refused():
    with pytest.raises(UserError, match="'phase' is of type complex128"):
        state_bytes({"phase": torch.ones(2, dtype=torch.complex128)})


def test_tied_tensors_are_written_once():
    weight = torch.ones(100, 10)
    tied = {"embed": weight, "head": weight}
    assert state_bytes(tied) == state_bytes({"embed": weight}) == len(save({"embed": weight}))
    assert state_bytes({"embed": weight, "rows": weight[:50]}) > state_bytes(tied)
