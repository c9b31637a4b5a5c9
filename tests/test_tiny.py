"""The whole pipeline on a tiny model: fit, verify, save, load, report."""

import json

import torch

import lilliput as lp


def test_fit_a_tiny_llama_end_to_end(llama_work, tmp_path):
    fitted = lp.fit(
        llama_work, "size<=60%", minutes=2, trials=40, out=tmp_path / "run", threads=1, recover=False, quiet=True
    )
    assert fitted.met, fitted.summary()
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["verify"]["measured"]["size_bytes"] <= 0.6 * record["original"]["values"]["size_bytes"]
    assert record["predictors"]["built"] >= 2
    model = lp.load(tmp_path / "run" / "fitted")
    with torch.inference_mode():
        assert torch.equal(*(llama_work.forward(m, llama_work.example) for m in (model, fitted.model)))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "tiny-llama" in report
    again = lp.Plan.load(tmp_path / "run" / "plan.yaml").apply(llama_work)
    assert again.state_dict().keys() == fitted.model.state_dict().keys()
