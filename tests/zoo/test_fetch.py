"""Packages made here stand for downloaded ones; they lie in the cache folder `archives`, so nothing uses a network."""

import dataclasses
import hashlib
import importlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest

from lilliput import cache, zoo
from lilliput.errors import UserError

fetch = importlib.import_module("lilliput.zoo.fetch")  # `zoo.fetch` is the function of that name
MEMBERS = {"pkg/data/*.txt": "texts/", "pkg/LICENSE": "LICENSE"}
FILES = {"pkg/data/a.txt": b"first", "pkg/data/b.txt": b"second", "pkg/LICENSE": b"free", "pkg/setup.py": b"exit(1)"}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files, links=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def debian(files, tmp_path):
    root = tmp_path / "root"
    for name, content in {**files, "DEBIAN/control": None}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content or b"Package: x\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
        )
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "x.deb"], check=True, capture_output=True)
    return (tmp_path / "x.deb").read_bytes()


def asset_of(content, file="pkg.whl", members=MEMBERS, kind="pypi", place=True):
    """An asset whose one archive holds `content`, put where a user would put it by hand."""
    if place:
        (cache.folder("archives") / file).write_bytes(content)
    archive = fetch.Archive("pkg", "1.0", file, hashlib.sha256(content).hexdigest())
    return fetch.Asset("thing", kind, "a thing", "MIT", "made here", len(content), (archive,), members)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(own_cache):
    return [p.name for p in (own_cache / "assets").iterdir()]


KEPT = {"texts/a.txt": b"first", "texts/b.txt": b"second", "LICENSE": b"free"}


@pytest.mark.parametrize("file", ["pkg.whl", "pkg.tgz", "pkg.deb"])
def test_only_the_listed_members_are_kept(own_cache, tmp_path, file):
    make = {"pkg.whl": zipped, "pkg.tgz": tarred, "pkg.deb": lambda files: debian(files, tmp_path)}[file]
    said = []
    folder = fetch.fetch_asset(asset_of(make(FILES), file), said.append)
    found = contents(folder)
    found.pop(cache.MANIFEST)
    assert found == KEPT
    assert "MIT" in said[-1]
    assert leftovers(own_cache) == ["thing"]


def test_a_second_fetch_does_nothing(own_cache):
    asset = asset_of(zipped(FILES))
    folder = fetch.fetch_asset(asset, lambda line: None)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    (own_cache / "archives" / "pkg.whl").unlink()
    said = []
    fetch.fetch_asset(asset, said.append)
    assert said == ["thing: already there"]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_pin_is_fetched_anew(own_cache):
    fetch.fetch_asset(asset_of(zipped(FILES)), lambda line: None)
    newer = asset_of(zipped({**FILES, "pkg/data/a.txt": b"newer"}))
    assert not fetch.is_fetched(newer)
    assert (fetch.fetch_asset(newer, lambda line: None) / "texts/a.txt").read_bytes() == b"newer"
    assert leftovers(own_cache) == ["thing"]


def test_a_wrong_hash_is_refused_and_leaves_nothing(own_cache):
    asset = asset_of(zipped(FILES))
    (own_cache / "archives" / "pkg.whl").write_bytes(zipped({**FILES, "pkg/LICENSE": b"evil"}))
    with pytest.raises(UserError, match="SHA-256"):
        fetch.fetch_asset(asset, lambda line: None)
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("name", ["../../evil.txt", "/evil.txt", "pkg/../../evil.txt", "..\\evil.txt"])
@pytest.mark.parametrize("file", ["pkg.whl", "pkg.tgz"])
def test_a_path_out_of_the_folder_is_refused(own_cache, name, file):
    asset = asset_of((zipped if file == "pkg.whl" else tarred)({name: b"evil"}), file, {"*.txt": "./"})
    with pytest.raises(UserError, match="refused"):
        fetch.fetch_asset(asset, lambda line: None)
    assert leftovers(own_cache) == []
    assert not list(own_cache.parent.rglob("evil*"))


def test_links_are_not_followed(own_cache):
    content = tarred({"pkg/LICENSE": b"free"}, links=[("pkg/data/a.txt", "/etc/passwd")])
    folder = fetch.fetch_asset(asset_of(content, "pkg.tgz"), lambda line: None)
    assert set(contents(folder)) == {"LICENSE", cache.MANIFEST}


