"""The experiment's parts on a tiny model, and its rule on made-up figures that must and must not hold."""

import copy

import pytest
import torch

from lilliput.kernels.decoder_parts import parts_of
from lilliput.methods.decode._kv_predictor import KvPredictor
from lilliput.methods.decode.kv_prediction import KvPrediction, first_token_flops
from lilliput.metrics.latency import Comparison
from lilliput.papers import kv_prediction as paper
from lilliput.papers._paired import last_losses

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = paper.Effort(steps=3, seeds=1, keeps=(0.5,), prompts=((14, 10), (5, 3)), rounds=5)
FASTER, SLOWER = Comparison(1.5, 1.2, 1.8, (3.0, 2.0), 9), Comparison(1.1, 0.9, 1.3, (2.0, 1.9), 9)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama


@pytest.fixture
def ids():
    return torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("margin", "ratio", "holds"),
    [((0.1, 0.04), FASTER, True), ((0.1, 0.06), FASTER, False), ((-0.1, 0.01), FASTER, False),
     ((0.1, 0.04), SLOWER, False)],
)  # fmt: skip
def test_every_rival_is_to_be_beaten_and_the_first_token_to_come_earlier(margin, ratio, holds):
    margins = {("a", 14, 0.5): (0.1, 0.01), ("b", 14, 0.5): margin}
    assert paper.judge(margins, {"one": FASTER, "other": ratio}) is holds


def test_last_losses_are_those_of_transformers(model, ids):
    labels = ids.clone()
    labels[:, :14] = -100
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    found = last_losses(out.logits, ids, 10)
    assert found.shape == (3, 10)
    assert float(found.mean()) == pytest.approx(float(out.loss), rel=1e-5)


def test_an_exact_prediction_has_the_models_own_losses(model, ids):
    predictor = KvPredictor(copy.deepcopy(model), [b.kv_heads * b.head_dim for b in parts_of(model).blocks])
    own = paper.tail(model, ids, 10)
    torch.testing.assert_close(paper.predicted(model, predictor, ids, 14), own, rtol=1e-4, atol=1e-4)
    torch.nn.init.zeros_(predictor.value_maps[1].weight)
    assert not torch.allclose(paper.predicted(model, predictor, ids, 14), own, rtol=1e-2)


def test_a_prompt_of_all_tokens_is_whole_and_fewer_keep_their_places(model, ids):
    own = paper.tail(model, ids, 10)
    torch.testing.assert_close(paper.dropped(model, ids, 14, 14, 0), own, rtol=1e-4, atol=1e-4)
    places = paper.some_places(24, 14, 5, seed=0, row=2)
    assert places.tolist()[4:] == list(range(13, 24))
    assert places[:4].tolist() == sorted(set(places[:4].tolist()))
    assert int(places[3]) < 13
    assert paper.some_places(24, 14, 5, seed=1, row=2).tolist() != places.tolist()
    # tokens that may not be seen do not matter, others do
    hidden = next(i for i in range(13) if i not in paper.some_places(24, 14, 5, 0, 0).tolist())
    other = ids.clone()
    other[0, hidden] = (other[0, hidden] + 1) % 64
    assert torch.equal(paper.dropped(model, other, 5, 14, 0), paper.dropped(model, ids, 5, 14, 0))
    other[0, 13] = (other[0, 13] + 1) % 64
    assert not torch.equal(paper.dropped(model, other, 5, 14, 0), paper.dropped(model, ids, 5, 14, 0))


def test_a_pruned_prompt_costs_no_less(model):
    for flops in (1, first_token_flops(model, 9), first_token_flops(model, 9) + 1):
        kept = paper.tokens_for(model, flops)
        assert first_token_flops(model, kept) >= flops
        assert kept == 1 or first_token_flops(model, kept - 1) < flops


def test_every_contender_runs_on_a_tiny_model(llama_work, ids):
    llama_work.test = [{"input_ids": ids}]
    before = {k: v.clone() for k, v in llama_work.model.state_dict().items()}
    found = {}
    runs = paper.compare(found, llama_work, TINY, seed=0)
    names = (paper.OURS, paper.UNTRAINED, *paper.RIVALS)
    whole = {paper.at(paper.WHOLE, 14), paper.at(paper.WHOLE, 5)}
    assert set(found) == whole | {paper.at(name, prompt, 0.5) for name in names for prompt in (14, 5)}
    for name, one in found.items():
        assert [tuple(x.shape) for x in one.losses] == [(3, 10) if "14 tokens" in name else (9, 3)]
    costs = {name: found[paper.at(name, 14, 0.5)].flops for name in names}
    assert costs[paper.SMALL] < costs[paper.OURS] <= costs[paper.CUT] == costs[paper.DROPPED]
    assert costs[paper.CUT] < found[paper.at(paper.WHOLE, 14)].flops
    assert all(torch.equal(v, before[k]) for k, v in llama_work.model.state_dict().items())
    ours = paper.at(paper.OURS, 14, 0.5)
    assert list(paper.timed(found, runs, 5)) == [ours]
    row = found[ours].row("ours")
    assert set(row.values) == {"first_token_mflops", "nats_per_token", "first_token_ms"}
    assert set(row.spread) == {"nats_per_token", "first_token_ms"}
    assert not torch.equal(found[ours].losses[0], found[paper.at(paper.UNTRAINED, 14, 0.5)].losses[0])


def test_the_summary_names_the_nearest_rival_of_each_length():
    def one(loss):
        return paper.Found(1, [torch.tensor([[loss, loss], [loss, loss + 0.2]])])

    found = {}
    for prompt in (14, 5):
        found |= {paper.at(paper.WHOLE, prompt): one(1.0), paper.at(paper.OURS, prompt, 0.5): one(1.0 + prompt)}
    margins = {(name, prompt, 0.5): (0.1 * i + 0.1, 0.01) for prompt in (14, 5) for i, name in enumerate("ab")}
    text = paper.summary(found, margins, {"tiny": FASTER}, TINY)
    for part in ("14 tokens: +14.000 ± 0.000 nats", "5 tokens: +5.000 ± 0.000 nats", "over a at 50%", "tiny 1.50x"):
        assert part in text
    assert "over b" not in text


def test_times_of_a_large_model_are_of_predictors_of_its_sizes(llama_work, monkeypatch):
    monkeypatch.setattr(paper.Workload, "from_name", lambda name: llama_work)
    found = {}
    ratios = paper.large_times(found, 5, "tiny")
    whole, ours = f"tiny: {paper.at(paper.WHOLE, 24)}", f"tiny: {paper.at(paper.OURS, 24, 0.5)}"
    assert list(found) == [whole, ours]
    assert list(ratios) == [ours]
    assert found[ours].flops < found[whole].flops
    assert len(found[ours].ms) == 5
    assert KvPrediction(keep=0.5).auxiliary(llama_work.model).config.num_hidden_layers == 1
