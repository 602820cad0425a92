"""The published rules, one by one on graphs of a few nodes, and facts of the reference's own graphs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from isomorphism import counts
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


@functools.cache
def build(name: str) -> nn.Module:
    with torch.device('meta'):
        return torchvision.models.get_model(name, weights=None)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    'conv': lambda: nn.Conv2d(3, 8, 3),
    'oned': lambda: nn.Conv1d(8, 8, 1),
    'norm': lambda: nn.BatchNorm2d(8),
    'ln': lambda: nn.LayerNorm(8),
    'embedding': lambda: nn.Embedding(3, 8),
    'encoder': lambda: build('vit_b_16').encoder,
    'linear': lambda: nn.Linear(8, 8),
}


def layer_of(path: str) -> nn.Module:
    """A layer of the kind that its path names, else a linear one."""
    kinds = [part.strip('0123456789') for part in path.split('.')]
    return LAYERS[next((kind for kind in kinds if kind in LAYERS), 'linear')]() if path else nn.Module()


def full(name: str) -> str:
    """'Add' -> 'AddBackward0'; parameters have lower-case names."""
    return f'{name}Backward0' if name[0].isupper() and 'Backward' not in name else name


def draft_of(names: str, edges: str) -> Draft:
    """A draft from names, outputs first as in a listing, and edges 'a>b>c, d>b'."""
    layers: dict[str, nn.Module] = {}
    labels = []
    for name in map(full, names.split()):
        if 'Backward' in name:
            labels.append(Label(name, primitive=operator_primitive(name.partition('Backward')[0])))
            continue
        path = name.rpartition('.')[0]
        layer = layers.setdefault(path, layer_of(path))
        labels.append(Label(name, layer, (8, 8), published_primitive(name, layer)))
    draft, position = Draft(labels), {label.name: x for x, label in enumerate(labels)}
    for path in edges.split(', '):
        for source, target in itertools.pairwise(map(full, path.split('>'))):
            draft.connect(position[source], position[target])
    return draft


def found_in(draft: Draft) -> tuple[set[str], set[str]]:
    """Names and edges of a draft."""
    edges = {f'{draft.name(x)}>{draft.name(s)}' for x in draft.order for s in draft.successors[x]}
    return {draft.name(x) for x in draft.order}, edges


def expected_from(edges: str) -> tuple[set[str], set[str]]:
    paths = [[full(name) for name in path.split('>')] for path in edges.split(', ')]
    return set(itertools.chain(*paths)), {f'{u}>{v}' for path in paths for u, v in itertools.pairwise(path)}


# -- listing


def recording_of(*ops: Op) -> Recording:
    names = dict.fromkeys(item for op in ops for item in op.inputs if isinstance(item, str))
    layers = {path: layer_of(path) for path in (name.rpartition('.')[0] for name in names)}
    parameters = tuple(ParameterInfo(name, (8, 8), torch.float32, 'torch.nn.Module') for name in names)
    owners = {name: layers[name.rpartition('.')[0]] for name in names}
    return Recording(ops, (0,), parameters, owners, {}, nn.Module(), (3, 8, 8))


@pytest.mark.parametrize(
    ('ops', 'expected'),
    [
        (
            [
                Op('AddBackward0', (1, 2)),
                Op('ConvolutionBackward0', (3, 'conv.weight', 'conv.bias')),
                Op('ReluBackward0', (1,)),
                Op('NativeBatchNormBackward0', ('norm.weight', 'norm.bias'), reads_image=True),
            ],
            'norm.weight>norm.bias>conv.weight>conv.bias>Relu>Add, conv.bias>Add',
        ),
        (
            [
                Op('AddmmBackward0', ('l.bias', 1, 2)),
                Op('ReluBackward0', (3,)),
                Op('TBackward0', ('l.weight',)),
                Op('ConvolutionBackward0', ('conv.weight',), reads_image=True),
            ],
            'conv.weight>Relu>l.bias, l.weight>l.bias',
        ),
        (
            [
                Op('ConvolutionBackward0', (1, 'conv.weight')),
                Op('MaxPool2DWithIndicesBackward0', (2,)),
                Op('MulBackward0', (), reads_image=True),
            ],
            'conv.weight',
        ),
    ],
    ids=['parameters stand for the op that reads them', 'a linear weight feeds the bias', 'only above parameters'],
)
def test_the_listing_of_ops(ops, expected):
    assert found_in(listing(recording_of(*ops))) == expected_from(expected)


def test_dropout_is_a_product_in_the_listing():
    """As in the reference, whose autograd graph is made in training mode."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.ReLU()).eval()
    assert found_in(listing(record(model, input_size=8)))[1] == {
        '0.weight>0.bias',
        '0.bias>MulBackward0',
        'MulBackward0>ReluBackward0',
    }


