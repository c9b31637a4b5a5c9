"""Which attention the methods that rewrite keys and values know: plain projections and Llama's rotary positions."""

from __future__ import annotations

from torch import nn

from lilliput.anatomy import Attention, needs_blocks
from lilliput.errors import UserError

# Without norms of queries and keys; rotary pairs are the halves of a head.
KNOWN = ("LlamaAttention", "Qwen2Attention", "MistralAttention", "GemmaAttention")


def known_attentions(model: nn.Module, method: str, also: type[nn.Module] | None = None) -> dict[str, Attention]:
    """Name -> parts of every attention of a model, in its order, those without queries or keys of their own left out.

    Raises UserError where one is neither of KNOWN nor of the class `also`.
    """
    found = {b.attention.name: b.attention for b in needs_blocks(model, method).blocks if b.attention}
    for name in found:
        module = model.get_submodule(name)
        if type(module).__name__ not in KNOWN and type(module) is not also:
            kind = type(module).__name__
            raise UserError(f"{method} knows {', '.join(KNOWN)}; {name!r} of this model is a {kind}")
    return found
