"""Records that describe a traced network: nodes, edges and parameters; and a graph as JSON."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from timm_ghn.errors import CheckpointError, UnsupportedModelError
from timm_ghn.graph.paths import shortest_paths, topological_levels
from timm_ghn.graph.primitives import Primitive

#: Row written into :attr:`Graph.shapes_N4` for a node that has no shape (sums, concatenations, the input, ...).
NO_SHAPE = (-1, -1, -1, -1)


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One distinct parameter of the traced model.

    Attributes:
        name: Its first name in ``model.named_parameters()``.
        shape: Its shape.
        dtype: Its dtype in the user's model.
        owner: Class of the module that holds it, e.g. ``'torch.nn.modules.conv.Conv2d'``.
        aliases: Its other names, when it is tied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph.

    Attributes:
        primitive: What it is.
        label: What a person reads: the parameter's name, or the operator's.
        parameter: Name of the parameter that it represents, or None for an operator.
        shape: What the shape encoder sees: four sizes (out, in, height, width), or None.
        norm_bias: Name of the bias that a normalisation layer's weight node predicts along with the weight.
        kernel: Shape (out, in, ...) of the kernels that the parameter holds, where its own shape is another one.
        blocks: (rows, columns, height, width) of the blocks in which a positional embedding is stored, if it is.
    """

    primitive: Primitive
    label: str
    parameter: str | None = None
    shape: tuple[int, int, int, int] | None = None
    norm_bias: str | None = None
    kernel: tuple[int, ...] | None = None
    blocks: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A network as a GHN reads it: a directed graph from the input to the output.

    Attributes:
        nodes: In a topological order (:func:`timm_ghn.trace` gives the one of the published GHNs).
        edges_E2: int64 (E, 2) on the CPU, one row (source, target) for each edge; no duplicates, no self-loops.
        start: Index of the node from which GHN-3 measures the distance to the input.
        class_weights: Parameters that the class predictor decodes: the weight of the classifier, if there is one.
        class_biases: Parameters that the class predictor decodes: the bias of the classifier, if there is one.
        classifier: All parameters of the model's classifier; those of both kinds above are among them.
        parameters: Every parameter of the model once, in the order of ``model.named_parameters()``.
        kept: Reason for each parameter that no node of the graph predicts.
        input_size: (channels, height, width) of the image that the graph was traced with.
        num_classes: Number of classes of the classifier, None where it is not known or absent.
        rules: Name of the rule set that shaped the graph: 'published' or 'operators'.

    Graphs are compared by identity: equal ones may list their nodes in different orders.
    """

    nodes: tuple[Node, ...]
    edges_E2: Tensor
    start: int
    class_weights: tuple[str, ...]
    class_biases: tuple[str, ...]
    classifier: tuple[str, ...]
    parameters: tuple[ParameterInfo, ...]
    kept: dict[str, str]
    input_size: tuple[int, int, int]
    num_classes: int | None
    rules: str

    def __post_init__(self) -> None:
        n, edges = len(self.nodes), self.edges_E2
        if edges.dtype != torch.int64 or edges.dim() != 2 or edges.shape[1] != 2:
            raise UnsupportedModelError(
                f'expected int64 edges of shape (E, 2) (got {edges.dtype} {tuple(edges.shape)})'
            )
        if not all(0 <= node < n for node in (self.start, *edges.flatten().tolist())):
            raise UnsupportedModelError(f'an edge or the start names a node outside 0..{n - 1}')

    def __len__(self) -> int:
        return len(self.nodes)

    @functools.cached_property
    def primitives_N(self) -> Tensor:
        """int64 (N,): :class:`Primitive` of each node."""
        return torch.tensor([int(node.primitive) for node in self.nodes], dtype=torch.int64, device='cpu')

    @functools.cached_property
    def shapes_N4(self) -> Tensor:
        """int64 (N, 4): shape of each node, :data:`NO_SHAPE` where it has none."""
        shapes = [node.shape or NO_SHAPE for node in self.nodes]
        return torch.tensor(shapes, dtype=torch.int64, device='cpu').view(-1, 4)

    @functools.cached_property
    def _topological_levels_N(self) -> Tensor | None:
        return topological_levels(len(self), self.edges_E2)

    @property
    def is_acyclic(self) -> bool:
        """Whether the graph has no cycle. Only a few published ones have."""
        return self._topological_levels_N is not None

    @functools.cached_property
    def forward_levels_N(self) -> Tensor:
        """int64 (N,): when each node is visited in a forward traversal; nodes of a level are visited together.

        The level is the length of the longest path from a node without predecessors. In a graph with a cycle there is
        no such order: nodes are visited one by one, as they are listed.
        """
        levels_N = self._topological_levels_N
        return torch.arange(len(self), device='cpu') if levels_N is None else levels_N

    @functools.cached_property
    def backward_levels_N(self) -> Tensor:
        """int64 (N,): the same for a backward traversal, from the nodes without successors."""
        levels_N = topological_levels(len(self), self.edges_E2.flip(1))
        return torch.arange(len(self), device='cpu').flip(0) if levels_N is None else levels_N

    def distances_NN(self, cutoff: int) -> Tensor:
        """Shortest directed path lengths: virtual edges (arXiv 2110.13100, section 4.1).

        Args:
            cutoff: Longest distance kept; 1 keeps the real edges only.

        Returns:
            int16 (N, N): entry (u, v) is the length of the shortest path from u to v, 0 where there is none, where
            u is v, or where it is longer than ``cutoff``.
        """
        distances = self._distances_NN
        return torch.where(distances <= cutoff, distances, 0)

    @functools.cached_property
    def _distances_NN(self) -> Tensor:
        return shortest_paths(len(self), self.edges_E2)

    @functools.cached_property
    def node_of(self) -> dict[str, int]:
        """Index of the node that predicts each parameter, biases of normalisation layers included."""
        found: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in (node.parameter, node.norm_bias):
                if name is not None:
                    found.setdefault(name, index)
        return found


@dataclasses.dataclass(frozen=True)
class GraphBatch:
    """Several graphs (at least one) that go through a GHN together. Node numbers continue from graph to graph."""

    graphs: tuple[Graph, ...]

    def __post_init__(self) -> None:
        if not self.graphs:
            raise ValueError('expected at least one graph (got none)')

    @classmethod
    def of(cls, graphs: Graph | GraphBatch | Iterable[Graph]) -> GraphBatch:
        """Wrap one graph, several, or a batch (returned as it is)."""
        if isinstance(graphs, GraphBatch):
            return graphs
        return cls((graphs,) if isinstance(graphs, Graph) else tuple(graphs))

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of nodes of each graph."""
        return tuple(len(graph) for graph in self.graphs)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Number of the first node of each graph."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0))


