"""The folder for everything that can be made again: fetched packages, converted models, tables, token windows.

A folder is `seal`ed when it is complete: a manifest lists the size and SHA-256 of each file. `damage` compares.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_STALE_S = 24 * 3600


def folder(*parts: str) -> Path:
    """$LILLIPUT_CACHE or ~/.cache/lilliput, with `parts` below it; made when it is missing."""
    root = os.environ.get("LILLIPUT_CACHE") or Path.home() / ".cache" / "lilliput"
    path = Path(root).expanduser().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, content: bytes | str | Callable[[Path], Any]) -> Path:
    """Write a file beside `path`, then move it into place: readers see the old file or the new one, never half of one.

    `content` is the bytes or text, or a function that writes the file whose path it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_PARTIAL, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def new_folder(target: Path, **facts: Any) -> Iterator[Path]:
    """An empty folder beside `target` that is sealed and moved to `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    beside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=target.parent))
    try:
        yield beside
        seal(beside, **facts)
        beside.chmod(0o755)
        _put(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put(beside: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=target.parent))
        with contextlib.suppress(FileNotFoundError):  # another process was quicker to move it away
            os.replace(target, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(beside, target)
    except OSError:
        if damage(target):  # otherwise another process has just put the same there
            raise


def _remove_stale(parent: Path) -> None:
    """Leftovers of killed processes; what is younger than a day may still be in use."""
    for path in parent.glob(_PARTIAL + "*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def seal(path: Path, **facts: Any) -> None:
    """Write the manifest of a complete folder; `facts` are kept in it and compared by `damage`."""
    files = {str(p.relative_to(path)): _facts_of(p) for p in sorted(path.rglob("*")) if p.is_file()}
    write_atomically(path / MANIFEST, json.dumps({"facts": facts, "files": files}, indent=1))


def _facts_of(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size_bytes": status.st_size, "changed_ns": status.st_mtime_ns, "sha256": sha256(path)}


def manifest(path: Path) -> dict[str, Any]:
    """{"facts", "files"} of a sealed folder; empty ones when there is no readable manifest."""
    try:
        found = json.loads((path / MANIFEST).read_text())
        return {"facts": dict(found["facts"]), "files": dict(found["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"facts": {}, "files": {}}


def damage(path: Path, **facts: Any) -> str:
    """What is wrong with a sealed folder, or "". A file is hashed again only when its size or time changed."""
    found = manifest(path)
    if not found["files"]:
        return f"{path} is not complete"
    if any(found["facts"].get(key) != value for key, value in facts.items()):
        return f"{path} holds another version"
    for name, known in found["files"].items():
        try:
            status = (path / name).stat()
            same_time = status.st_mtime_ns == known["changed_ns"]
            if status.st_size != known["size_bytes"] or not (same_time or sha256(path / name) == known["sha256"]):
                return f"{path / name} is damaged"
        except (OSError, KeyError, TypeError):
            return f"{path / name} is missing"
    return ""
