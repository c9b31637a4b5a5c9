"""One safetensors file of a teacher's answers: the largest probabilities of every picture in every draw.

Tensors `classes` (draws, pictures, k) and `probabilities` (the same, float16); the header says what they are of, and
holds a checksum of each draw, which is compared when that draw is read.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilliput import cache
from lilliput.errors import UserError

KIND, FORMAT = "reinforced dataset", 1
FLOOR = 1e-7  # of a probability, so that its logarithm is finite
DAMAGED = "delete it and store the teacher's answers again"


@dataclass
class Header:
    """What a file holds."""

    data: str  # fingerprint of the pictures
    pictures: int
    classes: int
    top_k: int
    settings: dict[str, Any]  # of the views, and their seed
    checks: list[int] = field(default_factory=list)  # checksum of each draw


class Store:
    """A file that is read draw by draw. Raises UserError when it is missing, damaged or of another version."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); {DAMAGED}") from None
        if metadata.get("kind") != KIND or metadata.get("format") != str(FORMAT):
            found = f"{metadata.get('kind', 'an unknown file')}, version {metadata.get('format', 'unknown')}"
            raise UserError(f"{file} is {found}, not a {KIND} of version {FORMAT}; {DAMAGED}")
        text = metadata.get("header", "")
        if metadata.get("check") != str(zlib.crc32(text.encode())):
            raise UserError(f"the header of {file} is damaged: its checksum is another; {DAMAGED}")
        self.header = Header(**json.loads(text))
        expected = (len(self.header.checks), self.header.pictures, self.header.top_k)
        if shapes != {"classes": expected, "probabilities": expected}:
            raise UserError(f"{file} holds {shapes}, its header says {expected}; {DAMAGED}")

    @property
    def draws(self) -> int:
        return len(self.header.checks)

    def read(self, draw: int) -> tuple[Tensor, Tensor]:
        """(pictures, k) classes and float16 probabilities. Raises UserError when they are not what was written."""
        try:
            with safe_open(self.file, "pt") as stored:
                classes, kept = (stored.get_slice(name)[draw : draw + 1][0] for name in ("classes", "probabilities"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.file} cannot be read ({error}); {DAMAGED}") from None
        if checksum(classes, kept) != self.header.checks[draw]:
            raise UserError(f"draw {draw} of {self.file} is damaged: its checksum is another; {DAMAGED}")
        return classes, kept


def write(file: Path, header: Header, draws: list[tuple[Tensor, Tensor]]) -> None:
    """Write all draws beside the file and move them into its place."""
    header.checks = [checksum(*draw) for draw in draws]
    tensors = {name: torch.stack(part) for name, part in zip(("classes", "probabilities"), map(list, zip(*draws)))}
    text = json.dumps(asdict(header))
    metadata = {"kind": KIND, "format": str(FORMAT), "header": text, "check": str(zlib.crc32(text.encode()))}
    cache.write_atomically(file, lambda beside: save_file(tensors, beside, metadata))


def checksum(classes: Tensor, kept: Tensor) -> int:
    """CRC-32 of the bytes of one draw."""
    return zlib.crc32(kept.contiguous().numpy().tobytes(), zlib.crc32(classes.contiguous().numpy().tobytes()))


def sparse(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, C) -> classes (n, k) in the smallest type that holds them, and their probabilities as float16."""
    kept, classes = probabilities.topk(k, dim=-1)
    count = probabilities.shape[-1]
    kind = torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32
    return classes.to(kind), kept.half()


def log_probabilities(classes: Tensor, kept: Tensor, count: int) -> Tensor:
    """(n, count): logarithms of the kept probabilities, what is left of 1 spread evenly over the other classes."""
    kept = kept.float()
    left = (1 - kept.sum(-1, keepdim=True)).clamp_min(0) / max(count - kept.shape[-1], 1)
    full = left.expand(-1, count).scatter(1, classes.long(), kept)
    return full.clamp_min(FLOOR).log()