def test_two_members_of_one_name_are_refused(own_cache):
    content = zipped({"pkg/data/a.txt": b"1", "pkg/data/more/a.txt": b"2"})
    with pytest.raises(UserError, match="twice"):
        fetch.fetch_asset(asset_of(content), lambda line: None)


def test_a_missing_member_is_named(own_cache):
    files = {name: content for name, content in FILES.items() if name != "pkg/LICENSE"}
    with pytest.raises(UserError, match="pkg/LICENSE"):
        fetch.fetch_asset(asset_of(zipped(files)), lambda line: None)
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("file", ["pkg.whl", "pkg.tgz", "pkg.deb"])
def test_a_broken_archive_is_a_plain_error(own_cache, file):
    whole = zipped(FILES) if file == "pkg.whl" else tarred({**FILES, "pkg/big": os.urandom(100_000)})
    with pytest.raises(UserError, match="cannot be unpacked"):
        fetch.fetch_asset(asset_of(whole[: len(whole) // 2], file), lambda line: None)
    assert leftovers(own_cache) == []


def test_a_killed_fetch_leaves_nothing_that_counts(own_cache):
    asset = asset_of(zipped(FILES))
    script = textwrap.dedent(
        f"""
        import importlib, os, signal
        fetch = importlib.import_module("lilliput.zoo.fetch")
        a = fetch.Archive(**{dataclasses.asdict(asset.archives[0])!r})
        whole = fetch.unpack
        def unpack(*arguments):
            whole(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        fetch.unpack = unpack
        fetch.fetch_asset(fetch.Asset("thing", "pypi", "", "MIT", "", 1, (a,), {MEMBERS!r}))
        """
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL
    assert [name[:9] for name in leftovers(own_cache)] == [".partial-"]
    assert not fetch.is_fetched(asset)
    assert fetch.fetch_asset(asset, lambda line: None).name == "thing"
    assert fetch.is_fetched(asset)


def test_leftovers_of_killed_fetches_go_after_a_day(own_cache):
    old, young = (cache.folder("assets", f".partial-{name}") for name in ("old", "young"))
    os.utime(old, (0, 0))
    fetch.fetch_asset(asset_of(zipped(FILES)), lambda line: None)
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone", "no manifest"])
def test_damage_is_found_and_fetching_again_repairs_it(own_cache, monkeypatch, harm):
    asset = asset_of(zipped(FILES))
    monkeypatch.setattr(fetch, "assets", lambda: {"thing": asset})
    file = fetch.fetch_asset(asset, lambda line: None) / "texts" / "a.txt"
    assert fetch.folder_of("thing") == asset.folder
    harms = {
        "changed": lambda: file.write_bytes(b"fjrst"),
        "shorter": lambda: file.write_bytes(b"f"),
        "gone": file.unlink,
        "no manifest": (asset.folder / cache.MANIFEST).unlink,
    }
    harms[harm]()
    with pytest.raises(UserError, match="lilliput zoo fetch the-model"):
        fetch.folder_of("thing", "the-model")
    fetch.fetch_asset(asset, lambda line: None)
    assert file.read_bytes() == b"first"


def test_parts_are_joined_in_order_and_checked(tmp_path):
    whole = b"abc" * 1000
    for i in (1, 0, 2):
        (tmp_path / f"model.part0{i}").write_bytes(whole[i * 1000 : (i + 1) * 1000])
    fetch.join_parts(tmp_path / "model", hashlib.sha256(whole).hexdigest())
    assert contents(tmp_path) == {"model": whole}
    with pytest.raises(UserError, match="SHA-256"):
        fetch.join_parts(tmp_path / "model", hashlib.sha256(whole).hexdigest())


# --- downloading -----------------------------------------------------------------------------------------------


def test_a_package_that_cannot_be_had_says_how_to_get_it(own_cache, monkeypatch):
    asset = asset_of(zipped(FILES), place=False)
    monkeypatch.setattr(fetch, "_run", lambda command, place: "no route to host")
    with pytest.raises(UserError) as error:
        fetch.fetch_asset(asset, lambda line: None)
    for part in ("pkg 1.0", "PyPI", "no route to host", "pkg.whl", str(own_cache / "archives")):
        assert part in str(error.value)
    assert leftovers(own_cache) == []


def test_the_package_lists_are_updated_once_when_debian_has_nothing(own_cache, monkeypatch, tmp_path):
    content, commands = debian(FILES, tmp_path), []

    def run(command, place):
        commands.append(command[1])
        if command[1] == "download" and "update" in commands:
            (place / "pkg.deb").write_bytes(content)
        return "" if "update" in commands else "unable to locate"

    monkeypatch.setattr(fetch, "_run", run)
    fetch.fetch_asset(asset_of(content, "pkg.deb", kind="debian", place=False), lambda line: None)
    assert commands == ["download", "update", "download"]


def test_nothing_of_a_package_is_built_or_run(own_cache, monkeypatch):
    commands = {}
    monkeypatch.setattr(fetch, "_run", lambda command, place: commands.setdefault(command[-1], command) and "off")
    for kind in ("pypi", "npm"):
        with pytest.raises(UserError):
            fetch.fetch_asset(asset_of(b"", kind=kind, place=False), lambda line: None)
    assert {"--no-deps", "--only-binary=:all:"} < set(commands["pkg==1.0"])
    assert "--ignore-scripts" in commands["pkg@1.0"]


def test_a_missing_program_and_a_failing_one_are_named(tmp_path):
    assert fetch._run(["no-such-program"], tmp_path) == "no-such-program is not installed"
    assert fetch._run(["sh", "-c", "echo one >&2; echo two >&2; exit 3"], tmp_path) == "two"
    assert fetch._run(["true"], tmp_path) == ""


# --- the catalogue ---------------------------------------------------------------------------------------------


def test_the_catalogue_is_consistent():
    entries = {entry.name: entry for entry in zoo.catalogue()}
    assert {"smollm2-135m", "gemma3-270m", "mobilenet-v2", "resnet-small", "llama-tiny", "sotu"} <= set(entries)
    assert len(entries) == len(zoo.catalogue())
    assert entries["resnet-small"].origin == "trained here"
    for table in zoo.tables()["workloads"].values():
        assert {table[part] for part in ("model", "data") if part in table} <= set(zoo.assets())
    for asset in zoo.assets().values():
        assert all(len(archive.sha256) == 64 for archive in asset.archives)
        assert asset.licence
        assert any(name.startswith("LICENSE") for name in asset.members.values())


@pytest.mark.parametrize("name", ["smollm2-gguf", "sotu", "fashion-mnist", "digits", "mobilenet-v2-weights"])
def test_what_the_tests_need_is_fetched_and_whole(name):
    folder = fetch.folder_of(name)
    for file, facts in cache.manifest(folder)["files"].items():
        assert cache.sha256(folder / file) == facts["sha256"]
    assert (folder / "LICENSE").stat().st_size > 100


def test_nothing_fetched_says_what_to_run(own_cache):
    for name in ("smollm2-135m", "mobilenet-v2"):
        with pytest.raises(UserError, match=f"lilliput zoo fetch {name}"):
            zoo.load(name)
    assert not any(entry.fetched for entry in zoo.catalogue())


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="smollm2-135m"):
        zoo.fetch("smolm2-135m")
    with pytest.raises(UserError, match="nothing to fetch"):
        zoo.fetch([])
    with pytest.raises(UserError, match=r"nowhere/model.*does not exist"):
        zoo.load("nowhere/model")
    with pytest.raises(UserError, match="resnet-small"):
        zoo.load("resnet-smal")
    with pytest.raises(UserError, match="data of the zoo"):
        zoo.load("digits")
    with pytest.raises(UserError, match="batch_size"):
        zoo.load("mobilenet-v2", batchsize=3)


# --- the cache -------------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = cache.write_atomically(tmp_path / "deep" / "file.txt", "old")

    def fail(beside):
        beside.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        cache.write_atomically(path, fail)
    assert contents(tmp_path) == {"deep/file.txt": b"old"}
    with open(path) as reader:
        cache.write_atomically(path, b"new")
        assert reader.read() == "old"
    assert contents(tmp_path) == {"deep/file.txt": b"new"}


def test_the_cache_is_where_the_variable_says(own_cache, monkeypatch):
    assert cache.folder("a", "b") == own_cache / "a" / "b"
    monkeypatch.setenv("HOME", str(own_cache))
    monkeypatch.delenv("LILLIPUT_CACHE")
    assert cache.folder() == own_cache / ".cache" / "lilliput"
