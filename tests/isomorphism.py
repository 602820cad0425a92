"""Small networks from functions; graphs by names, and compared whatever the order of their nodes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn import Graph
from timm_ghn.graph import Primitive


class Net(nn.Module):
    """A network from a function of itself and its inputs, with layers, parameters and other attributes by name."""

    def __init__(self, compute: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(self, *inputs)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def labels(graph: Graph) -> list[str]:
    """Parameters by name, ops by what they are."""
    return [node.parameter or node.primitive.name.lower() for node in graph.nodes]


def edges(graph: Graph) -> set[str]:
    name = labels(graph)
    return {f'{name[u]}>{name[v]}' for u, v in graph.edges_E2.tolist()}


def counts(graph: Graph) -> Counter[Primitive]:
    return Counter(node.primitive for node in graph.nodes)


def permuted(graph: Graph, order: Sequence[int]) -> Graph:
    """The same graph with its nodes listed in another order; new node i is the old node ``order[i]``."""
    position = torch.tensor(list(order)).argsort()
    nodes = tuple(graph.nodes[i] for i in order)
    return dataclasses.replace(graph, nodes=nodes, edges_E2=position[graph.edges_E2], start=int(position[graph.start]))


def equal(first: Graph, second: Graph) -> bool:
    """Whether two graphs are equal in every field, their nodes listed in the same order."""
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(Graph)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def colours(graphs: Sequence[Graph]) -> list[list[int]]:
    """Colour the nodes of graphs by colour refinement (Weisfeiler and Leman), with one palette for all.

    Nodes of different colours differ in what a GHN reads of them or of their surroundings; a GHN gives nodes of one
    colour one embedding, as far as messages can tell. Graphs with different numbers of nodes of a colour differ.
    """
    around = []
    for graph in graphs:
        before: list[list[int]] = [[] for _ in graph.nodes]
        behind: list[list[int]] = [[] for _ in graph.nodes]
        for source, target in graph.edges_E2.tolist():
            before[target].append(source)
            behind[source].append(target)
        around.append((before, behind))
    palette: dict[object, int] = {}
    found = [
        [palette.setdefault(_own_colour(graph, index), len(palette)) for index in range(len(graph))] for graph in graphs
    ]
    while True:
        finer: dict[object, int] = {}
        found = [
            [
                finer.setdefault(
                    (colour, tuple(sorted(own[p] for p in before[v])), tuple(sorted(own[s] for s in behind[v]))),
                    len(finer),
                )
                for v, colour in enumerate(own)
            ]
            for own, (before, behind) in zip(found, around, strict=True)
        ]
        if len(finer) == len(palette):
            return found
        palette = finer


def _own_colour(graph: Graph, index: int) -> object:
    node = graph.nodes[index]
    head = node.parameter is not None and node.parameter in (*graph.class_weights, *graph.class_biases)
    return node.primitive, node.shape, index == graph.start, head, node.norm_bias is not None


def same_graph(first: Graph, second: Graph) -> bool:
    """Whether no node of two graphs can be told apart."""
    left, right = colours((first, second))
    return sorted(left) == sorted(right)
