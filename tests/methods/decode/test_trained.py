"""Files of what decoders learned."""

import pytest
import torch

from lilliput.errors import UserError
from lilliput.methods.decode.gated_lora_mtp import MaskAdapters
from lilliput.methods.decode.medusa import MedusaHeads
from lilliput.methods.decode.speculative_streaming import Streams


@pytest.fixture
def parts(model, make_rows):
    heads = MedusaHeads(2, 32)
    torch.nn.init.normal_(heads.weight)
    return [heads, make_rows("masks", model), make_rows("streams", model)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_loaded_is_what_was_saved_to_the_bit(which, parts, tmp_path):
    part = parts[which]
    again = type(part).load(part.save(tmp_path / "new" / "part.safetensors"))
    assert again.rebuild_config() == part.rebuild_config()
    assert list(again.state_dict()) == list(part.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in part.state_dict().items())
    assert not again.training


def test_files_of_something_else_are_refused(parts, tmp_path):
    file = parts[0].save(tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=r"holds MedusaHeads, not Streams; load it with MedusaHeads\.load"):
        Streams.load(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"heads\.safetensors"):
        MedusaHeads.load(file)
    with pytest.raises(UserError, match=r"absent\.safetensors"):
        MaskAdapters.load(tmp_path / "absent.safetensors")