# -- rules


#: A gated convolution between two others, pooled and classified, in the order in which autograd lists it.
GATED = 'head.bias MeanBackward1 conv2.bias conv2.weight Mul GATE convse.bias convse.weight MeanBackward2 conv1.weight '
GATED += 'head.weight'
GATED_EDGES = (
    'conv1.weight>MeanBackward2>convse.weight>convse.bias>GATE>Mul>conv2.weight>conv2.bias>MeanBackward1>head.bias, '
    'conv1.weight>Mul, head.weight>head.bias'
)
GATE_KEPT = (
    'conv1.weight>convse.weight>convse.bias>Mul>conv2.weight>conv2.bias>MeanBackward1>head.bias, conv1.weight>Mul, '
    'head.weight>head.bias'
)
SWIN = 'Add 1.attn.proj.bias 1.norm1.weight 0.reduction.weight 0.norm.weight'
SWIN_EDGES = '0.norm.weight>1.norm1.weight>1.attn.proj.bias>Add, 0.norm.weight>Add'


def swin(draft: Draft) -> None:
    connect_swin_stages(draft, build('swin_t'))


RULES: dict[str, tuple[Callable[[Draft], None], str, str, str]] = {
    'contracting a cycle leaves no edge from a node to itself': (
        lambda draft: draft.contract({1}), 'a.weight b.weight', 'a.weight>b.weight>a.weight', 'a.weight'),
    'unknown operators and layers are contracted': (
        filter_operators, 'View conv2.weight oned.weight norm.bias conv1.weight',
        'conv1.weight>norm.bias>oned.weight>conv2.weight>View', 'conv1.weight>conv2.weight'),
    'biases of norms are contracted, since the weights predict them': (
        filter_operators, 'norm.bias norm.weight conv.bias', 'conv.bias>norm.weight>norm.bias',
        'conv.bias>norm.weight'),
    'a join of one input is contracted': (
        filter_operators, 'Add Cat AddBackward1 conv1.weight conv2.weight',
        'conv1.weight>Cat>Add, conv2.weight>Cat, conv1.weight>AddBackward1>Add',
        'conv1.weight>Cat>Add, conv2.weight>Cat, conv1.weight>Add'),
    'and again afterwards': (filter_joins, 'Add conv.weight', 'conv.weight>Add', 'conv.weight'),
    **{
        f'squeeze and excite with {gate} keeps its product, not its squeeze': (
            filter_operators,
            GATED.replace('GATE', gate),
            GATED_EDGES.replace('GATE', gate),
            GATE_KEPT,
        )
        for gate in ('Sigmoid', 'Hardsigmoid')
    },
    'without a sigmoid no product is a gate and every mean a pooling': (
        filter_operators, GATED.replace('GATE', 'Tanh'), GATED_EDGES.replace('GATE', 'Tanh'),
        'conv1.weight>MeanBackward2>convse.weight>convse.bias>conv2.weight>conv2.bias>MeanBackward1>head.bias, '
        'conv1.weight>conv2.weight, head.weight>head.bias'),
    # An accident of the reference, which matches substrings.
    'an unknown parameter takes along those whose names contain its own': (
        filter_operators, 'conv.1norm.bias conv.1norm.weight norm.bias norm.weight',
        'norm.weight>norm.bias>conv.1norm.weight>conv.1norm.bias', 'norm.weight>conv.1norm.weight'),
    # The same: its name begins with a dot in the reference, and '.w' is in '.weight'.
    'a parameter of the model itself takes every weight along': (
        filter_operators, 'conv.bias conv.weight w', 'w>conv.weight>conv.bias', 'conv.bias'),
    'a linear weight comes between its input and its bias': (
        insert_weights, 'other.bias l.bias conv.weight l.weight', 'conv.weight>l.bias>other.bias, l.weight>l.bias',
        'conv.weight>l.weight>l.bias>other.bias'),
    'the weight of attention without biases comes before the softmax': (
        insert_weights, 'Softmax ln.weight Add qkv.weight', 'Add>ln.weight>Softmax, qkv.weight>Softmax',
        'Add>ln.weight>qkv.weight>Softmax'),
    'a weight of another layer is not inserted': (
        insert_weights, 'a.bias b.weight conv.weight', 'conv.weight>a.bias, b.weight>a.bias',
        'conv.weight>a.bias, b.weight>a.bias'),
    'values of a joint projection go through the softmax only': (
        route_values_through_softmax, 'proj.weight Softmax qkv.bias',
        'qkv.bias>Softmax>proj.weight, qkv.bias>proj.weight', 'qkv.bias>Softmax>proj.weight'),
    'values of their own projection are moved to the softmax': (
        route_values_through_softmax, 'proj.weight Softmax qk.bias v.bias',
        'qk.bias>Softmax>proj.weight, v.bias>proj.weight', 'qk.bias>Softmax>proj.weight, v.bias>Softmax'),
    'an edge that a longer path bypasses goes even behind the softmax': (
        route_values_through_softmax, 'Add b.weight a.bias Softmax',
        'Softmax>a.bias>b.weight>Add, Softmax>Add, Softmax>b.weight, a.bias>Add',
        'Softmax>a.bias>b.weight>Add, Softmax>Add, Softmax>b.weight'),
    'the image feeds the weights that have no input': (
        add_input, 'conv2.weight conv1.weight conv1.bias p', 'conv1.weight>conv1.bias',
        'input>conv1.weight>conv1.bias, input>conv2.weight, p'),
    "the stages of torchvision's Swin are joined by the reduction": (
        swin, SWIN, SWIN_EDGES, '0.norm.weight>0.reduction.weight, 1.norm1.weight>1.attn.proj.bias>Add'),
    'those of another class are not': (
        lambda draft: connect_swin_stages(draft, nn.Module()), SWIN, SWIN_EDGES, f'{SWIN_EDGES}, 0.reduction.weight'),
    "the residual of torchvision's Swin does not end in the reduction": (
        swin, 'Add 1.reduction.weight 1.attn.proj.bias', '1.attn.proj.bias>1.reduction.weight>Add',
        '1.attn.proj.bias>Add, 1.reduction.weight>Add'),
}  # fmt: skip


