"""The contract of every method, found by listing files: what it declares is what it does, on tiny models."""

import dataclasses
import gzip
import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from small import WORKS, small_method, targets
from torch import nn

from lilliput.anatomy import anatomy
from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.method import (
    BLOCK_COUNT,
    EXACT_OUTPUT,
    FLOAT_WEIGHTS,
    LAYER_SHAPES,
    NONE,
    OUTPUT_SHAPE,
    UNLABELLED,
    Audit,
    Decoder,
    Guard,
    Method,
    Settings,
    Target,
    find_method,
    method_names,
)
from lilliput.methods.layers._sparsity import sparsity_report
from lilliput.methods.train.compressible_subspaces import at
from lilliput.metrics.memory import weight_bytes
from lilliput.plan import Plan, Step

NAMES = [name for name in method_names() if issubclass(find_method(name), Method)]
TESTS = Path(__file__).parent.parent / "methods"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

KINDS = Method | Decoder | Audit | Guard | Target
FOUND = [name for name in method_names() if issubclass(find_method(name), KINDS)]

everything = pytest.mark.parametrize("name", FOUND)
every_method = pytest.mark.parametrize("name", NAMES)
every_work = pytest.mark.parametrize("work_name", WORKS)


def logits(work, model, batch=None):
    with torch.inference_mode():
        return work.forward(model, work.calibration[0] if batch is None else batch)


def float_layers(model):
    """Names of plain layers whose weight is a float parameter."""
    plain = ((n, m) for n, m in model.named_modules() if type(m) in LAYERS)
    return {n for n, m in plain if isinstance(m.weight, nn.Parameter) and m.weight.is_floating_point()}


def shapes(model):
    """Name -> (inputs, outputs) of everything that has them."""
    found = {}
    for name, module in model.named_modules():
        for pair in (("in_features", "out_features"), ("in_channels", "out_channels")):
            if all(hasattr(module, p) for p in pair) and name:
                found[name] = tuple(getattr(module, p) for p in pair)
    return found


# --- what is written -------------------------------------------------------------------------------------------


@everything
def test_it_has_a_test_file_of_its_name(name):
    family, _, method = name.partition(".")
    assert (TESTS / family / f"test_{method}.py").is_file()


@everything
def test_its_docstring_is_a_sentence(name):
    doc = (find_method(name).__doc__ or "").strip()
    assert not doc.startswith(find_method(name).__name__ + "(")  # the one that dataclass writes by itself
    assert doc[0].isupper()
    assert "." in doc
    assert len(doc.split()) >= 5


@everything
def test_it_is_found_under_its_name_and_through_its_family(name):
    import lilliput

    cls = find_method(name)
    assert issubclass(cls, Settings)
    assert cls.name() == name
    assert getattr(getattr(lilliput.methods, name.partition(".")[0]), cls.__name__) is cls


# --- settings --------------------------------------------------------------------------------------------------


@everything
def test_settings_are_frozen_and_hashable(name):
    method = find_method(name)()
    assert hash(method) == hash(find_method(name)())
    assert {method: 1}[find_method(name)()] == 1
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, field.default)


@everything
def test_every_setting_is_a_knob_whose_default_lies_inside(name):
    cls = find_method(name)
    assert set(cls.knobs()) == set(cls.defaults()) == {f.name for f in dataclasses.fields(cls)}
    for key, knob in cls.knobs().items():
        default = cls.defaults()[key]
        assert knob.help, f"{name}.{key} says nothing in the command line's help"
        if knob.choices is not None:
            assert default in knob.choices
        else:
            assert knob.low is None or knob.low <= default
            assert knob.high is None or default <= knob.high
            assert not knob.log or knob.low > 0


@everything
def test_values_outside_a_knob_are_refused_with_the_value(name):
    cls = find_method(name)
    for key, knob in cls.knobs().items():
        if isinstance(cls.defaults()[key], str) and knob.choices is None:
            continue  # any text will do
        wrong = ["nonsense"] if knob.choices is not None else [float("nan"), "nonsense"]
        wrong += [] if knob.choices is not None or knob.low is None else [knob.low - 1]
        wrong += [] if knob.choices is not None or knob.high is None else [knob.high + 1]
        default = cls.defaults()[key]
        wrong += [float(default), default + 0.5] if type(default) is int else []
        for value in wrong:
            with pytest.raises(UserError) as caught:
                cls(**{key: value})
            assert key in str(caught.value)
            assert str(value) in str(caught.value)


@everything
def test_unknown_settings_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError) as caught:
        find_method(name)().with_(nonsense=1)
    assert "nonsense" in str(caught.value)
    for key in find_method(name).knobs():
        assert key in str(caught.value)


