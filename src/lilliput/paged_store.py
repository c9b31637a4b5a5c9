"""Tensors in a file of equal records, of which a cache of limited bytes holds those in use.

    write_store(path, [{"up": row, "down": row}, ...])
    with PagedStore(path, capacity_bytes=2**20) as store:
        store.fetch([3, 7])["up"]  # (2, ...), the record's number is its key

Records begin at whole blocks of the file: one is one read. Reads go past the operating system's page cache
(`PagedStore.access` says how), so that they cost what the disk costs and no second copy takes memory. Which record
makes room for another is a `Policy`.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass, replace
from functools import cache
from operator import index
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from lilliput._paged_file import (
    ADVISED,
    CACHED,
    DIRECT,
    open_past_cache,
    read_fully,
    read_layout,
    read_sums,
    write_store,
)
from lilliput.errors import UserError

__all__ = ["ADVISED", "CACHED", "DIRECT", "Lru", "PagedStore", "Policy", "StoreStats", "write_store"]

SCRATCH_BYTES = 2**20  # a read is at most this long, or one record


class Policy(Protocol):
    """Which record leaves when another needs its place. Keys are record numbers, steps never fall."""

    def touch(self, key: int, step: int) -> None:
        """`key` was used at `step`; called for each key of a request, those in memory before those that come in."""
        ...

    def victim(self, keys: Set[int], step: int) -> int:
        """The one of `keys`, all in memory and not asked for now, that leaves."""
        ...


class Lru:
    """The least recently used record leaves."""

    def __init__(self):
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, key: int, step: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def victim(self, keys: Set[int], step: int) -> int:
        found = next(key for key in self._order if key in keys)
        del self._order[found]
        return found


@dataclass
class StoreStats:
    """What a store has done since it was opened or reset: each key of a request is a hit or a miss."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    reads: int = 0  # calls; records that lie side by side come in one
    bytes_read: int = 0  # whole blocks

    def __add__(self, other: StoreStats) -> StoreStats:
        return StoreStats(*(a + b for a, b in zip(astuple(self), astuple(other))))

    @property
    def hit_rate(self) -> float:
        """Share of the asked keys that were in memory, 0 when none was asked."""
        return self.hits / max(1, self.hits + self.misses)


