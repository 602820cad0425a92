"""A trace reads a network without computing anything and without leaving anything behind."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from isomorphism import Net, equal, labels, zeros
from networks import NETWORKS, SIZE, plain
from torch import Tensor, nn
from torch.utils import checkpoint

from timm_ghn import Graph, UnsupportedModelError, trace
from timm_ghn.graph.checks import flaws_of
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record, resolve_input_size


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that can be seen of a model: values, identities, flags and attributes, down to nested containers."""
    return {name: _frozen(module.__dict__) for name, module in model.named_modules()}


def _frozen(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, Tensor):
        numbers = None if value.is_meta else value.detach().reshape(-1).contiguous().view(torch.uint8).tolist()
        return id(value), value.dtype, value.shape, value.device, value.requires_grad, numbers
    if isinstance(value, dict):
        return id(value), [(key, _frozen(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [_frozen(item) for item in value]
    return id(value), repr(value) if isinstance(value, (int, float, str, bool)) else None


def random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('rules', ['auto', 'operators'])
def test_a_trace_leaves_nothing_behind_and_its_graph_is_sound(name, rules):
    """Whatever the mode and the device of the model."""
    case = NETWORKS[name]()
    before = state_of(case.model), random_states()
    graph = trace(case.model, rules=rules, **case.options)
    assert (state_of(case.model), random_states()) == before
    check_graph(graph, case.model)
    if (name, rules) != ('tokens', 'operators'):  # integer tokens have no gradient, so that they cannot be followed
        assert flaws_of(graph, Flow.of(record(case.model, **case.options))) == []
    assert equal(trace(case.model.eval(), rules=rules, **case.options), graph)
    with torch.device('meta'):
        on_meta = NETWORKS[name]()
    assert equal(trace(on_meta.model, rules=rules, **on_meta.options), graph)


def check_graph(graph: Graph, model: nn.Module) -> None:
    """Laws that hold for the graph of any network that is not one of the few cyclic published ones."""
    source, target = graph.edges_E2.T
    assert graph.is_acyclic
    assert bool((source < target).all()), 'listed in a topological order'
    assert len(set(map(tuple, graph.edges_E2.tolist()))) == len(graph.edges_E2), 'no edge twice'
    assert graph.nodes[graph.start].label == 'input'
    assert [info.name for info in graph.parameters] == [name for name, _ in model.named_parameters()]
    for info, parameter in zip(graph.parameters, model.parameters(), strict=True):
        assert (info.shape, info.dtype) == (tuple(parameter.shape), parameter.dtype)
        assert (info.name in graph.node_of) != (info.name in graph.kept), 'predicted or kept, for a reason'
    assert all(graph.kept.values())
    heads = {*graph.class_weights, *graph.class_biases}
    assert heads <= set(graph.classifier)
    assert heads <= set(graph.node_of)


@pytest.mark.parametrize('name', timm.list_models('test_*'))
def test_timms_test_networks_can_be_traced(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    graph = trace(model)
    check_graph(graph, model)
    assert graph.num_classes == model.num_classes
    assert len(graph.kept) < 0.5 * len(graph.parameters)


def test_the_comparison_of_states_sees_changes():
    model = NETWORKS['remembering']().model
    before = state_of(model)
    for change in (
        lambda: model.norm.running_mean.add_(1),
        lambda: model.norm.eval(),
        lambda: model.conv.weight.requires_grad_(False),
        lambda: model.nested['seen']['widths'].append(1),
    ):
        change()
        assert state_of(model) != before
        before = state_of(model)


def test_a_failing_forward_pass_leaves_nothing_behind_either():
    case = NETWORKS['remembering']()

    def fail(_module: nn.Module, _args: Any) -> None:
        raise KeyError('no')

    case.model.head.register_forward_pre_hook(fail)
    before = state_of(case.model), random_states()
    with pytest.raises(UnsupportedModelError, match=r"module 'head' \(Linear\).*KeyError"):
        trace(case.model, **case.options)
    assert (state_of(case.model), random_states()) == before


def test_one_network_is_traced_at_a_time():
    """A trace changes the model, the process's random generators and its default dtype until it is done."""
    barrier = threading.Barrier(2)

    def compute(net: Net, x: Tensor) -> Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=0.3)
            raise AssertionError('two threads are in a trace')
        return net.layer(x)

    model = Net(compute, layer=nn.Conv2d(3, 3, 1))
    before = state_of(model), random_states()
    with ThreadPoolExecutor(2) as pool:
        graphs = list(pool.map(lambda _: trace(model, input_size=SIZE), range(2)))
    assert equal(*graphs)
    assert (state_of(model), random_states()) == before


# -- what a graph does not depend on


def test_a_graph_depends_on_the_network_only():
    """Not on requires_grad, mode, dtype and hooks."""
    expected = trace(plain(), input_size=SIZE)
    for name in ('frozen', 'partly in eval mode', 'mixed dtypes', 'double', 'hooked'):
        found = trace(NETWORKS[name]().model, input_size=SIZE)
        assert found.nodes == expected.nodes, name
        assert torch.equal(found.edges_E2, expected.edges_E2), name


def test_a_graph_does_not_depend_on_the_context():
    model = timm.create_model('test_vit')
    expected = trace(model)
    autocast = torch.autocast('cpu', dtype=torch.bfloat16)
    for context in (torch.no_grad(), torch.inference_mode(), autocast, torch.device('meta')):
        with context:
            assert equal(trace(model), expected), context
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(trace(model), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'eva02_tiny_patch14_224', 'nextvit_small'])
def test_a_graph_does_not_depend_on_gradient_checkpointing(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    expected = trace(model, rules='operators')
    model.set_grad_checkpointing(True)
    assert equal(trace(model, rules='operators'), expected)


def test_a_checkpointed_block_is_part_of_the_graph():
    def traced(run: Any) -> Graph:
        block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        layers = {'stem': nn.Conv2d(3, 8, 3), 'block': block, 'head': nn.Linear(8, 10)}
        return trace(Net(lambda net, x: net.head(run(net.block, net.stem(x)).mean((2, 3))), **layers), input_size=SIZE)

    expected = traced(lambda block, x: block(x))
    for use_reentrant in (False, True):
        found = traced(functools.partial(checkpoint.checkpoint, use_reentrant=use_reentrant))
        assert equal(found, expected)
    assert checkpoint.CheckpointFunction.__name__ == 'CheckpointFunction'


@pytest.mark.parametrize(
    'compute',
    [
        lambda x, filter: torch.view_as_real(torch.fft.fft2(x)).sum(-1),
        lambda x, filter: torch.fft.ifft2(torch.fft.fft2(x) * torch.view_as_complex(filter)).real,
    ],
    ids=['view_as_real', 'filter'],
)
def test_complex_numbers_are_followed(compute):
    model = Net(
        lambda net, x: net.head(compute(net.stem(x), net.filter).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 1),
        filter=zeros(8, SIZE, SIZE, 2),
        head=nn.Linear(8, 10),
    )
    graph = trace(model, input_size=SIZE)
    assert labels(graph) == ['input', 'stem.weight', 'stem.bias', 'glob_avg', 'head.weight', 'head.bias']
    assert graph.edges_E2.tolist() == [[index, index + 1] for index in range(5)]
    assert list(graph.kept) == ['filter']


# -- inputs, outputs and parameters


def test_inputs_may_be_named_and_outputs_be_in_containers():
    logits = trace(NETWORKS['tuple']().model, input_size=SIZE)
    assert equal(trace(NETWORKS['dictionary']().model, input_size=SIZE), logits)
    by_position, by_name = NETWORKS['two inputs'](), NETWORKS['named inputs']()
    assert equal(trace(by_position.model, **by_position.options), trace(by_name.model, **by_name.options))


def test_example_inputs_are_only_read():
    case = NETWORKS['two inputs']()
    inputs = case.options['example_inputs']
    before = [(tensor.clone(), tensor._version, tensor.requires_grad) for tensor in inputs]
    trace(case.model, **case.options)
    for tensor, (values, version, requires_grad) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, values)
        assert (tensor._version, tensor.requires_grad, tensor.grad_fn) == (version, requires_grad, None)


def test_a_tied_parameter_and_a_module_at_two_places_are_one_with_aliases():
    layer, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = layer.weight
    found = record(nn.Sequential(layer, tied, layer), example_inputs=torch.ones(2, 4))
    expected = [('0.weight', ('1.weight', '2.weight')), ('0.bias', ('2.bias',)), ('1.bias', ())]
    assert [(info.name, info.aliases) for info in found.parameters] == expected


def test_nothing_is_computed():
    """A batch for this network would not fit into memory."""
    model = nn.Sequential(nn.Conv2d(3, 4096, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4096, 10))
    assert trace(model, input_size=100_000).input_size == (3, 100_000, 100_000)


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        (lambda: plain(), (3, 224, 224)),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3)), (1, 224, 224)),
        (lambda: timm.create_model('test_resnet', in_chans=5), (5, 160, 160)),
        (lambda: timm.create_model('test_vit', img_size=(96, 64), in_chans=1), (1, 96, 64)),
        (lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 16), (3, 32, 32)),
    ],
    ids=['unknown', 'one channel', 'timm', 'timm image size', 'torchvision'],
)
def test_the_input_size_is_that_of_the_model_unless_one_is_given(model, expected):
    with torch.device('meta'):
        model = model()
    assert resolve_input_size(model) == trace(model).input_size == expected
    channels = expected[0]
    for given, size in ((32, (channels, 32, 32)), ((32, 48), (channels, 32, 48)), ([7, 32, 48], (7, 32, 48))):
        assert resolve_input_size(model, given) == size


