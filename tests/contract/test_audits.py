"""The contract of every audit: it changes nothing, finds no harm in the same model, says what it refuses."""

import json

import pytest
import torch

from lilliput.auditing import find_audit
from lilliput.errors import UserError
from lilliput.method import HARM, NO_HARM, UNSURE, Audit, find_method, method_names
from lilliput.plan import Plan, Step

NAMES = [name for name in method_names() if issubclass(find_method(name), Audit)]
WORKS = ("cnn_work", "llama_work")

every_audit = pytest.mark.parametrize("name", NAMES)


def supported(name, request):
    """(audit, workload) for the tiny workloads that it takes."""
    for work_name in WORKS:
        work = request.getfixturevalue(work_name)
        if not find_audit(name).supports(work, work.model):
            yield find_audit(name), work


@every_audit
def test_all_of_the_family_are_audits(name):
    assert name.startswith("audit.")
    assert find_method(name).facts.stage == "audit"
    assert method_names("audit.*") == NAMES


@every_audit
def test_the_same_model_shows_no_harm(name, request):
    found = list(supported(name, request))
    assert found, f"{name} takes none of the tiny workloads"
    for audit, work in found:
        findings = audit.check(work, work.model, work.model)
        assert findings.audit == name
        assert findings.verdict in (NO_HARM, UNSURE)
        assert findings.summary.endswith(".")
        assert all(c.after == c.before or not c.verdict for c in findings.changes)
        assert all(c.low <= c.high and c.verdict in ("", NO_HARM, UNSURE) for c in findings.changes)
        assert findings.change(findings.changes[0].name) == findings.changes[0]


@every_audit
def test_a_broken_model_is_told_from_the_original_again_and_again(name, request):
    for audit, work in supported(name, request):
        broken = type(work.model)(work.model.config) if hasattr(work.model, "config") else type(work.model)()
        first = audit.check(work, work.model, broken.eval())
        assert audit.check(work, work.model, broken) == first
        assert json.loads(json.dumps(first.to_json()))["verdict"] == first.verdict
        assert name in str(first)


@every_audit
def test_it_leaves_models_as_they_are(name, request):
    for audit, work in supported(name, request):
        work.model.train()
        before = {k: v.clone() for k, v in work.model.state_dict().items()}
        audit.check(work, work.model, work.model)
        assert work.model.training
        assert all(torch.equal(before[k], v) for k, v in work.model.state_dict().items())
        assert all(p.grad is None for p in work.model.parameters())


@every_audit
def test_what_it_refuses_it_refuses_with_the_reason(name, request):
    for work_name in WORKS:
        work = request.getfixturevalue(work_name)
        reasons = find_audit(name).supports(work, work.model)
        if reasons:
            with pytest.raises(UserError) as caught:
                find_audit(name).check(work, work.model, work.model)
            assert name in str(caught.value)
            assert reasons[0] in str(caught.value)


@every_audit
def test_it_stands_in_no_plan(name):
    with pytest.raises((UserError, TypeError)):
        Plan.from_yaml(Plan([Step(find_audit(name))]).to_yaml())  # type: ignore[arg-type]


def test_unknown_audits_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no audit 'luck'; there are: audit\.calibration"):
        find_audit("luck")
    assert find_audit("groups") == find_audit("audit.groups")
    assert HARM not in (NO_HARM, UNSURE)
