"""The command line: a thin front of the public API. Exit codes: 0 done, 1 budget or claim not met, 2 wrong call."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Fit neural networks into small machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo_app = typer.Typer(help="Models and data that are known by name.", invoke_without_command=True)
app.add_typer(zoo_app, name="zoo")

DEFAULT_MODEL, DEFAULT_BUDGET = "smollm2-135m", "memory<=50%, time_per_token<=50%"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point: user errors become one message and exit code 2."""
    from lilliput.errors import UserError

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        app(standalone_mode=True)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"lilliput: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lilliput: interrupted", file=sys.stderr)
        sys.exit(130)


def _show(data: Any, text: str, as_json: bool) -> None:
    print(json.dumps(_plain(data), indent=1) if as_json else text)


def _plain(data: Any) -> Any:
    """What JSON can hold: infinity and NaN become null, what is not data becomes its text."""
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data if isinstance(data, bool | int | str | None) else str(data)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Zoo name, Hugging Face directory or GGUF file.")] = DEFAULT_MODEL,
    budget: Annotated[str, typer.Option(help="Limits, e.g. 'memory<=300MB, time_per_token<=15ms'.")] = DEFAULT_BUDGET,
    time_limit: Annotated[str, typer.Option(help="For the whole fit: 10m, 90s, 1h.")] = "8m",
    data: Annotated[Path | None, typer.Option(help="Your text: a .txt file or a folder of them.")] = None,
    device: Annotated[str | None, typer.Option(help="Another (modelled) or an FPGA: `lilliput devices`.")] = None,
    runtime: Annotated[str | None, typer.Option(help="What executes the model; default: the fastest.")] = None,
    families: Annotated[str, typer.Option(help="Comma-separated: quantize, prune, factorize.")] = "quantize,prune",
    sampler: Annotated[str, typer.Option(help="genecai, ascai, random, tpe or nsga2.")] = "genecai",
    trials: Annotated[int, typer.Option(min=1, help="Searched settings per round.")] = 250,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/<model>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    storage: Annotated[str | None, typer.Option(help="Database URL of the search; default SQLite in the run.")] = None,
    ray: Annotated[str | None, typer.Option(help="Run trials on Ray: 'local' or an address.")] = None,
    recover: Annotated[bool, typer.Option(help="Distil the best from the original in the time left.")] = True,
    context: Annotated[int | None, typer.Option(help="Tokens of text to measure a language model with.")] = None,
    serve: Annotated[bool, typer.Option(help="Try drafts and smaller caches on the best plans.")] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit a model into a budget and prove it on this machine."""
    import lilliput as lp
    from lilliput.fitting.aim import AlreadyInside
    from lilliput.fitting.circuit import FittedCircuit
    from lilliput.fitting.request import check_names

    parsed = lp.Budget(budget)
    minutes = parse_minutes(time_limit)
    check_names(runtime, sampler)
    workload = lp.Workload.from_name(model, **({"data": data} if data else {}))
    try:
        fitted = lp.fit(
            workload,
            parsed,
            minutes=minutes,
            device=device,
            runtime=runtime,
            threads=threads,
            families=tuple(f.strip() for f in families.split(",") if f.strip()),
            sampler=sampler,
            trials=trials,
            seed=seed,
            out=out,
            resume=resume,
            storage=storage,
            ray=ray,
            recover=recover,
            context=context,
            serve=serve,
            quiet=as_json,
        )
    except AlreadyInside as inside:
        _show({"met": True, "message": str(inside)}, str(inside), as_json)
        return
    other = "circuit" if isinstance(fitted, FittedCircuit) else "report.html"
    where = f"{other.removesuffix('.html'):8} {fitted.folder / other}\nartifact {fitted.folder / 'fitted'}"
    _show(fitted.record, f"{fitted.summary()}\n{where}", as_json)
    raise typer.Exit(0 if fitted.met else 1)


def parse_minutes(text: str) -> float:
    """'10m', '90s' or '1h' in minutes."""
    from lilliput.errors import UserError

    scale = {"s": 1 / 60, "m": 1.0, "h": 60.0}.get(text[-1:])
    try:
        minutes = float(text[:-1]) * (scale or float("nan"))
    except ValueError:
        minutes = float("nan")
    if not 0 < minutes < float("inf"):
        raise UserError(f"the time limit is {text!r}; write it as in 10m, 90s or 1h")
    return minutes


@app.command()
def measure(
    model: Annotated[
        str, typer.Argument(help="Zoo name, Hugging Face directory, GGUF file or artifact.")
    ] = DEFAULT_MODEL,
    data: Annotated[
        Path | None, typer.Option(help="What judges it: your text; for a classifier's artifact a .safetensors file.")
    ] = None,
    runtime: Annotated[str | None, typer.Option()] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of text to measure a language model with.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Every number of a model on this machine; of an artifact as it is served."""
    import lilliput as lp
    from lilliput.artifact import ARCHITECTURE, serving_of

    workload, judged = _subject(model, data)
    workload = workload if context is None else workload.at_context(context)
    serving = serving_of(model) if (Path(model) / ARCHITECTURE).is_file() else None
    split = "validation" if judged else None
    measured = lp.measure(workload, runtime=runtime, threads=threads, split=split, serving=serving)
    if not judged:
        measured.notes.append("quality is not measured: no data of this model is known; give some with --data")
    _show(measured.to_json(), str(measured), as_json)


