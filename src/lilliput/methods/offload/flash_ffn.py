"""Feed-forward weights on the disk: only the rows of neurons that fire are read, and those used of late stay in memory.

Paper: LLM in a flash: Efficient Large Language Model Inference with Limited Memory (Alizadeh et al., 2023, 2312.11514)

    a = max(0, W_gate x - shift),   y = sum over a_j != 0 of a_j (u_j x) d_j        (plain parts: without u_j x)

The rows of a neuron lie side by side in a file (row-column bundling) and are read at once. Who fires is told by the
gate, which then stays in memory and makes the answer that of `layers.sparse_ffn`; or is guessed by a classifier of low
rank, and the gate lies in the file too. Of a cache of limited bytes the least recently used neurons leave first; with a
`window` also those that the last tokens did not use, as in the paper. Needs (shifted) ReLUs, see layers.relufy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from lilliput.edits import set_module
from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, PACKED_WEIGHTS, UNLABELLED, Facts, Method, knob
from lilliput.methods.layers._feed_forward import Rectified, rectified_names, rectified_parts
from lilliput.methods.layers._rows import FORMATS
from lilliput.methods.offload._flash_part import GATES, PREDICTED, FlashFeedForward
from lilliput.methods.offload._predictor import Predictor, fit_predictor, inputs_of_parts
from lilliput.paged_store import StoreStats
from lilliput.workload import Workload, need_workload


@dataclass(frozen=True)
class FlashFFN(Method):
    """Read the rows of feed-forward neurons from the disk when they fire; the activation must be a (shifted) ReLU.

    For models larger than memory, a few tokens at a time. `store_stats(model)` tells what was read.
    """

    gate: str = knob(
        "int8",
        choices=GATES,
        per_layer=True,
        help="how the gate stays in memory; 'predicted': not at all, a predictor of low rank says who fires",
    )
    rows: str = knob("int8", choices=FORMATS, per_layer=True, help="how the rows on the disk are stored")
    group: int = knob(64, choices=(32, 64, 128), help="weights that share a grid in int4")
    memory: float = knob(
        0.25, low=0.0, high=1.0, per_layer=True, help="share of the neurons that memory has room for, at least one"
    )
    window: int = knob(
        0, low=0, high=100_000, help="calls that a neuron stays for after its last use; 0: until its place is needed"
    )
    rank: float = knob(
        0.125, low=0.01, high=1.0, per_layer=True, help="rank of the predictor as a share of the part's inputs"
    )
    recall: float = knob(
        0.99, low=0.5, high=1.0, per_layer=True, help="share of the neurons that fire which the predictor must find"
    )
    steps: int = knob(200, low=0, high=1_000_000, help="updates of a predictor after its start from the gate")
    paper: ClassVar[str] = "llm_in_a_flash"
    facts: ClassVar[Facts] = Facts(
        stage="serve",
        needs={FLOAT_WEIGHTS},
        takes={FLOAT_WEIGHTS},
        gives={PACKED_WEIGHTS},
        keeps={OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="smaller in memory, slower: weights are read from the disk",
    )

    def targets(self, model: nn.Module) -> Iterator[str]:
        """Names of the feed-forward modules. Raises UserError that says why none can be replaced."""
        yield from rectified_names(model, self.name())

    def apply_(self, model: nn.Module, workload: Workload | None, layers: Mapping[str, Self]) -> nn.Module:
        guessed = [name for name, settings in layers.items() if settings.gate == PREDICTED]
        seen = {}
        if guessed:
            work = need_workload(workload, self.name(), "to teach the predictor (or use another gate)")
            seen = inputs_of_parts(model, work, guessed)
        for part in rectified_parts(model, layers, self.name()):
            settings = layers[part.name]
            predictor = settings.predictor(part, seen.pop(part.name)) if part.name in seen else None
            made = FlashFeedForward.from_layers(
                part.layers, part.shift, settings.gate, settings.rows, settings.group, settings.memory, settings.window,
                predictor,
            )  # fmt: skip
            made.move_out_()
            set_module(model, part.name, made)
        return model

    def predictor(self, part: Rectified, x: Tensor) -> Predictor:
        """The predictor of a part, taught on its inputs x (tokens, inputs)."""
        gate = next(iter(part.layers.values()))
        rank = max(1, min(round(self.rank * gate.in_features), gate.out_features))
        return fit_predictor(gate, part.shift, x, rank, self.recall, self.steps)


def flash_parts(model: nn.Module) -> list[FlashFeedForward]:
    """The feed-forward parts of a model whose weights lie on the disk."""
    return [module for module in model.modules() if isinstance(module, FlashFeedForward)]


def store_stats(model: nn.Module, reset: bool = False) -> StoreStats:
    """Hits, misses, reads and bytes of all stores of a model together, since they were opened or reset."""
    total = StoreStats()
    for part in flash_parts(model):
        store = part.store()
        total += store.stats()
        if reset:
            store.reset_stats()
    return total
