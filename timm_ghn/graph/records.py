"""A graph as plain values, so that it need not be traced again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from timm_ghn.errors import CheckpointError
from timm_ghn.graph.graph import Graph, Node, ParameterInfo
from timm_ghn.graph.primitives import Primitive


def graph_to_dict(graph: Graph) -> dict[str, Any]:
    """Plain values that ``json`` can write; :func:`graph_from_dict` reads them back."""
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
        CheckpointError: if the values are no graph.
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
