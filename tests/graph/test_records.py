import json

import pytest
import timm
import torch

import timm_ghn
from timm_ghn.errors import CheckpointError
from timm_ghn.graph.records import graph_from_dict, graph_to_dict


@pytest.mark.parametrize('rules', ['auto', 'operators'])
@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_efficientnet', 'levit_128s', 'nest_tiny'])
def test_a_graph_survives_json(name, rules):
    with torch.device('meta'):
        model = timm.create_model(name)
    graph = timm_ghn.trace(model, rules=rules)
    again = graph_from_dict(json.loads(json.dumps(graph_to_dict(graph))))
    assert torch.equal(again.edges_E2, graph.edges_E2)
    assert (again.nodes, again.parameters, again.kept) == (graph.nodes, graph.parameters, graph.kept)
    assert graph_to_dict(again) == graph_to_dict(graph)
    config = timm_ghn.GHNConfig(hid=16, max_shape=(16, 16, 7, 7), num_classes=10, heads=4)
    assert timm_ghn.plan_parameters(again, config).rows == timm_ghn.plan_parameters(graph, config).rows


@pytest.mark.parametrize('change', [{'nodes': 3}, {'edges_E2': [[0]]}, {'nodes': [['nothing', 'x']]}, {'more': 1}])
def test_other_values_are_refused(change):
    values = graph_to_dict(timm_ghn.trace(timm.create_model('test_vit')))
    with pytest.raises(CheckpointError, match='plain values of a graph'):
        graph_from_dict({**values, **change})
