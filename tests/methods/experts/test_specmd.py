"""Policies against a slow simulation that keeps the whole history, Belady against every possible eviction, modelled
times by hand, and real runs from disk against replays and the model in memory."""

import copy
import itertools

import pytest
import torch
from foreign_mixtures import foreign
from transformers import DynamicCache

from lilliput.errors import UserError
from lilliput.methods.experts._pager import Tally, pieces
from lilliput.methods.experts._policies import BELADY, POLICIES, LeastStale
from lilliput.methods.experts._replay import policy_of, requests
from lilliput.methods.experts._trace import likeliest, recording
from lilliput.methods.experts.specmd import ExpertTrace, Hardware, SpecMD, expert_bytes, records_of, write_experts
from lilliput.methods.experts.upcycle import Upcycle
from lilliput.methods.quantize.group import Group
from lilliput.paged_store import PagedStore

EVERY = (*POLICIES, BELADY)
SIZE = 100  # bytes of an expert in replays
PROMPT = 8


def made_up(seed, passes=14, layers=3, experts=6, used=2, ahead=2):
    """A trace of random choices, some experts likelier than others, and of guesses that are often right."""
    generator = torch.Generator().manual_seed(seed)
    liking = torch.randn(layers, experts, generator=generator)
    scores = liking + torch.randn(passes, layers, experts, generator=generator)
    needed = torch.zeros(passes, layers, experts, dtype=torch.bool).scatter_(2, scores.topk(used).indices, True)
    needed[0] |= torch.rand(layers, experts, generator=generator) < 0.7
    foreseen = torch.zeros(passes, layers, ahead, experts)
    for layer, distance in itertools.product(range(layers), range(ahead)):
        if layer + 1 + distance < layers:
            seen = scores[:, layer + 1 + distance] + torch.randn(passes, experts, generator=generator)
            foreseen[:, layer, distance] = seen.softmax(-1)
    return ExpertTrace(needed, foreseen, (5, *[1] * (passes - 1)), used)


def slow(trace, slots, policy, predictor, ahead, width):
    """The same by looking through the whole history at every decision."""
    passes, layers, experts = trace.needed.shape
    future = requests(trace, slots)
    asked, loads = [], []  # (step, key, whether ahead), (step, key)
    memory, counts, step = set(), {"prefill": Tally(), "decode": Tally()}, 0

    def rank(key, layer):
        last = max(s for s, k, _ in asked if k == key)
        if policy == "lru":
            return -last
        if policy == "lfu":
            return -sum(k == key and not early for _, k, early in asked), -last
        if policy == "fifo":
            return -max(s for s, k in loads if k == key)
        if policy == "least_stale":
            distance = key // experts - layer
            return (distance if distance > 0 else distance + layers), -last
        return next((s for s, keys in enumerate(future, 1) if s > step and key in keys), 10**9)

    def ask(keys, layer, in_use, early):
        absent = [key for key in keys if key not in memory]
        asked.extend((step, key, early) for key in keys if key in memory)
        for _ in range(len(memory) + len(absent) - slots):
            choices = [key for key in sorted(memory) if key not in keys and key not in in_use]
            memory.remove(max(choices, key=lambda key: rank(key, layer)))
        for key in absent:
            memory.add(key)
            asked.append((step, key, early))
            loads.append((step, key))
        return absent

    for at in range(passes):
        tally, early = counts["decode" if trace.tokens[at] == 1 else "prefill"], set()
        for layer in range(layers):
            needed = trace.needed[at, layer].nonzero().flatten().tolist()
            parts = [needed[i : i + slots] for i in range(0, len(needed), slots)]
            for part in parts:
                keys, step = [layer * experts + e for e in part], step + 1
                for key in keys:
                    tally.hits += key in memory
                    tally.misses += key not in memory
                    tally.foreseen += key in memory and key in early
                    tally.collisions += key not in memory and key in early
                    early.discard(key)
                ask(keys, layer, [], False)
            named = []
            for later in range(layer + 1, min(layer + ahead, layers - 1) + 1):
                if predictor == "routers":
                    scores = trace.foreseen[at, layer, later - layer - 1].tolist()
                    order = sorted(range(experts), key=lambda e: -scores[e])
                    chosen = order[: width * trace.tokens[at]]
                elif predictor == "history":
                    chosen = trace.needed[at - 1, later].nonzero().flatten().tolist() if at else []
                else:
                    chosen = trace.needed[at, later].nonzero().flatten().tolist() if predictor == "oracle" else []
                named += [later * experts + e for e in chosen]
            absent = ask(named[: slots - len(keys)], layer, keys, True)
            tally.fetched_ahead += len(absent)
            early.update(absent)
    return counts["prefill"], counts["decode"]


