"""Writes the generated parts of the docs from the code and from `results/`; nothing in them is typed by hand.

    python docs/tables.py            # write what is out of date
    python docs/tables.py --check    # exit code 1 when something is out of date

`docs/methods.md`, `docs/papers.md` and `docs/results.md` are generated whole. In other pages the text between
`<!-- name -->` and `<!-- /name -->` is. A figure that was not recorded is called "not recorded": none is made up.
"""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lilliput.catalogue import method_rows, paper_rows
from lilliput.device import Device
from lilliput.method import families

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- Written by docs/tables.py. Do not edit. -->"
NOT_RECORDED = "not recorded"
DIGITS = 4  # shown of a figure
LONGEST = 30  # rows of a table in the README


def pages() -> dict[Path, str]:
    """Every file with generated text -> what it should hold."""
    made = {"methods": methods_page, "papers": papers_page, "results": results_page}
    found = {ROOT / "docs" / f"{name}.md": page() for name, page in made.items()}
    for path in (ROOT / "README.md", ROOT / "docs" / "budgets_and_devices.md"):
        found[path] = filled(path.read_text(encoding="utf-8"))
    return found


def filled(text: str) -> str:
    """A page with the text between its markers written anew."""
    for name, make in PARTS.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if between.search(text):
            part = make()
            text = between.sub(lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text)
    return text


# --- methods ---------------------------------------------------------------------------------------------------


def own_methods() -> dict[str, list[dict[str, Any]]]:
    """Family -> rows of the methods that come with the package; those of other installed packages are left out."""
    rows = method_rows()
    return {family: [r for r in rows if r["name"].startswith(f"{family}.")] for family in families()}


def methods_page() -> str:
    """All methods by family: one table, then the settings of each."""
    parts = [NOTICE, "# Methods", METHODS_INTRO]
    for family, rows in own_methods().items():
        table = markdown_table(
            ("name", "stage", "what", "effect", "data"),
            ((f"[{r['name']}](#{anchor(r['name'])})", r["stage"], r["summary"], r["effect"], r["data"]) for r in rows),
        )
        parts += [f"## {family}", family_summary(family), table, *map(method_section, rows)]
    return "\n\n".join(parts) + "\n"


METHODS_INTRO = """\
`lilliput methods` prints this list, `lilliput method NAME` one entry with its formula and source. The stages run in
this order: initialize, prune, factorize, tokens, depth, train, distill, quantize, serve; an audit changes nothing and
stands in no plan. A method's *data* says what it needs to see: nothing, inputs, or inputs with labels. The *effect* is
what a method is for; figures stand under a method when `results/<name>.csv` was recorded, and they alone count."""


def family_summary(family: str) -> str:
    """The first line of a family's docstring."""
    return (importlib.import_module(f"lilliput.methods.{family}").__doc__ or "").strip().splitlines()[0]


def method_section(row: dict[str, Any]) -> str:
    """One method: class, facts, settings, measurements."""
    family = row["name"].partition(".")[0]
    facts = "; ".join(f"{key} {', '.join(row[key])}" for key in ("needs", "takes", "gives", "keeps") if row[key])
    lines = [f"### {row['name']}", row["summary"], f"`lilliput.methods.{family}.{row['class']}`"]
    if facts:
        lines.append(f"Facts: {facts}.")
    if row["settings"]:
        lines.append(markdown_table(("setting", "default", "range", "meaning"), settings_rows(row["settings"])))
    return "\n\n".join([*lines, *measured_effect(row["name"])])


def settings_rows(settings: dict[str, dict[str, Any]]) -> Iterable[tuple[str, str, str, str]]:
    """Name, default, range and meaning of each setting."""
    for name, setting in settings.items():
        span = "any"
        if setting["choices"]:
            span = ", ".join(f"`{choice}`" for choice in setting["choices"])
        elif setting["low"] is not None or setting["high"] is not None:
            low, high = (None if setting[end] is None else f"{setting[end]:g}" for end in ("low", "high"))
            span = f"{low} to {high}" if low and high else f"{low} or more" if low else f"{high} or less"
        yield f"`{name}`", f"`{setting['default']}`", span, setting["help"]


def measured_effect(name: str) -> list[str]:
    """The rows of results/<family>.<method>.csv, if there are any."""
    path = ROOT / "results" / f"{name}.csv"
    return [f"Measured, `results/{path.name}`:", results_table(path)] if path.is_file() else []


