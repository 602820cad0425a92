"""Which rules shape a graph, where its classifier is, and why parameters are left out."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from isomorphism import Net, equal
from networks import NETWORKS, SIZE, plain
from timm.layers import LayerNorm2d
from torch import nn

from timm_ghn import ConfigError, Graph, UnsupportedModelError, trace
from timm_ghn.graph import Primitive
from timm_ghn.graph.checks import flaws_of
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record


def timm_graph(name: str, rules: str = 'auto', **options: object) -> Graph:
    with torch.device('meta'):
        return trace(timm.create_model(name, **options), rules=rules)


# -- rules


def test_unknown_rules_are_refused():
    for rules in ('', 'Published', 'ghn3', None):
        with pytest.raises(ConfigError, match='expected rules to be one of auto, published, operators'):
            trace(plain(), rules=rules)


@pytest.mark.parametrize('name', ['resnet18', 'vgg11', 'legacy_seresnet18'])
def test_a_sound_published_graph_is_taken(name):
    graph = timm_graph(name)
    assert graph.rules == 'published'
    assert equal(graph, timm_graph(name, 'published'))


@pytest.mark.parametrize(
    ('name', 'kind'),
    [('mobilenetv3_small_050', 'timm.layers.linear.Linear'), ('test_convnext', 'timm.layers.norm.LayerNorm2d')],
)
def test_a_network_with_a_subclass_of_a_known_layer_has_no_published_graph(name, kind):
    """The reference fails on a subclass."""
    graph = timm_graph(name)
    assert graph.rules == 'operators'
    assert equal(graph, timm_graph(name, 'operators'))
    with pytest.raises(UnsupportedModelError, match=rf"but not {kind}, which holds '.*'; rules='auto'"):
        timm_graph(name, 'published')


@pytest.mark.parametrize(
    ('name', 'flaw'),
    [
        ('swin_tiny_patch4_window7_224', 'behind a weight but not so in the graph'),
        ('levit_128s', 'no classifier found'),
        ('resmlp_12_224', 'not reached from the input: MeanBackward1, head.weight'),
    ],
)
def test_a_published_graph_that_is_not_sound_gives_way(name, flaw):
    with torch.device('meta'):
        model = timm.create_model(name)
    published, graph = (trace(model, rules=rules) for rules in ('published', 'auto'))
    flow = Flow.of(record(model))
    assert published.rules == 'published'
    assert flaw in ' '.join(flaws_of(published, flow))
    assert graph.rules == 'operators'
    assert equal(graph, trace(model, rules='operators'))
    assert not flaws_of(graph, flow)


CONV = nn.Conv2d(3, 8, 3)
ENDS = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]


@pytest.mark.parametrize(
    ('layers', 'left_out'),
    [
        ([nn.GroupNorm(2, 8), *ENDS], {'1.weight': 'GroupNorm.weight', '1.bias': 'GroupNorm.bias'}),
        # It has as many elements as a gain.
        (
            [nn.Flatten(2), nn.Conv1d(8, 8, 1, groups=8, bias=False), nn.AdaptiveAvgPool1d(1), *ENDS[1:]],
            {'2.weight': 'Conv1d.weight'},
        ),
        # A classifier without a bias is not at the last two positions.
        ([*ENDS[:2], nn.Linear(8, 10, bias=False)], {}),
    ],
    ids=['a norm', 'a depthwise convolution', 'the classifier'],
)
def test_a_published_graph_that_leaves_out_what_can_be_predicted_gives_way(layers, left_out):
    model = nn.Sequential(CONV, *layers)
    published, graph = (trace(model, input_size=SIZE, rules=rules) for rules in ('published', 'auto'))
    assert (published.rules, graph.rules, graph.kept) == ('published', 'operators', {})
    assert published.kept == {name: f'{kind} is left out by the published rules' for name, kind in left_out.items()}
    assert bool(published.class_weights) == bool(left_out)
    assert graph.class_weights == (f'{len(layers)}.weight',)


def test_a_subclass_that_is_not_used_does_not_decide():
    graph = trace(Net(lambda net, x: net.body(x), body=plain(), spare=LayerNorm2d(8)), input_size=SIZE)
    assert graph.rules == 'published'
    assert graph.kept == dict.fromkeys(('spare.weight', 'spare.bias'), 'not used in the forward pass')


def test_a_cycle_that_the_published_rules_close_is_part_of_the_published_graph():
    with torch.device('meta'):
        model = torchvision.models.swin_v2_t()
    assert not trace(model, rules='published').is_acyclic
    graph = trace(model)
    assert graph.rules == 'operators'
    assert graph.is_acyclic


def test_a_layer_that_is_used_again_has_no_published_graph():
    """Behind itself, it has no place in an acyclic graph with one node for each parameter."""
    shared = nn.Linear(8, 8)
    twice = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), shared, nn.ReLU(), shared)
    for model in (NETWORKS['tied']().model, twice):
        graph = trace(model, input_size=SIZE)
        assert graph.rules == 'operators'
        assert graph.is_acyclic
        with pytest.raises(UnsupportedModelError, match=r"used again behind itself; rules='auto'"):
            trace(model, input_size=SIZE, rules='published')


# -- classifier


@pytest.mark.parametrize(
    ('name', 'classifier'),
    [
        ('resnet18', ('fc.weight', 'fc.bias')),
        ('test_convnext', ('head.fc.weight', 'head.fc.bias')),
        ('deit_tiny_distilled_patch16_224', ('head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias')),
    ],
)
def test_timms_metadata_says_where_the_classifier_is(name, classifier):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=7)
        headless = timm.create_model(name, num_classes=0)
    for rules in ('auto', 'operators'):
        graph = trace(model, rules=rules)
        assert graph.classifier == classifier
        assert graph.num_classes == 7
        assert {*graph.class_weights, *graph.class_biases} == set(classifier)
    graph = trace(headless)
    assert graph.num_classes is None
    assert graph.classifier == graph.class_weights == graph.class_biases == ()


HEADS = {
    'without a bias': (lambda: nn.Linear(8, 10, bias=False), ('head.weight',), 10),
    'with a hidden layer': (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 10), nn.Softmax(-1)),
        ('head.3.weight', 'head.3.bias'),
        10,
    ),
    'nothing': (nn.Identity, (), None),
    'a norm': (lambda: nn.LayerNorm(8), (), None),
}


@pytest.mark.parametrize('head', HEADS)
def test_without_metadata_the_layer_that_makes_the_output_is_the_classifier(head):
    make, classifier, classes = HEADS[head]
    model = plain()
    model.pool = nn.Sequential(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    model.head = make()
    for rules in ('published', 'operators'):
        graph = trace(model, input_size=SIZE, rules=rules)
        assert graph.classifier == classifier
        assert graph.num_classes == classes
    assert graph.class_weights + graph.class_biases == classifier


def test_a_reparametrised_classifier_is_found():
    graph = trace(NETWORKS['reparametrised']().model, input_size=SIZE)
    path = 'head.parametrizations.weight.original'
    assert set(graph.classifier) == {'head.bias', f'{path}0', f'{path}1'}
    assert graph.num_classes == 1000
    assert graph.class_weights == (f'{path}1',)


# -- what is kept


def test_why_parameters_are_kept():
    vit = timm_graph('test_vit', init_values=0.1, reg_tokens=2).kept
    assert vit['cls_token'] == vit['reg_token'] == 'class or register token'
    assert vit['blocks.0.ls1.gamma'] == 'layer scale or gain'
    direct = trace(NETWORKS['direct']().model, input_size=SIZE).kept
    assert direct['unused'] == 'not used in the forward pass'
    assert direct['scale'] == 'layer scale or gain'
    assert direct['cls_token'] == 'class or register token'


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_what_weight_normalisation_of_either_kind_keeps_apart_is_kept():
    """The predicted direction has the norm that the layer's own initialisation gave the weight."""
    reason = 'norm that weight normalisation keeps apart from the direction'
    for normalise, leaf in (
        (nn.utils.weight_norm, 'weight_g'),
        (nn.utils.parametrizations.weight_norm, 'parametrizations.weight.original0'),
    ):
        model = plain()
        normalise(model.body[0])
        graph = trace(model, input_size=SIZE, rules='operators')
        assert graph.kept == {f'body.0.{leaf}': reason}


def test_nodes_have_the_shapes_of_their_parameters():
    """A positional embedding that of a square map of features."""
    (node,) = (node for node in timm_graph('test_vit').nodes if node.primitive is Primitive.POS_ENC)
    assert (node.parameter, node.shape) == ('pos_embed', (1, 64, 10, 10))
    graph = timm_graph('resnet18', in_chans=1)
    assert graph.input_size == (1, 224, 224)
    assert graph.nodes[1].shape == (64, 1, 7, 7)
