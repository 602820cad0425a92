"""Each flaw of a graph is found (tests/graph/test_trace.py: sound graphs have none)."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from networks import SIZE, plain
from torch import Tensor

from timm_ghn import Graph, trace
from timm_ghn.graph.checks import flaws_of
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record


@pytest.fixture(scope='module')
def vit() -> tuple[Graph, Flow]:
    with torch.device('meta'):
        model = timm.create_model('test_vit')
    return trace(model), Flow.of(record(model))


def flaws(vit: tuple[Graph, Flow], edges: Tensor, **changes: object) -> str:
    graph, flow = vit
    return ' '.join(flaws_of(dataclasses.replace(graph, edges_E2=edges, **changes), flow))


def test_a_graph_without_an_edge_to_the_classifier(vit):
    graph, _ = vit
    into_head = graph.edges_E2[:, 1] == graph.node_of['head.weight']
    found = flaws(vit, graph.edges_E2[~into_head])
    for flaw in ('ends for 1 outputs', 'not reached from the input: head.weight', 'without an input: head.weight'):
        assert flaw in found


def test_a_cycle(vit):
    graph, _ = vit
    qkv, norm = graph.node_of['blocks.0.attn.qkv.weight'], graph.node_of['blocks.1.norm1.weight']
    assert 'cyclic' in flaws(vit, torch.cat([graph.edges_E2, torch.tensor([[norm, qkv]])]))


def test_weights_in_another_order(vit):
    """The attention's last weight and the next norm change places."""
    graph, _ = vit
    proj, norm = graph.node_of['blocks.0.attn.proj.weight'], graph.node_of['blocks.1.norm1.weight']
    swapped = graph.edges_E2.clone()
    swapped[graph.edges_E2 == proj], swapped[graph.edges_E2 == norm] = norm, proj
    assert 'in the graph only behind a weight' in flaws(vit, swapped)


def test_a_weight_that_hangs_on_the_input(vit):
    """A short cut around a layer leaves the order as it is; dropping the layer's input does not."""
    graph, _ = vit
    qkv = graph.node_of['blocks.0.attn.qkv.weight']
    from_input = torch.tensor([[0, qkv]])
    assert flaws(vit, torch.cat([graph.edges_E2, from_input])) == ''
    rest = graph.edges_E2[graph.edges_E2[:, 1] != qkv]
    assert 'behind a weight but not so in the graph' in flaws(vit, torch.cat([rest, from_input]))


def test_a_classifier_that_is_not_found(vit):
    graph, _ = vit
    assert flaws(vit, graph.edges_E2, class_weights=()) == 'no classifier found for 1000 classes'
    wrong = flaws(vit, graph.edges_E2, class_weights=('blocks.0.attn.proj.weight',))
    assert 'head.weight of the classifier is no class weight' in wrong
    assert 'classifier blocks.0.attn.proj.weight of shape' in wrong


def test_a_second_input():
    model = plain()
    graph = trace(model, input_size=SIZE)
    nodes = list(graph.nodes)
    nodes[1] = dataclasses.replace(nodes[1], primitive=nodes[0].primitive)
    found = flaws_of(dataclasses.replace(graph, nodes=tuple(nodes)), Flow.of(record(model, input_size=SIZE)))
    assert '2 inputs' in found
