"""A paper and the evidence of its reproduction. Each `papers/<slug>.py` holds one `paper` and one `experiment`."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from dataclasses import asdict, dataclass, field

from lilliput.errors import UserError


@dataclass(frozen=True)
class Paper:
    """What a paper claims, in our words, and the methods here that implement it."""

    title: str
    authors: str
    year: int
    arxiv: str
    claim: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One contender: measured quantities (units in their names) and their spread over seeds or repeats."""

    name: str
    values: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What an experiment found; `holds` is computed from `rows` by a rule fixed beforehand."""

    setup: str  # model, data, sizes, seeds, device: what was really run
    rows: list[Row]  # the baseline and the strongest simple rival included
    holds: bool
    figure: str  # the one line to quote
    limits: str  # what this small run does not show

    def row(self, name: str) -> Row:
        """The row of one contender."""
        return next(r for r in self.rows if r.name == name)

    def to_json(self) -> dict:
        return asdict(self)


def paper_names(pattern: str = "*") -> list[str]:
    """Slugs of the papers that match, found by listing files."""
    package = importlib.import_module("lilliput.papers")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return sorted(n for n in names if fnmatch.fnmatchcase(n, pattern) or pattern in n)


def find_paper(slug: str):
    """The module `papers/<slug>.py`. Raises UserError with the known slugs."""
    if slug not in paper_names():
        raise UserError(f"there is no paper {slug!r}; there are: {', '.join(paper_names())}")
    return importlib.import_module(f"lilliput.papers.{slug}")
