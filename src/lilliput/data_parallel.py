"""Processes that train one model together, each on its rows of every batch:  torchrun --nproc_per_node 2 program.py

    g = sum over processes of  share_p g_p,     share_p = rows of p / rows of the batch

which is the gradient of the whole batch for every loss that is a mean over rows. Every process makes the same model and
the same batches; where they differ the first one counts: its weights at the start, its clock, its checkpoint, and the
statistics of its batch norms at the end. Random numbers, such as those of dropout, are each process's own.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lilliput.errors import UserError


class Processes:
    """Those that train together, and which of them this is; one alone needs no others."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def rows(self, batch: Any) -> tuple[Any, float]:
        """This process's rows of a batch, and their share of all; 0 where there are fewer rows than processes.

        Raises UserError for what is not made of tensors with equally many rows.
        """
        if self.size == 1:
            return batch, 1.0
        count = row_count(batch)
        begin, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return rows_of(batch, slice(begin, end)), (end - begin) / count

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all processes; waits for them."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def average_(self, parameters: Sequence[Tensor], share: float) -> None:
        """Gradients become the sum over processes of share times gradient; none stays none where no process has one."""
        if self.size == 1:
            return
        wanted = [p for p in parameters if p.requires_grad]
        kind = torch.float64 if any(p.dtype == torch.float64 for p in wanted) else torch.float32
        held = torch.tensor([p.grad is not None for p in wanted], dtype=kind)
        flat = torch.cat([held, *(share * _gradient(p).flatten().to(kind) for p in wanted)])
        dist.all_reduce(flat)
        counts, summed = flat[: len(wanted)].tolist(), flat[len(wanted) :].split([p.numel() for p in wanted])
        for p, count, gradient in zip(wanted, counts, summed):
            p.grad = gradient.view(p.shape).to(p.dtype) if count else None

    @torch.no_grad()
    def spread_(self, model: nn.Module) -> None:
        """Every process gets the first one's parameters and buffers, to the bit."""
        if self.size == 1:
            return
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.numel():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole.view(-1).view(torch.uint8), 0)
                tensor.copy_(whole)

    def agree(self, facts: Mapping[str, float]) -> None:
        """Raises UserError, in all processes, when the facts of one are not those of the others."""
        if self.size == 1:
            return
        mine = torch.tensor(list(facts.values()), dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        for name, *values in zip(facts, *(each.tolist() for each in found)):
            if len(set(values)) > 1:
                said = ", ".join(f"{value:g}" for value in values)
                raise UserError(
                    f"the processes that train together have {said} {name}; give all of them the same model, batches "
                    "and checkpoint, or data_parallel=False to train each on its own"
                )


def joined(wanted: bool | None = None) -> Processes:
    """The processes to train with: None means those that torchrun started, if it did; True those of the group that
    there is, or else that torchrun started; False none. Raises UserError for True where there are no others."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if wanted is False or not (wanted or launched):
        return Processes()
    if not (dist.is_available() and dist.is_initialized()):
        if not launched:
            raise UserError("data_parallel is True, but there is no process group; start the program with torchrun")
        dist.init_process_group("gloo")
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


# --- rows of a batch -------------------------------------------------------------------------------------------------


def row_count(batch: Any) -> int:
    """The first dimension of all tensors of a batch. Raises UserError when there is not one number of rows."""
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) != 1 or 0 in lengths:
        said = f"tensors of {sorted(lengths)} rows" if lengths else f"no tensors ({type(batch).__name__})"
        raise UserError(
            f"a batch holds {said} and cannot be shared out; several processes train on tensors (B, ...) of one B, in "
            "dictionaries, tuples or lists"
        )
    return lengths.pop()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def rows_of(value: Any, rows: slice) -> Any:
    """The same structure with some rows of its tensors; numbers and other values stay."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim else value
    if isinstance(value, Mapping):
        return type(value)({key: rows_of(part, rows) for key, part in value.items()})  # pyright: ignore
    if isinstance(value, list | tuple):
        parts = [rows_of(part, rows) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
