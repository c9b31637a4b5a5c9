"""A trace of experts played against a cache policy, without the experts: hits, collisions, bytes and modelled times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.errors import UserError
from lilliput.methods.experts._pager import Pager, Tally, pieces
from lilliput.methods.experts._policies import BELADY, POLICIES, Belady, ExpertPolicy
from lilliput.methods.experts._trace import ExpertTrace


@dataclass(frozen=True)
class Hardware:
    """Where experts come from, and what a layer takes once they are there. Times that follow from it are modelled."""

    name: str
    bytes_per_second: float
    latency_s: float  # of one read
    layer_s: float  # computing one layer for one token

    def load_s(self, size_bytes: int) -> float:
        """Seconds to read one expert."""
        return self.latency_s + size_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Report:
    """What a replay or a real run moved; times are modelled, None without hardware."""

    prefill: Tally
    decode: Tally
    expert_bytes: int
    late: int = 0  # hits that were still on their way
    first_token_ms: float | None = None
    token_ms: float | None = None

    @property
    def bytes_moved(self) -> int:
        """Bytes of all experts that were read, on demand or ahead."""
        return self.expert_bytes * (self.prefill.loads + self.decode.loads)


class Slots:
    """A paged store without content, and the clock of its reads: one at a time, in the order they are asked for."""

    def __init__(self, slots: int, policy: ExpertPolicy, load_s: float = 0.0):
        self.slots, self.policy, self.load_s = slots, policy, load_s
        self.ready: dict[int, float] = {}  # key in memory -> when it is there
        self.now = self.free = 0.0
        self.late = 0

    def __contains__(self, key: int) -> bool:
        return key in self.ready

    def hold(self, keys: list[int], step: int) -> list[int]:
        """As `PagedStore.hold`: the same calls of the policy in the same order."""
        missing = sorted(key for key in keys if key not in self.ready)
        for key in set(keys).difference(missing):
            self.policy.touch(key, step)
            self.late += not self.policy.ahead and self.ready[key] > self.now
        while len(self.ready) + len(missing) > self.slots:
            del self.ready[self.policy.victim(self.ready.keys() - set(keys), step)]
        for key in missing:
            self.free = max(self.free, self.now) + self.load_s
            self.ready[key] = self.free
            self.policy.touch(key, step)
        return keys

    def run(self, keys: list[int], seconds: float) -> None:
        """Wait for experts and compute with them."""
        self.now = max(self.now, *(self.ready[key] for key in keys)) + seconds


def replay(
    trace: ExpertTrace,
    slots: int,
    policy: str,
    predictor: str,
    ahead: int,
    width: int,
    expert_bytes: int = 0,
    hardware: Hardware | None = None,
) -> Report:
    """The passes of a trace with room for `slots` experts, empty at the start."""
    passes, layers, _ = trace.needed.shape
    store = Slots(slots, policy_of(policy, trace, slots), hardware.load_s(expert_bytes) if hardware else 0.0)
    pager, ends = Pager(store, store.policy), []
    for at in range(passes):
        seconds = hardware.layer_s * trace.tokens[at] if hardware else 0.0
        for layer in range(layers):
            needed = trace.experts(at, layer)
            share = seconds / max(1, -(-len(needed) // slots))

            def use(_: Sequence[int], keys: Any, share: float = share) -> None:
                store.run(keys, share)

            pager.visit(layer, needed, trace.guesses(at, layer, predictor, ahead, width), trace.tokens[at], use)
        ends.append(store.now)
    first = 1e3 * ends[0] if hardware else None
    each = 1e3 * (ends[-1] - ends[0]) / (passes - 1) if hardware and passes > 1 else None
    return Report(pager.prefill, pager.decode, expert_bytes, store.late, first, each)


def policy_of(name: str, trace: ExpertTrace, slots: int) -> ExpertPolicy:
    """A new policy for the layers and experts of a trace; Belady's knows what will be asked for."""
    _, layers, experts = trace.needed.shape
    if name in POLICIES:
        return POLICIES[name](layers, experts)
    if name != BELADY:
        raise UserError(f"there is no policy {name!r}; choose one of {', '.join((*POLICIES, BELADY))}")
    return Belady(layers, experts, requests(trace, slots))


def requests(trace: ExpertTrace, slots: int) -> list[list[int]]:
    """Keys that are asked for together, in their order."""
    passes, layers, experts = trace.needed.shape
    visits = [(at, layer) for at in range(passes) for layer in range(layers)]
    parts = [(layer, part) for at, layer in visits for part in pieces(trace.experts(at, layer), slots)]
    return [[layer * experts + expert for expert in part] for layer, part in parts]
