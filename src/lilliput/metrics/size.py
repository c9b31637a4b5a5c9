"""Bytes on disk: of an artifact that exists, and of tensors if they were saved as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lilliput.errors import UserError

# The file is 8 bytes of length, a JSON header padded to 8 bytes, the tensors: https://huggingface.co/docs/safetensors.
# The types stand in the order in which the file holds them.
_DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_ORDER = list(_DTYPES)


def folder_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder; a file that is linked several times counts once."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file or folder {str(path)!r} to take the size of")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    found = {(status.st_dev, status.st_ino): status.st_size for status in (p.stat() for p in files)}
    return sum(found.values())


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file with these tensors, to the byte, without writing it; shared tensors count once."""
    tensors = {name: (_dtype(name, tensor), tensor) for name, tensor in _unique(state).items()}
    offset, header = 0, {}
    for name in sorted(tensors, key=lambda n: (_ORDER.index(tensors[n][0]), n)):
        dtype, tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (text + 7) // 8 * 8 + offset


def _dtype(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UserError(f"{name!r} is of type {dtype}, which a safetensors file cannot hold")
    return dtype


def _unique(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without tensors that are another one under a second name (tied weights)."""
    unique: dict[tuple, str] = {}
    for name, t in state.items():
        unique.setdefault((t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype), name)
    return {name: state[name] for name in unique.values()}