@pytest.mark.parametrize('law', RULES)
def test_a_rule_rewrites_a_draft(law):
    rule, names, edges, expected = RULES[law]
    draft = draft_of(names, edges)
    rule(draft)
    assert found_in(draft) == expected_from(expected)


def test_a_positional_encoding_is_added_in_a_sum_of_its_own():
    draft = draft_of('ln.weight encoder.pos_embedding conv.bias', 'conv.bias>encoder.pos_embedding>ln.weight')
    order = add_positional_sum(draft, [2, 1, 0])
    assert [draft.name(x) for x in order] == ['conv.bias', 'encoder.pos_embedding', 'PositionalAdd', 'ln.weight']
    edges = {'conv.bias>PositionalAdd', 'encoder.pos_embedding>PositionalAdd', 'PositionalAdd>ln.weight'}
    assert found_in(draft)[1] == edges
    assert draft.labels[order[2]].primitive is Primitive.SUM
    embedded = draft_of('ln.weight embedding.weight', 'embedding.weight>ln.weight')
    assert add_positional_sum(embedded, [1, 0]) == [1, 0], 'an embedding reads its tokens and is added to nothing'


def test_squeezenet_pools_before_it_classifies():
    names = ['classifier.1conv.weight', 'classifier.1conv.bias', 'MeanBackward1']
    draft, order = draft_of(' '.join(names[::-1]), '>'.join(names)), [2, 1, 0]
    rotate_squeezenet_head(draft, order, nn.Module())
    assert [draft.name(x) for x in order] == names
    rotate_squeezenet_head(draft, order, build('squeezenet1_1'))
    assert [draft.name(x) for x in order] == [names[2], *names[:2]]


def test_a_layer_that_is_used_behind_itself_has_no_published_graph():
    ops = [Op('ConvolutionBackward0', (1, 'conv1.weight')), Op('ConvolutionBackward0', (2, 'conv2.weight'))]
    ops.append(Op('ConvolutionBackward0', ('conv1.weight',), reads_image=True))
    with pytest.raises(UnsupportedModelError, match='used again behind itself'):
        published_draft(recording_of(*ops))


# -- facts of the reference's graphs


@pytest.mark.parametrize(
    ('name', 'nodes'), [('squeezenet1_1', 65), ('vit_b_16', 164), ('convnext_base', 305), ('efficientnet_b0', 191)]
)
def test_the_published_sizes_of_graphs(name, nodes):
    assert len(trace(build(name))) == nodes


def test_a_dropout_that_the_reference_takes_for_a_gate_is_a_gate():
    """In timm's legacy_seresnet18, by its place in the list."""
    with torch.device('meta'):
        graph = trace(timm.create_model('legacy_seresnet18'), rules='published')
    assert counts(graph)[Primitive.CSE] == 9
    ends = ['AddBackward0', 'MulBackward0', 'last_linear.weight', 'last_linear.bias']
    assert [node.label for node in graph.nodes[-4:]] == ends
    assert graph.edges_E2[-3:].tolist() == [[89, 90], [90, 91], [91, 92]]
