"""Compare graphs whose nodes are listed in different orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_ghn import Graph


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
