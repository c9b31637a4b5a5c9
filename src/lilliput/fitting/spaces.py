"""Which space a workload has, and the uniform settings that a joint search must beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lilliput.anatomy import anatomy
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.fitting.space import Genome, Space
from lilliput.runtimes import Runtime
from lilliput.workload import Workload


def build_space(
    workload: Workload,
    families: Sequence[str],
    original: Mapping[str, float],
    threads: int,
    device: Device,
    runtime: Runtime,
    progress: Callable[[str], None],
    cache_bytes: float = 0.0,
) -> Space:
    """The search space of a workload. Raises UserError for a model that no space knows, with what still works."""
    parts = anatomy(workload.model)
    dense = all(block.attention and block.mlp for block in parts.blocks)  # no mixtures of experts
    if workload.kind == "causal_lm" and parts.kind == "llama" and dense:
        from lilliput.fitting.decoder_space import decoder_space

        return decoder_space(
            workload, families, original["token_ms"], original["memory_bytes"], threads, device, progress, cache_bytes
        )
    if workload.kind != "causal_lm":
        from lilliput.fitting.feedforward_space import feedforward_space

        return feedforward_space(workload, families, original, threads, device, runtime, progress)
    raise UserError(
        f"fit has no search space for a {type(workload.model).__name__} as {workload.kind}; single methods still "
        "apply: see `lilliput methods` and lilliput.methods.<family>.<Method>().apply(model, workload)"
    )


def rivals(space: Space) -> dict[str, Genome]:
    """Name -> genome of the uniform settings that have an effect; settings of families left out may coincide."""
    found: dict[str, Genome] = {}
    for name, wanted in space.rivals.items():
        genome = space.uniform(wanted)
        if any(genome) and genome not in found.values():
            found[name] = genome
    return found
