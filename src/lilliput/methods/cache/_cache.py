"""What all cache policies share: a cache for one text (or batch) at a time that counts the bytes it really holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.hooks import tensors_in

FULL, WINDOW = "full_attention", "sliding_attention"  # what transformers calls the kinds of layers


def held_bytes(cache: Cache) -> int:
    """Bytes of all storages that the tensors of a cache keep alive, those that a view shows in part included."""
    tensors = [t for owner in (cache, *cache.layers) for t in tensors_in(vars(owner).values())]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def policy_layers(model: Any, policy: str, make: Callable[[], PolicyLayer], mixed: bool = True) -> list[Any]:
    """A layer of the cache for each of a decoder's: `make()` where it attends to the whole past, where it has a sliding
    window of its own that of transformers. Raises UserError for other models; with `mixed` False, for windows too."""
    config = getattr(model, "config", None)
    generates = hasattr(model, "generate") and not getattr(config, "is_encoder_decoder", True)
    if not generates or anatomy(model).kind not in ("llama", "gpt2"):
        raise UserError(f"{policy} is for decoders that generate text; {type(model).__name__} is none")
    assert config is not None
    kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    known = {FULL, WINDOW} if mixed else {FULL}
    if FULL not in kinds or set(kinds) - known:
        raise UserError(
            f"{policy} needs layers of {' or '.join(sorted(known))}, at least one of {FULL}; {type(model).__name__} "
            f"has {', '.join(sorted(set(kinds)))}; use the cache that transformers makes for it"
        )
    return [make() if k == FULL else DynamicSlidingWindowLayer(**o) for k, o in zip(kinds, options)]


class PolicyLayer(CacheLayerMixin):
    """Keys and values of one layer. Every tensor it holds has the batch as its first dimension."""

    keys: Any  # (B, heads, n, d), None without a text
    values: Any
    seen: int = 0  # tokens of each row so far, padding and evicted ones included
    waiting = False  # for the attention to show itself after an update, where a layer needs that

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device from the first keys."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens held: positions go on from it."""
        return self.seen

    def get_max_length(self) -> int:
        """No text is too long (-1)."""
        return -1

    def reset(self) -> None:
        """Forget the text."""
        for name in [name for name, value in vars(self).items() if isinstance(value, Tensor)]:
            setattr(self, name, None)
        self.is_initialized, self.seen, self.waiting = False, 0, False

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, change(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, for beam search."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self._rows(lambda tensor: tensor[indices])


class PolicyCache(Cache):
    """A cache that a policy made. It serves one text or one batch of texts: `reset` it before another one.

    Raises UserError when `generate` gets it while it holds a text; `resumed` allows that for one call.
    """

    def __init__(self, layers: Sequence[CacheLayerMixin]):
        super().__init__(layers=list(layers))
        self._may_resume = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to, new ones included."""
        if getattr(self.layers[layer_idx - 1], "waiting", False):
            raise UserError(
                "the model's attention was changed after this cache was made; make a new one by policy.cache(model)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held now."""
        return held_bytes(self)

    def resumed(self) -> Self:
        """This cache, for a prompt that begins with the text it holds."""
        self._may_resume = True
        return self

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """`generate` marks a cache of the user when it begins: the one moment to notice that it is not empty."""
        if (seen := self.get_seq_length()) and not self._may_resume:
            raise UserError(
                f"the cache holds {seen} tokens of an earlier text; call its reset() before another prompt, or give "
                "past_key_values=cache.resumed() when the prompt begins with that text"
            )
        self._may_resume = False


def head_width(model: Any) -> int:
    """Numbers in a key of one head."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
