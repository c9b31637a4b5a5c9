"""The docs keep up with the code: generated parts are fresh, code blocks run, links and commands exist.

The word after `python` in a fenced block says what is done with it: `run` executes it, with a tiny Llama in the place
of every named model and short fits; `method=`, `paper=` and `test` are tried as the files that the text calls them; a
bare block is compiled. `yaml plan` and `toml device` blocks are read.
"""

import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer

import lilliput as lp
from lilliput.budget import QUANTITIES
from lilliput.cli import app
from lilliput.device import Device
from lilliput.method import find_method, method_names
from lilliput.paper import find_paper, paper_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language, kind=None, pages=PAGES):
    """(page:line, code) of fenced blocks; `kind` is the start of what follows the language."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] == language and (kind is None or match[2].strip().startswith(kind)):
                place = f"{page.name}:{text[: match.start()].count(chr(10)) + 1}"
                found.append(pytest.param(match[3], id=place))
    return found


def load_tables():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()
GENERATED = tables.pages()


# --- generated parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(GENERATED), ids=lambda p: p.name)
def test_generated_text_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == GENERATED[path], "run: python docs/tables.py"


def test_every_method_and_paper_has_a_section():
    methods, papers = tables.methods_page(), tables.papers_page()
    assert all(f"### {row['name']}\n" in methods for rows in tables.own_methods().values() for row in rows)
    assert all(f"### {slug}\n" in papers for slug in paper_names())


def test_documented_class_paths_exist():
    for family, name in re.findall(r"^`lilliput\.methods\.(\w+)\.(\w+)`$", tables.methods_page(), re.MULTILINE):
        assert isinstance(getattr(getattr(lp.methods, family), name), type)


def test_results_are_shown_as_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for folder in ("benchmarks", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "benchmarks" / "race.py").write_text('"""Who is first?"""\nif __name__ == "__main__":\n    pass\n')
    (tmp_path / "benchmarks" / "helper.py").write_text('"""Not a benchmark."""\n')
    assert "not recorded" in tables.results_page()
    assert not tables.results_part()
    assert tables.missing_results() == ["results/race*.csv", "results/papers.json"]
    rows = ["seed,who,ms,runtime", "0,a,1.0,torch", "1,a,3.0,torch", "2,a,2.00001,torch", "0,b|c,9,torch"]
    (tmp_path / "results" / "race.tiny.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "results" / "racer.csv").write_text("x\n1\n")
    part = tables.results_part()
    assert part in tables.results_page()
    assert "| who | ms |\n| --- | --- |\n| a | 2 |\n| b\\|c | 9 |" in part
    assert "medians over 3 seeds; runtime torch." in part
    assert "not recorded" not in part
    assert "racer" not in part
    monkeypatch.setattr(tables, "LONGEST", 1)
    assert tables.results_part().endswith("- Who is first?")


def test_evidence_is_shown_as_recorded(tmp_path, monkeypatch):
    slug = paper_names()[0]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "does not hold" not in tables.papers_page().split("###", 1)[1]
    (tmp_path / "results").mkdir()
    row = {"name": "ours", "values": {"ms": 1.23456}, "spread": {"ms": 0.1}}
    evidence = {"setup": "two cores", "rows": [row], "holds": False, "figure": "1.5 times slower", "limits": "small"}
    (tmp_path / "results" / "papers.json").write_text(json.dumps({slug: evidence}))
    page = tables.papers_page()
    assert "Here: **does not hold**. 1.5 times slower" in page
    assert "| ours | 1.235 ± 0.1 |" in page


def test_check_tells_what_is_stale(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("old")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: {tmp_path / "page.md": "new"})
    assert tables.main(["--check"]) == 1
    assert "page.md is out of date" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert (tmp_path / "page.md").read_text() == "new"
    assert tables.main(["--check"]) == 0


# --- code blocks -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_world(llama_work, tmp_path, monkeypatch):
    """An empty working folder where every named model is a tiny Llama and a fit stops after its first candidates."""
    fit = lp.fit

    def short_fit(*args, **options):
        return fit(*args, **options | {"minutes": 0.02, "trials": 5, "threads": 1, "recover": False, "quiet": True})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lp, "fit", short_fit)
    monkeypatch.setattr(lp.Workload, "from_name", lambda name, **options: llama_work)
    torch.manual_seed(0)


@pytest.mark.parametrize("code", blocks("python", "run"))
def test_marked_python_blocks_run(code, tiny_world):
    exec(compile(code, "<docs>", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_compile(code):
    compile(code, "<docs>", "exec")


@pytest.mark.parametrize("code", blocks("yaml", "plan"))
def test_plans_in_the_docs_are_legal(code, llama_work):
    plan = lp.Plan.from_yaml(code)
    assert plan.check() == []
    plan.apply(llama_work)


@pytest.mark.parametrize("code", blocks("toml", "device"))
def test_devices_in_the_docs_are_complete(code):
    assert Device.from_dict(tomllib.loads(code)).cores > 0


def test_a_plan_stores_the_name_that_an_entry_point_should_have(tmp_path, monkeypatch, llama_work):
    source = extract("method=quantize.half_precision")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "half_precision.py").write_text(source)
    entry = next(c.values[0] for c in blocks("toml") if "entry-points" in c.values[0])
    ((name, value),) = tomllib.loads(entry)["project"]["entry-points"]["lilliput.methods"].items()
    facts = tmp_path / "my_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[lilliput.methods]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert name in method_names()
    plan = lp.Plan([lp.Step(find_method(name)())])
    assert lp.Plan.from_yaml(plan.to_yaml()) == plan
    model = lp.load(lp.save(plan.apply(llama_work), tmp_path / "a", llama_work, plan))
    assert type(model.model.layers[0].mlp.up_proj).__module__ == name
    for module in [m for m in sys.modules if m.startswith("my_package")]:
        del sys.modules[module]


# --- the files of CONTRIBUTING ---------------------------------------------------------------------------------


def extract(kind):
    """The one block of CONTRIBUTING that is marked so."""
    (found,) = blocks("python", kind, [ROOT / "CONTRIBUTING.md"])
    return found.values[0]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Put a file into a package as if it stood there."""
    names = []

    def add(package, name, source):
        assert importlib.util.find_spec(f"{package}.{name}") is None, "the example has the name of a real file"
        (tmp_path / "added").mkdir(exist_ok=True)
        (tmp_path / "added" / f"{name}.py").write_text(source)
        monkeypatch.setattr(
            importlib.import_module(package), "__path__", [*sys.modules[package].__path__, str(tmp_path / "added")]
        )
        names.append(f"{package}.{name}")

    yield add
    for name in names:
        sys.modules.pop(name, None)
        vars(sys.modules[name.rpartition(".")[0]]).pop(name.rpartition(".")[2], None)


