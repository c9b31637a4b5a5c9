"""Models and data to begin with: small real ones that come with packages, and nets trained here.

`fetch` is the one thing that downloads. `load` makes a workload of a zoo name, a Hugging Face folder or a GGUF file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput import cache
from lilliput.errors import UserError
from lilliput.zoo.fetch import Asset, assets, fetch_asset, folder_of, is_fetched, tables

if TYPE_CHECKING:
    from torch import nn

    from lilliput.workload import Workload
    from lilliput.zoo.texts import Corpus

TRAINED_HERE = "trained here"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: a workload (causal_lm, classifier) or an asset (pypi, npm, debian)."""

    name: str
    kind: str
    what: str
    size_bytes: int  # to download
    licence: str
    origin: str
    fetched: bool


def catalogue() -> list[Entry]:
    """Every workload, then every asset."""
    found = [_workload_entry(name, table) for name, table in tables()["workloads"].items()]
    for a in assets().values():
        found.append(Entry(a.name, a.kind, a.what, a.size_bytes, a.licence, a.origin, is_fetched(a)))
    return found


def workload_names(kind: str) -> list[str]:
    """The workloads of one kind: causal_lm or classifier."""
    return [name for name, table in tables()["workloads"].items() if table["kind"] == kind]


def _workload_entry(name: str, table: dict[str, Any]) -> Entry:
    needed = _assets_of(name)
    model = assets().get(table.get("model", ""))
    licence, origin = (model.licence, model.origin) if model else ("Apache-2.0", TRAINED_HERE)
    size_bytes, fetched = sum(a.size_bytes for a in needed), all(map(is_fetched, needed))
    return Entry(name, table["kind"], table["what"], size_bytes, licence, origin, fetched)


def _assets_of(name: str) -> list[Asset]:
    """What a name of the catalogue needs: a workload its model and data, an asset itself."""
    table = tables()["workloads"].get(name)
    if table is None and name not in assets():
        raise UserError(f"the zoo has no {name!r}; {_nearest(name, [*tables()['workloads'], *assets()])}")
    names = [name] if table is None else [table[part] for part in ("model", "data") if part in table]
    return [assets()[n] for n in names]


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, 3, 0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(known)}"


def fetch(names: str | Iterable[str], progress: Callable[[str], Any] = print) -> None:
    """Download what the names need, check and unpack it, and make workloads ready to load fast.

    What is there and whole is left alone; what is damaged is made again. Raises UserError when a package cannot be had.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError(f"nothing to fetch; name some of: {', '.join([*tables()['workloads'], *assets()])}")
    needed = {asset.name: asset for name in names for asset in _assets_of(name)}
    for asset in needed.values():
        fetch_asset(asset, progress)
    for name in names:
        if "model" in tables()["workloads"].get(name, {}):
            _make_ready(name, progress)


def _make_ready(name: str, progress: Callable[[str], Any]) -> None:
    """Convert the model and cut the data once, so that loading takes a second."""
    progress(f"{name}: making it ready to load (up to two minutes, once)")
    if "gguf" in tables()["workloads"][name]:
        _converted(name, cure=None)
    load(name)
    progress(f"{name}: ready")


def _converted(name: str, cure: str | None) -> Path:
    """The Hugging Face folder of a workload whose model comes as GGUF."""
    from lilliput.zoo.language import from_gguf

    table = tables()["workloads"][name]
    folder = folder_of(table["model"], name)
    sha256 = cache.manifest(folder)["files"][table["gguf"]]["sha256"]
    return from_gguf(folder / table["gguf"], sha256, cure)


# --- loading ---------------------------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    """The untrained net behind a workload whose source is {"kind": "zoo", "name": name}."""
    if name == "mobilenet-v2":
        from lilliput.zoo.images import MobileNetV2

        return MobileNetV2().eval()
    from lilliput.zoo import nets

    return nets.build(name)


def load(name: str | Path, **options: Any) -> Workload:
    """A workload of the zoo, of a Hugging Face folder or of a .gguf file.

    Language models take `data` (a .txt file or a folder of .txt documents; State of the Union addresses if not
    given), `length` (tokens a window: 256, or what a smaller model reads) and `windows` (their number by split, such as
    {"validation": 8}); classifiers take `batch_size`. Raises UserError for an unknown name, something not fetched, and
    files that do not load.
    """
    table = tables()["workloads"].get(str(name))
    if table is None:
        return _load_path(Path(name), options)
    if table["kind"] == "classifier":
        _check_options(options, {"batch_size"}, name)
        return _load_classifier(str(name), options)
    _check_options(options, {"data", "length", "windows"}, name)
    return _load_language(str(name), options)


def _load_classifier(name: str, options: dict[str, Any]) -> Workload:
    from lilliput.zoo import images, nets

    if name == "mobilenet-v2":
        return images.mobilenet_workload(name, **options)
    folder_of("fashion-mnist", name)
    return images.image_workload(name, nets.load(name), **options)


def _load_language(name: str, options: dict[str, Any]) -> Workload:
    from lilliput.zoo import language, nets

    corpus, rest = _corpus(options, name)
    if name == "llama-tiny":
        digest = cache.sha256(nets.CHECKPOINTS / "llama-tiny.tokenizer.json")
        return language.model_workload(nets.load(name), nets.load_tokenizer(), digest, corpus, name, **rest)
    folder = _converted(name, cure=f"lilliput zoo fetch {name}")
    return language.language_workload(folder, corpus, name, **rest)


def _load_path(path: Path, options: dict[str, Any]) -> Workload:
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        problem = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
        hint = _nearest(str(path), tables()["workloads"])
        if str(path) in assets():
            hint = f"{path} is data of the zoo, not a model; {hint}"
        raise UserError(f"{str(path)!r} {problem} and is no name of the zoo; {hint}")
    from lilliput.zoo import language

    _check_options(options, {"data", "length", "windows"}, path)
    corpus, rest = _corpus(options, "sotu")
    folder = path if path.is_dir() else language.from_gguf(path)
    full = path.resolve()
    return language.language_workload(folder, corpus, full.name if path.is_dir() else full.stem, **rest)


def _corpus(options: dict[str, Any], fetch_name: str) -> tuple[Corpus, dict[str, Any]]:
    """The text that `data` names, and the other options."""
    rest = {key: value for key, value in options.items() if key != "data"}
    return text_corpus(options.get("data"), fetch_name), rest


def text_corpus(data: str | Path | None = None, fetch_name: str = "sotu") -> Corpus:
    """A user's text, or the State of the Union addresses. Raises UserError; `fetch_name` is what its cure fetches."""
    from lilliput.zoo import texts

    return texts.state_of_the_union(fetch_name) if data is None else texts.own_corpus(data)


def _check_options(options: dict[str, Any], known: set[str], name: str | Path) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"{name} has no option {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
