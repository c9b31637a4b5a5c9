"""The house rules that a machine can check: who may import whom, sizes of files and functions, forbidden names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lilliput"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {
    ".".join(("lilliput", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}

# A module may import its own layer and those above its line here; the longest matching name counts.
LAYERS = [
    {"errors", "cache", "hooks"},
    {"_probe", "budget", "device", "edits", "framing", "method", "paged_store", "_paged_file", "paper"}
    | {"training", "checkpoints", "data_parallel"},
    {"workload"},
    {"zoo"},
    {"anatomy", "graph", "kernels", "metrics", "moments", "onnx_export", "runtimes"},
    {"methods"},
    {"plan"},
    {"artifact", "hf_quantizer", "_transformers_hook", "gguf_export", "_gguf_matrices", "_gguf_tokenizer"},
    {"auditing", "measuring", "reopening", "served", "serving", "exporting"},
    {"fitting"},
    {"catalogue", "cli"},
    {"papers"},
]
REASONS = {
    ("workload", "zoo"): "Workload.from_name is the public way to the zoo; imported when it is called",
}
PUBLIC_ROOT = {"cli", "papers"}  # may use `import lilliput as lp`, as any user would


def layer_of(module):
    name = module.removeprefix("lilliput").removeprefix(".")
    found = [(len(key), i) for i, layer in enumerate(LAYERS) for key in layer if f"{name}.".startswith(f"{key}.")]
    assert found, f"{module} stands in no layer; add it to LAYERS"
    return max(found)[1]


def part(module):
    """`methods` of `lilliput.methods.prune.depth`."""
    return module.split(".")[1] if "." in module else ""


def imports(path):
    """Every module of ours that a file imports, at its top or inside a function, but not for type checking only."""
    tree = ast.parse(path.read_text())
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(n) for block in checking for n in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
    return {name for name in found if name.split(".")[0] == "lilliput"}


EDGES = [(name, target) for name, path in MODULES.items() if name != "lilliput" for target in sorted(imports(path))]


def test_every_import_goes_down_the_layers():
    wrong = []
    for name, target in EDGES:
        if target == "lilliput" or (part(name), part(target)) in REASONS:
            continue
        if layer_of(target) > layer_of(name):
            wrong.append(f"{name} imports {target}")
    assert not wrong


def test_every_exception_is_still_needed():
    used = {(part(name), part(target)) for name, target in EDGES}
    assert set(REASONS) <= used


def test_only_the_outermost_use_the_public_package():
    """Inside, `import lilliput` would load the whole house; `__version__` is all that may be read from it."""
    for name, target in EDGES:
        if target == "lilliput" and part(name) not in PUBLIC_ROOT:
            taken = re.findall(
                r"^\s*(?:from lilliput import (.+)|import lilliput(?: as \w+)?$)", MODULES[name].read_text(), re.M
            )
            assert set(taken) <= {"__version__"}, name


def test_nothing_imports_papers_or_benchmarks():
    for name, path in MODULES.items():
        if part(name) != "papers":
            assert not any(part(target) == "papers" for target in imports(path)), name
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)\b", path.read_text(), re.M), name


def test_methods_do_not_know_the_engine_that_uses_them():
    for name, target in EDGES:
        if part(name) == "methods":
            assert part(target) not in ("fitting", "plan", "artifact", "measuring", "cli"), f"{name} imports {target}"


def test_the_zoo_stands_on_workloads_and_training_alone():
    allowed = {"workload", "training", "cache", "errors", "zoo", *(b for a, b in REASONS if a == "zoo")}
    assert {part(target) for name, target in EDGES if part(name) == "zoo"} <= allowed


@pytest.mark.parametrize("package", ["torchvision", "timm", "requests", "urllib3", "pickle"])
def test_forbidden_packages_are_not_imported(package):
    pattern = re.compile(rf"^\s*(from|import) {package}\b", re.M)
    assert not [str(p) for p in FILES if pattern.search(p.read_text())]


def test_files_stay_below_400_lines():
    assert not {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) >= 400}


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_functions_stay_within_60_lines():
    sizes = {f"{p.relative_to(ROOT)}:{f.name}": (f.end_lineno or 0) - f.lineno + 1 for p in FILES for f in functions(p)}
    assert not {name: lines for name, lines in sizes.items() if lines > 60}


def test_every_module_says_what_it_is_for():
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc, f"{path.relative_to(ROOT)} has no docstring"


def tracked():
    """Text files that belong to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in FILES]
    paths = [ROOT / name for name in names if (ROOT / name).is_file()]
    return {p: p.read_bytes().decode("utf8", "ignore") for p in paths if p.suffix not in (".safetensors", ".png")}


def test_no_file_is_called_utils():
    assert not [p for p in tracked() if re.match(r"(utils?|helpers?|misc|common)\.py$", p.name)]


def test_no_file_names_a_place_of_this_machine():
    places = [str(ROOT), str(Path.home()) + "/", sys.prefix + "/"]
    homes = re.compile(r"(?<![\w./~-])/(home|Users)/\w")
    for path, text in tracked().items():
        assert not [place for place in places if place in text], path
        assert not homes.search(text), path


def test_no_file_names_a_registry_host():
    hosts = re.compile(r"(pypi\.(python\.)?org|pythonhosted\.org|registry\.npmjs|deb\.debian\.org|download\.pytorch)")
    for path, text in tracked().items():
        if path != Path(__file__):
            assert not hosts.search(text), path


def test_nothing_is_left_to_do():
    words = re.compile(r"\b(TODO|FIXME|XXX)\b|NotImplementedError\(\s*[\"']")
    for path in FILES:
        assert not words.search(path.read_text()), path
