"""Keys and values of a large model from those of a small one: two linear maps for each block of the large model.

    K_i = K'_m(i) A_i + a_i,   V_i = V'_m(i) B_i + b_i        (K', V': of the small model, m(i): the block that i reads)

Keys are mapped before the norm that some families have for them and before rotary positions: those are the large
model's own, applied to what comes out of the map.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.anatomy import anatomy, in_out
from lilliput.errors import UserError
from lilliput.hooks import attached
from lilliput.kernels.decoder import decoder_for
from lilliput.kernels.decoder_parts import Parts, normed, parts_of, refusals, rotated
from lilliput.zoo.language import load_model

MAPS = "kv_maps.safetensors"  # beside the files of the auxiliary model
RIDGE = 1e-6  # of least squares, relative to the mean square of an input

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each block
Names = list[tuple[str, str]]  # of the layers that give them


class KvPredictor(nn.Module):
    """An auxiliary model and the maps from its keys and values to those of a base model.

    `widths[i]` is how many numbers a key of the base's block i has, all heads together; `sources[i]` is the auxiliary
    block that it is mapped from. `tokenizer`, if it is known, is the auxiliary model's. New maps are identities, as far
    as the widths go.
    """

    def __init__(self, auxiliary: Any, widths: Sequence[int], tokenizer: Any = None):
        super().__init__()
        self.auxiliary, self.widths, self.tokenizer = auxiliary, list(widths), tokenizer
        self.names = key_value_names(auxiliary)
        self.sources = layer_map(len(self.widths), len(self.names))
        inputs = [in_out(auxiliary.get_submodule(self.names[s][0]))[1] for s in self.sources]  # pyright: ignore
        self.key_maps, self.value_maps = (
            nn.ModuleList(_identity(i, o) for i, o in zip(inputs, self.widths)) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> tuple[Pairs, Tensor]:
        """Ids (B, T) -> predicted keys and values (B, T, width) of each block, the auxiliary's own logits (B, T, V)."""
        found: dict[str, Tensor] = {}
        with hooked(self.auxiliary, self.names, found.__setitem__):
            logits = self.auxiliary(input_ids=ids, use_cache=False).logits
        return self._mapped([(found[k], found[v]) for k, v in self.names]), logits

    @torch.no_grad()
    def predict(self, model: Any, ids: Tensor, runtime: str = "torch") -> Pairs:
        """What the model's cache would hold after the tokens ids (T,): keys, values (kv_heads, T, head_dim) by block.

        Raises UserError for a model that the predictor was not made for.
        """
        parts = self.parts_of(model)
        read = self._read_natively(ids) if runtime == "lean" else self._read(ids)
        return placed(parts, self._mapped(read))

    def parts_of(self, model: Any) -> Parts:
        """The parts of a base model. Raises UserError unless the maps give keys of its sizes."""
        parts = base_parts(model)
        if (widths := key_widths(parts)) != self.widths:
            raise UserError(
                f"the predictor gives keys of {_sizes(self.widths)}, this model has {_sizes(widths)}; train a "
                "predictor for it"
            )
        return parts

    def _mapped(self, read: Pairs) -> Pairs:
        maps = zip(self.key_maps, self.value_maps, self.sources)
        return [(key(read[source][0]), value(read[source][1])) for key, value, source in maps]

    def _read(self, ids: Tensor) -> Pairs:
        return [(k[0], v[0]) for k, v in keys_and_values(self.auxiliary, self.names, ids[None])]

    def _read_natively(self, ids: Tensor) -> Pairs:
        """The same by the native decoder, whose cache holds keys behind their rotation: it is taken back."""
        decoder = decoder_for(self.auxiliary)
        blocks = decoder.parts.blocks
        if any(block.key_norm is not None for block in blocks):
            raise UserError(
                "the native decoder keeps the auxiliary model's keys behind a norm, which cannot be taken back; "
                "predict with runtime='torch'"
            )
        cache = decoder.cache(len(ids))
        decoder(ids, cache)
        tables = decoder.parts.rotary_tables(len(ids))
        turned = [rotated_back(k.transpose(0, 1), *tables[b.positions]) for b, k in zip(blocks, cache.keys)]
        return [(k.flatten(1), v.transpose(0, 1).flatten(1)) for k, v in zip(turned, cache.values)]

    # --- files ---

    def save(self, folder: str | Path) -> Path:
        """Write the auxiliary model, the maps and the tokenizer to a folder, without pickle."""
        folder = Path(folder)
        self.auxiliary.save_pretrained(folder)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        save_file(self._maps(), folder / MAPS, {"widths": json.dumps(self.widths)})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> KvPredictor:
        """What `save` wrote, to the bit. Raises UserError for a folder that holds none or a damaged one."""
        file = Path(folder) / MAPS
        try:
            with safe_open(file, "pt") as stored:
                widths = json.loads((stored.metadata() or {})["widths"])
                maps = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            predictor = cls(load_model(Path(folder)), widths)
            shapes = {k: t.shape for k, t in predictor._maps().items()}
            if shapes != {k: t.shape for k, t in maps.items()}:
                raise ValueError("the maps do not fit the auxiliary model")
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise UserError(
                f"{str(folder)!r} holds no predictor of keys and values that loads ({error}); write one with "
                "predictor.save(folder)"
            ) from None
        predictor.load_state_dict(maps, strict=False)
        return predictor.eval()

    def _maps(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("auxiliary.")}