def graph_to_dict(graph: Graph) -> dict[str, Any]:
    """Values that ``json`` can write; :func:`graph_from_dict` reads them back."""
    values = {field.name: getattr(graph, field.name) for field in dataclasses.fields(graph)}
    return {
        **values,
        'nodes': [[node.primitive.name, *dataclasses.astuple(node)[1:]] for node in graph.nodes],
        'edges_E2': graph.edges_E2.tolist(),
        'parameters': [
            [info.name, info.shape, str(info.dtype).removeprefix('torch.'), info.owner, info.aliases]
            for info in graph.parameters
        ],
    }


def graph_from_dict(values: Mapping[str, Any]) -> Graph:
    """The graph that :func:`graph_to_dict` wrote.

    Raises:
        CheckpointError: if the values are not those of a graph.
    """
    try:
        return Graph(
            **{
                **values,
                'nodes': tuple(Node(Primitive[name], *map(_tuples, rest)) for name, *rest in values['nodes']),
                'edges_E2': torch.tensor(values['edges_E2'], dtype=torch.int64, device='cpu').view(-1, 2),
                'class_weights': _tuples(values['class_weights']),
                'class_biases': _tuples(values['class_biases']),
                'classifier': _tuples(values['classifier']),
                'parameters': tuple(
                    ParameterInfo(name, _tuples(shape), getattr(torch, dtype), owner, _tuples(aliases))
                    for name, shape, dtype, owner, aliases in values['parameters']
                ),
                'input_size': _tuples(values['input_size']),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f'expected the plain values of a graph ({error!r})') from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
