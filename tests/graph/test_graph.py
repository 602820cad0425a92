"""The records: validation, derived values, and JSON."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from isomorphism import equal
from tiny import TINY

from timm_ghn import Graph, UnsupportedModelError, plan_parameters, trace
from timm_ghn.errors import CheckpointError
from timm_ghn.graph import GraphBatch, Node, ParameterInfo, Primitive
from timm_ghn.graph.graph import graph_from_dict, graph_to_dict


def graph_of(size: int, edges: list[tuple[int, int]], **changes: object) -> Graph:
    """A graph of nameless nodes."""
    fields = {
        'nodes': tuple(Node(Primitive.SUM, f'node{index}') for index in range(size)),
        'edges_E2': torch.tensor(edges, dtype=torch.int64).view(-1, 2),
        'start': 0,
        'class_weights': (),
        'class_biases': (),
        'classifier': (),
        'parameters': (),
        'kept': {},
        'input_size': (3, 8, 8),
        'num_classes': None,
        'rules': 'operators',
    }
    return Graph(**{**fields, **changes})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'edges_E2': torch.zeros(2, 2)}, r'expected int64 edges of shape \(E, 2\) \(got torch.float32 \(2, 2\)\)'),
        ({'edges_E2': torch.zeros(2, 3, dtype=torch.int64)}, r'shape \(E, 2\)'),
        ({'edges_E2': torch.tensor([[0, 3]])}, r'outside 0\.\.2'),
        ({'edges_E2': torch.tensor([[-1, 0]])}, r'outside 0\.\.2'),
        ({'start': 3}, r'outside 0\.\.2'),
    ],
)
def test_a_graph_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        graph_of(3, [(0, 1)], **changes)


def test_a_cutoff_keeps_the_distances_up_to_it():
    chain = graph_of(5, [(0, 1), (1, 2), (2, 3), (3, 4)])
    assert chain.distances_NN(50)[0].tolist() == [0, 1, 2, 3, 4]
    assert chain.distances_NN(3)[0].tolist() == [0, 1, 2, 3, 0]
    assert chain.distances_NN(1).nonzero().tolist() == chain.edges_E2.tolist()
    chain.distances_NN(50).zero_()
    assert chain.distances_NN(50)[0].tolist() == [0, 1, 2, 3, 4], 'not changed by who reads them'


def test_backward_levels_are_the_forward_levels_of_the_reversed_graph():
    edges = [(0, 1), (0, 2), (1, 3), (2, 4), (4, 3), (3, 5)]
    graph, reverse = graph_of(6, edges), graph_of(6, [(v, u) for u, v in edges])
    assert graph.forward_levels_N.tolist() == [0, 1, 1, 3, 2, 4]
    assert graph.backward_levels_N.tolist() == reverse.forward_levels_N.tolist() == [4, 2, 3, 1, 2, 0]


def test_nodes_on_a_cycle_are_visited_in_the_order_of_the_list():
    graph = graph_of(4, [(0, 1), (1, 2), (2, 1), (2, 3)])
    assert not graph.is_acyclic
    assert graph.forward_levels_N.tolist() == [0, 1, 2, 3]
    assert graph.backward_levels_N.tolist() == [3, 2, 1, 0]


def test_nodes_have_primitives_shapes_and_parameters():
    nodes = (Node(Primitive.INPUT, 'input'), Node(Primitive.BN, 'a.weight', 'a.weight', (8, 1, 1, 1), 'a.bias'))
    graph = graph_of(2, [(0, 1)], nodes=nodes)
    assert graph.shapes_N4.tolist() == [[-1, -1, -1, -1], [8, 1, 1, 1]]
    assert graph.primitives_N.tolist() == [9, 11]
    assert graph.node_of == {'a.weight': 1, 'a.bias': 1}
    for shape, numel in (((), 1), ((0, 3), 0), ((4, 3, 2, 2), 48)):
        assert ParameterInfo('p', shape, torch.float32, 'torch.nn.Module').numel == numel


def test_the_nodes_of_a_batch_are_numbered_through():
    graphs = [graph_of(size, []) for size in (3, 1, 4)]
    batch = GraphBatch.of(graphs)
    assert batch.sizes == (3, 1, 4)
    assert batch == GraphBatch.of(graphs) != GraphBatch.of([graph_of(size, []) for size in (3, 1, 4)]), 'by identity'
    assert batch.offsets == (0, 3, 4)
    assert GraphBatch.of(batch) is batch
    assert GraphBatch.of(graphs[0]).graphs == (graphs[0],)
    assert GraphBatch.of(iter(graphs)).sizes == batch.sizes
    with pytest.raises(ValueError, match='at least one graph'):
        GraphBatch(())


@pytest.mark.parametrize(('name', 'rules'), [('test_vit', 'auto'), ('nest_tiny', 'operators')])
def test_a_graph_survives_json(name, rules):
    with torch.device('meta'):
        graph = trace(timm.create_model(name), rules=rules)
    again = graph_from_dict(json.loads(json.dumps(graph_to_dict(graph))))
    assert equal(again, graph)
    assert plan_parameters(again, TINY['gated']).rows == plan_parameters(graph, TINY['gated']).rows


def test_values_of_no_graph_are_refused():
    values = graph_to_dict(graph_of(2, [(0, 1)]))
    for change in ({'edges_E2': [[0]]}, {'nodes': [['nothing', 'x']]}, {'more': 1}):
        with pytest.raises(CheckpointError, match='plain values of a graph'):
            graph_from_dict({**values, **change})
