"""Feed-forward parts that read the weights of the neurons that fired and of no others.

Paper: ReLU Strikes Back (Mirzadeh et al., 2023, arXiv 2310.04564), whose models have such neurons; see layers.relufy.

    a = max(0, W_gate x - shift),   y = sum over a_j != 0 of a_j (u_j x) d_j        (plain parts: without u_j x)

The gate is computed whole; rows of up and of down (stored transposed) are gathered. Measured: results/sparse_ffn.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.kernels import sparse_ffn as kernel
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, LAYER_SHAPES, OUTPUT_SHAPE, PACKED_WEIGHTS, Facts, Method, knob
from lilliput.methods.layers._feed_forward import rectified_names, rectified_parts
from lilliput.methods.layers._rows import FORMATS, RowLinear
from lilliput.methods.quantize._grid import choose_grid, round_to_grid
from lilliput.methods.quantize._packed import PackedLinear
from lilliput.methods.quantize.group import fitting_group
from lilliput.workload import Workload

BY_INPUTS = "inputs"  # a gate that reads the rows of inputs that are not zero, in the format of the other rows
GATES = (*FORMATS, BY_INPUTS)


class SparseFeedForward(nn.Module):
    """A feed-forward part (..., inputs) -> (..., inputs) whose layers keep their names: gate, up (if any), down.

    The gate is a PackedLinear (int8, int4) or a RowLinear (float32, bfloat16, or by its inputs in the format of the
    rows); up and down are rows of neurons.
    """

    def __init__(
        self,
        names: Sequence[str],
        inputs: int,
        neurons: int,
        shift: float,
        gate: str,
        rows: str,
        groups: Sequence[int],
        biases: Sequence[bool],
    ):
        super().__init__()
        if not len(names) == len(groups) == len(biases) in (2, 3) or gate not in GATES:
            raise UserError(f"a sparse feed-forward part has 2 or 3 layers with a group and a bias each, not {names}")
        self.names, self.inputs, self.neurons, self.shift = tuple(names), inputs, neurons, shift
        self.gate_format, self.row_format, self.groups = gate, rows, tuple(groups)
        if taken := [name for name in names if hasattr(self, name)]:
            raise UserError(f"a layer is called {taken[0]!r}, which a sparse feed-forward part needs itself; rename it")
        self.add_module(names[0], gate_layer(inputs, neurons, gate, rows, groups[0], biases[0]))
        for name, group, bias in list(zip(names, groups, biases))[1:-1]:
            self.add_module(name, RowLinear(inputs, neurons, "outputs", rows, group, bias))
        self.add_module(names[-1], RowLinear(neurons, inputs, "inputs", rows, groups[-1], biases[-1]))

    @classmethod
    def from_layers(
        cls, layers: Mapping[str, nn.Linear], shift: float, gate: str, rows: str, group: int = 64
    ) -> SparseFeedForward:
        """The same part with its layers (name -> gate, up if any, down) stored as asked for."""
        names, linears = list(layers), list(layers.values())
        made: list[Any] = [stored_gate(linears[0], gate, rows, group)]
        made += [RowLinear.from_weight(up.weight, up.bias, "outputs", rows, group) for up in linears[1:-1]]
        made.append(RowLinear.from_weight(linears[-1].weight, linears[-1].bias, "inputs", rows, group))
        inputs, neurons = linears[0].in_features, linears[0].out_features
        with torch.device("meta"):
            whole = cls(
                names, inputs, neurons, shift, gate, rows, [m.group for m in made], [m.bias is not None for m in made]
            )
        for name, layer in zip(names, made):
            whole.add_module(name, layer)
        return whole

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        sizes = {"names": list(self.names), "inputs": self.inputs, "neurons": self.neurons, "shift": self.shift}
        biases = [layer.bias is not None for layer in self.layers()]
        return sizes | {
            "gate": self.gate_format,
            "rows": self.row_format,
            "groups": list(self.groups),
            "biases": biases,
        }

    def extra_repr(self) -> str:
        return f"shift={self.shift:.4g}"

    def layers(self) -> list[Any]:
        """Gate, up (if any) and down."""
        return [self.get_submodule(name) for name in self.names]

    def sparse_parts(self) -> tuple[kernel.Rows | None, Tensor | None, kernel.Rows, Tensor | None]:
        """Rows and bias of up (None: none) and of down, as kernels take them."""
        *_, up, down = self.layers()
        below = down.rows(), down.float_bias()
        return (None, None, *below) if len(self.names) == 2 else (up.rows(), up.float_bias(), *below)

    def activations(self, x: Tensor) -> Tensor:
        """What the gate lets through for x (..., inputs): (..., neurons), zero for those that are silent."""
        return F.relu(self.layers()[0](x) - self.shift)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        if rows.requires_grad and torch.is_grad_enabled():
            return self._plain(rows).view(x.shape)
        rows = rows.float()
        y = kernel.sparse_ffn(rows, self.layers()[0](rows), self.shift, *self.sparse_parts())
        return y.to(x.dtype).view(x.shape)

    def _plain(self, x: Tensor) -> Tensor:
        """All neurons in plain torch, through which gradients flow."""
        _, *up, down = self.layers()
        hidden = self.activations(x).float()
        for layer in up:
            hidden = hidden * layer.plain(x)
        return down.plain(hidden).to(x.dtype)


def gate_layer(inputs: int, neurons: int, format: str, rows: str, group: int, bias: bool) -> nn.Module:
    """An empty gate of one of GATES; `rows` is the format of one by its inputs."""
    if format == BY_INPUTS:
        return RowLinear(inputs, neurons, "inputs", rows, group, bias)
    if format in ("int8", "int4"):
        return PackedLinear(inputs, neurons, 8 if format == "int8" else 4, group, bias)
    return RowLinear(inputs, neurons, "outputs", format, 0, bias)


def stored_gate(linear: nn.Linear, format: str, rows: str, group: int) -> nn.Module:
    """The gate of a linear layer in one of GATES."""
    weight, columns = linear.weight.detach(), linear.in_features
    if format == BY_INPUTS:
        return RowLinear.from_weight(weight, linear.bias, "inputs", rows, group)
    if format not in ("int8", "int4"):
        return RowLinear.from_weight(weight, linear.bias, "outputs", format)
    bits, shared = (8, columns) if format == "int8" else (4, fitting_group(group, columns))
    scale, zero = choose_grid(weight, bits, shared, symmetric=bits == 8, search=0 if bits == 8 else 10)
    return PackedLinear.from_codes(round_to_grid(weight, scale, zero, bits), scale, zero, bits, shared, linear.bias)


@dataclass(frozen=True)
class SparseFFN(Method):
    """Store feed-forward parts by neuron and read only those that fired; the activation must be a (shifted) ReLU.

    Faster for few tokens at a time, as in decoding, and only where most neurons are silent.
    """

    gate: str = knob(
        "int8",
        choices=GATES,
        per_layer=True,
        help="how the gate is stored; 'inputs': as rows of its inputs, of which those that are zero are not read",
    )
    rows: str = knob("int8", choices=FORMATS, per_layer=True, help="how the rows of up and down are stored")
    group: int = knob(64, choices=(32, 64, 128), help="weights that share a grid in int4")
    paper: ClassVar[str] = "relu_strikes_back"
    facts: ClassVar[Facts] = Facts(
        stage="quantize",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, LAYER_SHAPES, BLOCK_COUNT},
        effect="smaller, and faster where most neurons are silent",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the feed-forward modules. Raises UserError that says why none can be replaced."""
        yield from rectified_names(model, self.name())

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        for part in rectified_parts(model, layers, self.name()):
            settings = layers[part.name]
            options = settings.gate, settings.rows, settings.group
            set_module(model, part.name, SparseFeedForward.from_layers(part.layers, part.shift, *options))
        return model
