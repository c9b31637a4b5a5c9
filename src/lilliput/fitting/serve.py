"""Step 6: other ways to serve the best plans, each measured: drafts from the text, and smaller caches.

Every candidate was measured as it is served plainly. Drafts (`decode.ngram`) leave the text as it is, so they are taken
when they are faster on validation prompts. Policies of `cache` are tried where the memory of a context is limited and
the plan alone is above the limit: low-bit caches first, then those that forget, with as many tokens as fit. The step
looks at the best plan and at those that lost less but missed such a limit: a cache that gives bytes back leaves them to
the weights.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lilliput.anatomy import anatomy
from lilliput.artifact import save, write_serving
from lilliput.errors import UserError
from lilliput.fitting.build import key_of
from lilliput.fitting.policies import full_cache, late_nats, long_texts, mean_and_error, worse
from lilliput.fitting.recover import all_cores
from lilliput.measuring import compare_behind, compare_drafting, fresh_process_memory, modelled_energy
from lilliput.method import CachePolicy, Decoder
from lilliput.methods.cache._cache import head_width
from lilliput.methods.cache.h2o import H2O
from lilliput.methods.cache.low_bit import LowBit
from lilliput.methods.cache.roco import RoCo
from lilliput.methods.cache.sliding import Sliding
from lilliput.methods.decode.ngram import Ngram
from lilliput.methods.prune.depth import Depth
from lilliput.metrics.latency import Comparison
from lilliput.plan import Plan, serving_entry
from lilliput.served import Drafting, Setting, attention_as_before, label, prepare

if TYPE_CHECKING:
    from lilliput.fitting.run import Job

MOST_PLANS = 3
RESERVE = 1.5  # times what measuring took: kept for this step, at most SHARE of the time
SHARE = 0.2
BITS = (8, 4, 2)
TYPICAL = LowBit(bits=4)  # what is tried once before the search: it may leave to the weights what that gives back
FREE = 0.9  # share of the room under the limit that a policy fills
FEWEST, STEP = 32, 16  # tokens that a policy keeps at least, and what their number is a multiple of
FITTING = 2.0  # times the limit, or times what the typical policy gives back, that serving may mend


def check_context(job: Job) -> None:
    """Raise UserError when a context is asked of a runtime that keeps none."""
    if job.options.context is not None and not job.runtime.keeps_text:
        raise UserError(
            f"the runtime {job.runtime.name} keeps no keys and values, so a context says nothing about it; "
            "leave out context, or take the runtime lean"
        )


def wants_drafts(job: Job) -> bool:
    """Whether drafts may help: a time per token is limited and can be measured."""
    able = job.options.serve and job.runtime.keeps_text and job.device.measured
    return able and "token_ms" in job.budget.limits


def may_use_policies(job: Job) -> bool:
    """Whether a smaller cache is looked at: the memory of a context is limited, and lost perplexity can be seen."""
    able = job.options.serve and job.runtime.keeps_text and job.device.measured and bool(job.workload.source)
    judged = job.workload.metric.name == "perplexity"
    return able and judged and job.options.context is not None and "memory_bytes" in job.budget.limits


def freed_bytes(job: Job) -> float:
    """What the typical policy gives back of the original's memory in a fresh process, less what transformers takes
    beside the cache; 0 for a model that it does not fit."""
    try:
        with attention_as_before(job.workload.model):
            TYPICAL.cache(job.workload.model)
    except UserError:
        return 0.0
    job.progress.say("memory with a smaller cache")
    return job.original.values["memory_bytes"] - job.bench.fresh_memory(job.workload.model, TYPICAL)


def reserve_s(job: Job) -> float:
    """Seconds to keep for this step."""
    wanted = wants_drafts(job) or job.freed > 0
    return min(RESERVE * job.timings.get("measure", 0.0), SHARE * 60 * job.options.minutes) if wanted else 0.0


def serving_rows(job: Job) -> list[dict[str, Any]]:
    """A row for every plan and every way to serve it that was tried, with its figures; the plain one comes first."""
    seen: set[str] = set()
    return [row for c in plans_to_serve(job) for row in Trial(job, c, seen).rows()]


def plans_to_serve(job: Job) -> list[dict[str, Any]]:
    """The best candidate, and those that lost less but miss a limit that serving may mend; the least damage first."""
    best, limits = job.best(), job.budget.limits
    if not (wants_drafts(job) or job.freed > 0):
        return []
    out_by = {
        "memory_bytes": limits["memory_bytes"] + FITTING * job.freed if job.freed > 0 else 0,
        "token_ms": FITTING * limits["token_ms"] if wants_drafts(job) else 0,
    }

    def mendable(c: dict[str, Any]) -> bool:
        broken = [key for key, slack in job.budget.slack(c["measured"]).items() if slack < 0]
        return bool(broken) and all(c["measured"][key] <= out_by.get(key, 0) for key in broken)

    hopeful = [c for c in job.run.candidates() if damage_of(c) < damage_of(best) and mendable(c)]
    return [*sorted(hopeful, key=damage_of)[: MOST_PLANS - 1], best]


def damage_of(candidate: dict[str, Any]) -> float:
    """Of a candidate, after recovery where it had its time already."""
    return candidate.get("recovered", candidate)["damage"]


def choices(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that help, each as the candidate it is of: drafts that are faster, policies where no plan alone meets
    the budget or where they lose less than the best that does, by more than the noise."""
    built, best = {c["number"]: c for c in job.run.candidates()}, job.best()
    least = damage_of(best) - best["damage_error"] if job.budget.met(best["measured"]) else float("inf")
    found = []
    for row in rows:
        lossless = "same_text" in row
        if row["serving"] is None or "refused" in row:
            continue
        if row["speedup"]["low"] > 1 if lossless else row["damage"] < least:
            own = built[row["candidate"]]
            served = own | row | {"weights_damage": own["damage"]}
            if "recovered" in own:
                served["recovered"] = own["recovered"] | {"damage": row["damage"]}
            found.append(served)
    return found


