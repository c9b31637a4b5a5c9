"""A model cut in two before a layer, by its torch.fx graph: what a device computes, and what a server does after it."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.proxy import TraceError

from lilliput.errors import UserError


class Halves(NamedTuple):
    """rest(layer(device(input))) is the model; all three share its weights."""

    device: fx.GraphModule
    layer: nn.Linear | nn.Conv2d
    rest: fx.GraphModule


def cuts(model: nn.Module) -> list[str]:
    """Names of the linear and convolution layers behind which nothing is needed but their output, in their order."""
    graph = _traced(model)
    return [str(node.target) for node in graph.nodes if _is_cut(node, graph, model)]


def split(model: nn.Module, layer: str) -> Halves:
    """The two halves around a layer. Raises UserError with the layers that can be chosen."""
    graph = _traced(model)
    node = next((n for n in graph.nodes if str(n.target) == layer and _is_cut(n, graph, model)), None)
    if node is None:
        possible = ", ".join(cuts(model)) or "none"
        raise UserError(
            f"{type(model).__name__} cannot be split before {layer!r}: it is no plain linear or convolution layer, or "
            f"more than its input would have to cross; layers that can be chosen: {possible}"
        )
    entry: Any = node.args[0]
    before = _ancestors(node)
    device = _part(model, [n for n in graph.nodes if n in before], entry)
    after = [n for n in graph.nodes if n not in before and n is not node]
    return Halves(device, model.get_submodule(layer), _rest(model, after, node))  # type: ignore[arg-type]


def _traced(model: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(model)
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be traced by torch.fx, so it is not known where it can be split: {error}"
        ) from None


def _is_cut(node: fx.Node, graph: fx.Graph, model: nn.Module) -> bool:
    """Whether a node is a layer called once, whose input alone joins what is before it with what is behind."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    layer = model.get_submodule(str(node.target))
    plain = type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    )
    if not plain or Counter(n.target for n in graph.nodes if n.op == "call_module")[node.target] > 1:
        return False
    before = _ancestors(node)
    crossing = {b for n in graph.nodes if n not in before and n is not node for b in n.all_input_nodes} & before
    return all(n.op == "get_attr" for n in crossing)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def _part(model: nn.Module, nodes: list[fx.Node], result: fx.Node) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return fx.GraphModule(model, graph)


def _rest(model: nn.Module, nodes: list[fx.Node], entry: fx.Node) -> fx.GraphModule:
    """What follows; constants that both halves read are in both."""
    graph, copies = fx.Graph(), {}
    copies[entry] = graph.placeholder("features")

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        if node.op != "placeholder":
            copied(node)
    return fx.GraphModule(model, graph)
