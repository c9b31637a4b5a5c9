"""What autograd keeps between the forward and the backward pass, counted and made smaller (eDKM).

Three reductions of what differentiable k-means saves, each exact:
- marshalling: a tensor that was saved before, or a view of it, is kept once, with the view to make of it;
- uniquification: rows that depend only on a 16-bit weight are kept once per value, with a 16-bit index per weight;
- sharding: each process keeps its part of the indices, and they are gathered when the backward pass wants them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lilliput.errors import UserError

HALF = 2**15  # moves indices 0 .. 65535 into int16
MODES = ("copy", "marshal", "unique", "shard")


@dataclass
class Unique:
    """Which of n weights have equal 16-bit values: `first` (m,) places of the values, `index` (n,) int64 into them."""

    first: Tensor
    index: Tensor

    @classmethod
    def of(cls, u: Tensor) -> Unique:
        """From bfloat16 values kept in any float type, by their bit patterns: no sorting."""
        patterns = u.detach().bfloat16().flatten().view(torch.int16).long() + HALF
        place = torch.full((2 * HALF,), -1)
        place[patterns.flip(0)] = torch.arange(len(patterns)).flip(0)
        used = place >= 0
        rank = used.cumsum(0) - 1
        return cls(place[used], rank[patterns])

    @property
    def counts(self) -> Tensor:
        """Weights of each value, (m,) float32."""
        return torch.bincount(self.index, minlength=len(self.first)).float()


class _Kept:
    """One saved tensor; counted for as long as autograd, or another record that shares it, holds it."""

    def __init__(self, tensor: Tensor, keeper: Keeper, source: StorageWeakRef | None = None):
        self.tensor, self.source = tensor, source
        keeper._add(tensor.nbytes)
        weakref.finalize(self, keeper._add, -tensor.nbytes)


class Keeper:
    """Counts, and with the modes after "copy" reduces, what is saved for backward inside `with keeper.saving()`.

    "copy" keeps every saved tensor by itself, as moving them to another memory does; each later mode adds one of the
    reductions above. `live_bytes` is what is held now, `peak_bytes` the most that was.
    """

    def __init__(self, mode: str = "unique"):
        if mode not in MODES:
            raise UserError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
        if mode == "shard" and not dist.is_initialized():
            raise UserError('mode "shard" needs torch.distributed; call init_process_group, or choose "unique"')
        self.mode, self.live_bytes, self.peak_bytes = mode, 0, 0
        self._seen: weakref.WeakValueDictionary[Any, _Kept] = weakref.WeakValueDictionary()
        self._unique: Unique | None = None
        self._index: _Kept | None = None

    def _add(self, count: int) -> None:
        self.live_bytes += count
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def memory_report(self) -> dict[str, int]:
        """Bytes saved for backward: now, and at the peak."""
        return {"live_bytes": self.live_bytes, "peak_bytes": self.peak_bytes}

    @contextmanager
    def saving(self) -> Iterator[Keeper]:
        """Counts and reduces what the operations inside save."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved()):
            yield self

    @contextmanager
    def clustering(self, u: Tensor) -> Iterator[None]:
        """Inside, saved tensors with a row per weight depend on nothing but its bfloat16 value in `u` (n,)."""
        if self.mode in ("unique", "shard"):
            self._unique = Unique.of(u)
            self._index = self._kept_index(self._unique.index)
        try:
            yield
        finally:
            self._unique = self._index = None

    def _kept_index(self, index: Tensor) -> _Kept:
        if self.mode == "shard":
            part = -(-len(index) // dist.get_world_size())
            index = index[part * dist.get_rank() : part * (dist.get_rank() + 1)]
        return _Kept((index - HALF).to(torch.int16), self)

    def _pack(self, tensor: Tensor):
        if self.mode == "copy":
            kept = _Kept(tensor.clone(), self)
            return lambda: kept.tensor
        if self._unique is not None and tensor.ndim > 0 and len(tensor) == len(self._unique.index):
            return self._by_value(tensor, self._unique, self._index)
        return self._by_reference(tensor)

    def _by_reference(self, tensor: Tensor):
        """The whole storage, kept once, and how this tensor lies in it."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes(), tensor.dtype, tensor._version
        kept = self._seen.get(key)
        if kept is None:
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage)  # type: ignore[call-overload]
            kept = self._seen[key] = _Kept(flat, self)
        whole, lies = kept, (tensor.shape, tensor.stride(), tensor.storage_offset())
        return lambda: whole.tensor.as_strided(*lies)

    def _by_value(self, tensor: Tensor, unique: Unique, index: _Kept | None):
        """A row for each value; a tensor that comes again in another view has its table kept once."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
        kept = self._seen.get(key)
        if kept is None or kept.source is None or kept.source.expired():  # another tensor may have come to its address
            kept = self._seen[key] = _Kept(tensor.detach()[unique.first], self, StorageWeakRef(storage))
        assert index is not None
        table, count = kept, len(tensor)
        return lambda: table.tensor[self._gathered(index, count)]

    def _gathered(self, index: _Kept, count: int) -> Tensor:
        part = index.tensor
        if self.mode == "shard":
            size = -(-count // dist.get_world_size())
            padded = torch.nn.functional.pad(part, (0, size - len(part)))
            parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
            dist.all_gather([p.view(torch.uint8) for p in parts], padded.view(torch.uint8))  # gloo lacks int16
            part = torch.cat(parts)[:count]
        return part.long() + HALF