@dataclasses.dataclass
class Trial:
    """One candidate, to be served in several ways."""

    job: Job
    candidate: dict[str, Any]
    seen: set[str]  # families that were tried, on whichever candidate

    def rows(self) -> list[dict[str, Any]]:
        """A row for each way that is tried; when the time is up, only for one of a family that never was."""
        found = [self._row(None, {"measured": self.candidate["measured"], "damage": damage_of(self.candidate)})]
        for setting in self._settings(found):
            family = setting.name().partition(".")[0]
            if family in self.seen and self.job.seconds_left() <= 0:
                break
            self.seen.add(family)
            found.append(self._tried(setting))
        return found

    def _settings(self, rows: list[dict[str, Any]]) -> Iterator[Decoder | CachePolicy]:
        """What to try next, after the rows that are there."""
        if wants_drafts(self.job):
            yield Ngram(runtime="lean")
        limit = self.job.budget.limits.get("memory_bytes")
        if limit is None or not self.job.freed > 0 or self.candidate["measured"]["memory_bytes"] <= limit:
            return
        for policy in (LowBit(bits=bits) for bits in BITS):
            if self._beside(rows) + self._share(policy) * self.token_bytes * self.context <= limit:
                yield policy
                if rows[-1].get("measured", {}).get("memory_bytes", limit + 1) <= limit:
                    return
        tokens = int(FREE * (limit - self._beside(rows)) / self.token_bytes)
        budget = min(tokens, self.context // 2) // STEP * STEP
        if budget >= FEWEST and self.whole:
            yield from (Sliding(budget=budget), H2O(budget=budget), RoCo(budget=budget))

    def _beside(self, rows: list[dict[str, Any]]) -> float:
        """Bytes beside a policy's cache, as measured with this plan, or by what the usual one left of the original."""
        seen = [row for row in rows if row["serving"] and "cache_bytes" in row]
        if seen:
            return max(row["measured"]["memory_bytes"] - row["cache_bytes"] for row in seen)
        expected = (1 - self._share(TYPICAL)) * whole_token_bytes(self.job) * self.context
        plain = self.candidate["measured"]["memory_bytes"] - self.token_bytes * self.context
        return plain + max(0.0, expected - self.job.freed)

    def _share(self, policy: LowBit) -> float:
        return low_bit_share(policy, self.context, head_width(self.job.workload.model))

    def _tried(self, setting: Setting) -> dict[str, Any]:
        """The stored row of a setting, or one measured now."""
        plan = dataclasses.replace(Plan.from_yaml(self.candidate["plan"]), serving=setting)
        self.job.progress.say(label(setting))
        return self.job.run.step(f"serving/{key_of(plan)}", lambda: self._measured(setting))

    def _measured(self, setting: Setting) -> dict[str, Any]:
        try:
            with attention_as_before(self.model):
                figures = self._drafted(setting) if isinstance(setting, Decoder) else self._under(setting)
        except UserError as error:  # a policy that this kind of model cannot have
            return self._row(setting, {"refused": str(error)})
        return self._row(setting, figures)

    def _row(self, setting: Setting, figures: dict[str, Any]) -> dict[str, Any]:
        entry = None if setting is None else serving_entry(setting)
        row = {"candidate": self.candidate["number"], "serving": entry, "label": label(setting)}
        if setting is None and self.job.reference is not None:
            row["cache_bytes"] = round(self.token_bytes * self.context)
        return row | figures

    def _drafted(self, setting: Any) -> dict[str, Any]:
        """The candidate's figures with the time per token that drafts give."""
        job = self.job
        plain = job.runtime.prepare(self.model, job.workload, job.threads)
        gain, same = compare_drafting(job.workload, Drafting(plain, setting))
        measured = self.candidate["measured"]
        return {
            "measured": measured | {"token_ms": measured["token_ms"] / gain.ratio},
            "damage": damage_of(self.candidate),
            "damage_error": self.candidate["damage_error"],
            "speedup": _interval(gain),
            "same_text": f"{same} of {gain.rounds}",
        }

    def _under(self, policy: Any) -> dict[str, Any]:
        """The figures under a policy: times behind the context, memory of a fresh process, loss at the end of texts."""
        job, own = self.job, self.candidate
        write_serving(self.artifact, policy)  # written before the policy touches the model
        memory = fresh_process_memory(self.artifact, job.runtime.name, job.threads)
        session: Any = prepare(job.runtime, self.model, job.workload, job.threads, policy)
        gain, first_ms = compare_behind(job.workload, job.reference, session)
        size = session.cache_bytes
        with all_cores():
            nats, error = mean_and_error(late_nats(self.model, self.texts, policy.cache) - self.full_nats)
        token_ms = job.original.values["token_ms"] / gain.ratio
        measured = own["measured"] | {
            "token_ms": token_ms,
            "first_token_ms": first_ms,
            "energy_j": modelled_energy(job.workload, self.model, job.device, token_ms),
            "memory_bytes": float(memory),
            "drop": worse(own["measured"]["drop"], nats),
        }
        return {
            "measured": measured,
            "damage": damage_of(own) + nats,
            "damage_error": own["damage_error"] + (error if len(self.texts) > 1 else 0.0),
            "speedup": _interval(gain),
            "cache_bytes": size,
            "nats": nats,
        }

    # --- what several settings need ------------------------------------------------------------------------------

    @cached_property
    def model(self) -> nn.Module:
        """The candidate's model, built when something has to be measured."""
        if self.candidate["number"] in self.job.made:
            return self.job.made[self.candidate["number"]][1]
        with all_cores():
            return Plan.from_yaml(self.candidate["plan"]).apply(self.job.light)

    @cached_property
    def artifact(self) -> Path:
        """The model on disk, for fresh processes; the folder goes with this object."""
        self._folder = tempfile.TemporaryDirectory()
        return save(self.model, Path(self._folder.name) / "model", self.job.workload)

    @cached_property
    def _texts(self) -> tuple[Tensor, bool]:
        return long_texts(self.job.workload, "validation")

    @property
    def texts(self) -> Tensor:
        """Long validation texts (n, context)."""
        return self._texts[0]

    @property
    def whole(self) -> bool:
        """Whether they are pieces of one text each: put together ones would hide what forgetting costs."""
        return self._texts[1]

    @cached_property
    def full_nats(self) -> Tensor:
        """Their loss with a cache that keeps everything."""
        return late_nats(self.model, self.texts, full_cache)

    @property
    def context(self) -> int:
        return self.job.options.context or 0

    @cached_property
    def token_bytes(self) -> float:
        """Of the keys and values of one token, in the blocks that the plan leaves."""
        steps = Plan.from_yaml(self.candidate["plan"]).steps
        dropped = sum(len(step.layers or ()) for step in steps if isinstance(step.method, Depth))
        blocks = len(anatomy(self.job.workload.model).blocks)
        return whole_token_bytes(self.job) * (blocks - dropped) / blocks


def whole_token_bytes(job: Job) -> float:
    """Of the keys and values of one token in the original."""
    return job.reference.cache_bytes / job.reference.max_length


def low_bit_share(policy: LowBit, tokens: int, width: int) -> float:
    """Bytes of a low-bit cache as a share of one in float32, with heads of `width`: 4 bytes for the grid of a group."""
    kept = min(tokens, policy.residual + policy.group - 1) / tokens
    grids = 4 * (1 / policy.group + 1 / min(policy.group, width)) / 2
    return kept + (1 - kept) * (policy.bits / 8 + grids) / 4


def _interval(gain: Comparison) -> dict[str, float]:
    return {"ratio": gain.ratio, "low": gain.low, "high": gain.high}
