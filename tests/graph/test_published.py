"""The published rules, one by one, on graphs of a few nodes."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import networkx as nx
import pytest
import timm
import torch
import torchvision
from torch import nn

from timm_ghn import UnsupportedModelError, trace
from timm_ghn.graph import ParameterInfo, Primitive
from timm_ghn.graph.published import (
    Draft,
    Label,
    add_input,
    add_positional_sum,
    connect_swin_stages,
    filter_joins,
    filter_operators,
    insert_weights,
    listing,
    published_draft,
    rotate_squeezenet_head,
    route_values_through_softmax,
)
from timm_ghn.graph.trace import Op, Recording, record
from timm_ghn.graph.vocabulary import operator_primitive, published_primitive

CONV, NORM, LINEAR = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8)


def draft_of(labels: list[str | tuple[str, nn.Module]], edges: str) -> Draft:
    """A draft from labels, outputs first as in a listing, and edges 'a>b>c, d>b'; names must differ."""
    draft = Draft(_label(*((label,) if isinstance(label, str) else label)) for label in labels)
    position = {label.name: x for x, label in enumerate(draft.labels)}
    for path in filter(None, edges.split(',')):
        names = path.strip().split('>')
        for source, target in itertools.pairwise(names):
            draft.connect(position[source], position[target])
    return draft


def _label(name: str, module: nn.Module | None = None) -> Label:
    if module is None:
        return Label(name, primitive=operator_primitive(name.partition('Backward')[0]))
    return Label(name, module, (8, 8), published_primitive(name, module))


def edges_of(draft: Draft) -> set[str]:
    return {f'{draft.name(x)}>{draft.name(s)}' for x in draft.order for s in draft.successors[x]}


def names_of(draft: Draft) -> list[str]:
    return [draft.name(x) for x in draft.order]


def recording_of(ops: list[Op], owners: dict[str, nn.Module]) -> Recording:
    parameters = tuple(ParameterInfo(name, (8, 8), torch.float32, 'torch.nn.Module') for name in owners)
    return Recording(tuple(ops), (0,), parameters, owners, nn.Module(), (3, 8, 8))


# -- drafts


@pytest.mark.parametrize('removed', [{1}, {1, 2}, {2, 1, 3}, {0}, {4}])
def test_contracting_keeps_what_is_reachable_from_what(removed):
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 3), (1, 4)]
    draft = Draft(Label(str(x)) for x in range(5))
    for source, target in edges:
        draft.connect(source, target)
    before = nx.transitive_closure(nx.DiGraph(edges))
    draft.contract(removed)
    assert draft.order == [x for x in range(5) if x not in removed]
    after = nx.DiGraph()
    after.add_nodes_from(draft.order)
    after.add_edges_from((x, s) for x in draft.order for s in draft.successors[x])
    assert set(nx.transitive_closure(after).edges) == set(before.subgraph(draft.order).edges)
    assert all(draft.predecessors[x] == set(after.predecessors(x)) for x in draft.order)


def test_an_edge_from_a_position_to_itself_is_none():
    draft = draft_of(['a', 'b'], 'a>b>a')
    draft.contract({1})
    assert edges_of(draft) == set()


@pytest.mark.parametrize('seed', range(20))
def test_positions_are_sorted_as_networkx_does(seed):
    """The reference sorts with networkx: generation by generation, and within one by when its last input came."""
    rng = random.Random(seed)
    size = rng.randrange(2, 40)
    place = rng.sample(range(size), size)
    draft, graph = Draft(Label(str(x)) for x in range(size)), nx.DiGraph()
    graph.add_nodes_from(range(size))
    pairs = {(rng.randrange(size), rng.randrange(size)) for _ in range(2 * size)}
    for source, target in sorted(pairs):
        if place[source] < place[target]:
            draft.connect(source, target)
            graph.add_edge(source, target)
    assert draft.sort() == list(nx.topological_sort(graph))


def test_a_cycle_cannot_be_sorted():
    assert draft_of(['a', 'b', 'c'], 'a>b>c>b').sort() is None


# -- listing


def test_an_op_is_represented_by_the_parameters_that_it_reads():
    ops = [Op('AddBackward0', (1, 2)), Op('ConvolutionBackward0', (3, 'c.weight', 'c.bias')), Op('ReluBackward0', (1,))]
    ops.append(Op('NativeBatchNormBackward0', ('n.weight', 'n.bias'), reads_image=True))
    draft = listing(recording_of(ops, {'c.weight': CONV, 'c.bias': CONV, 'n.weight': NORM, 'n.bias': NORM}))
    assert names_of(draft) == ['AddBackward0', 'c.weight', 'c.bias', 'ReluBackward0', 'n.weight', 'n.bias']
    assert edges_of(draft) == {
        'n.weight>n.bias',
        'n.bias>c.weight',
        'c.weight>c.bias',
        'c.bias>AddBackward0',
        'c.bias>ReluBackward0',
        'ReluBackward0>AddBackward0',
    }


def test_the_weight_of_a_linear_layer_is_listed_behind_a_transposition_and_feeds_the_bias():
    ops = [Op('AddmmBackward0', ('l.bias', 1, 2)), Op('ReluBackward0', (3,)), Op('TBackward0', ('l.weight',))]
    ops.append(Op('ConvolutionBackward0', ('c.weight',), reads_image=True))
    draft = listing(recording_of(ops, {'l.weight': LINEAR, 'l.bias': LINEAR, 'c.weight': CONV}))
    assert edges_of(draft) == {'c.weight>ReluBackward0', 'ReluBackward0>l.bias', 'l.weight>l.bias'}


def test_what_depends_on_the_image_only_is_not_in_the_listing():
    """The reference has no gradient for its image: a stem's pooling or normalisation does not show."""
    ops = [Op('ConvolutionBackward0', (1, 'c.weight')), Op('MaxPool2DWithIndicesBackward0', (2,))]
    ops.append(Op('MulBackward0', (), reads_image=True))
    assert names_of(listing(recording_of(ops, {'c.weight': CONV}))) == ['c.weight']