@pytest.fixture
def half_precision(added):
    added("lilliput.methods.quantize", "half_precision", extract("method=quantize.half_precision"))
    return find_method("quantize.half_precision")


def test_the_example_method_is_found_by_its_file(half_precision, llama_work):
    assert "quantize.half_precision" in method_names("quantize.*")
    plan = lp.Plan.from_yaml(lp.Plan([lp.Step(half_precision(limit=0.5))]).to_yaml())
    model = plan.apply(llama_work)
    assert llama_work.score(model).value == pytest.approx(llama_work.score(llama_work.model).value, rel=0.02)


def test_the_example_test_passes(half_precision, request, tmp_path):
    names = {"__name__": "example"}
    exec(compile(extract("test"), "<CONTRIBUTING>", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 4
    for test in tests:
        arguments = test.__code__.co_varnames[: test.__code__.co_argcount]
        test(**{name: request.getfixturevalue(name) for name in arguments})


def test_the_example_paper_runs(added):
    added("lilliput.papers", "limited_precision", extract("paper=limited_precision"))
    evidence = find_paper("limited_precision").experiment(seed=1)
    accuracy = {row.name: row.values["accuracy_percent"] for row in evidence.rows}
    assert accuracy["stochastic"] > accuracy["nearest"] + 20
    assert accuracy["float32"] > 60
    assert evidence.holds == (accuracy["float32"] - accuracy["stochastic"] < 1)
    assert json.dumps(evidence.to_json())


# --- links and commands ----------------------------------------------------------------------------------------


def prose(page):
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page):
    """Relative links and pictures of a page."""
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    return [(bool(mark), target) for mark, target in found if not re.match(r"[a-z]+://", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    for target in (t for is_picture, t in links(page) if not is_picture):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
            assert anchor in map(tables.anchor, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pictures_exist(page):
    for target in (t for is_picture, t in links(page) if is_picture):
        assert (page.parent / target).is_file(), f"{page.name} shows {target}"


def command_lines():
    """Every `lilliput ...` line of the shell blocks, and every command named in running text."""
    found = []
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match[1] == "sh":
                parts = [part.strip() for line in match[3].splitlines() for part in line.split("&&")]
                found += [(page.name, part) for part in parts if part.startswith("lilliput ")]
        found += [(page.name, code) for code in re.findall(r"`(lilliput [^`]+)`", prose(page))]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_exist(page, line):
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", ()):
        command = command.commands[words.pop(0)]
    if line in lines_of_blocks():
        command.make_context("lilliput", words)  # parses as the command line does, without running
    options = {name for parameter in command.params for name in parameter.opts}
    assert [word for word in words if word.startswith("--") and word not in options] == []
    assert not hasattr(command, "commands") or not words or words[0].startswith("-"), "there is no such command"


def lines_of_blocks():
    """The commands that stand in shell blocks: those are complete."""
    shell = [case.values[0] for case in blocks("sh")]
    return {part.strip() for code in shell for line in code.splitlines() for part in line.split("&&")}


def test_every_command_is_documented():
    text = " ".join(line for _, line in command_lines())
    commands = typer.main.get_command(app).commands
    assert [name for name in commands if f"lilliput {name}" not in text] == []


def test_every_quantity_and_unit_is_documented():
    page = (ROOT / "docs" / "budgets_and_devices.md").read_text(encoding="utf-8")
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)}
    for quantity, (_, units) in QUANTITIES.items():
        assert set(re.findall(r"`([^`]+)`", rows[quantity])) == {*units, "%"} - {""}