@app.command()
def audit(
    fitted: Annotated[str, typer.Argument(help="Artifact, or a model as in --against.")],
    against: Annotated[str, typer.Option(help="The original: zoo name, folder, GGUF file or artifact.")],
    data: Annotated[
        Path | None, typer.Option(help="What both are judged by: text, or a .safetensors file; see `lilliput measure`.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts for a language model, one a line.")] = None,
    only: Annotated[str, typer.Option(help="Comma-separated audits, e.g. groups,membership; default: all.")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a change harmed beyond the score; exit code 1 when harm was found."""
    import lilliput as lp
    from lilliput.errors import UserError

    workload, judged = _subject(against, data)
    if not judged:
        raise UserError(f"no data to judge {against!r} by is known; give some with --data")
    if prompts:
        workload.prompts = read_prompts(prompts)
    names = [name.strip() for name in only.split(",") if name.strip()]
    found = lp.audit(workload, _subject(fitted, data)[0].model, names or None)
    _show(found.to_json(), str(found), as_json)
    if found.harmed:
        raise typer.Exit(1)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that hold something."""
    from lilliput.errors import UserError

    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts {str(path)!r} cannot be read: {error}") from None
    if not found:
        raise UserError(f"the prompts {str(path)!r} are empty; give one a line")
    return found


def _subject(name: str, data: Path | None):
    """The workload of a name, a folder or an artifact, and whether there is data to judge it by."""
    import lilliput as lp
    from lilliput.artifact import ARCHITECTURE

    if not (Path(name) / ARCHITECTURE).is_file():
        return lp.Workload.from_name(name, **({"data": data} if data else {})), True
    from lilliput.reopening import artifact_workload

    return artifact_workload(name, data)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="A plan.yaml.")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder of the artifact.")] = Path("fitted"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Apply a plan to a model and save the artifact."""
    import lilliput as lp

    steps = lp.Plan.load(plan)
    workload = lp.Workload.from_name(model)
    folder = lp.save(steps.apply(workload), out, workload, steps)
    _show({"artifact": str(folder)}, f"artifact {folder}", as_json)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="Artifact of a language model.")],
    prompt: Annotated[str, typer.Argument()],
    tokens: Annotated[int, typer.Option(min=1)] = 64,
    plain: Annotated[bool, typer.Option("--plain", help="Without the drafts or the cache that the fit chose.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Text from a fitted language model, streaming."""
    from lilliput.serving import stream_text

    pieces = []
    for piece in stream_text(folder, prompt, tokens, plain):
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    _show({"prompt": prompt, "text": "".join(pieces)}, "", as_json)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="An artifact.")],
    out: Annotated[Path, typer.Argument(help="model.onnx or model.gguf; for a target a new folder.")],
    target: Annotated[
        str | None, typer.Option(help="verilog: a circuit for an FPGA, and C++; cpp: that alone.")
    ] = None,
    cycles: Annotated[
        int | None, typer.Option(min=1, help="Of a circuit: most that a frame keeps a stage busy.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Of a circuit: .safetensors with inputs, for their range.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an artifact as ONNX or GGUF, checked against the model in memory, or as a circuit."""
    from lilliput.exporting import export_artifact, export_circuit

    facts = export_circuit(folder, out, target, cycles, data) if target else export_artifact(folder, out)
    _show(facts, "\n".join(f"{k} {v}" for k, v in facts.items()), as_json)


@app.command()
def methods(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or with *.")] = "*",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """All methods with what they do."""
    from lilliput.catalogue import method_rows

    rows = method_rows(pattern)
    width = max((len(r["name"]) for r in rows), default=0)
    _show(rows, "\n".join(f"{r['name']:{width}}  {r['effect']:32}  {r['summary']}" for r in rows), as_json)


@app.command()
def method(name: Annotated[str, typer.Argument()], as_json: Json = False, debug: Debug = False) -> None:
    """Settings, facts, paper and measured effect of one method."""
    from lilliput.catalogue import method_page, method_row

    _show(method_row(name), method_page(name), as_json)


@app.command()
def papers(pattern: Annotated[str, typer.Argument()] = "*", as_json: Json = False, debug: Debug = False) -> None:
    """All papers with a reproduction."""
    from lilliput.catalogue import paper_rows

    rows = paper_rows(pattern)
    width = max((len(r["slug"]) for r in rows), default=0)
    _show(rows, "\n".join(f"{r['slug']:{width}}  {r['year']}  {r['title']}" for r in rows), as_json)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Slug of a paper.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every paper.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    full: Annotated[bool, typer.Option("--full", help="As long as it needs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a paper's experiment; exit code 1 when its claim does not hold here."""
    from lilliput.catalogue import evidence_text
    from lilliput.errors import UserError
    from lilliput.paper import find_paper, paper_names

    if (name is None) != all_:
        raise UserError("give the name of one paper, or --all")
    found = {}
    for slug in paper_names() if all_ else [str(name)]:
        evidence = find_paper(slug).experiment(seed=seed, full=full)
        found[slug] = evidence.to_json()
        if not as_json:
            print(evidence_text(slug, evidence))
    if as_json:
        _show(found if all_ else found[str(name)], "", True)
    if not all(e["holds"] for e in found.values()):
        raise typer.Exit(1)


@app.command()
def devices(as_json: Json = False, debug: Debug = False) -> None:
    """Known devices; `here` is this machine, measured."""
    from lilliput.catalogue import device_rows, fpga_rows

    rows = device_rows() + fpga_rows()
    _show(rows, "\n".join(f"{r['name']:18} {r['summary']}" for r in rows), as_json)


@zoo_app.callback()
def zoo(context: typer.Context, as_json: Json = False, debug: Debug = False) -> None:
    """List what is known by name, with size, licence and origin."""
    if context.invoked_subcommand is not None:
        return
    from lilliput.zoo import catalogue

    rows = [vars(e) for e in catalogue()]
    lines = [
        f"{r['name']:16} {r['size_bytes'] / 1e6:7.1f} MB  {'fetched' if r['fetched'] else '-':8} {r['licence']:14} "
        f"{r['what']}  ({r['origin']})"
        for r in rows
    ]
    _show(rows, "\n".join(lines), as_json)


@zoo_app.command("fetch")
def zoo_fetch(names: Annotated[list[str], typer.Argument()], debug: Debug = False) -> None:
    """Download what the named models and data need: the one command that uses the network."""
    from lilliput.zoo import fetch

    fetch(names, progress=lambda text: print(text, file=sys.stderr))


@app.command()
def ui(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    port: Annotated[int, typer.Option()] = 8080,
    debug: Debug = False,
) -> None:
    """Live view of a run's search (optuna-dashboard)."""
    from lilliput.errors import UserError, missing_extra

    if not (run / "search.db").is_file():
        raise UserError(f"{str(run)!r} has no search.db; give the folder of a run")
    try:
        from optuna_dashboard import run_server  # type: ignore[import-not-found]
    except ImportError:
        raise missing_extra("optuna-dashboard", "ui") from None
    run_server(f"sqlite:///{(run / 'search.db').absolute()}", host="127.0.0.1", port=port)
