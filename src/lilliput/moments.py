"""What reaches a layer: shapes, second moments of its inputs, squared gradients of its outputs, in one pass over data.

Rows are what a weight row meets: tokens for a Linear, unfolded patches for a Conv2d. Everything a layer-wise method
needs (GPTQ, path following, error prediction) follows from sums over rows, so no activation outlives its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import attached, evaluating, watching

if TYPE_CHECKING:
    from lilliput.workload import Batch, Workload

PATCHES = 4096  # patches of a convolution looked at per batch; neighbours are so alike that more add only time


def layer_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs of one call as rows, (groups, n, K): for each weight row of a group, the vectors it is multiplied with."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    if not isinstance(layer, nn.Conv2d):
        raise UserError(f"moments are taken of Linear and Conv2d layers, not of {type(layer).__name__}")
    return _patches(layer, x if x.dim() == 4 else x.unsqueeze(0))


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (groups, n, K); inputs of one shape give the same positions, so that two runs can be paired."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x.float(), conv._reversed_padding_repeated_twice, mode=mode)
    height, width = padded.shape[2:]
    kh, kw = conv.kernel_size
    (dh, dw), (sh, sw) = conv.dilation, conv.stride  # type: ignore[misc]
    rows = torch.arange(0, height - dh * (kh - 1), sh)
    columns = torch.arange(0, width - dw * (kw - 1), sw)
    per_image = len(rows) * len(columns)
    picks = _picks(len(x) * per_image)
    image, place = picks // per_image, picks % per_image
    top, left = rows[place // len(columns)], columns[place % len(columns)]
    y = top[:, None, None] + dh * torch.arange(kh)[:, None]
    z = left[:, None, None] + dw * torch.arange(kw)
    patches = padded[image[:, None, None], :, y, z]  # (n, kh, kw, C)
    patches = patches.permute(0, 3, 1, 2).reshape(len(picks), conv.groups, -1)
    return patches.transpose(0, 1)


def _picks(n: int) -> Tensor:
    if n <= PATCHES:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))[:PATCHES]


def grouped_weight(layer: nn.Module) -> Tensor:
    """The weight as (groups, N / groups, K), matching `layer_rows`."""
    weight = layer.weight.detach()  # type: ignore[union-attr]
    return weight.reshape(getattr(layer, "groups", 1), -1, weight[0].numel()).float()


class Moments:
    """Running sums over the rows X of one layer: `gram` = X^T X / n, `mean` = X^T 1 / n.

    With a second set of rows Y also `cross` = X^T Y / n and `other_mean`. All are (groups, K, K) or (groups, K).
    """

    def __init__(self, name: str):
        self.name, self.n = name, 0
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Tensor, other: Tensor | None = None, gram: Tensor | None = None) -> Tensor:
        """Add rows (groups, n, K), paired with `other` rows; returns X^T X for reuse by a layer with equal rows."""
        gram = rows.transpose(1, 2) @ rows if gram is None else gram
        self._accumulate("gram", gram)
        self._accumulate("mean", rows.sum(1))
        if other is not None:
            self._accumulate("cross", rows.transpose(1, 2) @ other)
            self._accumulate("other_mean", other.sum(1))
        self.n += rows.shape[1]
        return gram

    def add_squares(self, rows: Tensor) -> None:
        """Add only the squares of rows (groups, n, K): the diagonal of `gram`, as "squares", in far less memory."""
        self._accumulate("squares", rows.square().sum(1))
        self.n += rows.shape[1]

    def _accumulate(self, key: str, value: Tensor) -> None:
        seen = value.diagonal(dim1=-2, dim2=-1) if value.dim() == 3 else value
        if not torch.isfinite(seen).all():
            raise UserError(
                f"the inputs of layer {self.name!r} hold NaN or infinity on the calibration data; check both"
            )
        self._sums[key] = self._sums[key].add_(value) if key in self._sums else value.clone()

    def get(self, key: str) -> Tensor:
        """One of the averages by name."""
        if not self.n:
            raise UserError(f"layer {self.name!r} never ran on the calibration data; leave it out of the plan")
        return self._sums[key] / self.n

    @property
    def gram(self) -> Tensor:
        return self.get("gram")

    @property
    def mean(self) -> Tensor:
        return self.get("mean")


def input_shapes(
    model: nn.Module, workload: Workload, names: Iterable[str], batch: Batch
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a layer gets in its first call when the model runs the batch; layers never called lack."""
    shapes: dict[str, tuple[int, ...]] = {}

    def seen(name: str, layer: nn.Module, x: Tensor) -> None:
        shapes.setdefault(name, tuple(x.shape))

    with torch.no_grad(), evaluating(model), watching(model, names, seen):
        workload.forward(model, batch)
    return shapes