class PagedStore:
    """The records of a file, of which at most `capacity_bytes` are in memory; a copy of a store starts empty.

    Reads take up to SCRATCH_BYTES (or one record) more. `readers` threads read what does not lie side by side at once.
    Raises UserError for a damaged file and for a capacity below one record.
    """

    def __init__(self, path: str | Path, capacity_bytes: int, policy: Policy | None = None, readers: int = 4):
        self.path, self.capacity_bytes, self.readers = Path(path), capacity_bytes, readers
        self.policy = Lru() if policy is None else policy
        self.layout = read_layout(path)
        size = self.layout.record_bytes
        if capacity_bytes < size:
            raise UserError(f"capacity_bytes is {capacity_bytes}, a record of {path} takes {size}; give as much")
        if readers < 1:
            raise UserError(f"readers is {readers}; give at least 1")
        self.slots = min(capacity_bytes // size, self.layout.records)  # places for records
        fields = self.layout.fields
        with torch.inference_mode(False):  # what is made in inference mode could not be written to outside
            self.tensors = {  # the cache itself, (slots, *shape) each: read it at the places that `hold` gives
                f.name: torch.empty(self.slots, *f.shape, dtype=f.dtype) for f in fields
            }
            self._bytes = {name: t.view(self.slots, t[0].numel()).view(torch.uint8) for name, t in self.tensors.items()}
        self._slot_of: dict[int, int] = {}
        self._free = list(range(self.slots - 1, -1, -1))
        self._step, self._stats = 0, StoreStats()
        self._lock = threading.RLock()
        self._file: int | None
        self._sums = read_sums(self.path, self.layout)
        self._file, self.access = open_past_cache(self.path, self.layout)

    def __len__(self) -> int:
        return self.layout.records

    def __contains__(self, key: int) -> bool:
        """Whether a record is in memory."""
        return key in self._slot_of

    def __reduce__(self):
        return PagedStore, (self.path, self.capacity_bytes, self.policy, self.readers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give file and memory back; a second call does nothing."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None
            self._slot_of, self._bytes, self.tensors = {}, {}, {}

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            self.close()

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        return replace(self._stats)

    def reset_stats(self) -> None:
        """All counters to zero; what is in memory stays."""
        self._stats = StoreStats()

    def fetch(self, keys: Iterable[int] | Tensor, step: int | None = None) -> dict[str, Tensor]:
        """Copies of the records `keys`, one tensor (len(keys), *shape) for each name.

        `step` is handed to the policy; without one, each call is a step. More keys than fit into memory are read too.
        Raises UserError for a number out of range, a damaged record or a closed store.
        """
        wanted = _numbers(keys)
        pieces = [wanted[i : i + self.slots] for i in range(0, len(wanted), self.slots)] or [[]]
        with self._lock:
            step = self._next_step(step)
            parts = []
            for piece in pieces:
                places = self.hold(piece, step)
                parts.append({name: tensor[places] for name, tensor in self.tensors.items()})
        return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def hold(self, keys: Iterable[int] | Tensor, step: int | None = None) -> Tensor:
        """Bring records into memory and give their places in `tensors`, (len(keys),); they hold until the next request.

        Raises UserError when they do not fit into memory together, and as `fetch` does.
        """
        wanted = _numbers(keys)
        distinct = set(wanted)
        with self._lock:
            file = self._check_request(distinct)
            step = self._next_step(step)
            missing = sorted(key for key in distinct if key not in self._slot_of)
            self._stats.hits += len(distinct) - len(missing)
            self._stats.misses += len(missing)
            for key in sorted(distinct.difference(missing)):
                self.policy.touch(key, step)
            if missing:
                self._make_room(len(missing), distinct, step)
                self._load(file, missing, step)
            return torch.tensor([self._slot_of[key] for key in wanted], dtype=torch.int64)

    def drop(self, keys: Iterable[int]) -> None:
        """Forget records; those that are not in memory are passed over."""
        with self._lock:
            self._free += [self._slot_of.pop(key) for key in keys if key in self._slot_of]

    def _next_step(self, step: int | None) -> int:
        self._step = self._step + 1 if step is None else step
        return self._step

    def _check_request(self, keys: set[int]) -> int:
        """The open file."""
        if self._file is None:
            raise UserError(f"the store {self.path} is closed; open it again")
        if len(keys) > self.slots:
            raise UserError(f"{len(keys)} records at once, the cache holds {self.slots}; raise capacity_bytes")
        wrong = [key for key in keys if not 0 <= key < len(self)]
        if wrong:
            raise UserError(f"{self.path} has no record {wrong[0]}; it has 0 to {len(self) - 1}")
        return self._file

    def _make_room(self, needed: int, wanted: set[int], step: int) -> None:
        candidates = self._slot_of.keys() - wanted if len(self._free) < needed else set()
        while len(self._free) < needed:
            key = self.policy.victim(candidates, step)
            if key not in candidates:
                raise UserError(f"{type(self.policy).__name__} names {key} to leave, which is not among its choices")
            candidates.remove(key)
            self._free.append(self._slot_of.pop(key))
            self._stats.evictions += 1

    def _load(self, file: int, keys: list[int], step: int) -> None:
        """Read records in ascending order; one becomes known only after its checksum was right."""
        stride = self.layout.stride
        per_read = max(1, SCRATCH_BYTES // stride)
        for part in (keys[start : start + per_read] for start in range(0, len(keys), per_read)):
            pages = mmap.mmap(-1, len(part) * stride, flags=mmap.MAP_PRIVATE)  # direct reads want whole pages
            self._read(file, part, memoryview(pages))
            scratch = torch.frombuffer(pages, dtype=torch.uint8).view(len(part), stride)
            places = [self._free.pop() for _ in part]
            rows = torch.tensor(places)
            for field in self.layout.fields:
                self._bytes[field.name][rows] = scratch[:, field.start : field.stop]
            self._slot_of.update(zip(part, places))
            for key in part:
                self.policy.touch(key, step)

    def _read(self, file: int, keys: list[int], target: memoryview) -> None:
        """Fill `target` with records, one read for those that lie side by side. Raises UserError for a damaged one."""
        stride, runs = self.layout.stride, list(runs_of(keys))

        def read(runs: list[tuple[int, int]]) -> None:
            for row, count in runs:
                part, offset = target[row * stride : (row + count) * stride], self.layout.offset(keys[row])
                read_fully(file, part, offset, self.path)
                if self.access == ADVISED:
                    os.posix_fadvise(file, offset, len(part), os.POSIX_FADV_DONTNEED)

        if self.readers > 1 and len(runs) > 1:
            shares = [runs[i :: self.readers] for i in range(min(self.readers, len(runs)))]
            reading = [_pool(self.readers).submit(read, share) for share in shares]
            wait(reading)  # all of them, also when one fails: until then they use the file
            for one in reading:
                one.result()
        else:
            read(runs)
        self._stats.reads += len(runs)
        self._stats.bytes_read += len(keys) * stride
        for row, key in enumerate(keys):
            if zlib.crc32(target[row * stride : row * stride + self.layout.record_bytes]) != self._sums[key]:
                raise UserError(f"record {key} of {self.path} is damaged; write the store again")


@cache
def _pool(readers: int) -> ThreadPoolExecutor:
    """Threads that all stores with so many readers share."""
    return ThreadPoolExecutor(readers, thread_name_prefix="paged-store")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads


def _numbers(keys: Iterable[int] | Tensor) -> list[int]:
    return keys.tolist() if isinstance(keys, Tensor) else [index(key) for key in keys]


def runs_of(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, length) of each stretch of ascending numbers that follow one another."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield start, i - start
            start = i