# --- papers ----------------------------------------------------------------------------------------------------


def papers_page() -> str:
    """Every paper: what it claims and whether that holds here."""
    evidence = paper_evidence()
    source = "Last run: `results/papers.json`." if evidence else f"The outcome of a run is {NOT_RECORDED} yet."
    rows = [(p, evidence.get(p["slug"])) for p in paper_rows()]
    overview = markdown_table(
        ("slug", "title", "year", "claim", "holds here"),
        ((f"[{p['slug']}](#{anchor(p['slug'])})", linked_title(p), p["year"], p["claim"], verdict(e)) for p, e in rows),
    )
    sections = [paper_section(p, e) for p, e in rows]
    return "\n\n".join([NOTICE, "# Papers", f"{PAPERS_INTRO} {source}", overview, *sections]) + "\n"


PAPERS_INTRO = """\
`lilliput reproduce SLUG` runs the experiment of a paper, `--full` a longer one, `--seed N` another draw. Each compares
with a baseline and a simple rival. The rule for "holds" was fixed before the outcome was known, and it can fail. The
setting is smaller than the paper's: "does not hold" speaks of this setting."""


def paper_evidence() -> dict[str, dict[str, Any]]:
    """Slug -> evidence of the last run of all papers; empty when none was recorded."""
    path = ROOT / "results" / "papers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def linked_title(paper: dict[str, Any]) -> str:
    """The title with its arXiv page behind it."""
    return f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']})" if paper["arxiv"] else paper["title"]


def verdict(evidence: dict[str, Any] | None) -> str:
    """Holds, does not hold, or not recorded."""
    if evidence is None:
        return NOT_RECORDED
    return "holds" if evidence["holds"] else "**does not hold**"


def paper_section(paper: dict[str, Any], evidence: dict[str, Any] | None) -> str:
    """One paper with the figure of its last run, how it was run and what that does not show."""
    methods = ", ".join(f"[{m}](methods.md#{anchor(m)})" for m in paper["methods"]) or "none"
    head = f"{paper['authors']}, {paper['year']}. {linked_title(paper)}. Methods: {methods}."
    lines = [f"### {paper['slug']}", head, f"Claim: {paper['claim']}", f"Here: {verdict(evidence)}."]
    if evidence is not None:
        lines[-1] = f"Here: {verdict(evidence)}. {evidence['figure']}"
        lines += [evidence_table(evidence["rows"]), f"Set-up: {evidence['setup']}", f"Limits: {evidence['limits']}"]
    return "\n\n".join(lines)


def evidence_table(rows: Sequence[dict[str, Any]]) -> str:
    """The contenders with their figures and spreads."""
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    return markdown_table(
        ("contender", *keys), ([row["name"], *(_with_spread(row, key) for key in keys)] for row in rows)
    )


def _with_spread(row: dict[str, Any], key: str) -> str:
    if key not in row["values"]:
        return ""
    spread = row.get("spread", {}).get(key)
    return shown(row["values"][key]) + ("" if spread is None else f" ± {spread:.2g}")


# --- results ---------------------------------------------------------------------------------------------------


def results_page() -> str:
    """Every row of every benchmark."""
    sections = [result_section(script, result_files(script)) for script in benchmark_scripts()]
    return "\n\n".join([NOTICE, "# Results", *sections]) + "\n"


def results_part() -> str:
    """The recorded tables that are short enough for the README, and what the benchmarks of the others ask."""
    scripts = {script: result_files(script) for script in benchmark_scripts()}
    short = {script: files for script, files in scripts.items() if files and all(map(is_short, files))}
    parts = [result_section(script, files) for script, files in short.items()]
    others = [f"- {question(script)}" for script, files in scripts.items() if files and script not in short]
    return "\n\n".join([*parts, *(["In [all results](docs/results.md):", "\n".join(others)] if others else [])])


def result_section(script: Path, files: Sequence[Path]) -> str:
    """What a benchmark asks, and the files that it wrote as tables."""
    tables = [f"`results/{path.name}`\n\n{results_table(path)}" for path in files]
    head = f"{question(script)} Written by `python benchmarks/{script.name}`."
    return "\n\n".join([head, *(tables or [f"Results: {NOT_RECORDED}."])])