@every_method
def test_it_survives_a_plan_written_as_yaml(name):
    plan = Plan([Step(small_method(name))])
    assert Plan.from_yaml(plan.to_yaml()) == plan


# --- what it does ----------------------------------------------------------------------------------------------


@every_method
def test_at_least_one_tiny_model_has_something_to_change(name, request):
    assert any(targets(small_method(name), request.getfixturevalue(work).model) for work in WORKS)


@every_method
@every_work
def test_the_original_stays_the_same_to_the_bit(name, work_name, applied):
    done = applied(name, work_name)
    after = done.work.model.state_dict()
    assert repr(done.work.model) == done.layout
    assert list(after) == list(done.before)
    assert all(torch.equal(after[k], v) for k, v in done.before.items())
    assert done.model is not done.work.model
    shared = {t.data_ptr() for t in after.values() if t.numel()}
    assert not shared & {t.data_ptr() for t in done.model.state_dict().values() if t.numel()}


@every_method
@every_work
def test_the_result_runs_is_finite_and_not_left_in_training(name, work_name, applied):
    done = applied(name, work_name)
    found = logits(done.work, done.model)
    assert torch.isfinite(found).all()
    assert not any(m.training for m in done.model.modules())
    assert all(p.grad is None for p in done.model.parameters())
    if OUTPUT_SHAPE in done.method.facts.keeps:
        assert found.shape == logits(done.work, done.work.model).shape


@every_method
@every_work
def test_float_weights_are_taken_exactly_when_it_says_so(name, work_name, applied):
    done = applied(name, work_name)
    before = {n for n in float_layers(done.work.model) for t in done.targets if f"{n}.".startswith(f"{t}.")}
    stayed = before & float_layers(done.model)
    takes = FLOAT_WEIGHTS in done.method.facts.takes
    assert takes == (FLOAT_WEIGHTS not in done.method.facts.keeps) or done.method.facts.stage == "distill"
    if takes:
        assert not stayed
    else:
        packed = {n for n, m in done.model.named_modules() if hasattr(type(m), "weight_bytes")}
        assert not packed
        assert all(p.is_floating_point() for p in done.model.parameters())


@every_method
@every_work
def test_what_it_keeps_is_kept(name, work_name, applied):
    done = applied(name, work_name)
    keeps, before, after = done.method.facts.keeps, shapes(done.work.model), shapes(done.model)
    if LAYER_SHAPES in keeps and BLOCK_COUNT in keeps:
        assert after == before
    elif LAYER_SHAPES in keeps:
        assert Counter(after.values()) <= Counter(before.values())
    if BLOCK_COUNT in keeps:
        assert len(anatomy(done.model).blocks) == len(anatomy(done.work.model).blocks)
    if EXACT_OUTPUT in keeps:
        torch.testing.assert_close(*(logits(done.work, m) for m in (done.model, done.work.model)), rtol=1e-4, atol=1e-4)


@every_method
@every_work
def test_it_needs_no_more_data_than_it_says_and_gives_the_same_again(name, work_name, applied):
    done = applied(name, work_name)
    needs = done.method.facts.data
    if needs == NONE:
        again = done.method.apply(done.work.model)
    elif needs == UNLABELLED:
        again = done.method.apply(done.work.model, unlabelled(done.work))
    else:
        again = done.method.apply(done.work.model, done.work)
    first, second = done.model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def unlabelled(work):
    """The workload without labels in what methods may look at, and without its test data."""
    strip = [[{k: v for k, v in b.items() if k != "label"} for b in s] for s in (work.calibration, work.training)]
    return dataclasses.replace(work, calibration=strip[0], training=strip[1], test=[{}])


@every_method
@every_work
def test_an_artifact_gives_it_back_to_the_bit(name, work_name, applied, tmp_path):
    done = applied(name, work_name)
    plan = Plan([Step(done.method)])
    save(done.model, tmp_path / "fitted", done.work, plan)
    own = None if done.work.source else type(done.work.model)()
    again = load(tmp_path / "fitted", model=own)
    assert torch.equal(logits(done.work, again), logits(done.work, done.model))
    mine, theirs = done.model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert Plan.load(tmp_path / "fitted" / "plan.yaml") == plan


