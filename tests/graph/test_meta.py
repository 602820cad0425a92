"""Borrowing a network for a pass on the meta device, and what stands in for slow or hidden functions there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from timm_ghn import UnsupportedModelError, trace
from timm_ghn.graph.meta import MetaMode, on_meta
from timm_ghn.graph.trace import record


def labels(graph):
    return [node.label for node in graph.nodes]


class Caching(nn.Module):
    """Keeps things outside of its parameters and buffers, and changes them in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.grid = torch.ones(4, 1, 1)  # neither a parameter nor a buffer
        self.cache: dict[str, torch.Tensor] = {}
        self.calls: list[int] = []
        self.last = None

    def forward(self, x):
        x = self.conv(x) * self.grid
        self.cache['x'] = x
        self.calls.append(1)
        self.last = x
        return x.mean((2, 3))


def test_what_a_forward_pass_stores_is_taken_back():
    model = Caching()
    cache, calls = model.cache, model.calls
    trace(model)
    assert model.last is None
    assert model.cache is cache
    assert model.calls is calls
    assert not cache
    assert not calls


def test_a_network_is_given_back_when_its_forward_pass_fails():
    class Failing(Caching):
        def forward(self, x):
            super().forward(x)
            raise ValueError('no')

    model = Failing().eval()
    before = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match='ValueError: no'):
        trace(model)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert not model.training
    assert model.last is None


def test_tied_parameters_have_one_stand_in():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with on_meta(list(model.modules()), {id(model[0].weight): '0.weight'}) as names:
        assert model[0].weight is model[1].weight
        assert names == {id(model[0].weight): '0.weight'}
    assert model[0].weight.device.type == 'cpu'


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(8), nn.LayerNorm(8)], ids=lambda norm: type(norm).__name__)
def test_stand_ins_check_shapes_as_pytorch_does(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    with pytest.raises(UnsupportedModelError, match=r"module '1' .* expected .*"):
        trace(model)


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(('layers', 'both'), [(1, False), (2, True)])
@pytest.mark.parametrize('batch_first', [False, True])
def test_a_recurrent_layer_has_each_weight_once_whatever_the_length(kind, layers, both, batch_first):
    size = {'num_layers': layers, 'bidirectional': both, 'batch_first': batch_first}
    real = kind(3, 5, **size)
    with torch.no_grad():
        sequence, states = real(torch.zeros(2, 16, 3))
    expected = sequence.shape, (states[0] if isinstance(states, tuple) else states).shape

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(3, 5, **size)
            self.head = nn.Linear(10 if both else 5, 2)

        def forward(self, x):
            sequence, states = self.rnn(x.flatten(2).transpose(1, 2))
            last = states[0] if isinstance(states, tuple) else states
            if x.shape[-1] == 4:
                assert (sequence.shape, last.shape) == expected
            return self.head(sequence.mean(1))

    graphs = [trace(Reader(), input_size=size, rules='operators') for size in (4, 6)]
    assert labels(graphs[0]) == labels(graphs[1])
    weights = [name for name, _ in Reader().rnn.named_parameters(prefix='rnn')]
    assert sorted(label for label in labels(graphs[0]) if label.startswith('rnn.')) == sorted(weights)


def test_tensors_made_in_the_forward_pass_meet_the_stand_ins():
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(5, 4, 1)

        def forward(self, x):
            ramp = torch.linspace(0, 1, x.shape[-1], device='cpu').expand(x.shape[0], 1, x.shape[2], -1)
            noise = torch.zeros(x.shape[0], 1, *x.shape[2:])
            return self.conv(torch.cat((x, ramp.to(x.device), noise.cpu()), 1)).mean((2, 3))

    graph = trace(Grid(), input_size=(3, 8, 8))
    assert 'conv.weight' in labels(graph)


def test_attention_is_plain_with_its_learned_mask():
    mode = MetaMode()
    q = torch.empty(2, 2, 4, 8, device='meta', requires_grad=True)
    mask = torch.empty(2, 4, 4, device='meta', requires_grad=True)
    with mode:
        out = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    kinds = set()
    stack = [out.grad_fn]
    while stack:
        function = stack.pop()
        kinds.add(type(function).__name__.partition('Backward')[0])
        stack += [child for child, _ in function.next_functions if child is not None]
    assert {'Bmm', 'Softmax', 'Add'} <= kinds
    assert out.shape == q.shape


@pytest.mark.parametrize('p', [0.0, 0.5])
def test_a_dropout_that_does_not_look_like_a_gate_is_not_in_the_graph(p):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.reduce = nn.Conv2d(8, 8, 1)
            self.drop = nn.Dropout(p)
            self.last = nn.Conv2d(8, 8, 1)
            self.classifier = nn.Linear(8, 2)

        def forward(self, x):
            x = self.conv(x)
            gate = self.reduce(x.mean((2, 3), keepdim=True)).sigmoid()
            return self.classifier(self.drop(self.last(self.drop(gate * x))).mean((2, 3)))

    assert labels(trace(Gated())) == [
        'input',
        'conv.weight',
        'conv.bias',
        'reduce.weight',
        'reduce.bias',
        'MulBackward0',
        'last.weight',
        'last.bias',
        'MeanBackward1',
        'classifier.weight',
        'classifier.bias',
    ]


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_scripted_networks_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedModelError, match='before scripting'):
        record(torch.jit.script(nn.Sequential(nn.Linear(3, 3))))


CASTS = {
    'half': lambda x: x.half(),
    'bfloat16': lambda x: x.bfloat16(),
    'double': lambda x: x.double(),
    'float': lambda x: x.float(),
    'to a type': lambda x: x.to(torch.bfloat16),
    'to a named type': lambda x: x.to(dtype=torch.float16),
    'to a device and a type': lambda x: x.to('cpu', torch.float16),
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
    """All that is floating-point is float32 in a trace: half precision met stand-ins of another type."""

    class Net(nn.Module):
        def __init__(self, compute):
            super().__init__()
            self.a, self.b, self.compute = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), compute

        def forward(self, x):
            return self.b(self.compute(self.a(x))).mean((2, 3))

    plain = trace(Net(lambda x: x), input_size=8)
    assert labels(trace(Net(CASTS[cast]), input_size=8)) == labels(plain)


def test_layers_that_are_cast_in_the_forward_pass_keep_their_type():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x):
            return self.b.half()(self.a.bfloat16()(x.bfloat16()).mean((2, 3)).half())

    model = Net()
    assert labels(trace(model, input_size=8))[-2:] == ['b.weight', 'b.bias']
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
