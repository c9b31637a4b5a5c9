"""Weights as entries of small tables: exact 1-D k-means, the fit of tables and scales, and the layer of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.kernels import codebook_linear as kernel
from lilliput.kernels.native_weights import NativeWeights
from lilliput.methods.quantize._kernel_linear import KernelEmbedding, KernelLinear
from lilliput.methods.quantize._packed import pack_codes, unpack_codes

LARGEST = 127  # of a table's signed bytes
BINS = 512  # distinct values up to which k-means is exact; more are put into so many intervals first
LOOK = 8 * BINS  # values that are looked at first
START = 2**20  # weights from which the first tables come, at least
CHUNK = 2**17  # weights that are looked at together
SEARCH_EVERY = 4  # rounds, a search for the scales
FACTORS = (1.0, 0.85, 0.92, 1.08, 1.16, -1.0)  # of a scale that are tried

Codebook = tuple[Tensor, Tensor, Tensor]  # indices (N, K), scale (N, K / group), tables (T, 2**bits) int8


def kmeans_1d(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """The k centres, ascending, with the least weighted squared distance to the values (n,); exact up to BINS values.

    By dynamic programming over the sorted values: the best c clusters of the first j values end with a cluster i .. j.
    With fewer distinct values than k the largest is repeated.
    """
    points, mass = _distinct(values.flatten().double(), weights.flatten().double())
    n = len(points)
    if n <= k:
        return torch.cat([points, points[-1:].expand(k - n)])
    sums = [torch.cat([torch.zeros(1, dtype=torch.float64), (mass * points**i).cumsum(0)]) for i in range(3)]
    s0, s1, s2 = (s.unsqueeze(1) - s.unsqueeze(0) for s in sums)  # [j, i]: of the values i .. j-1
    cost = torch.where(s0 > 0, s2 - s1.square() / s0.clamp_min(1e-300), torch.inf)
    best, starts = cost[:, 0], []
    for _ in range(k - 1):
        best, start = (best + cost).min(1)
        starts.append(start)
    ends = [n]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    edges = torch.tensor([0, *reversed(ends)])
    return torch.diff(sums[1][edges]) / torch.diff(sums[0][edges])


def _distinct(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending values with a positive weight, at most BINS of them: more become the means of equal intervals."""
    values, weights = values[weights > 0], weights[weights > 0]
    index = None
    if len(values[:LOOK].unique()) <= BINS:  # otherwise sorting all of them would only say that they are too many
        points, index = values.unique(return_inverse=True)
        index = index if len(points) <= BINS else None
    if index is None:
        low, high = values.aminmax()
        index = ((values - low) / (high - low) * BINS).long().clamp_(0, BINS - 1)
    mass = torch.bincount(index, weights)
    means = torch.bincount(index, weights * values)[mass > 0] / mass[mass > 0]
    return means, mass[mass > 0]


