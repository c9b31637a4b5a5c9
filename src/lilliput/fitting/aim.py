"""Step 2: is the budget met already, and can it be reached at all?"""

from __future__ import annotations

from collections.abc import Mapping

from lilliput.anatomy import convolutions, linears
from lilliput.budget import NAME_OF_KEY, Budget, format_quantity
from lilliput.device import Device
from lilliput.errors import UserError
from lilliput.workload import Workload

SMALLEST_BITS = 2.0  # per weight, of any format here
MOST_PRUNED = 0.95  # share of the weights that pruning may take at most


class AlreadyInside(UserError):
    """The original meets the budget."""


def aim(workload: Workload, budget: Budget, original: Mapping[str, float], device: Device, threads: int) -> None:
    """Raise AlreadyInside when there is nothing to do, UserError with the distance when a limit is out of reach."""
    unknown = set(budget.limits) - set(original) - {"drop"}
    if unknown:
        known = ", ".join(NAME_OF_KEY[k] for k in original if k in NAME_OF_KEY)
        raise UserError(f"{workload.name} has no {NAME_OF_KEY[min(unknown)]}; a budget can limit its {known} and drop")
    comparable = {k: v for k, v in original.items() if k in budget.limits}
    if comparable and set(budget.limits) - {"drop"} <= set(comparable) and budget.met({**comparable, "drop": 0.0}):
        values = ", ".join(format_quantity(k, v) for k, v in comparable.items())
        raise AlreadyInside(f"{workload.name} is inside the budget {budget} already ({values}); nothing to fit")
    for key, least in lower_bounds(workload, original, device, threads).items():
        limit = budget.limits.get(key)
        if limit is not None and limit < least:
            raise UserError(
                f"the budget is out of reach: {format_quantity(key, limit)} is asked, but {SMALLEST_BITS:.0f} bits "
                f"a weight with {MOST_PRUNED:.0%} of the weights pruned need {format_quantity(key, least)} "
                f"({least / limit:.1f} times the limit); raise the limit or start from a smaller model"
            )


def lower_bounds(workload: Workload, original: Mapping[str, float], device: Device, threads: int) -> dict[str, float]:
    """The least that any plan could need: bytes of the smallest weights, and the time to read them once."""
    model = workload.model
    weights = sum(model.get_submodule(n).weight.numel() for n in [*linears(model), *convolutions(model)])  # type: ignore[union-attr]
    least_bytes = weights * (1 - MOST_PRUNED) * SMALLEST_BITS / 8
    reading_ms = 1e3 * least_bytes / device.bandwidth(least_bytes, threads)
    bounds = {"size_bytes": least_bytes, "memory_bytes": least_bytes, "energy_j": device.idle_w * reading_ms / 1e3}
    time_key = "token_ms" if "token_ms" in original else "latency_ms"
    return bounds | {time_key: reading_ms}