# --- replays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("predictor", ["none", "routers", "history", "oracle"])
@pytest.mark.parametrize(("slots", "ahead"), [(2, 1), (3, 1), (5, 2), (9, 2), (18, 2)])
def test_replays_count_what_a_slow_simulation_counts(policy, predictor, slots, ahead):
    for seed in range(3):
        trace = made_up(seed)
        settings = SpecMD(policy=policy, predictor=predictor, ahead=ahead, width=2)
        found = settings.replay(trace, slots * SIZE, SIZE)
        assert (found.prefill, found.decode) == slow(trace, slots, policy, predictor, ahead, 2)
        assert found.bytes_moved == SIZE * (found.prefill.loads + found.decode.loads)


@pytest.mark.parametrize("slots", [2, 3, 4, 6, 9, 13])
def test_nothing_beats_belady_without_fetching_ahead(slots):
    for seed in range(8):
        trace = made_up(seed, passes=30)
        hits = {}
        for policy in EVERY:
            found = SpecMD(policy=policy, predictor="none").replay(trace, slots * SIZE, SIZE)
            hits[policy] = found.prefill.hits + found.decode.hits
            assert found.prefill.fetched_ahead == found.decode.collisions == found.decode.foreseen == 0
        assert hits[BELADY] == max(hits.values())


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_belady_is_the_best_of_all_evictions(slots):
    for seed in range(4):
        trace = made_up(seed, passes=5, layers=2, experts=4)
        best = {frozenset(): 0}  # what is in memory -> most hits
        for keys in map(set, requests(trace, slots)):
            after = {}
            for memory, hits in best.items():
                gained = hits + len(keys & memory)
                kept = memory - keys
                for count in range(min(len(kept), slots - len(keys)) + 1):
                    for rest in itertools.combinations(kept, count):
                        state = frozenset(keys.union(rest))
                        after[state] = max(after.get(state, 0), gained)
            best = after
        found = SpecMD(policy=BELADY, predictor="none").replay(trace, slots * SIZE, SIZE)
        assert found.prefill.hits + found.decode.hits == max(best.values())


def test_with_room_for_all_only_first_uses_miss():
    trace = made_up(0)
    for policy in EVERY:
        found = SpecMD(policy=policy, predictor="none").replay(trace, 18 * SIZE, SIZE)
        assert found.prefill.misses + found.decode.misses == int(trace.needed.any(0).sum())


def test_least_stale_keeps_what_comes_next_and_drops_what_has_just_been():
    policy = LeastStale(layers=4, experts=10)
    for step, key in enumerate((5, 15, 25, 35, 16)):
        policy.touch(key, step)
    policy.enter(2, frozenset([25]))
    assert [policy.victim(keys, 9) for keys in ({5, 15, 35}, {5, 35}, {16, 15}, {15, 25})] == [15, 5, 15, 15]
    policy.enter(1, frozenset())
    assert policy.victim({5, 15, 25, 35}, 9) == 15


def test_an_oracle_with_room_leaves_misses_to_the_first_layer():
    trace = made_up(1)
    found = SpecMD(policy="least_stale", predictor="oracle", ahead=1).replay(trace, 17 * SIZE, SIZE)
    assert found.decode.collisions == 0
    assert found.decode.misses <= 2 * 13


def test_modelled_times_by_hand():
    needed = torch.tensor([[[1, 0]], [[0, 1]], [[0, 1]]]).bool()
    one_layer = ExpertTrace(needed, torch.zeros(3, 1, 1, 2), (1, 1, 1), 1)
    machine = Hardware("slow", bytes_per_second=100.0, latency_s=0.0, layer_s=0.5)
    found = SpecMD(policy="lru", predictor="none").replay(one_layer, SIZE, SIZE, machine)
    assert found.first_token_ms == pytest.approx(1500)  # 1 s to load, 0.5 s to compute
    assert found.token_ms == pytest.approx((1500 + 500) / 2)  # the last pass hits
    two_layers = ExpertTrace(torch.ones(1, 2, 1).bool(), torch.zeros(1, 2, 1, 1), (1,), 1)
    found = SpecMD(policy="lru", predictor="oracle").replay(two_layers, 2 * SIZE, SIZE, machine)
    assert found.first_token_ms == pytest.approx(2500)  # the second load ends at 2 s, half a second late
    assert found.late == 1
    assert found.token_ms is None


def test_pieces_fit_and_are_ascending():
    assert list(pieces([5, 1, 3], 2)) == [[1, 3], [5]]
    with pytest.raises(UserError, match="single one"):
        pieces([1], 0)


# --- traces --------------------------------------------------------------------------------------------------------


def test_a_trace_holds_what_the_routers_chose_and_what_later_ones_would_say(mixture, ids):
    trace = ExpertTrace.record(mixture, ids, PROMPT, ahead=2)
    assert trace.tokens == (PROMPT, *[1] * 16)
    assert trace.needed.shape == (17, 4, 8)
    assert trace.needed[1:].sum(-1).unique().tolist() == [2]
    inputs = {}
    for layer, block in enumerate(mixture.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0][0]}))
    with torch.no_grad():
        mixture(ids[None])
        chosen = [block.mlp.gate(inputs[i])[2] for i, block in enumerate(mixture.model.layers)]
        guess = mixture.model.layers[3].mlp.gate(inputs[1][PROMPT:])[0].softmax(-1)
    for layer in range(4):
        assert trace.experts(0, layer) == chosen[layer][:PROMPT].unique().tolist()
        one_by_one = [sorted(row.tolist()) for row in chosen[layer][PROMPT:]]
        assert [trace.experts(at, layer) for at in range(1, 17)] == one_by_one
    torch.testing.assert_close(trace.foreseen[1:, 1, 1], guess, rtol=1e-3, atol=1e-4)
    assert not trace.foreseen[:, 3].any()
    with pytest.raises(UserError, match="ahead is 3, the trace was recorded with 2"):
        SpecMD(ahead=3).replay(trace, 8 * SIZE, SIZE)