def test_dropout_is_a_product_in_the_listing():
    """As in the reference, whose autograd graph is made in training mode."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return nn.functional.dropout(self.conv(x), 0.5, self.training).relu()

    draft = listing(record(Dropping().eval(), input_size=8))
    assert edges_of(draft) == {'conv.weight>conv.bias', 'conv.bias>MulBackward0', 'MulBackward0>ReluBackward0'}


@pytest.mark.parametrize(
    ('op', 'shape'),
    [
        (Op('AvgPool2DBackward0', (1,), kernel_size=(2, 5)), (1, 1, 2, 5)),
        (Op('MaxPool2DWithIndicesBackward0', (1,)), (1, 1, 3, 3)),
        (Op('MeanBackward1', (1,), kernel_size=(2, 2)), None),
    ],
)
def test_a_pooling_node_has_the_shape_of_its_kernel(op, shape):
    ops = [op, Op('ConvolutionBackward0', ('c.weight',), reads_image=True)]
    assert listing(recording_of(ops, {'c.weight': CONV})).labels[0].shape == shape


# -- filter_operators and filter_joins


def test_what_is_not_in_the_vocabulary_is_contracted():
    odd = nn.Conv1d(8, 8, 1)
    draft = draft_of(
        ['ViewBackward0', ('b.weight', CONV), ('odd.weight', odd), ('n.bias', NORM), ('a.weight', CONV)],
        'a.weight>n.bias>odd.weight>b.weight>ViewBackward0',
    )
    filter_operators(draft)
    assert edges_of(draft) == {'a.weight>b.weight'}


def test_the_biases_of_norms_are_contracted_because_the_weights_node_predicts_them():
    draft = draft_of([('n.bias', NORM), ('n.weight', NORM), ('c.bias', CONV)], 'c.bias>n.weight>n.bias')
    filter_operators(draft)
    assert names_of(draft) == ['n.weight', 'c.bias']


def test_a_join_with_one_input_is_contracted():
    """x + 1 adds nothing; x + y does."""
    labels = ['AddBackward0', 'CatBackward0', 'AddBackward1', ('a.weight', CONV), ('b.weight', CONV)]
    draft = draft_of(
        labels, 'a.weight>CatBackward0>AddBackward0, b.weight>CatBackward0, a.weight>AddBackward1>AddBackward0'
    )
    filter_operators(draft)
    assert names_of(draft) == ['AddBackward0', 'CatBackward0', 'a.weight', 'b.weight']


def test_joins_are_judged_by_the_inputs_that_they_had_before_the_filter():
    """Two inputs from one origin become one edge; the second filter sees that, the first does not."""
    draft = draft_of(['AddBackward0', 'ReluBackward0', ('a.weight', CONV)], 'a.weight>ReluBackward0>AddBackward0')
    draft.connect(2, 0)
    filter_operators(draft)
    assert edges_of(draft) == {'a.weight>AddBackward0'}
    filter_joins(draft)
    assert names_of(draft) == ['a.weight']


def squeeze_and_excite(gate: str) -> Draft:
    """A gated convolution between two others, pooled and classified, in the order in which autograd lists it."""
    labels = [('head.bias', LINEAR), 'MeanBackward1', ('b.bias', CONV), ('b.weight', CONV), 'MulBackward0', gate]
    labels += [('se.bias', CONV), ('se.weight', CONV), 'MeanBackward2', ('a.weight', CONV), ('head.weight', LINEAR)]
    return draft_of(
        labels,
        f'a.weight>MeanBackward2>se.weight>se.bias>{gate}>MulBackward0>b.weight>b.bias>MeanBackward1>head.bias,'
        'a.weight>MulBackward0, head.weight>head.bias',
    )


@pytest.mark.parametrize('gate', ['SigmoidBackward0', 'HardsigmoidBackward0'])
def test_the_product_of_squeeze_and_excite_is_kept_and_its_squeeze_is_not(gate):
    draft = squeeze_and_excite(gate)
    filter_operators(draft)
    assert 'MulBackward0' in names_of(draft)
    assert 'MeanBackward2' not in names_of(draft)
    assert {'a.weight>se.weight', 'se.bias>MulBackward0', 'a.weight>MulBackward0'} <= edges_of(draft)


def test_the_pooling_before_the_head_is_kept_in_a_network_with_squeeze_and_excite():
    draft = squeeze_and_excite('SigmoidBackward0')
    filter_operators(draft)
    assert 'b.bias>MeanBackward1' in edges_of(draft)


def test_without_a_sigmoid_no_product_is_a_gate_and_every_mean_is_a_pooling():
    draft = squeeze_and_excite('TanhBackward0')
    filter_operators(draft)
    assert not [name for name in names_of(draft) if name.startswith('Mul')]
    assert [name for name in names_of(draft) if name.startswith('Mean')] == ['MeanBackward1', 'MeanBackward2']


def test_an_unknown_parameter_takes_those_with_it_whose_names_contain_its_own():
    """An accident of the reference, which matches substrings: norm biases in a plain sequence of layers."""
    draft = draft_of(
        [('f.11.bias', CONV), ('f.11.weight', CONV), ('1.bias', NORM), ('1.weight', NORM)],
        '1.weight>1.bias>f.11.weight>f.11.bias',
    )
    filter_operators(draft)
    assert names_of(draft) == ['f.11.weight', '1.weight']


@pytest.mark.parametrize(('name', 'left'), [('w', ['c.bias']), ('gain', ['c.bias', 'c.weight'])])
def test_a_parameter_of_the_model_itself_may_take_every_weight_with_it(name, left):
    """The same accident: its name begins with a dot in the reference, and '.w' is in '.weight'."""
    draft = draft_of([('c.bias', CONV), ('c.weight', CONV), (name, nn.Module())], f'{name}>c.weight>c.bias')
    filter_operators(draft)
    assert names_of(draft) == left


# -- insert_weights


def test_the_weight_of_a_linear_layer_comes_between_its_input_and_its_bias():
    other = nn.Linear(8, 8)
    labels = [('b.bias', other), ('l.bias', LINEAR), ('c.weight', CONV), ('l.weight', LINEAR)]
    draft = draft_of(labels, 'c.weight>l.bias>b.bias, l.weight>l.bias')
    insert_weights(draft)
    assert edges_of(draft) == {'c.weight>l.weight', 'l.weight>l.bias', 'l.bias>b.bias'}


def test_the_weight_of_attention_without_biases_comes_before_the_softmax():
    draft = draft_of(
        ['SoftmaxBackward0', ('norm.weight', nn.LayerNorm(8)), 'AddBackward0', ('qkv.weight', LINEAR)],
        'AddBackward0>norm.weight>SoftmaxBackward0, qkv.weight>SoftmaxBackward0',
    )
    insert_weights(draft)
    assert edges_of(draft) == {'AddBackward0>norm.weight', 'norm.weight>qkv.weight', 'qkv.weight>SoftmaxBackward0'}


def test_a_weight_that_nothing_else_feeds_stays():
    """The first layer has no input yet."""
    draft = draft_of([('l.bias', LINEAR), ('l.weight', LINEAR)], 'l.weight>l.bias')
    insert_weights(draft)
    assert edges_of(draft) == {'l.weight>l.bias'}


def test_a_weight_of_another_layer_is_not_inserted():
    other = nn.Linear(8, 8)
    draft = draft_of([('a.bias', LINEAR), ('b.weight', other), ('c.weight', CONV)], 'c.weight>a.bias, b.weight>a.bias')
    insert_weights(draft)
    assert edges_of(draft) == {'c.weight>a.bias', 'b.weight>a.bias'}


# -- route_values_through_softmax


def test_values_reach_the_output_through_the_softmax_and_not_around_it():
    """The values of a joint projection bypass the softmax: there are two paths from them, so the edge goes."""
    labels = [('proj.weight', LINEAR), 'SoftmaxBackward0', ('qkv.bias', LINEAR)]
    draft = draft_of(labels, 'qkv.bias>SoftmaxBackward0>proj.weight, qkv.bias>proj.weight')
    route_values_through_softmax(draft)
    assert edges_of(draft) == {'qkv.bias>SoftmaxBackward0', 'SoftmaxBackward0>proj.weight'}


def test_values_with_a_projection_of_their_own_are_moved_to_the_softmax():
    labels = [('proj.weight', LINEAR), 'SoftmaxBackward0', ('qk.bias', LINEAR), ('v.bias', LINEAR)]
    draft = draft_of(labels, 'qk.bias>SoftmaxBackward0>proj.weight, v.bias>proj.weight')
    route_values_through_softmax(draft)
    assert edges_of(draft) == {
        'qk.bias>SoftmaxBackward0',
        'v.bias>SoftmaxBackward0',
        'SoftmaxBackward0>proj.weight',
    }


def test_an_edge_that_a_longer_path_bypasses_goes_even_behind_the_softmax():
    labels = ['AddBackward0', ('b.weight', LINEAR), ('a.bias', LINEAR), 'SoftmaxBackward0']
    kept = 'SoftmaxBackward0>a.bias>b.weight>AddBackward0, SoftmaxBackward0>AddBackward0, SoftmaxBackward0>b.weight'
    draft = draft_of(labels, kept + ', a.bias>AddBackward0')
    route_values_through_softmax(draft)
    assert edges_of(draft) == edges_of(draft_of(labels, kept))


def test_a_graph_without_attention_is_left_alone():
    draft = draft_of([('b.weight', CONV), ('a.weight', CONV)], 'a.weight>b.weight')
    route_values_through_softmax(draft)
    assert edges_of(draft) == {'a.weight>b.weight'}


# -- input, order and single networks


def test_the_image_feeds_the_weights_that_have_no_input():
    draft = draft_of([('b.weight', CONV), ('a.weight', CONV), ('a.bias', CONV), ('p', CONV)], 'a.weight>a.bias')
    add_input(draft)
    assert edges_of(draft) == {'a.weight>a.bias', 'input>a.weight', 'input>b.weight'}
    assert names_of(draft)[-1] == 'input'


def encoder() -> nn.Module:
    with torch.device('meta'):
        return torchvision.models.vit_b_16().encoder


def test_a_positional_encoding_is_added_in_a_sum_of_its_own():
    draft = draft_of([('ln.weight', NORM), ('e.pos_embedding', encoder()), ('c.bias', CONV)], 'c.bias>e.pos_embedding')
    draft.connect(1, 0)
    order = add_positional_sum(draft, [2, 1, 0])
    assert [draft.name(x) for x in order] == ['c.bias', 'e.pos_embedding', 'PositionalAdd', 'ln.weight']
    assert edges_of(draft) == {'c.bias>PositionalAdd', 'e.pos_embedding>PositionalAdd', 'PositionalAdd>ln.weight'}
    assert draft.labels[order[2]].primitive is Primitive.SUM


def test_an_embedding_reads_its_tokens_and_is_added_to_nothing():
    draft = draft_of([('ln.weight', NORM), ('e.weight', nn.Embedding(3, 8))], 'e.weight>ln.weight')
    assert add_positional_sum(draft, [1, 0]) == [1, 0]


def test_squeezenet_pools_before_it_classifies():
    with torch.device('meta'):
        model = torchvision.models.squeezenet1_1()
    draft = draft_of(
        ['MeanBackward1', ('classifier.1.bias', CONV), ('classifier.1.weight', CONV)],
        'classifier.1.weight>classifier.1.bias>MeanBackward1',
    )
    order = [2, 1, 0]
    rotate_squeezenet_head(draft, order, nn.Module())
    assert [draft.name(x) for x in order][-1] == 'MeanBackward1'
    rotate_squeezenet_head(draft, order, model)
    assert [draft.name(x) for x in order] == ['MeanBackward1', 'classifier.1.weight', 'classifier.1.bias']
    assert edges_of(draft) == {'MeanBackward1>classifier.1.weight', 'classifier.1.weight>classifier.1.bias'}


def test_the_stages_of_torchvisions_swin_are_joined_by_the_reduction():
    with torch.device('meta'):
        model = torchvision.models.swin_t()
    norm = nn.LayerNorm(8)
    labels = ['AddBackward0', ('1.attn.proj.bias', LINEAR), ('1.norm1.weight', norm), ('0.reduction.weight', LINEAR)]
    labels.append(('0.norm.weight', norm))
    edges = '0.norm.weight>1.norm1.weight>1.attn.proj.bias>AddBackward0, 0.norm.weight>AddBackward0'
    other = draft_of(labels, edges)
    connect_swin_stages(other, nn.Module())
    assert '0.norm.weight>AddBackward0' in edges_of(other)
    draft = draft_of(labels, edges)
    connect_swin_stages(draft, model)
    assert edges_of(draft) == {
        '0.norm.weight>0.reduction.weight',
        '1.norm1.weight>1.attn.proj.bias',
        '1.attn.proj.bias>AddBackward0',
    }


def test_the_residual_of_torchvisions_swin_does_not_end_in_the_reduction():
    with torch.device('meta'):
        model = torchvision.models.swin_t()
    draft = draft_of(
        ['AddBackward0', ('1.reduction.weight', LINEAR), ('1.attn.proj.bias', LINEAR)],
        '1.attn.proj.bias>1.reduction.weight>AddBackward0',
    )
    connect_swin_stages(draft, model)
    assert edges_of(draft) == {'1.attn.proj.bias>AddBackward0', '1.reduction.weight>AddBackward0'}


def test_a_layer_that_is_used_behind_itself_has_no_published_graph():
    ops = [Op('ConvolutionBackward0', (1, 'a.weight')), Op('ConvolutionBackward0', (2, 'b.weight'))]
    ops.append(Op('ConvolutionBackward0', ('a.weight',), reads_image=True))
    with pytest.raises(UnsupportedModelError, match='used again behind itself'):
        published_draft(recording_of(ops, {'a.weight': CONV, 'b.weight': nn.Conv2d(8, 3, 3)}))


# -- reference chains


def chain(model: nn.Module, first: str, last: str) -> list[str]:
    """Labels from one node to another, in the order of the graph; softmax has several names."""
    labels = ['softmax' if node.primitive is Primitive.MSA else node.label for node in trace(model).nodes]
    return labels[labels.index(first) : labels.index(last) + 1]


def test_the_chain_of_a_transformer_block():
    with torch.device('meta'):
        model = torchvision.models.vit_b_32()
    layer = 'encoder.layers.encoder_layer_3'
    found = chain(model, f'{layer}.ln_1.weight', f'{layer}.mlp.3.bias')
    assert found == [
        f'{layer}.ln_1.weight',
        f'{layer}.self_attention.in_proj_weight',
        f'{layer}.self_attention.in_proj_bias',
        'softmax',
        f'{layer}.self_attention.out_proj.weight',
        f'{layer}.self_attention.out_proj.bias',
        'AddBackward0',
        f'{layer}.ln_2.weight',
        f'{layer}.mlp.0.weight',
        f'{layer}.mlp.0.bias',
        f'{layer}.mlp.3.weight',
        f'{layer}.mlp.3.bias',
    ]


@pytest.mark.parametrize(
    ('name', 'nodes'),
    [
        ('resnet18', 53),
        ('resnet50', 127),
        ('squeezenet1_1', 65),
        ('vit_b_16', 164),
        ('convnext_base', 305),
        ('efficientnet_b0', 191),
    ],
)
def test_the_published_sizes_of_graphs(name, nodes):
    with torch.device('meta'):
        model = torchvision.models.get_model(name, weights=None)
    assert len(trace(model)) == nodes


def test_a_dropout_that_the_reference_takes_for_a_gate_is_a_gate():
    """In timm's legacy_seresnet18, by its place in the list; facts of the reference's own graph."""
    with torch.device('meta'):
        graph = trace(timm.create_model('legacy_seresnet18'), rules='published')
    counts = Counter(node.primitive.label for node in graph.nodes)
    assert counts == {
        'conv': 37,
        'bn': 20,
        'bias': 17,
        'cse': 9,
        'sum': 8,
        'input': 1,
        'max_pool': 1,
    }
    assert len(graph.edges_E2) == 108
    assert [node.label for node in graph.nodes[-4:]] == [
        'AddBackward0',
        'MulBackward0',
        'last_linear.weight',
        'last_linear.bias',
    ]
    assert graph.edges_E2[-3:].tolist() == [[89, 90], [90, 91], [91, 92]]
