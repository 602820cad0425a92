"""A network on the meta device, and what takes the place of slow or hidden functions there."""

from __future__ import annotations

import itertools

import pytest
import torch
from isomorphism import Net, counts, labels
from torch import nn

from timm_ghn import UnsupportedModelError, trace
from timm_ghn.graph import Primitive
from timm_ghn.graph.trace import record


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(8), nn.LayerNorm(8)], ids=lambda norm: type(norm).__name__)
def test_stand_ins_check_shapes_as_pytorch_does(norm):
    with pytest.raises(UnsupportedModelError, match=r"module '1' .* (?:expected|should contain) .*"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1), norm))


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_has_each_weight_once_whatever_the_length(kind):
    """And gives tensors of the right shape."""
    for layers, both, batch_first in itertools.product((1, 2), (False, True), (False, True)):
        rnn = kind(3, 5, num_layers=layers, bidirectional=both, batch_first=batch_first)
        shapes = []

        def compute(net, x, shapes=shapes):
            sequence, states = net.rnn(x.flatten(2).transpose(1, 2))
            shapes.append((sequence.shape, (states[0] if isinstance(states, tuple) else states).shape))
            return net.head(sequence.mean(1))

        model = Net(compute, rnn=rnn, head=nn.Linear(10 if both else 5, 2))
        first, second = (trace(model, input_size=size, rules='operators') for size in (4, 6))
        assert labels(first) == labels(second)
        weights = [name for name, _ in rnn.named_parameters(prefix='rnn')]
        assert sorted(label for label in labels(first) if label.startswith('rnn.')) == sorted(weights)
        with torch.no_grad():
            model(torch.zeros(2, 3, 4, 4))
        assert shapes[0] == shapes[-1]


def test_tensors_made_in_the_forward_pass_meet_those_of_the_network():
    def compute(net, x):
        ramp = torch.linspace(0, 1, x.shape[-1], device='cpu').expand(x.shape[0], 1, x.shape[2], -1)
        noise = torch.zeros(x.shape[0], 1, *x.shape[2:])
        return net.conv(torch.cat((x, ramp.to(x.device), noise.cpu()), 1)).mean((2, 3))

    assert 'conv.weight' in labels(trace(Net(compute, conv=nn.Conv2d(5, 4, 1)), input_size=(3, 8, 8)))


def test_attention_with_a_learned_mask_is_written_out():
    def compute(net, x):
        x = net.stem(x).flatten(2).transpose(1, 2)
        return net.head(nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=net.mask(x)))

    graph = trace(Net(compute, stem=nn.Conv2d(3, 8, 1), mask=nn.Linear(8, 16), head=nn.Linear(8, 2)), input_size=4)
    assert counts(graph)[Primitive.MSA] == 1
    assert 'mask.weight' in labels(graph)


@pytest.mark.parametrize('p', [0.0, 0.5])
def test_a_dropout_that_does_not_look_like_a_gate_is_not_in_the_graph(p):
    def compute(net, x):
        x = net.conv(x)
        gate = net.reduce(x.mean((2, 3), keepdim=True)).sigmoid()
        return net.classifier(net.drop(net.last(net.drop(gate * x))).mean((2, 3)))

    layers = {'conv': nn.Conv2d(3, 8, 3), 'reduce': nn.Conv2d(8, 8, 1), 'drop': nn.Dropout(p)}
    graph = trace(Net(compute, **layers, last=nn.Conv2d(8, 8, 1), classifier=nn.Linear(8, 2)))
    assert [label for label in labels(graph) if not label.endswith('bias')] == [
        'input', 'conv.weight', 'reduce.weight', 'cse', 'last.weight', 'glob_avg', 'classifier.weight',
    ]  # fmt: skip


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_scripted_networks_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedModelError, match='before scripting'):
        record(torch.jit.script(nn.Sequential(nn.Linear(3, 3))))


CASTS = {
    'half': lambda x: x.half(),
    'to a device and a type': lambda x: x.to('cpu', torch.float16),
    'to a named type': lambda x: x.to(dtype=torch.float16),
    'to the type of another': lambda x: x.to(torch.zeros(1).half()),
    'type': lambda x: x.type(torch.float16),
    'type by name': lambda x: x.type('torch.cuda.HalfTensor'),
    'type by class': lambda x: x.type(torch.DoubleTensor),
    'type as': lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    'with a mask': lambda x: x * torch.ones(8, 1, 1, dtype=torch.float16),
    'integers and back': lambda x: x + x.long().double(),
}


@pytest.mark.parametrize('cast', CASTS)
def test_casts_between_floating_point_types_leave_no_trace(cast):
    """All that is floating-point is float32 in a trace: half precision met tensors of another type."""
    model = Net(
        lambda net, x: net.b.half()(CASTS[cast](net.a.bfloat16()(x.bfloat16()))).mean((2, 3)),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(8, 10, 1),
    )
    expected = ['input', 'a.weight', 'a.bias', 'b.weight', 'b.bias', 'glob_avg']
    assert labels(trace(model, input_size=8)) == expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