def test_generation_can_be_recorded(mixture, ids):
    with recording(mixture) as recorder:
        mixture.generate(ids[None, :5], max_new_tokens=6, do_sample=False)
    assert recorder.trace().tokens == (5, 1, 1, 1, 1, 1)


def test_experts_are_named_by_their_scores():
    assert likeliest(torch.tensor([0.1, 0.0, 0.5, 0.1])) == [2, 0, 3]


# --- from disk -----------------------------------------------------------------------------------------------------


def read(model, ids):
    """Logits of a prompt and of the tokens behind it, one by one."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(piece[None], past_key_values=cache).logits[0] for piece in ids.split([PROMPT, *[1] * 16])]
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["upcycled", "olmoe", "mixtral"])
@pytest.mark.parametrize("predictor", ["routers", "history", "none"])
@pytest.mark.parametrize("policy", POLICIES)
def test_from_disk_the_answers_and_the_counts_are_those_of_memory_and_replay(
    kind, predictor, policy, mixture, ids, tmp_path
):
    model = mixture if kind == "upcycled" else foreign(kind)
    settings, size = SpecMD(policy=policy, predictor=predictor, ahead=2), expert_bytes(model)
    expected = settings.replay(ExpertTrace.record(model, ids, PROMPT), 6 * size, size)
    paged = copy.deepcopy(model)
    with settings.attached_(paged, write_experts(model, tmp_path / "experts"), 6 * size) as pager:
        torch.testing.assert_close(read(paged, ids), read(model, ids), rtol=1e-3, atol=1e-3)
        pager.settle()
        assert (pager.prefill, pager.decode) == (expected.prefill, expected.decode)
        stats, stride = pager.store.stats(), pager.store.layout.stride
        assert stats.bytes_read == stride * (pager.prefill.loads + pager.decode.loads)
    assert sum(p.numel() for p in paged.parameters()) < sum(p.numel() for p in model.parameters())


def test_it_generates_from_disk_and_not_any_more_when_closed(mixture, ids, tmp_path):
    expected = mixture.generate(ids[None], max_new_tokens=10, do_sample=False)
    paged = copy.deepcopy(mixture)
    path = write_experts(mixture, tmp_path / "experts")
    with SpecMD().attached_(paged, path, 3 * expert_bytes(mixture)):
        assert torch.equal(paged.generate(ids[None], max_new_tokens=10, do_sample=False), expected)
    with pytest.raises(UserError, match="closed"):
        paged(ids[None])


def test_records_are_the_experts_layer_by_layer(mixture, tmp_path):
    path = write_experts(mixture, tmp_path / "experts")
    with PagedStore(path, 2**20) as store:
        assert len(store) == 32
        found = store.fetch([8 * 2 + 5])
        expert = mixture.model.layers[2].mlp.experts[5]
        assert torch.equal(found["down_proj.weight"][0], expert.down_proj.weight)
    assert sum(t.nbytes for t in next(records_of(mixture, "model.layers.0.mlp.experts")).values()) == 3 * 12 * 32 * 4


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_with_the_way_out(mixture, deep_work, ids, tmp_path):
    path, size = write_experts(mixture, tmp_path / "experts"), expert_bytes(mixture)
    trace = made_up(0)
    with pytest.raises(UserError, match="capacity_bytes is 99"):
        SpecMD().replay(trace, 99, 100)
    with pytest.raises(UserError, match="no policy 'mru'"):
        policy_of("mru", trace, 3)
    for settings in (SpecMD(policy=BELADY), SpecMD(predictor="oracle")):
        with pytest.raises(UserError, match="replays"), settings.attached_(mixture, path, 10 * size):
            pass
    with pytest.raises(UserError, match="capacity_bytes"), SpecMD().attached_(mixture, path, 10):
        pass
    other = Upcycle(experts=4, top_k=2, steps=0).apply(deep_work.model, deep_work)
    with pytest.raises(UserError, match="write them with write_experts"), SpecMD().attached_(other, path, 10 * size):
        pass
    with pytest.raises(UserError, match=r"experts\.upcycle"):
        write_experts(deep_work.model, tmp_path / "none")
    with pytest.raises(UserError, match="packed"):
        write_experts(Group(bits=4, group=32).apply(mixture), tmp_path / "packed")
    for prompt, text in ((0, ids), (25, ids), (3, ids[None])):
        with pytest.raises(UserError, match="prompt"):
            ExpertTrace.record(mixture, text, prompt)