def _identity(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _sizes(widths: Sequence[int]) -> str:
    return f"{len(widths)} blocks and {', '.join(map(str, sorted(set(widths))))} numbers"


def layer_map(blocks: int, sources: int) -> list[int]:
    """The auxiliary block that each of the base's blocks reads: in their order, the first ones serve one more."""
    each, more = divmod(blocks, sources)
    return [source for source in range(sources) for _ in range(each + (source < more))]


# --- the models ------------------------------------------------------------------------------------------------


def key_value_names(model: nn.Module) -> Names:
    """Names of the layers that give keys and values, by block. Raises UserError where they are not layers of their
    own."""
    attentions = [block.attention for block in anatomy(model).blocks]
    if not attentions or any(a is None or a.fused for a in attentions):
        raise UserError(
            f"predicting keys and values needs blocks with a layer for keys and one for values, {type(model).__name__} "
            "has none; take a model of the kind of Llama"
        )
    return [(a.k, a.v) for a in attentions if a is not None]


def base_parts(model: Any) -> Parts:
    """The parts of a model whose cache can be filled. Raises UserError for others."""
    if reasons := refusals(model):
        raise UserError(f"keys and values of this model cannot be predicted: {'; '.join(reasons)}")
    return parts_of(model)


def key_widths(parts: Parts) -> list[int]:
    """Numbers in a key of each block, all heads together."""
    return [block.kv_heads * block.head_dim for block in parts.blocks]


@contextmanager
def hooked(model: nn.Module, names: Names, act: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `act(name, output)` whenever one of the named layers ran; what it gives, if anything, is the output."""
    handles = []
    for name in (name for pair in names for name in pair):

        def hook(layer, args, output, name=name):
            return act(name, output)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with attached(handles):
        yield


def keys_and_values(model: Any, names: Names, ids: Tensor) -> Pairs:
    """Ids (B, T) -> the model's keys and values (B, T, width), before any norm and rotation."""
    found: dict[str, Tensor] = {}
    with hooked(model, names, found.__setitem__):
        model.base_model(input_ids=ids, use_cache=False)
    return [(found[k], found[v]) for k, v in names]


def answer(model: Any, names: Names, ids: Tensor, predicted: Pairs) -> Tensor:
    """Logits (B, T, V) of the model when every token has predicted keys and values in the place of its own."""
    given = {name: tensor for pair, tensors in zip(names, predicted) for name, tensor in zip(pair, tensors)}
    with hooked(model, names, lambda name, output: given[name]):
        return model(input_ids=ids, use_cache=False).logits


def placed(parts: Parts, pairs: Pairs) -> Pairs:
    """Mapped keys and values (T, width) of the first T places -> (kv_heads, T, head_dim), as a cache holds them."""
    tokens = len(pairs[0][0])
    tables = parts.rotary_tables(tokens)
    found = []
    for b, pair in zip(parts.blocks, pairs):
        keys, values = (x.view(tokens, b.kv_heads, b.head_dim) for x in pair)
        keys = rotated(normed(keys, b.key_norm), *tables[b.positions])
        found.append((keys.transpose(0, 1), values.transpose(0, 1)))
    return found


def rotated_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotated`, also of rotations that scale."""
    return rotated(x, cos, -sin) / (cos.square() + sin.square()).unsqueeze(1)


# --- the maps by least squares -----------------------------------------------------------------------------------


@torch.no_grad()
def fit_maps_(predictor: KvPredictor, model: Any, texts: Sequence[Tensor]) -> KvPredictor:
    """Set the maps to what comes nearest to the model's own keys and values on texts (B, T) of tokens."""
    names = key_value_names(model)
    fits = [(LeastSquares(), LeastSquares()) for _ in names]
    for ids in texts:
        true, read = keys_and_values(model, names, ids), keys_and_values(predictor.auxiliary, predictor.names, ids)
        for pair, source, wanted in zip(fits, predictor.sources, true):
            for fit, x, y in zip(pair, read[source], wanted):
                fit.add(x.flatten(0, -2), y.flatten(0, -2))
    for pair, *maps in zip(fits, predictor.key_maps, predictor.value_maps):
        for fit, linear in zip(pair, maps):
            weight, bias = fit.solved()
            linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return predictor


class LeastSquares:
    """y = W x + b over all pairs that were added, summed in float64."""

    def __init__(self):
        self.squares: Any = 0.0  # (inputs + 1, inputs + 1); the last input is the 1 of the bias
        self.products: Any = 0.0  # (inputs + 1, outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Pairs x (n, inputs), y (n, outputs)."""
        x, y = F.pad(x.double(), (0, 1), value=1.0), y.double()
        self.squares, self.products = self.squares + x.T @ x, self.products + x.T @ y

    def solved(self) -> tuple[Tensor, Tensor]:
        """W (outputs, inputs) and b (outputs,)."""
        ridge = RIDGE * self.squares.diagonal().mean() * torch.eye(len(self.squares), dtype=torch.float64)
        found = torch.linalg.solve(self.squares + ridge, self.products)
        return found[:-1].T.contiguous(), found[-1].clone()