@contextmanager
def collecting(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Moments]]:
    """Name -> Moments, filled by every forward pass inside the `with`. Layers that share an input share the product."""
    found = {name: Moments(name) for name in names}
    last: list = [None, None, None]

    def seen(name: str, layer: nn.Module, x: Tensor) -> None:
        shared = isinstance(layer, nn.Linear) and last[0] is not None and _same(last[0], x)
        rows = last[1] if shared else layer_rows(layer, x)
        gram = found[name].add(rows, gram=last[2] if shared else None)
        last[:] = [x, rows, gram] if isinstance(layer, nn.Linear) else [None, None, None]

    with watching(model, names, seen):
        yield found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same storage, unchanged (q, k and v read one input)."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a._version == b._version


def input_moments(
    model: nn.Module, workload: Workload, names: Sequence[str], batches: Sequence[Batch] | None = None
) -> dict[str, Moments]:
    """Name -> Moments of the layer's inputs over the calibration data (or the given batches), in one pass."""
    with torch.no_grad(), evaluating(model), collecting(model, names) as found:
        for batch in workload.calibration if batches is None else batches:
            workload.forward(model, batch)
    return found


def input_squares(
    model: nn.Module, workload: Workload, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Name -> (K,) float32, the mean square of each input of a linear layer over the batches, in one pass.

    Raises UserError, with the layer's name, when an input is NaN or infinite or the layer never ran.
    """
    found = {name: Moments(name) for name in names}

    def seen(name: str, layer: nn.Module, x: Tensor) -> None:
        found[name].add_squares(layer_rows(layer, x))

    with torch.no_grad(), evaluating(model), watching(model, names, seen):
        for batch in batches:
            workload.forward(model, batch)
    return {name: moments.get("squares")[0] for name, moments in found.items()}


def second_moments(model: nn.Module, workload: Workload, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> X^T X / n, (K, K) float32, over the calibration data; (groups, K, K) for a grouped convolution.

    Raises UserError, with the layer's name, when an input is NaN or infinite.
    """
    return {name: _squeeze(moments.gram) for name, moments in input_moments(model, workload, names).items()}


def _squeeze(gram: Tensor) -> Tensor:
    return gram[0] if len(gram) == 1 else gram


def gradient_moments(
    model: nn.Module, workload: Workload, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The second moments, and name -> (N,) float32 mean over rows of the squared gradient of the loss at the output.

    The gradient is that of the row's own sample: the batch's mean loss times the batch size. To second order a change d
    of the output costs a sample about rows / 2 * sum_n fisher_n * mean(d_n^2), with `rows` the rows per sample.
    """
    squares: dict[str, list] = {name: [0.0, 0] for name in names}
    size = 1

    def output(name: str, layer: nn.Module, out: Tensor) -> Tensor:
        leaf = not out.requires_grad
        out = out.requires_grad_() if leaf else out

        def square(gradient: Tensor) -> None:
            channels = gradient.movedim(1, -1) if isinstance(layer, nn.Conv2d) else gradient
            rows = channels.reshape(-1, channels.shape[-1]).double() * size
            squares[name][0] += rows.square().sum(0)
            squares[name][1] += len(rows)

        out.register_hook(square)
        return out.clone() if leaf else out  # an in-place activation may not write into a leaf

    handles = [
        model.get_submodule(name).register_forward_hook(lambda layer, args, out, name=name: output(name, layer, out))
        for name in names
    ]
    with attached(handles), evaluating(model), _frozen(model), collecting(model, names) as found:
        for batch in workload.calibration:
            size = len(next(iter(batch.values())))
            workload.loss(model, batch).backward()
    fisher = {name: _mean_square(name, *squares[name]) for name in names}
    return {name: _squeeze(moments.gram) for name, moments in found.items()}, fisher


def _mean_square(name: str, total: Tensor, n: int) -> Tensor:
    if not n or not torch.isfinite(total).all():
        raise UserError(f"the loss has no finite gradient at layer {name!r}; check the model and the calibration data")
    return (total / n).float()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters: only those of outputs are wanted."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    for p in wanted:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, flag in wanted.items():
            p.requires_grad_(flag)
