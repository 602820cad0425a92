"""Which rules shape a graph, where its classifier is, and why parameters are left out."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from isomorphism import equal, same_graph
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


@pytest.mark.parametrize('rules', ['', 'Published', 'ghn3', None])
def test_unknown_rules_are_refused(rules):
    with pytest.raises(ConfigError, match='expected rules to be one of auto, published, operators'):
        trace(plain(), rules=rules)


@pytest.mark.parametrize('name', ['resnet18', 'vgg11', 'test_resnet', 'legacy_seresnet18'])
def test_a_sound_published_graph_is_taken(name):
    graph = timm_graph(name)
    assert graph.rules == 'published'
    assert equal(graph, timm_graph(name, 'published'))


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('mobilenetv3_small_050', 'timm.layers.linear.Linear'),
        ('convnext_atto', 'timm.layers.norm.LayerNorm2d'),
        ('vit_tiny_patch16_224', 'timm.layers.norm.LayerNorm'),
    ],
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


def test_a_published_graph_that_loses_the_classifier_gives_way():
    """Without a bias it is not at the last two positions."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10, bias=False))
    published, graph = (trace(model, input_size=SIZE, rules=rules) for rules in ('published', 'auto'))
    assert (published.rules, published.class_weights) == ('published', ())
    assert (graph.rules, graph.class_weights) == ('operators', ('3.weight',))


def test_a_published_graph_that_leaves_out_what_can_be_predicted_gives_way():
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = nn.Sequential(*layers)
    published, graph = (trace(model, input_size=SIZE, rules=rules) for rules in ('published', 'auto'))
    assert not flaws_of(published, Flow.of(record(model, input_size=SIZE)))
    assert published.rules == 'published'
    assert published.kept == {
        f'1.{key}': f'GroupNorm.{key} is left out by the published rules' for key in ('weight', 'bias')
    }
    assert (graph.rules, graph.kept) == ('operators', {})


def test_what_the_published_rules_leave_out_is_not_taken_for_a_gain():
    """A depthwise convolution of one dimension has as many elements as a gain."""
    layers = [nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Conv1d(8, 8, 1, groups=8, bias=False), nn.AdaptiveAvgPool1d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
    published, graph = (trace(model, input_size=SIZE, rules=rules) for rules in ('published', 'auto'))
    assert published.kept == {'2.weight': 'Conv1d.weight is left out by the published rules'}
    assert (graph.rules, graph.kept) == ('operators', {})


def test_what_no_graph_predicts_does_not_decide():
    with torch.device('meta'):
        graph = trace(torchvision.models.convnext_tiny())
    assert set(graph.kept.values()) == {'layer scale or gain'}
    assert graph.rules == 'published'


def test_a_subclass_does_not_change_the_graph():
    class MyConv(nn.Conv2d):
        pass

    def network(kind: type[nn.Conv2d]) -> Graph:
        model = nn.Sequential(kind(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        model(torch.zeros(2, 3, 8, 8))
        return trace(model, input_size=8)

    known, own = network(nn.Conv2d), network(MyConv)
    assert (known.rules, own.rules) == ('published', 'operators')
    assert same_graph(known, own)


def test_a_subclass_that_is_not_used_does_not_decide():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain()
            self.spare = LayerNorm2d(8)

        def forward(self, x):
            return self.body(x)

    graph = trace(Spare(), input_size=SIZE)
    assert graph.rules == 'published'
    assert graph.kept == dict.fromkeys(('spare.weight', 'spare.bias'), 'not used in the forward pass')


def test_a_cycle_that_the_published_rules_close_is_part_of_the_published_graph():
    with torch.device('meta'):
        model = torchvision.models.swin_v2_t()
    assert not trace(model, rules='published').is_acyclic
    graph = trace(model)
    assert graph.rules == 'operators'
    assert graph.is_acyclic


@pytest.mark.parametrize('name', ['tied', 'shared'])
def test_a_layer_that_is_used_again_has_no_published_graph(name):
    """Behind itself, it has no place in an acyclic graph with one node for each parameter."""
    shared = nn.Linear(8, 8)
    networks = {
        'tied': NETWORKS['tied']().model,
        'shared': nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), shared, nn.ReLU(), shared),
    }
    graph = trace(networks[name], input_size=SIZE)
    assert graph.rules == 'operators'
    assert graph.is_acyclic
    assert graph.nodes[graph.start].primitive is Primitive.INPUT
    with pytest.raises(UnsupportedModelError, match=r"used again behind itself; rules='auto'"):
        trace(networks[name], input_size=SIZE, rules='published')


# -- classifier


@pytest.mark.parametrize(
    ('name', 'classifier'),
    [
        ('resnet18', ('fc.weight', 'fc.bias')),
        ('mobilenetv3_small_050', ('classifier.weight', 'classifier.bias')),
        ('vit_tiny_patch16_224', ('head.weight', 'head.bias')),
        ('convnext_atto', ('head.fc.weight', 'head.fc.bias')),
        ('resnet18d', ('fc.weight', 'fc.bias')),
        ('test_byobnet', ('head.fc.weight', 'head.fc.bias')),
        ('deit_tiny_distilled_patch16_224', ('head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias')),
    ],
)
@pytest.mark.parametrize('rules', ['auto', 'operators'])
def test_timms_metadata_says_where_the_classifier_is(name, classifier, rules):
    graph = timm_graph(name, rules, num_classes=7)
    assert graph.classifier == classifier
    assert graph.num_classes == 7
    assert {*graph.class_weights, *graph.class_biases} == set(classifier)


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224', 'mobilenetv3_small_050'])
def test_a_network_without_classes_has_no_classifier(name):
    graph = timm_graph(name, num_classes=0)
    assert graph.num_classes is None
    assert graph.classifier == graph.class_weights == graph.class_biases == ()


def test_a_classifier_that_was_replaced_is_the_one_that_is_found():
    with torch.device('meta'):
        model = timm.create_model('resnet18')
        model.reset_classifier(12)
        assert trace(model).num_classes == 12
        model.fc = nn.Linear(512, 5)
        graph = trace(model)
    assert graph.class_weights == ('fc.weight',)
    assert graph.classifier == ('fc.weight', 'fc.bias')


HEADS = {
    'linear': (lambda: nn.Linear(8, 10), ('head.weight', 'head.bias'), 10),
    'without a bias': (lambda: nn.Linear(8, 10, bias=False), ('head.weight',), 10),
    'behind a dropout': (
        lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 10), nn.Softmax(-1)),
        ('head.1.weight', 'head.1.bias'),
        10,
    ),
    'with a hidden layer': (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 10)),
        ('head.2.weight', 'head.2.bias'),
        10,
    ),
    'nothing': (nn.Identity, (), None),
    'a norm': (lambda: nn.LayerNorm(8), (), None),
}


