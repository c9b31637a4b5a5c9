"""Feed-forward parts on the disk against the ordinary ones in memory, and what the predictor finds."""

import copy

import pytest
import torch
from torch import nn

from lilliput.artifact import load, save
from lilliput.errors import UserError
from lilliput.methods.layers.relufy import Relufy
from lilliput.methods.layers.sparse_ffn import SparseFFN
from lilliput.methods.offload._flash_part import FlashFeedForward
from lilliput.methods.offload._predictor import fit_predictor, low_rank_gate, threshold_for
from lilliput.methods.offload.flash_ffn import PREDICTED, FlashFFN, flash_parts, store_stats
from lilliput.metrics.memory import weight_bytes
from lilliput.plan import Plan, Step

TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03, "int4": 0.4}
EXACT = {"gate": "float32", "rows": "float32"}


@pytest.fixture(autouse=True)
def stores(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


@pytest.fixture
def relu_llama(llama_work):
    """The tiny Llama with shifted ReLUs, another shift in each block."""
    return Relufy(sparsity=0.8).apply(llama_work.model, llama_work)


def token_ids(seed=5):
    return torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(seed))


def logits(model, seed=5):
    with torch.no_grad():
        return model(input_ids=token_ids(seed), use_cache=False).logits


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- the answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_with_the_true_signs_it_answers_as_the_model_in_memory(relu_llama, memory, window):
    model = FlashFFN(**EXACT, memory=memory, window=window).apply(relu_llama)
    assert len(flash_parts(model)) == 2
    for seed in range(3):
        assert error(logits(model, seed), logits(relu_llama, seed)) < 1e-5
    assert store_stats(model).misses > 0


@pytest.mark.parametrize("gate", TOLERANCES)
@pytest.mark.parametrize("rows", TOLERANCES)
def test_in_each_format_it_answers_as_sparse_parts_in_memory(relu_llama, gate, rows):
    model = FlashFFN(gate=gate, rows=rows, group=32).apply(relu_llama)
    sparse = SparseFFN(gate=gate, rows=rows, group=32).apply(relu_llama)
    assert error(logits(model), logits(sparse)) < 1e-5
    assert error(logits(model), logits(relu_llama)) < max(TOLERANCES[gate], TOLERANCES[rows])


def test_token_by_token_it_generates_the_same(relu_llama):
    model = FlashFFN(**EXACT, memory=0.2).apply(relu_llama)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(token_ids(), **options), relu_llama.generate(token_ids(), **options))


def test_a_plain_model_with_biases_answers_as_before():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, activation_function="relu")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert error(logits(FlashFFN(**EXACT).apply(model)), logits(model)) < 1e-5


@pytest.mark.parametrize("rows", ["float32", "int8"])
def test_a_predictor_that_takes_everything_to_fire_loses_nothing(relu_llama, llama_work, rows):
    model = FlashFFN(gate=PREDICTED, rows=rows).apply(relu_llama, llama_work)
    for part in flash_parts(model):
        part.predictor.threshold.fill_(-1e9)
    assert error(logits(model), logits(relu_llama)) < TOLERANCES[rows]


