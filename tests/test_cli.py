"""The command line in this process: exit codes, one JSON document on stdout, errors that name the value and the fix."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lilliput
from lilliput import cli
from lilliput.artifact import save
from lilliput.errors import UserError
from lilliput.measuring import Measured
from lilliput.method import method_names
from lilliput.methods.quantize.int8 import Int8
from lilliput.methods.quantize.lookup_tables import LookupTables
from lilliput.paper import Evidence, Row, paper_names
from lilliput.plan import Plan, Step
from lilliput.workload import Workload

COMMANDS = (
    "fit",
    "measure",
    "apply",
    "audit",
    "generate",
    "export",
    "methods",
    "method",
    "papers",
    "reproduce",
    "devices",
    "zoo",
)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)`: (exit code, stdout, stderr) of the command line."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lilliput", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = done.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def refused(run):
    """`refused(*arguments)`: the message of a call that is a user's mistake."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("lilliput: ")
        assert "Traceback" not in err
        assert err.count("\n") == 1
        return err

    return call


@pytest.fixture
def tokenizer():
    """Words w0 .. w63, the vocabulary of the tiny llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


@pytest.fixture
def zoo(monkeypatch, llama_work):
    """`tiny` is the one name that the zoo knows."""

    def from_name(name, **options):
        if name != "tiny":
            raise UserError(f"{name!r} does not exist and is no name of the zoo")
        return llama_work

    monkeypatch.setattr(Workload, "from_name", staticmethod(from_name))
    return llama_work


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(Plan([Step(Int8())]).to_yaml())
    return path


# --- help ------------------------------------------------------------------------------------------------------


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_takes_json_and_debug(run, command):
    code, out, _ = run(command, "-h")
    assert code == 0
    assert "--json" in out
    assert "--debug" in out


def test_no_arguments_show_the_help(run):
    code, out, err = run()
    assert code in (0, 2)
    assert "Usage" in out + err


@pytest.mark.parametrize(
    "arguments", [["explode"], ["fit", "--explode"], ["fit", "--trials", "0"], ["apply"], ["method"]]
)
def test_calls_that_do_not_parse_exit_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "code",
    [
        "import lilliput; dir(lilliput)",
        "from lilliput.cli import main; sys.argv = ['lilliput', '--help']; main()",
        "from lilliput.cli import main; sys.argv = ['lilliput', 'fit', '-h']; main()",
        "from lilliput.method import method_names; method_names()",
    ],
)
def test_the_package_and_its_help_do_without_torch(code):
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'optuna', 'openvino'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


# --- lists -----------------------------------------------------------------------------------------------------


def test_methods_are_listed_with_their_effects(run):
    code, out, _ = run("methods")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == method_names()
    code, out, _ = run("methods", "prune.*", "--json")
    assert [row["name"] for row in json.loads(out)] == method_names("prune.*")
    assert all(row["effect"] and row["summary"] for row in json.loads(out))


def test_a_pattern_without_methods_gives_nothing(run):
    assert run("methods", "nothing.here") == (0, "\n", "")
    assert json.loads(run("methods", "nothing.here", "--json")[1]) == []


def test_one_method_shows_its_settings_and_facts(run):
    code, out, _ = run("method", "quantize.group")
    assert code == 0
    assert "bits = 4  (one of 4, 3, 2)  bits per weight" in out
    assert "stage: quantize" in out
    row = json.loads(run("method", "quantize.group", "--json")[1])
    assert row["settings"]["group"]["choices"] == [32, 64, 128]


def test_papers_are_listed(run):
    code, out, _ = run("papers")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == paper_names()
    rows = json.loads(run("papers", "--json")[1])
    assert [row["slug"] for row in rows] == paper_names()
    assert all(set(row["methods"]) <= set(method_names()) for row in rows)


def test_devices_are_listed_and_only_this_one_is_measured(run, monkeypatch):
    here = lilliput.Device.load("laptop")
    monkeypatch.setattr(lilliput.Device, "here", classmethod(lambda cls: here))
    code, out, _ = run("devices")
    assert code == 0
    assert out.startswith("here ")
    assert "(modelled)" in out
    rows = json.loads(run("devices", "--json")[1])
    assert {"here", "raspberry-pi-4"} <= {row["name"] for row in rows}


def test_the_zoo_is_listed(run):
    code, out, _ = run("zoo")
    assert code == 0
    assert "smollm2-135m" in out
    row = next(r for r in json.loads(run("zoo", "--json")[1]) if r["name"] == "smollm2-135m")
    assert row["licence"] == "Apache-2.0"


# --- fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_fit(monkeypatch, zoo):
    """`lilliput.fit` that answers at once; `calls` holds what it was asked."""
    calls = []

    def fit(workload, budget, **options):
        calls.append((workload, budget, options))
        return SimpleNamespace(
            met=fit.met,
            record={"met": fit.met, "value": float("inf")},
            folder=Path("runs/x"),
            summary=lambda: "the summary",
        )

    fit.met, fit.calls = True, calls
    monkeypatch.setattr(lilliput, "fit", fit, raising=False)
    return fit


def test_a_fit_that_meets_its_budget_exits_with_0_else_1(run, fake_fit):
    code, out, _ = run("fit", "tiny", "--budget", "size<=50%")
    assert code == 0
    assert "the summary" in out
    assert "report.html" in out
    fake_fit.met = False
    assert run("fit", "tiny", "--budget", "size<=50%")[0] == 1


def test_the_options_of_a_fit_arrive(run, fake_fit):
    arguments = "--time-limit 90s --families quantize,,prune --seed 3 --threads 2 --no-recover --sampler tpe --json"
    assert run("fit", "tiny", "--budget", "drop<=1%", *arguments.split())[0] == 0
    (_, budget, options) = fake_fit.calls[0]
    assert budget.limits == {"drop": 0.01}
    assert options["minutes"] == 1.5
    assert options["families"] == ("quantize", "prune")
    wanted = {"seed": 3, "threads": 2, "recover": False, "sampler": "tpe", "quiet": True}
    assert {k: options[k] for k in wanted} == wanted


def test_json_holds_no_number_that_json_lacks(run, fake_fit):
    _, out, _ = run("fit", "tiny", "--budget", "size<=50%", "--json")

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    assert json.loads(out, parse_constant=refuse) == {"met": True, "value": None}


def test_a_model_inside_its_budget_is_no_failure(run, monkeypatch, zoo):
    from lilliput.fitting.aim import AlreadyInside

    def fit(*_, **__):
        raise AlreadyInside("tiny is inside the budget already")

    monkeypatch.setattr(lilliput, "fit", fit, raising=False)
    assert run("fit", "tiny") == (0, "tiny is inside the budget already\n", "")
    assert json.loads(run("fit", "tiny", "--json")[1])["met"] is True


@pytest.mark.parametrize(("text", "minutes"), [("10m", 10), ("90s", 1.5), ("1h", 60), ("0.5m", 0.5)])
def test_time_limits_are_read(text, minutes):
    assert cli.parse_minutes(text) == pytest.approx(minutes)


@pytest.mark.parametrize("text", ["", "m", "10", "10x", "-5m", "0s", "nanm", "infh", "ten m", "1e999s"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(UserError, match=f"time limit is {text!r}; write it as in 10m, 90s or 1h"):
        cli.parse_minutes(text)


# --- mistakes --------------------------------------------------------------------------------------------------


def test_a_missing_model_is_named(refused):
    for command in ("fit", "measure"):
        assert "'no/such/model' does not exist" in refused(command, "no/such/model")
    assert "did you mean smollm2-135m" in refused("fit", "smollm-135m")


@pytest.mark.parametrize(
    ("budget", "wrong", "cure"),
    [
        ("memory<=3parsecs", "'parsecs'", "MB"),
        ("speed<=3ms", "'speed'", "latency"),
        ("memory<=-3MB", "'memory<=-3MB'", "positive"),
        ("fast please", "'fast please'", "latency<=20ms"),
        ("", "empty", "latency<=20ms"),
    ],
)
def test_a_bad_budget_is_named_with_the_way_out(refused, budget, wrong, cure):
    message = refused("fit", "no-model-is-loaded", "--budget", budget)
    assert "no-model-is-loaded" not in message
    assert wrong in message
    assert cure in message


def test_a_bad_time_limit_is_named(refused):
    assert "'10 parsecs'" in refused("fit", "no-model-is-loaded", "--time-limit", "10 parsecs")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", "abacus"), ("--runtime", "abacus"), ("--sampler", "abacus"), ("--families", "abacus")],
)
def test_other_bad_values_of_a_fit_are_named(refused, zoo, tmp_path, option, value):
    message = refused("fit", "tiny", "--budget", "size<=50%", option, value, "--out", tmp_path / "run")
    assert "'abacus'" in message
    assert any(known in message for known in ("laptop", "openvino", "genecai", "quantize"))


def test_an_unknown_method_is_named_with_the_known_ones(refused):
    message = refused("method", "prune.everything")
    assert "'prune.everything'" in message
    assert "prune.neurons" in message


def test_an_unknown_paper_is_named_with_the_known_ones(refused):
    assert "gpfq" in refused("reproduce", "perpetuum-mobile")


def test_reproduce_wants_a_name_or_all(refused):
    assert "--all" in refused("reproduce")
    assert "--all" in refused("reproduce", "gpfq", "--all")


def test_a_missing_or_broken_plan_is_named(refused, tmp_path, zoo):
    assert "absent.yaml" in refused("apply", tmp_path / "absent.yaml", "tiny")
    (tmp_path / "bad.yaml").write_text("version: 1\nsteps: [{method: prune.everything}]")
    assert "prune.everything" in refused("apply", tmp_path / "bad.yaml", "tiny")
    assert str(tmp_path) in refused("apply", tmp_path, "tiny")


@pytest.mark.parametrize("command", ["generate", "export"])
def test_a_folder_that_is_no_artifact_is_named(refused, tmp_path, command):
    argument = "once upon a time" if command == "generate" else tmp_path / "model.gguf"
    assert "is not an artifact" in refused(command, tmp_path, argument)
    assert "is not an artifact" in refused(command, tmp_path / "absent", argument)


def test_a_folder_without_a_run_is_named(refused, tmp_path):
    assert "search.db" in refused("ui", tmp_path)


def test_an_unknown_asset_is_named(refused):
    assert "fashion-mnist" in refused("zoo", "fetch", "fashion-mnst")


def test_debug_shows_where_an_error_came_from(run):
    with pytest.raises(UserError, match=r"prune\.everything"):
        run("method", "prune.everything", "--debug")


def test_an_interrupt_exits_with_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Workload, "from_name", staticmethod(interrupted))
    code, out, err = run("fit", "tiny")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


# --- apply, measure, generate, export --------------------------------------------------------------------------


def test_a_plan_becomes_an_artifact(run, zoo, tmp_path, plan_file):
    code, out, _ = run("apply", plan_file, "tiny", "--out", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(out) == {"artifact": str(tmp_path / "a")}
    expected = Int8().apply(zoo.model)
    with torch.inference_mode():
        assert torch.equal(zoo.forward(lilliput.load(tmp_path / "a"), zoo.example), zoo.forward(expected, zoo.example))


@pytest.fixture
def measured(monkeypatch):
    """`lilliput.measure` that answers at once; holds what it was asked."""
    seen = []

    def measure(workload, **options):
        seen.append((workload, options))
        return Measured("lean", 1, {"size_bytes": 10.0})

    monkeypatch.setattr(lilliput, "measure", measure, raising=False)
    return seen


def test_a_name_and_a_folder_are_measured_with_the_data_that_is_given(run, measured, monkeypatch):
    asked = []
    monkeypatch.setattr(Workload, "from_name", staticmethod(lambda name, **options: asked.append((name, options))))
    assert run("measure", "tiny", "--threads", "1")[0] == 0
    assert run("measure", "some/folder", "--data", "book.txt")[0] == 0
    assert asked == [("tiny", {}), ("some/folder", {"data": Path("book.txt")})]
    assert [options["split"] for _, options in measured] == ["validation", "validation"]


def test_an_artifact_is_measured_with_or_without_data(run, measured, llama_work, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    folder = save(Int8().apply(llama_work.model), tmp_path / "a", llama_work)
    code, out, _ = run("measure", folder, "--threads", "1", "--json")
    assert code == 0
    assert json.loads(out)["values"] == {"size_bytes": 10.0}
    assert "quality is not measured" in json.loads(out)["notes"][0]
    tokenizer.save_pretrained(folder)
    (tmp_path / "book.txt").write_text(" ".join(f"w{i * i % 64}" for i in range(30_000)))
    code, out, _ = run("measure", folder, "--data", tmp_path / "book.txt", "--json")
    assert code == 0
    assert json.loads(out)["notes"] == []
    (bare, first), (judged, second) = measured
    assert (first["split"], second["split"]) == (None, "validation")
    assert type(bare.model.lm_head).__name__ == type(judged.model.lm_head).__name__ == "PackedLinear"


def greedy_words(model, ids, tokens):
    for _ in range(tokens):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return [f"w{i}" for i in ids[0, -tokens:].tolist()]


@pytest.mark.parametrize("runtime", ["lean", "torch"])
def test_text_is_generated_on_any_runtime(run, llama_work, tokenizer, tmp_path, runtime, monkeypatch):
    from lilliput import runtimes, serving

    llama_work.tokenizer = tokenizer
    llama_work.model.config.eos_token_id = None
    save(llama_work.model, tmp_path / "a", llama_work)
    monkeypatch.setattr(serving, "choose", lambda *_: runtimes.find_runtime(runtime))
    code, out, _ = run("generate", tmp_path / "a", "w5 w6 w7", "--tokens", "5", "--json")
    assert code == 0
    words = greedy_words(llama_work.model, torch.tensor([[5, 6, 7]]), 5)
    assert json.loads(out) == {"prompt": "w5 w6 w7", "text": " ".join(words)}
    assert run("generate", tmp_path / "a", "w5 w6 w7", "--tokens", "5")[1] == " ".join(words) + "\n"


def test_text_ends_at_the_end_token(run, llama_work, tokenizer, tmp_path):
    llama_work.tokenizer = tokenizer
    words = greedy_words(llama_work.model, torch.tensor([[5, 6, 7]]), 5)
    llama_work.model.config.eos_token_id = int(words[2][1:])
    save(llama_work.model, tmp_path / "a", llama_work)
    out = run("generate", tmp_path / "a", "w5 w6 w7", "--tokens", "5", "--json")[1]
    assert json.loads(out)["text"] == " ".join(words[: words.index(words[2])])


def test_what_cannot_generate_is_refused(refused, llama_work, cnn_work, tokenizer, tmp_path):
    save(llama_work.model, tmp_path / "untold", llama_work)
    assert "no tokenizer" in refused("generate", tmp_path / "untold", "w1")
    llama_work.tokenizer = tokenizer
    save(llama_work.model, tmp_path / "llama", llama_work)
    assert "prompt is empty" in refused("generate", tmp_path / "llama", "")
    save(cnn_work.model, tmp_path / "cnn", cnn_work)
    assert "not a language model" in refused("generate", tmp_path / "cnn", "w1")


def test_an_export_to_an_unknown_format_is_refused(refused, llama_work, tmp_path):
    save(llama_work.model, tmp_path / "a", llama_work)
    assert "model.txt" in refused("export", tmp_path / "a", tmp_path / "model.txt")


def test_a_chain_is_exported_as_a_circuit(run, refused, tmp_path):
    torch.manual_seed(0)
    batch = {"input": torch.rand(16, 8), "label": torch.zeros(16, dtype=torch.int64)}
    work = Workload.classifier(torch.nn.Sequential(torch.nn.Linear(8, 3)), [batch], [batch], [batch])
    plan = Plan([Step(LookupTables(weights=16, inputs=16))])
    folder = save(plan.apply(work), tmp_path / "a", work, plan)
    code, out, _ = run("export", folder, tmp_path / "c", "--target", "cpp", "--json")
    assert code == 0
    assert json.loads(out)["files"] == "net.cpp"
    assert "classify" in (tmp_path / "c" / "net.cpp").read_text()
    assert "'vhdl'" in refused("export", folder, tmp_path / "d", "--target", "vhdl")
    assert "not empty" in refused("export", folder, tmp_path / "c", "--target", "cpp")


# --- reproduce -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_paper(monkeypatch):
    """Every paper's experiment gives the same evidence at once."""
    import lilliput.paper

    def experiment(seed, full):
        rows = [Row("baseline", {"error": 0.5}, {"error": 0.1}), Row("method", {"error": float("nan")})]
        return Evidence(f"seed {seed}, full {full}", rows, experiment.holds, "half the error", "small")

    experiment.holds = True
    monkeypatch.setattr(lilliput.paper, "find_paper", lambda slug: SimpleNamespace(experiment=experiment))
    return experiment


def test_a_claim_that_does_not_hold_exits_with_1(run, fake_paper):
    code, out, _ = run("reproduce", "gpfq", "--seed", "4", "--json")
    assert code == 0
    evidence = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert evidence["setup"] == "seed 4, full False"
    assert evidence["rows"][0] == {"name": "baseline", "values": {"error": 0.5}, "spread": {"error": 0.1}}
    fake_paper.holds = False
    code, out, _ = run("reproduce", "gpfq", "--full")
    assert code == 1
    assert "does NOT hold" in out
    assert "full True" in out


def test_all_papers_make_one_json_object(run, fake_paper):
    code, out, _ = run("reproduce", "--all", "--json")
    assert code == 0
    assert list(json.loads(out)) == paper_names()
