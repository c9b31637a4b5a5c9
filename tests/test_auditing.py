"""All audits of a workload at once, in Python and on the command line, and in the record of a fit."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import lilliput as lp
from lilliput import cli, zoo
from lilliput.artifact import save
from lilliput.auditing import quick_audits
from lilliput.errors import UserError
from lilliput.fitting.verify import damage_report
from lilliput.method import HARM, method_names
from lilliput.methods.audit._answers import answers
from lilliput.methods.audit.groups import Groups
from lilliput.workload import Workload
from lilliput.zoo import nets


@pytest.fixture
def pictures():
    """A net that is always right on 300 pictures."""
    torch.manual_seed(0)
    model = nets.resnet(4, 8).eval()
    x = torch.randn(300, 1, 28, 28)
    with torch.no_grad():
        scores = model(x)
        model.head.bias -= scores.mean(0)  # so that every class is answered
        y = model(x).argmax(-1)
    batches = [{"input": a, "label": b} for a, b in zip(x.split(50), y.split(50))]
    return Workload.classifier(model, batches, batches, batches, name="mine", source={"kind": "zoo", "name": "mine"})


def starved(model, label):
    """A copy that never answers one class."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.bias[label] = -1e4
    return changed


def test_a_starved_class_is_harm_and_nothing_else_is(pictures):
    labels = torch.cat([b["label"] for b in pictures.test])
    most = int(labels.bincount().argmax())
    found = lp.audit(pictures, starved(pictures.model, most))
    groups = next(f for f in found.findings if f.audit == "audit.groups")
    assert found.harmed
    assert groups.verdict == HARM
    assert groups.changes[0].name == f"class {most}"
    assert groups.changes[0].after == 0
    assert not lp.audit(pictures, copy.deepcopy(pictures.model)).harmed


def test_all_that_the_workload_allows_are_made_and_others_say_why(pictures, llama_work):
    for work in (pictures, llama_work):
        found = lp.audit(work, work.model)
        made = [f.audit for f in found.findings]
        assert sorted([*made, *found.skipped]) == method_names("audit.*")
        assert all(found.skipped.values())
        assert all(name in str(found) for name in found.skipped)
    assert "audit.language" in made
    assert "audit.groups" in found.skipped


def test_named_audits_take_settings(pictures):
    found = lp.audit(pictures, pictures.model, ["exemplars", Groups(fewest=300)])
    assert [f.audit for f in found.findings] == ["audit.exemplars", "audit.groups"]
    with pytest.raises(UserError, match="no audit 'luck'"):
        lp.audit(pictures, pictures.model, ["luck"])
    with pytest.raises(UserError, match="no training data"):
        lp.audit(pictures, pictures.model, ["membership"])


def test_another_shape_of_answers_is_refused(pictures):
    with pytest.raises(UserError, match=r"\(1, 10\) before, \(1, 7\) after"):
        lp.audit(pictures, nets.resnet(4, 8, classes=7))


def test_answers_given_already_are_not_taken_again(pictures):
    both = answers(pictures, pictures.model), answers(pictures, starved(pictures.model, 3))
    calls = []
    pictures.forward = lambda *_: calls.append(1)
    found = quick_audits(pictures, *both, pictures.model)
    assert not calls
    assert {"audit.groups", "audit.exemplars", "audit.calibration"} <= {f.audit for f in found.findings}
    assert "audit.corruptions" not in found.skipped


def test_the_verification_of_a_fit_holds_the_audits(pictures, llama_work):
    changed = starved(pictures.model, 3)
    report = damage_report(pictures, pictures.model, changed, changed)
    found = {f["audit"]: f for f in report["audits"]["findings"]}
    assert found["audit.groups"]["verdict"] == HARM
    assert report["drop"] == pytest.approx(
        1 - sum(c["after"] * c["n"] for c in found["audit.groups"]["changes"]) / 300, abs=1e-6
    )
    json.dumps(report)
    report = damage_report(llama_work, None, None, llama_work.model)
    (language,) = report["audits"]["findings"]
    assert language["audit"] == "audit.language"
    assert report["drop"] == 0


def test_a_model_without_what_an_audit_needs_does_not_end_a_fit(pictures):
    both = [answers(pictures, pictures.model)] * 2
    odd = [a.__class__(a.values, a.logits[:, :1], (), a.labels) for a in both]
    found = quick_audits(pictures, *odd, pictures.model)
    assert "two or more" in found.skipped["audit.groups"]


# --- the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lilliput", "audit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def folders(pictures, tmp_path, monkeypatch):
    """Artifacts of the net and of one that lost a class, and labelled data of two groups."""
    monkeypatch.setattr(zoo, "build", lambda name: nets.resnet(4, 8))
    columns = {k: torch.cat([b[k] for b in pictures.test]) for k in ("input", "label")}
    save_file(columns | {"group.half": torch.arange(300) // 150}, tmp_path / "data.safetensors")
    most = int(columns["label"].bincount().argmax())
    fine, hurt = copy.deepcopy(pictures.model), starved(pictures.model, most)
    with torch.no_grad():
        fine.head.bias += 1  # of all classes: no answer changes
    return (
        save(pictures.model, tmp_path / "original", pictures),
        save(fine, tmp_path / "fine", pictures),
        save(hurt, tmp_path / "hurt", pictures),
        tmp_path / "data.safetensors",
    )


def test_the_command_finds_harm_and_only_harm(folders, run):
    original, fine, hurt, data = folders
    code, out, _ = run(hurt, "--against", original, "--data", data)
    assert code == 1
    assert "audit.groups: harm found" in out
    code, out, _ = run(fine, "--against", original, "--data", data, "--json", "--only", "groups,exemplars")
    found = json.loads(out)
    assert code == 0
    assert not found["harmed"]
    assert [f["audit"] for f in found["findings"]] == ["audit.groups", "audit.exemplars"]
    assert "half 1" in [c["name"] for c in found["findings"][0]["changes"]]


def test_wrong_calls_are_told_in_one_line(folders, run, tmp_path):
    original, fine, _, data = folders
    for arguments, message in (
        ((fine, "--against", original), "give some with --data"),
        ((fine, "--against", tmp_path / "none"), "does not exist"),
        ((fine, "--against", original, "--data", data, "--only", "luck"), "no audit 'luck'"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, message in (("empty.txt", "are empty"), ("none.txt", "cannot be read")):
        code, _, err = run(fine, "--against", original, "--data", data, "--prompts", tmp_path / name)
        assert code == 2
        assert message in err
    tensors = {"input": torch.zeros(4, 1, 28, 28), "label": torch.zeros(4), "group": torch.zeros(3)}
    save_file(tensors, tmp_path / "odd.safetensors")
    code, _, err = run(fine, "--against", original, "--data", tmp_path / "odd.safetensors")
    assert code == 2
    assert "'group' has the shape (3,)" in err