@every_method
@every_work
def test_layers_limit_the_change_to_themselves(name, work_name, applied):
    done = applied(name, work_name)
    if len(done.targets) < 2 or done.method.facts.stage == "distill":
        pytest.skip("one target, or a method whose gradient goes through every layer")
    chosen = done.targets[0]
    assert list(done.method.resolve(done.work.model, [chosen])) == [
        t for t in done.targets if t == chosen or t.startswith(f"{chosen}.")
    ]
    model = done.method.apply(done.work.model, done.work, layers=[chosen])
    assert torch.isfinite(logits(done.work, model)).all()
    assert (
        model.state_dict().keys() != done.model.state_dict().keys()
        or any(not torch.equal(a, b) for a, b in zip(model.state_dict().values(), done.model.state_dict().values()))
        or not torch.equal(logits(done.work, model), logits(done.work, done.model))
    )


@every_method
@every_work
def test_unknown_layers_and_settings_of_layers_are_refused_by_name(name, work_name, applied):
    done = applied(name, work_name)
    with pytest.raises(UserError, match=r"cannot change 'no\.such\.layer'; it can change"):
        done.method.apply(done.work.model, done.work, layers=["no.such.layer"])
    with pytest.raises(UserError, match="nonsense"):
        done.method.apply(done.work.model, done.work, layers={done.targets[0]: {"nonsense": 1}})


@every_method
def test_a_model_without_anything_to_change_is_refused(name):
    with pytest.raises(UserError):
        small_method(name).apply(nn.Sequential(nn.ReLU()))


# --- its effect ------------------------------------------------------------------------------------------------


def compressed_bytes(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return len(gzip.compress(buffer.getvalue(), 1))


@every_method
@every_work
def test_the_effect_has_the_promised_sign(name, work_name, applied):
    done = applied(name, work_name)
    effect, before, after = done.method.facts.effect, weight_bytes(done.work.model), weight_bytes(done.model)
    if "where the file is compressed" in effect:
        assert after == before
        assert compressed_bytes(done.model) < compressed_bytes(done.work.model)
    elif "smaller" in effect or "size only" in effect:
        assert after < before
    elif "larger" in effect:
        assert after > before
    elif "sparse activations" in effect:
        before, after = (silent_neurons(done.work, model) for model in (done.work.model, done.model))
        assert after > max(before, 0.2)
    elif "fewer layers" in effect:
        assert len(float_layers(done.model)) < len(float_layers(done.work.model))
    elif "fewer tokens" in effect:
        assert after == before
        assert rows_multiplied(done.work, done.model) < rows_multiplied(done.work, done.work.model)
    elif "fewer weights read" in effect:
        parts = [done.model.get_submodule(target) for target in done.targets]
        assert sum(weights_read(part) for part in parts) < sum(
            weights_read(done.work.model.get_submodule(target)) for target in done.targets
        )
    elif "any compression at run time" in effect:
        assert compressed_bytes(at(done.model, 0.0)) < compressed_bytes(done.work.model)
    elif "wins back quality" in effect:
        assert after == before
        assert distance_after(done) < 0.9 * distance(done.work, damaged(done.work.model))
    else:
        pytest.fail(f"the effect {effect!r} promises nothing that can be measured")


def rows_multiplied(work, model):
    """Tokens that reach the linear layers of a model in one batch."""
    seen = []
    handles = [
        m.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[:-1].numel()))
        for m in model.modules() if type(m) is nn.Linear
    ]  # fmt: skip
    logits(work, model)
    for handle in handles:
        handle.remove()
    return sum(seen)


def weights_read(part):
    """Weights that one token multiplies."""
    total = sum(p.numel() for p in part.parameters())
    if not hasattr(part, "experts"):
        return total
    inside = sum(p.numel() for p in part.experts.parameters())
    return total - inside + inside * part.gate.top_k // part.gate.num_experts


def silent_neurons(work, model):
    """Share of exact zeros among the neurons of all feed-forward parts."""
    shares = [layer.zeros for layer in sparsity_report(model, work, (1,), "calibration")]
    return sum(shares) / len(shares)


def damaged(model):
    """The model with noise on its weights."""
    hurt = type(model)(model.config) if hasattr(model, "config") else type(model)()
    generator = torch.Generator().manual_seed(0)
    state = {
        k: v + 2 * v.std() * torch.randn(v.shape, generator=generator) if v.ndim > 1 else v
        for k, v in model.state_dict().items()
    }
    hurt.load_state_dict(state)
    return hurt.eval()


def distance(work, model):
    """Mean squared difference from the original's logits on the data that methods may look at."""
    pairs = [(logits(work, model, b), logits(work, work.model, b)) for b in work.training]
    return float(torch.stack([(a - b).square().mean() for a, b in pairs]).mean())


def distance_after(done):
    longer = done.method.with_(steps=40)
    return distance(done.work, longer.apply(damaged(done.work.model), done.work))