@pytest.mark.parametrize('rules', ['published', 'operators'])
@pytest.mark.parametrize('head', HEADS)
def test_without_metadata_the_layer_that_makes_the_output_is_the_classifier(head, rules):
    make, classifier, classes = HEADS[head]
    layers = {
        'a': nn.Conv2d(3, 8, 3),
        'b': nn.Conv2d(8, 8, 3, bias=False),
        'n': nn.BatchNorm2d(8),
        'pool': nn.AdaptiveAvgPool2d(1),
        'flat': nn.Flatten(),
        'head': make(),
    }
    graph = trace(nn.Sequential(OrderedDict(layers)), input_size=SIZE, rules=rules)
    assert graph.classifier == classifier
    assert graph.num_classes == classes
    if rules == 'operators':
        assert graph.class_weights + graph.class_biases == classifier


def test_a_reparametrised_classifier_is_found():
    graph = trace(NETWORKS['reparametrised']().model, input_size=SIZE)
    assert set(graph.classifier) == {
        'head.bias',
        'head.parametrizations.weight.original0',
        'head.parametrizations.weight.original1',
    }
    assert graph.num_classes == 1000
    assert graph.class_weights == ('head.parametrizations.weight.original1',)


# -- what is kept


def reasons(model: nn.Module, **options: object) -> dict[str, str]:
    return trace(model, **options).kept


def test_why_parameters_are_kept():
    with torch.device('meta'):
        vit = reasons(timm.create_model('test_vit', init_values=0.1, reg_tokens=2))
        swin = reasons(torchvision.models.swin_t())
        convnext = reasons(timm.create_model('test_convnext'))
    assert vit['cls_token'] == vit['reg_token'] == 'class or register token'
    assert vit['blocks.0.ls1.gamma'] == 'layer scale or gain'
    assert set(swin.values()) == {'relative position table'}
    assert all(name.endswith('gamma') for name in convnext)
    direct = reasons(NETWORKS['direct']().model, input_size=SIZE)
    assert direct['unused'] == 'not used in the forward pass'
    assert direct['scale'] == 'layer scale or gain'
    assert direct['cls_token'] == 'class or register token'


@pytest.mark.parametrize('rules', ['auto', 'operators'])
def test_what_weight_normalisation_keeps_apart_is_kept(rules):
    """The predicted direction has the norm that the layer's own initialisation gave the weight."""
    graph = trace(NETWORKS['reparametrised']().model, input_size=SIZE, rules=rules)
    norms = {f'{layer}.parametrizations.weight.original0' for layer in ('body.0', 'head')}
    assert graph.kept == dict.fromkeys(norms, 'norm that weight normalisation keeps apart from the direction')


def test_weight_normalisation_of_either_kind_is_the_same_by_the_operator_rules():
    def network(normalise) -> Graph:
        model = plain()
        normalise(model.body[0])
        normalise(model.body[3])
        return trace(model, input_size=SIZE, rules='operators')

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        old = network(nn.utils.weight_norm)
    assert same_graph(old, network(nn.utils.parametrizations.weight_norm))
    assert set(old.kept) == {'body.0.weight_g', 'body.3.weight_g'}


def test_a_positional_embedding_is_a_square_map_of_features():
    graph = timm_graph('test_vit')
    (node,) = (node for node in graph.nodes if node.primitive is Primitive.POS_ENC)
    assert node.parameter == 'pos_embed'
    assert node.shape == (1, 64, 10, 10)


def test_the_trace_of_a_model_that_timm_builds_for_other_channels():
    graph = timm_graph('resnet18', in_chans=1)
    assert graph.input_size == (1, 224, 224)
    assert graph.nodes[1].shape == (64, 1, 7, 7)
