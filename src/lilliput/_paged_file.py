"""The file of a paged store: equal records that begin at whole blocks, their checksums, and reads past the page cache.

Header, records and a table of CRC-32 stand one after another, little-endian, each from a whole block on.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lilliput.cache import write_atomically
from lilliput.errors import UserError

MAGIC, VERSION = b"LILPAGES", 1
_PREAMBLE = struct.Struct("<8sIII")  # magic, version, bytes and CRC-32 of the JSON that follows
BLOCK_BYTES = 4096  # what every disk reads at once; direct reads begin and end at multiples of it
LONGEST_HEADER = 2**20
DIRECT, ADVISED, CACHED = "O_DIRECT", "posix_fadvise", "page cache"


@dataclass(frozen=True)
class Field:
    """One tensor of a record and the place of its bytes there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a file."""

    fields: tuple[Field, ...]
    records: int
    block_bytes: int
    data_start: int
    table_crc: int = 0

    @classmethod
    def of(cls, named: Iterable[tuple[str, torch.dtype, Sequence[int]]], block_bytes: int, **facts: int) -> Layout:
        """The layout whose records hold these tensors one after another."""
        fields, start = [], 0
        for name, dtype, shape in named:
            fields.append(Field(name, dtype, tuple(shape), start))
            start = fields[-1].stop
        return cls(tuple(fields), block_bytes=block_bytes, **facts)

    @property
    def record_bytes(self) -> int:
        return self.fields[-1].stop

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return _rounded_up(self.record_bytes, self.block_bytes)

    def offset(self, number: int) -> int:
        """Where a record begins in the file."""
        return self.data_start + number * self.stride

    @property
    def table_start(self) -> int:
        return self.offset(self.records)

    @property
    def file_bytes(self) -> int:
        return self.table_start + 4 * self.records

    def header(self) -> bytes:
        """The first bytes of the file, without what fills the block."""
        tensors = [[f.name, str(f.dtype).removeprefix("torch."), list(f.shape)] for f in self.fields]
        text = json.dumps(
            {
                "tensors": tensors,
                "records": self.records,
                "block_bytes": self.block_bytes,
                "data_start": self.data_start,
                "table_crc": self.table_crc,
            }
        ).encode()
        return _PREAMBLE.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text


# --- writing -----------------------------------------------------------------------------------------------------


def write_store(path: str | Path, records: Iterable[Mapping[str, Tensor]], block_bytes: int = BLOCK_BYTES) -> Path:
    """Write records, each with tensors of the same names, types and shapes, beside `path` and move them there.

    One record is in memory at a time. A record takes whole blocks: `block_bytes` of 512 wastes less where the disk
    allows it. Raises UserError for no or unequal records and when the disk has no room; `path` is then as it was.
    """
    if block_bytes < 512 or block_bytes & (block_bytes - 1):
        raise UserError(f"block_bytes is {block_bytes}; give a power of two from 512 up, most disks take {BLOCK_BYTES}")
    path = Path(path)
    try:
        return write_atomically(path, lambda beside: _write(beside, iter(records), block_bytes))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        free = shutil.disk_usage(path.parent).free
        raise UserError(f"no room for {path}: its disk has {free} bytes left; free some or give another path") from None


def _write(beside: Path, records: Iterator[Mapping[str, Tensor]], block_bytes: int) -> None:
    first = next(records, None)
    if not first:
        raise UserError("a store needs at least one record with at least one tensor; none was given")
    named = [(name, tensor.dtype, tensor.shape) for name, tensor in first.items()]
    widest = Layout.of(named, block_bytes, records=2**53, data_start=2**53, table_crc=2**32)
    layout = Layout.of(named, block_bytes, records=0, data_start=_rounded_up(len(widest.header()), block_bytes))
    if len(widest.header()) > LONGEST_HEADER or layout.record_bytes == 0:
        raise UserError(f"a record of {len(named)} tensors with {layout.record_bytes} bytes cannot be stored")
    with beside.open("wb") as file:
        file.seek(layout.data_start)
        sums = array("I", [_write_record(file, layout, first, 0)])
        sums.extend(_write_record(file, layout, record, i) for i, record in enumerate(records, 1))
        table = _little_endian(sums)
        file.write(table)
        facts = {"records": len(sums), "data_start": layout.data_start, "table_crc": zlib.crc32(table)}
        file.seek(0)
        file.write(Layout.of(named, block_bytes, **facts).header())
        file.flush()
        os.fsync(file.fileno())


def _write_record(file: BinaryIO, layout: Layout, record: Mapping[str, Tensor], number: int) -> int:
    """Append one record, filled up to whole blocks; its CRC-32."""
    expected = [(f.name, f.dtype, f.shape) for f in layout.fields]
    found = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in record.items()]
    if found != expected:
        raise UserError(f"record {number} holds {found}, the first one {expected}; all must be equal")
    content = b"".join(_bytes_of(tensor) for tensor in record.values())
    file.write(content + bytes(layout.stride - layout.record_bytes))
    return zlib.crc32(content)


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _little_endian(sums: array) -> bytes:
    if sys.byteorder == "big":
        sums = array("I", sums)
        sums.byteswap()
    return sums.tobytes()


def _rounded_up(size: int, block: int) -> int:
    return -(-size // block) * block


# --- reading -----------------------------------------------------------------------------------------------------


def read_layout(path: str | Path) -> Layout:
    """The layout of a file. Raises UserError when it is no store, of another version, damaged or cut short."""
    try:
        with open(path, "rb") as file:
            start = file.read(_PREAMBLE.size)
            magic, version, length, checksum = _PREAMBLE.unpack(start.ljust(_PREAMBLE.size, b"\0"))
            text = file.read(length) if magic == MAGIC and length <= LONGEST_HEADER else b""
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot open the store {path}: {error.strerror or error}") from None
    if magic != MAGIC:
        raise UserError(f"{path} is not a store of Lilliput; write one with write_store")
    if version != VERSION:
        raise UserError(f"{path} is a store of version {version}, this Lilliput reads {VERSION}; write it again")
    if not text or zlib.crc32(text) != checksum:
        raise UserError(f"the header of {path} is damaged; write the store again")
    layout = _parsed(json.loads(text))
    if size != layout.file_bytes:
        raise UserError(f"{path} has {size} bytes instead of {layout.file_bytes}; write the store again")
    return layout


def _parsed(header: dict[str, Any]) -> Layout:
    named = []
    for name, kind, shape in header.pop("tensors"):
        dtype = getattr(torch, kind, None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"a store holds {name!r} as {kind}, which this torch does not have; update torch")
        named.append((name, dtype, shape))
    return Layout.of(named, **header)


def read_sums(path: Path, layout: Layout) -> array:
    """The CRC-32 of each record. Raises UserError when the table itself is damaged."""
    with path.open("rb") as file:
        file.seek(layout.table_start)
        table = file.read(4 * layout.records)
    if zlib.crc32(table) != layout.table_crc:
        raise UserError(f"the checksums of {path} are damaged; write the store again")
    return array("I", table if sys.byteorder == "little" else _little_endian(array("I", table)))


def open_past_cache(path: Path, layout: Layout) -> tuple[int, str]:
    """A descriptor whose reads leave nothing in the page cache where the system can do that, and how."""
    if hasattr(os, "O_DIRECT"):
        try:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # the file system has no direct reads
            file = None
        if file is not None:
            if _reads_directly(file, layout):
                return file, DIRECT
            os.close(file)
    file = os.open(path, os.O_RDONLY)
    if not hasattr(os, "posix_fadvise"):
        return file, CACHED
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return file, ADVISED


def _reads_directly(file: int, layout: Layout) -> bool:
    """Whether the disk takes reads of the file's blocks: its own may be larger."""
    block = mmap.mmap(-1, layout.block_bytes)
    try:
        return os.preadv(file, [block], layout.data_start) > 0
    except OSError:
        return False


def read_fully(file: int, target: memoryview, offset: int, path: Path) -> None:
    """Read until `target` is full. Raises UserError when the file ends before or cannot be read."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(file, [target[done:]], offset + done)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        if count == 0:
            raise UserError(f"{path} was cut short while it was open; write the store again")
        done += count