def test_a_predictor_with_biases_that_takes_everything_to_fire_loses_nothing():
    torch.manual_seed(0)
    layers = {"gate": nn.Linear(32, 64), "up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}
    x = torch.randn(300, 32)
    predictor = fit_predictor(layers["gate"], 0.1, x, 4, 0.9, 5)
    predictor.threshold.fill_(-1e9)
    part = FlashFeedForward.from_layers(layers, 0.1, PREDICTED, "float32", 32, 0.1, 0, predictor)
    with torch.no_grad():
        expected = layers["down"](torch.relu(layers["gate"](x) - 0.1) * layers["up"](x))
        torch.testing.assert_close(part(x), expected, rtol=1e-4, atol=1e-5)


def test_a_predicted_model_loses_little_and_less_with_more_recall(relu_llama, llama_work):
    lost = []
    for recall in (0.5, 0.9, 1.0):
        model = FlashFFN(gate=PREDICTED, rows="float32", rank=0.5, recall=recall).apply(relu_llama, llama_work)
        lost.append(error(logits(model), logits(relu_llama)))
    assert lost[0] > lost[1] > lost[2]
    assert lost[2] < 0.2


def test_a_token_uses_no_neurons_of_its_neighbours(relu_llama, llama_work):
    """Whole windows are scored as if the tokens had come one by one."""
    part = flash_parts(FlashFFN(gate=PREDICTED, rows="float32", recall=0.5).apply(relu_llama, llama_work))[0]
    x = torch.randn(12, 32)
    torch.testing.assert_close(part(x), torch.cat([part(row) for row in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_the_answer_does_not_depend_on_what_is_in_memory(relu_llama):
    model = FlashFFN(memory=0.3).apply(relu_llama)
    first = logits(model)
    logits(model, 6)
    assert torch.equal(logits(model), first)


def test_gradients_flow_to_the_inputs_as_through_the_ordinary_part(relu_llama):
    part = flash_parts(FlashFFN(**EXACT).apply(relu_llama))[0]
    x = torch.randn(2, 5, 32, requires_grad=True)
    slopes = [torch.autograd.grad(p(x).square().sum(), x)[0] for p in (part, relu_llama.model.layers[0].mlp)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_a_silent_part_reads_nothing(relu_llama):
    part = flash_parts(FlashFFN(**EXACT).apply(relu_llama))[0]
    part.shift = 1e9
    assert torch.equal(part(torch.randn(3, 32)), torch.zeros(3, 32))
    assert part.store().stats().misses == 0


def test_nan_is_not_swallowed(relu_llama):
    part = flash_parts(FlashFFN(**EXACT).apply(relu_llama))[0]
    assert torch.isnan(part(torch.full((1, 32), float("nan")))).any()


# --- what is read ------------------------------------------------------------------------------------------------


def test_only_the_neurons_that_fired_are_read_and_those_in_memory_are_not_read_again(relu_llama):
    model = FlashFFN(**EXACT, memory=1.0).apply(relu_llama)
    fired = []
    for layer in relu_llama.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: fired.append((args[0] != 0).flatten(0, 1).any(0)))
    logits(relu_llama)
    logits(model)
    assert store_stats(model).misses == sum(int(f.sum()) for f in fired)
    before = store_stats(model, reset=True)
    logits(model)
    after = store_stats(model)
    assert (after.misses, after.bytes_read, after.hits) == (0, 0, before.misses)


def test_a_window_lets_go_of_what_its_tokens_did_not_use(relu_llama):
    part = flash_parts(FlashFFN(**EXACT, memory=1.0, window=2).apply(relu_llama))[0]
    tokens, used = torch.randn(5, 32), []
    for x in tokens:
        part(x[None])
        used.append(set(part.firing(x[None])[1].any(0).nonzero().flatten().tolist()))
        held = {key for key in range(part.neurons) if key in part.store()}
        assert held == set().union(*used[-2:])


def test_memory_holds_what_it_was_given(relu_llama):
    for memory, slots in ((0.0, 1), (0.25, 24), (1.0, 96)):
        assert flash_parts(FlashFFN(memory=memory).apply(relu_llama))[0].store().slots == slots
    model = FlashFFN(gate="int4").apply(relu_llama)
    mlps = sum(p.nbytes for layer in relu_llama.model.layers for p in layer.mlp.parameters())
    assert weight_bytes(relu_llama) - weight_bytes(model) > 0.8 * mlps


# --- saved, copied, cast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["float32", "int8", PREDICTED])
@pytest.mark.parametrize("rows", ["float32", "bfloat16", "int4"])
def test_an_artifact_holds_the_rows_and_gives_them_back(relu_llama, llama_work, stores, gate, rows, tmp_path):
    plan = Plan([Step(Relufy(sparsity=0.8)), Step(FlashFFN(gate=gate, rows=rows, group=32))])
    model = plan.apply(llama_work)
    first = logits(model)
    folder = save(model, tmp_path / "flash", llama_work, plan)
    for file in stores.iterdir():
        file.unlink()
    again = load(folder)
    assert all(part.records.numel() == 0 for part in flash_parts(again))
    assert torch.equal(logits(again), first)
    assert len(list(stores.iterdir())) == 2


def test_copies_and_loaded_state_answer_alike(relu_llama):
    model = FlashFFN(**EXACT).apply(relu_llama)
    first = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), first)
    scaled = copy.deepcopy(relu_llama)
    with torch.no_grad():
        for layer in scaled.model.layers:
            layer.mlp.up_proj.weight.mul_(2)
    other = FlashFFN(**EXACT).apply(scaled)
    assert not torch.equal(logits(other), first)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), first)
    assert all(part.records.numel() == 0 for part in flash_parts(other))


def test_a_cast_model_still_runs(relu_llama):
    part = flash_parts(FlashFFN(rows="bfloat16").apply(relu_llama))[0]
    x = torch.randn(3, 32)
    before = part(x)
    assert error(part.bfloat16()(x.bfloat16()).float(), before) < 0.05


