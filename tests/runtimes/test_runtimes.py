import importlib.util

import pytest
import torch
from torch import nn

from lilliput import runtimes
from lilliput.errors import UserError
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.runtimes import Session, check, choose, find_runtime, runtime_names

EXECUTORS = ("torch", "openvino", "onnxruntime")


class Skewed(Session):
    """Gives a model's logits with a relative error."""

    names = ("input",)

    def __init__(self, model, share):
        self.model, self.share = model, share

    def run(self, tensors):
        return self.model(tensors[0]) * (1 + self.share)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, input):
        return self.head(input) if input.sum() > 0 else self.head(-input)


class Fourier(nn.Module):
    """Uses an operator that the exporter lacks."""

    def forward(self, input):
        return torch.special.bessel_j0(input)


class Packed(nn.Module):
    """A layer of ours with packed weights and no ONNX form."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(3, 4, dtype=torch.uint8))

    def rebuild_config(self):
        return {}

    def forward(self, input):
        return input @ self.codes.float().t()


def flat_work(model):
    from lilliput.workload import Workload

    batch = {"input": torch.randn(5, 4), "label": torch.zeros(5, dtype=torch.long)}
    return Workload.classifier(model, [batch], [batch], [batch])


def test_runtimes_are_found_by_their_files():
    assert {"torch", "openvino", "onnxruntime"} <= set(runtime_names())
    for name in runtime_names():
        assert find_runtime(name).name == name
    with pytest.raises(UserError, match=r"there is no runtime 'tensorflow'; there are: .*openvino"):
        find_runtime("tensorflow")


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_runtime_agrees_with_torch_in_float(any_work, name):
    session = find_runtime(name).prepare(any_work.model, any_work, threads=1)
    assert check(session, any_work.model, any_work) < 1e-5


@pytest.mark.parametrize(
    ("fixture", "settings"),
    [
        ("cnn_work", {"residual_sums": True}),
        ("mobile_work", {}),
        ("mobile_work", {"activations": "symmetric", "bits": 7}),
        ("vit_work", {}),
    ],
    ids=str,
)
def test_every_runtime_agrees_with_torch_in_int8(request, fixture, settings):
    work = request.getfixturevalue(fixture)
    model = Int8Static(**settings).apply(work.model, work)
    for name in EXECUTORS:
        session = find_runtime(name).prepare(model, work, threads=1)
        assert check(session, model, work) < 0.02
        found = work.forward(session, work.test[0])
        with torch.no_grad():
            assert torch.allclose(found, model(work.test[0]["input"]), atol=0.05 * float(found.std()))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("size", [1, 6])
def test_any_batch_size_runs(mobile_work, name, size):
    model = mobile_work.model
    session = find_runtime(name).prepare(model, mobile_work, threads=1)
    x = mobile_work.test[0]["input"][:size]
    with torch.no_grad():
        assert torch.allclose(session({"input": x}), model(x), atol=1e-4)
        assert torch.allclose(session(input=x), model(x), atol=1e-4)


@pytest.mark.parametrize("name", EXECUTORS)
def test_results_of_one_call_survive_the_next(mobile_work, name):
    session = find_runtime(name).prepare(mobile_work.model, mobile_work, threads=1)
    first = session(mobile_work.test[0])
    kept = first.clone()
    session(mobile_work.test[1])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", EXECUTORS)
def test_preparing_leaves_the_model_as_it_was(mobile_work, name):
    model = mobile_work.model.train()
    model.stem_bn.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    session = find_runtime(name).prepare(model, mobile_work, threads=1)
    check(session, model, mobile_work)
    assert model.training
    assert model.depth_bn.training
    assert not model.stem_bn.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.stem.weight.is_contiguous()


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_session_names_what_a_batch_lacks(mobile_work, name):
    session = find_runtime(name).prepare(mobile_work.model, mobile_work, threads=1)
    with pytest.raises(UserError, match="the batch lacks input; it has picture"):
        session({"picture": torch.zeros(1, 3, 16, 16)})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching(), r"decides in Python on values of its input \(Tensor.__bool__\)"),
        (Fourier(), "bessel_j0"),
        (nn.Sequential(Packed()), r"layer '0' \(Packed, 1 such\) keeps packed weights"),
    ],
    ids=["control flow", "missing operator", "packed"],
)
def test_graph_runtimes_refuse_with_the_reason_and_torch_takes_over(model, reason):
    work = flat_work(model)
    for name in ("openvino", "onnxruntime"):
        reasons = find_runtime(name).supports(model, work)
        assert len(reasons) == 1
        with pytest.raises(UserError, match=reason):
            raise UserError(reasons[0])
        with pytest.raises(UserError, match=reason):
            find_runtime(name).prepare(model, work)
    assert choose(model, work).name == "torch"
    check(choose(model, work).prepare(model, work), model, work)


def test_choosing_takes_the_fastest_that_can(mobile_work, llama_work, monkeypatch):
    assert choose(mobile_work.model, mobile_work).name == "openvino"
    assert choose(llama_work.model, llama_work).name == "lean"
    monkeypatch.setattr(runtimes, "runtime_names", lambda: ["onnxruntime", "torch"])
    assert choose(mobile_work.model, mobile_work).name == "onnxruntime"
    assert choose(llama_work.model, llama_work).name == "torch"
    monkeypatch.setattr(runtimes, "runtime_names", lambda: ["onnxruntime"])
    with pytest.raises(
        UserError, match=r"no runtime takes LlamaForCausalLM\. onnxruntime: a causal language model keeps"
    ):
        choose(llama_work.model, llama_work)


@pytest.mark.parametrize(("name", "line"), [("onnxruntime", r"lilliput\[onnxruntime\]"), ("openvino", "openvino")])
def test_a_runtime_that_is_not_installed_says_how_to_get_it(mobile_work, monkeypatch, name, line):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else real(n, *rest))
    (reason,) = find_runtime(name).supports(mobile_work.model, mobile_work)
    with pytest.raises(UserError, match=f"{name} is not installed; install it with: pip install '?{line}"):
        raise UserError(reason)
    assert choose(mobile_work.model, mobile_work).name != name


def test_the_check_measures_the_relative_error_and_fails_above_the_tolerance(mobile_work):
    model = mobile_work.model
    assert check(Skewed(model, 0.0), model, mobile_work) == 0.0
    assert check(Skewed(model, 0.01), model, mobile_work, tolerance=0.02) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(UserError, match=r"differ from the torch model's by 0.01 \(relative\), 0.001 is allowed"):
        check(Skewed(model, 0.01), model, mobile_work)
    with pytest.raises(UserError, match=r"differ .* by inf"):
        check(Skewed(model, float("nan")), model, mobile_work)


def test_the_check_of_an_int8_model_allows_for_rounding_and_not_for_much_more(mobile_work):
    model = Int8Static().apply(mobile_work.model, mobile_work)
    check(Skewed(model, 1e-3), model, mobile_work)
    with pytest.raises(UserError, match="differ"):
        check(Skewed(model, 0.1), model, mobile_work)