def question(script: Path) -> str:
    """The first line of a benchmark's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem).splitlines()[0]


def benchmark_scripts() -> list[Path]:
    """The benchmarks that can be run."""
    scripts = sorted((ROOT / "benchmarks").glob("[!_]*.py"))
    return [script for script in scripts if "__main__" in script.read_text(encoding="utf-8")]


def result_files(script: Path) -> list[Path]:
    """What a benchmark wrote: results/<its name>.csv and results/<its name>.<model>.csv."""
    written = sorted((ROOT / "results").glob("*.csv"))
    return [path for path in written if path.name.partition(".")[0] == script.stem]


def missing_results() -> list[str]:
    """The files that a benchmark or `lilliput reproduce --all` would write and that are not there."""
    missing = [f"results/{script.stem}*.csv" for script in benchmark_scripts() if not result_files(script)]
    return missing + ([] if paper_evidence() else ["results/papers.json"])


def result_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a CSV, medians over seeds where it has some, and what that says."""
    with path.open(newline="", encoding="utf-8") as file:
        return over_seeds(list(csv.DictReader(file)))


def is_short(path: Path) -> bool:
    return len(result_rows(path)[0]) <= LONGEST


def results_table(path: Path) -> str:
    """A CSV as a table; what is equal in all rows stands below it."""
    rows, notes = result_rows(path)
    if not rows:
        return f"Results: {NOT_RECORDED}."
    common = {k: v for k, v in rows[0].items() if len(rows) > 1 and all(row[k] == v for row in rows) and v}
    empty = {k for k in rows[0] if not any(row[k] for row in rows)}
    columns = [k for k in rows[0] if k not in common and k not in empty]
    notes += [f"{key} {shown(value)}" for key, value in common.items()]
    table = markdown_table(columns, ([shown(row[key]) for key in columns] for row in rows))
    return f"{table}\n\nAll rows: {'; '.join(notes)}." if notes else table


def over_seeds(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """Rows that differ in `seed` and figures alone become one with the medians."""
    seeds = {row.get("seed") for row in rows}
    if len(seeds) < 2:
        return rows, []
    figures = [k for k in rows[0] if k != "seed" and all(is_number(row[k]) for row in rows if row[k])]
    groups: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(v for k, v in row.items() if k not in figures and k != "seed"), []).append(row)
    return [_medians(group, figures) for group in groups.values()], [f"medians over {len(seeds)} seeds"]


def _medians(group: list[dict[str, str]], figures: list[str]) -> dict[str, str]:
    values = {k: [float(row[k]) for row in group if row[k]] for k in figures}
    medians = {k: str(statistics.median(v)) if v else "" for k, v in values.items()}
    return {k: medians.get(k, v) for k, v in group[0].items() if k != "seed"}


def is_number(text: str) -> bool:
    """Whether a cell holds a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def shown(value: Any) -> str:
    """A figure with a few digits; text and whole numbers as they are."""
    text = str(value)
    if not is_number(text) or re.fullmatch(r"-?\d+", text):
        return text
    return f"{float(text):.{DIGITS}g}"


# --- smaller parts ---------------------------------------------------------------------------------------------


def families_part() -> str:
    """Families with the number of their methods."""
    rows = ((f"`{name}`", len(rows), family_summary(name)) for name, rows in own_methods().items())
    return markdown_table(("family", "methods", "what"), rows)


def devices_part() -> str:
    """The devices that come with the package."""
    rows = []
    for name in Device.names():
        d = Device.load(name)
        figures = (d.bandwidth_gbps["memory"][1], d.peak("fp32") / 1e9, d.peak("int8") / 1e9, d.idle_w)
        rows.append(
            (f"`{name}`", d.source["device"], d.cores, f"{d.memory_bytes / 1e9:.3g}", *(f"{x:g}" for x in figures))
        )
    head = ("name", "what", "cores", "memory, GB", "bandwidth, GB/s", "fp32, GOP/s", "int8, GOP/s", "idle, W")
    return markdown_table(head, rows)


PARTS: dict[str, Callable[[], str]] = {
    "results": results_part,
    "families": families_part,
    "devices": devices_part,
}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; `|` and line breaks in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def anchor(heading: str) -> str:
    """The link target that Git hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check only compare; tells what is stale and how much is not recorded."""
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'is out of date' if '--check' in arguments else 'written'}")
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    for name in missing_results():
        print(f"{name} is {NOT_RECORDED}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