def test_a_file_that_was_cut_short_is_written_again(relu_llama, stores):
    first = logits(FlashFFN(**EXACT).apply(relu_llama))
    for file in stores.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(logits(FlashFFN(**EXACT).apply(relu_llama)), first)


def test_a_file_that_is_gone_is_said_so(relu_llama, stores):
    model = FlashFFN(**EXACT).apply(relu_llama)
    for file in stores.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="cannot open the store"):
        logits(model)


# --- the predictor -----------------------------------------------------------------------------------------------


@pytest.fixture
def taught():
    """A gate on inputs that lie in 8 of 32 directions but for a little noise."""
    torch.manual_seed(0)
    gate = nn.Linear(32, 96)
    x = torch.randn(2000, 8) @ torch.randn(8, 32) + 0.01 * torch.randn(2000, 32)
    return gate, x[:1000], x[1000:]


def test_the_start_is_the_gate_itself_where_the_rank_suffices(taught):
    gate, x, other = taught
    with torch.no_grad():
        scores, wanted = low_rank_gate(gate, 0.5, x, 8)(other), gate(other) - 0.5
        ratio = scores / wanted
    assert float(ratio.median()) == pytest.approx(float(ratio[wanted.abs() > 0.3].mean()), rel=0.05)
    assert float(((scores > 0) == (wanted > 0)).float().mean()) > 0.98
    assert (low_rank_gate(gate, 0.5, x, 1)(other) > 0).eq(wanted > 0).float().mean() < 0.95


@pytest.mark.parametrize("recall", [0.8, 0.99])
@pytest.mark.parametrize("steps", [0, 150])
def test_it_finds_the_share_that_was_asked_for(taught, recall, steps):
    gate, x, other = taught
    found = fit_predictor(gate, 1.0, x, 5, recall, steps).fires(other)
    assert float(found[gate(other) > 1.0].float().mean()) == pytest.approx(recall, abs=0.04)


def test_learning_spares_reads_where_few_may_be_missed(taught):
    gate, x, other = taught
    taken = [fit_predictor(gate, 1.0, x, 5, 0.99, steps).fires(other).float().mean() for steps in (0, 150)]
    assert taken[1] < taken[0]


def test_thresholds_at_the_extremes():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    fires = torch.tensor([True, True, True, False])
    assert (scores > threshold_for(scores, fires, 1.0)).tolist() == [True, True, True, False]
    assert (scores > threshold_for(scores, fires, 0.5)).tolist() == [True, False, True, False]
    assert threshold_for(scores, torch.zeros(4, dtype=torch.bool), 0.9) == float("inf")


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_smooth_activation_is_refused_with_the_way_out(tiny_llama):
    with pytest.raises(UserError, match=r"offload\.flash_ffn.*SiLU.*layers\.relufy"):
        FlashFFN().apply(tiny_llama)


def test_a_predictor_needs_data(relu_llama):
    with pytest.raises(UserError, match="needs a workload to teach the predictor"):
        FlashFFN(gate=PREDICTED).apply(relu_llama)


def test_too_few_or_broken_inputs_are_refused(relu_llama, llama_work):
    llama_work.calibration = [{"input_ids": torch.tensor([[3, 4, 5]])}]
    with pytest.raises(UserError, match="saw 3 calibration tokens"):
        FlashFFN(gate=PREDICTED).apply(relu_llama, llama_work)


def test_a_part_without_rows_does_not_run():
    with torch.device("meta"):
        part = FlashFeedForward(32, 64, 0.0, "float32", "float32", [0, 0, 0], [False] * 3, 1, 0.5, 0)
    with pytest.raises(UserError, match="no rows yet"):
        part(torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [32]}, "1 groups"),
        ({"rows": "int3"}, "int3"),
        ({"gate": "int3"}, "int3"),
        ({"groups": [32, 32, 5], "rows": "int4"}, "group 5"),
        ({"gate": PREDICTED, "rank": 33}, "rank of a predictor is 33"),
    ],
)
def test_a_hostile_description_is_refused(change, message):
    good = {"inputs": 32, "neurons": 64, "shift": 0.0, "gate": "int8", "rows": "int8", "groups": [32, 0, 0]}
    good |= {"biases": [False] * 3, "rank": 1, "memory": 0.5, "window": 0}
    FlashFeedForward(**good)
    with pytest.raises(UserError, match=message):
        FlashFeedForward(**(good | change))
