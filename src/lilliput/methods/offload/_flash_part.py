"""A feed-forward part whose neurons lie in a file: each is a record of its rows, read when the neuron fires."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput._paged_file import BLOCK_BYTES, Field, Layout, read_layout
from lilliput.cache import folder
from lilliput.errors import UserError
from lilliput.kernels import sparse_ffn as kernel
from lilliput.methods.layers._rows import FORMATS, RowLinear
from lilliput.methods.layers.sparse_ffn import gate_layer, stored_gate
from lilliput.methods.offload._predictor import Predictor
from lilliput.paged_store import PagedStore, write_store

PREDICTED = "predicted"  # no gate in memory: a predictor says who fires, the rows of the gate lie in the file too
GATES = (PREDICTED, *FORMATS)
SMALL_BLOCK_BYTES = 512  # of records that are smaller than a block


class FlashFeedForward(nn.Module):
    """(..., inputs) -> (..., inputs), the sum over the neurons taken to fire; their rows come from a paged store.

    `records` (neurons, bytes) holds all rows until `move_out_` writes them to a file; a state dict has them again. The
    answer does not depend on what is in memory.
    """

    records: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        neurons: int,
        shift: float,
        gate: str,
        rows: str,
        groups: Sequence[int],
        biases: Sequence[bool],
        rank: int,
        memory: float,
        window: int,
    ):
        super().__init__()
        if not len(groups) == len(biases) in (2, 3) or gate not in GATES or rows not in FORMATS:
            raise UserError(f"a part of {len(groups)} groups, {gate!r} and {rows!r}; give 2 or 3, and known formats")
        self.inputs, self.neurons, self.shift, self.rank = inputs, neurons, shift, rank
        self.gate_format, self.row_format, self.groups = gate, rows, tuple(groups)
        self.memory, self.window = memory, window
        if gate == PREDICTED:
            self.predictor = Predictor(inputs, neurons, rank)
        else:
            self.gate: Any = gate_layer(inputs, neurons, gate, rows, groups[0], biases[0])
        kept = {"gate": biases[0] and gate == PREDICTED, "up": len(biases) == 3 and biases[1]}
        for name, wanted in kept.items():
            self.register_buffer(f"{name}_bias", torch.zeros(neurons) if wanted else None)
        self.register_buffer("down_bias", torch.zeros(inputs) if biases[-1] else None)
        self.register_buffer("records", torch.zeros(neurons, self.fields()[-1].stop, dtype=torch.uint8))
        self._biases = tuple(biases)
        self._path: Path | None = None
        self._opened: PagedStore | None = None
        self._recent: deque[set[int]] = deque()
        self._step = 0

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[str, nn.Linear],
        shift: float,
        gate: str,
        rows: str,
        group: int,
        memory: float,
        window: int,
        predictor: Predictor | None = None,
    ) -> FlashFeedForward:
        """The same part as its layers (gate, up if any, down), the rows of its neurons still in memory."""
        first, *ups, last = layers.values()
        by_name = {"up": (ups[0], "outputs")} if ups else {}
        by_name |= {"down": (last, "inputs")}
        if gate == PREDICTED:
            by_name = {"gate": (first, "outputs")} | by_name
        stored = {n: RowLinear.from_weight(m.weight, None, by, rows, group) for n, (m, by) in by_name.items()}
        kept: Any = None if gate == PREDICTED else stored_gate(first, gate, rows, group)
        groups = [(kept or stored["gate"]).group, *(stored[name].group for name in ("up", "down") if name in stored)]
        biases, rank = [m.bias is not None for m in layers.values()], 1 if predictor is None else len(predictor.into)
        with torch.device("meta"):
            whole = cls(first.in_features, first.out_features, shift, gate, rows, groups, biases, rank, memory, window)
        if kept is None:
            assert predictor is not None
            whole.predictor = predictor
        else:
            whole.gate = kept
        for name, linear in (("gate", first), ("up", ups[0] if ups else None), ("down", last)):
            if linear is not None and getattr(whole, f"{name}_bias") is not None:
                setattr(whole, f"{name}_bias", linear.bias.detach().float().clone())
        parts = [t for m in stored.values() for t in (m.values, m.grid) if t is not None]
        whole.records = torch.cat([t.flatten(1).contiguous().view(torch.uint8) for t in parts], 1)
        return whole

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"inputs": self.inputs, "neurons": self.neurons, "shift": self.shift, "gate": self.gate_format}
        sizes |= {"rows": self.row_format, "groups": list(self.groups), "biases": list(self._biases)}
        return sizes | {"rank": self.rank, "memory": self.memory, "window": self.window}

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.neurons} neurons, {self.memory:.0%} in memory, shift={self.shift:.4g}"

    def fields(self) -> tuple[Field, ...]:
        """What the record of a neuron holds, tensor by tensor."""
        names = ("gate",) * (self.gate_format == PREDICTED) + ("up",) * (len(self.groups) == 3) + ("down",)
        stored = ("gate", "up", "down") if len(self.groups) == 3 else ("gate", "down")
        groups: dict[str, int] = dict(zip(stored, self.groups))
        found = []
        for name in names:
            with torch.device("meta"):
                one = RowLinear(self.inputs, 1, "outputs", self.row_format, groups[name])
            tensors = {name: one.values, f"{name}_grid": one.grid}
            found += [(key, t.dtype, t.shape[1:]) for key, t in tensors.items() if t is not None]
        return Layout.of(found, BLOCK_BYTES, records=1, data_start=0).fields

    # --- the file ------------------------------------------------------------------------------------------------

    def move_out_(self) -> None:
        """Write the records to a file named after their content and forget them here; nothing when that is done."""
        if not self.records.numel() or self.records.is_meta:
            return
        fields, records = self.fields(), self.records.contiguous()
        digest = hashlib.sha256(repr(fields).encode())
        digest.update(records.numpy().data)
        path = folder("stores") / f"{digest.hexdigest()[:32]}.pages"
        if not _is_store(path):
            block = SMALL_BLOCK_BYTES if records.shape[1] < BLOCK_BYTES else BLOCK_BYTES
            rows = ({f.name: row[f.start : f.stop].view(f.dtype).view(f.shape) for f in fields} for row in records)
            write_store(path, rows, block)
        self._path, self.records = path, records.new_zeros(0, records.shape[1])

    def store(self) -> PagedStore:
        """The open store; its cache has room for the share `memory` of the neurons, at least for one."""
        if self._opened is None:
            self.move_out_()
            if self._path is None:
                raise UserError("a feed-forward part has no rows yet; load its weights before it runs")
            slots = max(1, round(self.memory * self.neurons))
            self._opened = PagedStore(self._path, slots * self.fields()[-1].stop)
        return self._opened

    def _all_records(self) -> Tensor:
        assert self._path is not None
        with PagedStore(self._path, self.neurons * self.fields()[-1].stop) as whole:
            found = whole.fetch(range(self.neurons))
        return torch.cat([t.flatten(1).contiguous().view(torch.uint8) for t in found.values()], 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._path is not None:
            destination[f"{prefix}records"] = self._all_records()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self._path is not None:
            self.records, self._path, self._opened = self._all_records(), None, None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # --- the product ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        rows, store = x.reshape(-1, self.inputs).float(), self.store()
        gates, firing = self.firing(rows)
        keys = firing.any(0).nonzero().flatten()
        y = torch.zeros_like(rows) if self.down_bias is None else self.down_bias.float().expand_as(rows)
        self._step += 1
        for part in keys.split(store.slots) if len(keys) else ():
            y = y + self._part(rows, None if gates is None else gates[:, part], firing[:, part], part)
        self._leave(keys)
        return y.to(x.dtype).view(x.shape)

    def firing(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """Values of the gate where it is in memory, and who is taken to fire, (tokens, neurons) each."""
        if self.gate_format == PREDICTED:
            return None, self.predictor.fires(rows)
        gates = self.gate(rows)
        return gates, ~(gates <= self.shift)  # NaN fires, as in the kernel

    def _part(self, rows: Tensor, gates: Tensor | None, firing: Tensor, keys: Tensor) -> Tensor:
        """What the neurons `keys` add for rows (tokens, inputs); a token uses only those that it was said to need."""
        found = self.store().fetch(keys, self._step)
        gate, up, down = (self._matrix(found, name) for name in ("gate", "up", "down"))
        assert down is not None
        if gates is None:
            assert gate is not None
            gates = F.linear(rows, gate.dense(), _at(self.gate_bias, keys))
        gates = gates.masked_fill(~firing, float("-inf")).contiguous()
        whole = torch.is_grad_enabled() and rows.requires_grad
        product = kernel.reference if whole else kernel.sparse_ffn
        return product(rows, gates, self.shift, up, _at(self.up_bias, keys), down)

    def _matrix(self, found: dict[str, Tensor], name: str) -> kernel.Rows | None:
        return kernel.Rows(found[name], found.get(f"{name}_grid"), self.inputs) if name in found else None

    def _leave(self, keys: Tensor) -> None:
        """Let go of the neurons that the last `window` calls did not use."""
        if self.window:
            self._recent.append(set(keys.tolist()))
            if len(self._recent) > self.window:
                self.store().drop(self._recent.popleft().difference(*self._recent))


def _at(bias: Tensor | None, keys: Tensor) -> Tensor | None:
    return None if bias is None else bias.float()[keys]


def _is_store(path: Path) -> bool:
    """Whether a whole store of that content stands there already."""
    try:
        return path.exists() and bool(read_layout(path).records)
    except UserError:  # cut short or damaged: it is written again
        return False