def test_an_input_size_that_is_none_is_refused():
    for given in (0, (3,), (3, 0, 8), 'big', (3, 8.5, 8), {}, 10**9):
        with pytest.raises(UnsupportedModelError, match='expected input_size to be a side'):
            trace(plain(), input_size=given)


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        (lambda: nn.Sequential(nn.ReLU()), {}, 'Sequential has no parameters'),
        (lambda: Net(lambda net, x: net.a(x).detach(), a=plain()), {}, 'no parameter of Net is connected'),
        (lambda: plain(), {'input_size': (4, 16, 16)}, r"module 'body\.0' \(Conv2d\).*channel"),
        (lambda: plain(), {'example_inputs': torch.ones(2, 3)}, r'example_inputs=\.\.\.'),
        (lambda: plain(), {'example_inputs': 5}, 'expected example_inputs to be a tensor'),
        (lambda: Net(lambda net, x: x if net.a(x).sum() > 0 else -x, a=plain()), {}, r'the model itself.*values'),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), {}, 'lazy|uninitialized|initialise'),
    ],
    ids=['no parameters', 'detached', 'channels', 'rank', 'inputs', 'values', 'lazy'],
)
def test_a_network_that_cannot_be_traced_says_where_and_what_to_do(model, options, message):
    with pytest.raises(UnsupportedModelError, match=message):
        trace(model(), **options)