def fit_codebook(
    w: Tensor, bits: int, group: int, shared: bool = True, importance: Tensor | None = None, rounds: int = 10
) -> Codebook:
    """Indices, scales and tables for weights w (N, K) with a small sum of importance_k (w_nk - table s)^2.

    Exact k-means on weights divided by the largest of their group, sign included, so that all groups have an entry
    near 1 and tables need not be symmetric. Then in turn nearest entries, least-squares scales and least-squares
    tables, with a search for better scales now and then. `shared` makes one table, otherwise each `rows_per_table` rows
    have their own.
    """
    if w.shape[1] % group:
        raise UserError(f"group {group} does not divide the {w.shape[1]} inputs of the layer")
    if not torch.isfinite(w).all():
        raise UserError("a weight is NaN or infinite; load or train the model again before quantizing it")
    w = w.detach().float()
    weight = torch.ones(w.shape[1]) if importance is None else importance.float().clamp_min(1e-12)
    weight = weight / weight.mean()
    scale = largest_of_groups(w, group)
    tables = _first_tables(w, weight, scale, bits)
    if not shared:
        tables = tables.repeat(-(-len(w) // kernel.rows_per_table(bits)), 1)
    for i in range(rounds):
        tables = _improve_(w, weight, scale, tables, bits, search=i % SEARCH_EVERY == 1)
    return _rounded(w, weight, scale, tables, bits)


def _first_tables(w: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """One table (1, 2**bits) by k-means on weights over their scales; on every n-th row of a large matrix."""
    step = max(1, w.numel() // START)
    w, wide = w[::step], _wide(scale[::step], w)
    return kmeans_1d(w / wide, weight * wide.double().square(), 2**bits).float().unsqueeze(0)


def _improve_(w: Tensor, weight: Tensor, scale: Tensor, tables: Tensor, bits: int, search: bool) -> Tensor:
    """Nearest entries, then the best scales for them, in place, then the best tables, which are returned."""
    sums = []
    for rows, own in _parts(w, tables, bits):
        if search:
            scale[rows] = _searched_scale(w[rows], weight, scale[rows], own, bits)
        q = nearest(w[rows] / _wide(scale[rows], w), own, bits)
        entries = kernel.per_row(own, len(q), bits).gather(1, q)
        scale[rows] = best_scale(w[rows], entries, weight, scale[rows])
        sums.append(_table_sums(w[rows], q, weight, _wide(scale[rows], w), own))
    up, down = (torch.stack(s).sum(0) if len(tables) == 1 else torch.cat(s) for s in zip(*sums))
    return torch.where(down > 0, up / down.clamp_min(1e-300), tables.double()).float()


def _parts(w: Tensor, tables: Tensor, bits: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, with their tables: what is computed of them stays in a cache."""
    step, per_table = max(1, CHUNK // w.shape[1] // kernel.BLOCK) * kernel.BLOCK, kernel.rows_per_table(bits)
    for start in range(0, len(w), step):
        stop = min(start + step, len(w))
        yield slice(start, stop), tables if len(tables) == 1 else tables[start // per_table : -(-stop // per_table)]


def _wide(scale: Tensor, w: Tensor) -> Tensor:
    """The scale of each weight."""
    return scale.repeat_interleave(w.shape[1] // scale.shape[1], 1)


def largest_of_groups(w: Tensor, group: int) -> Tensor:
    """The weight of largest magnitude of each group, with its sign, (N, K / group); tiny where all are 0."""
    groups = w.unflatten(1, (-1, group))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    return torch.where(largest == 0, 1e-30, largest)


def _searched_scale(w: Tensor, weight: Tensor, scale: Tensor, tables: Tensor, bits: int) -> Tensor:
    """For each group the best of its scale, larger and smaller ones and the opposite sign, each fitted once."""
    group, per_row = w.shape[1] // scale.shape[1], kernel.per_row(tables, len(w), bits)
    best, least = scale, torch.full_like(scale, torch.inf)
    for factor in FACTORS:
        q = nearest(w / (factor * scale).repeat_interleave(group, 1), tables, bits)
        entries = per_row.gather(1, q)
        tried = best_scale(w, entries, weight, factor * scale)
        off = entries * tried.repeat_interleave(group, 1) - w
        error = (weight * off.square()).unflatten(1, (-1, group)).sum(2)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def nearest(u: Tensor, tables: Tensor, bits: int) -> Tensor:
    """The entry of each row's table nearest to u (N, K): indices (N, K)."""
    if len(tables) == 1:
        entries, order = tables[0].to(u.dtype).sort()
        place = torch.zeros(u.shape, dtype=torch.uint8)
        for middle in ((entries[1:] + entries[:-1]) / 2).tolist():
            place += u > middle  # a third of the time of torch.bucketize, whose branches no processor foresees
        return order.index_select(0, place.flatten().int()).view_as(u)
    per_row = kernel.per_row(tables, len(u), bits).to(u.dtype)
    best, q = (u - per_row[:, :1]).abs(), torch.zeros_like(u, dtype=torch.int64)
    for i in range(1, per_row.shape[1]):
        distance = (u - per_row[:, i : i + 1]).abs()
        q = torch.where(distance < best, i, q)
        best = torch.minimum(best, distance)
    return q


def best_scale(w: Tensor, entries: Tensor, weight: Tensor, old: Tensor) -> Tensor:
    """Least-squares scale of each group for entries (N, K); where all entries are 0 the old one stays."""
    shape = (old.shape[1], w.shape[1] // old.shape[1])
    up = (weight * w * entries).unflatten(1, shape).sum(-1)
    down = (weight * entries.square()).unflatten(1, shape).sum(-1)
    return torch.where((down > 0) & (up != 0), up / down.clamp_min(1e-30), old)


def _table_sums(w: Tensor, q: Tensor, weight: Tensor, wide: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Sums from which the least-squares entries of the tables follow, above and below the line, float64."""
    entries = tables.shape[1]
    if len(tables) > 1:
        q = q + entries * (torch.arange(len(w)) // (entries // 4)).unsqueeze(1)
    parts = (weight * wide * w, weight * wide.square())
    up, down = (torch.bincount(q.flatten(), p.flatten().double(), tables.numel()) for p in parts)
    return up.view_as(tables), down.view_as(tables)


def _rounded(w: Tensor, weight: Tensor, scale: Tensor, tables: Tensor, bits: int) -> Codebook:
    """As it is stored: bytes in the tables, bfloat16 scales, indices (int32) for these."""
    unit = tables.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST
    stored = (tables / unit).round().to(torch.int8)
    scale = scale * kernel.per_row(unit.expand(-1, 2**bits), len(w), bits)[:, :1]
    indices = torch.empty(w.shape, dtype=torch.int32)
    for rows, own in _parts(w, stored, bits):
        for _ in range(2):
            q = nearest(w[rows] / _wide(scale[rows], w), own, bits)
            entries = kernel.per_row(own, len(q), bits).gather(1, q).float()
            scale[rows] = best_scale(w[rows], entries, weight, scale[rows]).bfloat16().float()
        indices[rows] = q.int()
    return indices, scale, stored


def empty_layout(rows: int, columns: int, group: int, bits: int, shared: bool) -> dict[str, Tensor]:
    """The tensors of the executed layout, zeros. Raises UserError for bits and groups that the kernel does not take."""
    if bits not in kernel.BITS:
        raise UserError(f"bits is {bits}; choose one of {', '.join(map(str, kernel.BITS))}")
    if group < 1 or columns % group or (group % kernel.PIECE and group != columns):
        raise UserError(f"group {group} does not fit {columns} inputs: all, or a multiple of {kernel.PIECE}")
    codes, scales, tables = kernel.layout_sizes(rows, columns, group, bits, shared)
    return {
        "codes": torch.zeros(codes, dtype=torch.uint8),
        "scale": torch.zeros(scales, dtype=torch.int16),
        "tables": torch.zeros(tables, dtype=torch.int8),
    }


class CodebookEmbedding(KernelEmbedding):
    """An embedding that looks its rows up in the tables of a head."""

    codes: Tensor
    scale: Tensor
    tables: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int,
        shared: bool = True,
        factor: float = 1.0,
        dtype: str = "float32",
    ):
        super().__init__(num_embeddings, embedding_dim, factor, dtype)
        self.bits, self.group, self.shared = bits, group, shared
        for name, tensor in empty_layout(num_embeddings, embedding_dim, group, bits, shared).items():
            self.register_buffer(name, tensor)

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return super().rebuild_config() | {"bits": self.bits, "group": self.group, "shared": self.shared}

    def rows(self, ids: Tensor) -> Tensor:
        layout = (self.codes, self.scale, self.tables)
        return kernel.looked_up(ids, *layout, self.embedding_dim, self.group, self.bits)


class CodebookLinear(KernelLinear):
    """y = x W^T + b with W looked up in tables: indices of 4, 3 or 2 bits, a bfloat16 scale per group of inputs."""

    compute_dtype = "int8"
    embedding_class = CodebookEmbedding
    codes: Tensor
    scale: Tensor
    tables: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, group: int, shared: bool = True, bias: bool = False
    ):
        super().__init__(in_features, out_features, bias)
        self.bits, self.group, self.shared = bits, group, shared
        for name, tensor in empty_layout(out_features, in_features, group, bits, shared).items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_codes(cls, q: Tensor, scale: Tensor, tables: Tensor, bits: int, bias: Tensor | None) -> CodebookLinear:
        """A layer of indices (N, K), scale (N, K / group) and int8 tables (1 or one per few rows, 2**bits)."""
        rows, columns = q.shape
        layer = cls(columns, rows, bits, columns // scale.shape[1], len(tables) == 1, bias is not None)
        layout = kernel.pack(pack_codes(q, bits), scale, tables, columns, bits)
        layer.codes, layer.scale, layer.tables = (part.flatten() for part in layout)
        layer.set_bias_(bias)
        return layer

    def rebuild_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return super().rebuild_config() | {"bits": self.bits, "group": self.group, "shared": self.shared}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, shared={self.shared}"

    def multiply(self, rows: Tensor) -> Tensor:
        layout = (self.codes, self.scale, self.tables)
        return kernel.codebook_linear(rows, *layout, self.out_features, self.group, self.bits)

    def native_weights(self) -> NativeWeights:
        """For the native decoder."""
        kind, shape = "codebook" if self.shared else "codebooks", (self.out_features, self.in_features)
        return NativeWeights(kind, shape, self.codes, self.scale, self.tables, self.group, self.bits)

    def dequantized(self) -> Tensor:
        shape = (self.out_features, self.in_features, self.group, self.bits)
        stored, scale, tables = kernel.unpack(self.codes, self.scale, self.tables, *shape)
        q = unpack_codes(stored, self.bits, self.in_features).long()
        entries = kernel.per_row(tables, self.out_features, self.bits).gather(1, q).float()
        return entries * scale.float().repeat_interleave(self.group, 1)
