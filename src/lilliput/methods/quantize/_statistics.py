"""What a network with batch normalisation knows about its own activations, and samples drawn from that knowledge.

A BatchNorm's outputs have mean beta and standard deviation |gamma| per channel over the training data. `StatSampler`
runs the graph of a network on noise and puts fresh samples with those moments wherever a BatchNorm was: activations,
pooling and residual sums then follow the graph by themselves. No data is involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from lilliput.edits import set_module
from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.methods.quantize._fold import fold_
from lilliput.moments import Moments, layer_rows

Stats = dict[str, tuple[Tensor, Tensor]]  # module name -> mean and standard deviation of its output channels
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SAMPLERS = ("independent", "propagated", "noise")
SIX = 6.0  # how many standard deviations of an activation its range covers


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a feed-forward network. Raises UserError when Python control flow hides it."""
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except (TraceError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the graph of {type(model).__name__} cannot be traced by torch.fx ({error}); quantize.data_free needs a "
            "plain feed-forward network; use quantize.gptq or quantize.gpfq with data instead"
        ) from None


def called_once(graph: fx.GraphModule) -> set[str]:
    """Names of the modules that one node of the graph calls."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    return {t for t in targets if targets.count(t) == 1}


@torch.no_grad()
def fold_batchnorm_(model: nn.Module) -> Stats:
    """Fold every BatchNorm that directly follows a convolution into it, and return what the BatchNorms knew.

    Folded ones become Identity and their moments stand under the convolution's name, the others keep their own.
    """
    graph, stats = trace(model), {}
    once = called_once(graph)
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(norm := model.get_submodule(node.target), NORMS):
            continue
        source = node.args[0]
        before = str(source.target) if source.op == "call_module" else ""
        layer = model.get_submodule(before)
        alone = {before, str(node.target)} <= once and len(source.users) == 1
        if alone and isinstance(layer, nn.Conv2d) and fold_(layer, norm):
            set_module(model, str(node.target), nn.Identity())
            stats[before] = output_moments(norm)
        else:
            stats[str(node.target)] = output_moments(norm)
    return stats


def output_moments(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of a BatchNorm's outputs, copied."""
    size = norm.num_features  # type: ignore[attr-defined]
    if norm.weight is None:
        return torch.zeros(size), torch.ones(size)  # type: ignore[arg-type]
    return norm.bias.detach().clone(), norm.weight.detach().abs().clone()  # type: ignore[union-attr, operator]


class StatSampler(fx.Interpreter):
    """Runs a traced network on noise, with the outputs that `stats` knows replaced as `sampler` says.

    "independent": normal samples with the stored moments, one per position and channel. "propagated" (ours, not the
    paper's): what the layer makes of its sampled input, moved to the stored moments, which keeps the correlations that
    the weights themselves cause; the input is noise as smooth as pictures are. "noise": nothing is replaced. `sigma`
    puts mean + sigma * std everywhere instead.
    """

    def __init__(self, graph: fx.GraphModule, stats: Stats, sampler: str, generator: torch.Generator):
        super().__init__(graph)
        self.stats, self.sampler, self.generator = stats, sampler, generator
        self.sigma: float | None = None
        self.inputs: dict[str, Tensor] = {}  # of every layer called in the last run

    def call_module(self, target, args, kwargs):
        self.inputs[str(target)] = args[0]  # type: ignore[assignment]
        out = super().call_module(target, args, kwargs)
        if target not in self.stats or (self.sampler == "noise" and self.sigma is None):
            return out
        mean, std = (m.view(-1, *[1] * (out.dim() - 2)) for m in self.stats[str(target)])
        return self._standard(out) * std + mean

    def _standard(self, out: Tensor) -> Tensor:
        """Values of mean 0 and standard deviation 1 per channel, shaped like `out`."""
        if self.sigma is not None:
            return torch.full_like(out, self.sigma)
        if self.sampler == "independent":
            return torch.randn(out.shape, generator=self.generator)
        others = [d for d in range(out.dim()) if d != 1]
        centred = out - out.mean(others, keepdim=True)
        return centred / centred.square().mean(others, keepdim=True).sqrt().clamp_min(1e-6)

    def run_on(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """One run on standard normal noise; the inputs of every module by name. Raises UserError on a wrong size."""
        noise = torch.randn(tuple(shape), generator=self.generator)
        if self.sampler == "propagated" and noise.dim() == 4:
            noise = like_pictures(noise)
        try:
            with torch.no_grad():
                self.run(noise if self.sigma is None else torch.full_like(noise, self.sigma))
        except RuntimeError as error:
            raise UserError(f"the network does not take inputs of {tuple(shape[1:])} ({error}); set `size`") from None
        return self.inputs


def like_pictures(noise: Tensor) -> Tensor:
    """White noise (B, C, H, W) with the 1 / frequency spectrum of natural pictures, mean 0 and variance 1 over all."""
    height, width = noise.shape[2:]
    frequency = torch.hypot(torch.fft.fftfreq(height).unsqueeze(1), torch.fft.rfftfreq(width))
    spectrum = torch.fft.rfft2(noise) / frequency.clamp_min(1 / max(height, width))
    pictures = torch.fft.irfft2(spectrum, s=(height, width))
    return (pictures - pictures.mean()) / pictures.std(correction=0).clamp_min(1e-6)


def input_shape(graph: fx.GraphModule, batch: int, size: int) -> tuple[int, ...]:
    """Shape of a batch of inputs, from the first layer that reads them."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node in graph.graph.nodes:
        if node.op != "call_module" or len(placeholders) != 1:
            continue
        layer = graph.get_submodule(str(node.target))
        if isinstance(layer, nn.Conv2d):
            return (batch, layer.in_channels, size, size)
        if isinstance(layer, nn.Linear):
            return (batch, layer.in_features)
    raise UserError("quantize.data_free needs a network with one input that a Conv2d or Linear reads first")


def sampled_moments(
    model: nn.Module, stats: Stats, names: Sequence[str], sampler: str, samples: int, size: int, seed: int
) -> dict[str, Moments]:
    """Name -> Moments of the layer's inputs over `samples` sampled pictures of `size` x `size`."""
    graph, batch = trace(model), min(samples, 32)
    run = StatSampler(graph, stats, sampler, torch.Generator().manual_seed(seed))
    found = {name: Moments(name) for name in names}
    with evaluating(model):
        for _ in range(max(1, samples // batch)):
            inputs = run.run_on(input_shape(graph, batch, size))
            for name in names:
                if name not in inputs:
                    raise UserError(
                        f"layer {name!r} is not called in the graph of the network; leave it out of the plan"
                    )
                found[name].add(layer_rows(model.get_submodule(name), inputs[name]))
    return found


def input_ranges(model: nn.Module, stats: Stats, names: Sequence[str], size: int) -> dict[str, Tensor]:
    """Name -> (low, high) of the layer's inputs, six standard deviations out at every BatchNorm and at the input."""
    graph = trace(model)
    run = StatSampler(graph, stats, "independent", torch.Generator())
    ends: dict[str, list[float]] = {name: [] for name in names}
    with evaluating(model):
        for run.sigma in (-SIX, SIX):
            inputs = run.run_on(input_shape(graph, 1, size))
            for name in names:
                ends[name] += [float(inputs[name].min()), float(inputs[name].max())]
    return {name: torch.tensor([min(0.0, *values), max(0.0, *values)]) for name, values in ends.items()}
