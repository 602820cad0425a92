"""A network is the same to a GHN whichever package built it: graph and predictions do not depend on names and code."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import timm
import torch
import torchvision
from isomorphism import colours, same_graph
from torch import Tensor, nn

from timm_ghn import Graph, Prediction, predict, trace
from timm_ghn.graph import Primitive

#: timm's and torchvision's name of one architecture.
PAIRS = {
    'resnet18': 'resnet18',
    'resnet50': 'resnet50',
    'resnext50_32x4d': 'resnext50_32x4d',
    'densenet121': 'densenet121',
    'convnext_tiny': 'convnext_tiny',
    'regnetx_004_tv': 'regnet_x_400mf',
    'regnety_004': 'regnet_y_400mf',
    'efficientnet_b0': 'efficientnet_b0',
    'efficientnetv2_s': 'efficientnet_v2_s',
    'mnasnet_100': 'mnasnet1_0',
    'mobilenetv2_100': 'mobilenet_v2',
    'mobilenetv3_small_100': 'mobilenet_v3_small',
    'inception_v3': 'inception_v3',
    'vit_tiny_patch16_224': 'vit_ti_16',  # in torchvision only by its class
}
#: Those whose predictions are compared too.
PREDICTED = ('convnext_tiny', 'regnety_004', 'mobilenetv3_small_100')
SIZES = {'inception_v3': 299, 'swinv2_tiny_window8_256': 256}


def build(name: str, other: str) -> tuple[nn.Module, nn.Module]:
    """timm's version and torchvision's."""
    options = {'aux_logits': False, 'init_weights': False} if other == 'inception_v3' else {}
    # RegNet computes its widths with tensors, which must hold values.
    with torch.device('cpu' if name.startswith('regnet') else 'meta'):
        if other == 'vit_ti_16':
            return timm.create_model(name), torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768)
        return timm.create_model(name), torchvision.models.get_model(other, weights=None, **options)


def graphs(name: str, other: str, rules: str = 'auto') -> tuple[Graph, Graph]:
    ours, theirs = build(name, other)
    size = SIZES.get(name, 224)
    return trace(ours, input_size=size, rules=rules), trace(theirs, input_size=size, rules=rules)


def by_colour(prediction: Prediction, colour_N: list[int]) -> dict[object, list[Tensor]]:
    """Predicted tensors as vectors, by the node that predicts them and their role there."""
    found = defaultdict(list)
    for row in prediction.plan.predicted:
        found[colour_N[row.node], row.role].append(prediction.state_dict[row.name].flatten())
    return found


@pytest.mark.parametrize('name', PAIRS)
def test_versions_and_rules_agree_on_the_graph_of_a_published_network(name):
    """The operator rules extend the published ones: where those were made for a network, both make one graph."""
    ours, theirs = build(name, PAIRS[name])
    size = SIZES.get(name, 224)
    published = trace(theirs, input_size=size)
    for graph in (trace(ours, input_size=size), trace(theirs, input_size=size, rules='operators')):
        assert same_graph(graph, published)
    assert published.rules == 'published'
    assert graph.rules == 'operators'
    assert graph.kept == published.kept


@pytest.mark.parametrize('name', PREDICTED)
def test_two_versions_of_a_network_get_the_same_parameters(name, ghn):
    ours, theirs = (
        predict(model, ghn, input_size=SIZES.get(name, 224), head='predict') for model in build(name, PAIRS[name])
    )
    left, right = (
        by_colour(prediction, colour)
        for prediction, colour in zip((ours, theirs), colours((ours.plan.graph, theirs.plan.graph)), strict=True)
    )
    assert {key: len(tensors) for key, tensors in left.items()} == {key: len(tensors) for key, tensors in right.items()}
    for key, tensors in left.items():
        for tensor in (*tensors, *right[key]):
            torch.testing.assert_close(tensor, tensors[0], rtol=1e-4, atol=1e-6)
    assert sum(map(len, left.values())) > 50


def shapes(graph: Graph) -> Counter:
    return Counter((node.primitive, node.shape) for node in graph.nodes)


def test_vgg_differs_because_timm_classifies_with_convolutions():
    """timm's first hidden layer is a 7x7 convolution, torchvision's a linear layer on the flattened map."""
    ours, theirs = graphs('vgg11', 'vgg11')
    assert shapes(ours) - shapes(theirs) == {(Primitive.CONV, (4096, 512, 7, 7)): 1}
    assert shapes(theirs) - shapes(ours) == {(Primitive.CONV, (4096, 25088, 1, 1)): 1}


def test_swin_differs_by_the_published_rules_which_rewire_the_class_of_torchvision_only():
    name, other = 'swin_tiny_patch4_window7_224', 'swin_t'
    ours, theirs = graphs(name, other, rules='published')
    assert shapes(ours) == shapes(theirs)
    assert not same_graph(ours, theirs)
    ours, by_operators = graphs(name, other, rules='operators')
    assert same_graph(ours, by_operators)
    assert same_graph(theirs, by_operators)
    ours, theirs = graphs(name, other)
    assert (ours.rules, theirs.rules) == ('operators', 'published')
    assert same_graph(ours, theirs)


def test_swin_v2_differs_because_timm_has_no_bias_for_keys():
    """Its query and value biases are parameters of their own, where torchvision's are one with a part set to zero."""
    ours, theirs = map(shapes, graphs('swinv2_tiny_window8_256', 'swin_v2_t', rules='operators'))
    assert {primitive for primitive, _ in (ours - theirs) + (theirs - ours)} == {Primitive.BIAS}
