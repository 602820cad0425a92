"""A trace reads a network without computing anything and without leaving anything behind."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from isomorphism import equal
from networks import NETWORKS, SIZE, Case, plain
from torch import Tensor, nn
from torch.utils import checkpoint

from timm_ghn import Graph, UnsupportedModelError, trace
from timm_ghn.graph.trace import record, resolve_input_size

CASES = pytest.mark.parametrize('name', NETWORKS)


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


@CASES
@pytest.mark.parametrize('rules', ['auto', 'operators'])
def test_a_trace_leaves_nothing_behind_and_can_be_repeated(name, rules):
    case = NETWORKS[name]()
    before = state_of(case.model), random_states()
    first = trace(case.model, rules=rules, **case.options)
    assert (state_of(case.model), random_states()) == before
    assert equal(first, trace(case.model, rules=rules, **case.options))


@CASES
@pytest.mark.parametrize('rules', ['auto', 'operators'])
def test_every_graph_is_sound(name, rules):
    case = NETWORKS[name]()
    check_graph(trace(case.model, rules=rules, **case.options), case.model)


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


def failing_in_the_middle() -> Case:
    case = NETWORKS['remembering']()

    def fail(_module: nn.Module, _args: Any) -> None:
        raise KeyError('no')

    case.model.head.register_forward_pre_hook(fail)
    return case


def test_a_failing_forward_pass_leaves_nothing_behind_either():
    case = failing_in_the_middle()
    before = state_of(case.model), random_states()
    with pytest.raises(UnsupportedModelError, match=r"module 'head' \(Linear\).*KeyError"):
        trace(case.model, **case.options)
    assert (state_of(case.model), random_states()) == before


class Holding(nn.Module):
    """Holds a tensor as a plain attribute, and may work on it in place."""

    def __init__(self, held: Tensor, change: bool) -> None:
        super().__init__()
        self.held, self.change = held, change
        self.layer = nn.Conv2d(3, 3, 1)
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        if self.change:
            self.held.mul_(2)
        return self.layer(x)


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a prototype, says PyTorch
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=layout)


def compressed() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # in beta state, says PyTorch
        return torch.eye(3).to_sparse_csr()


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # deprecated, says PyTorch
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


def quantised_per_channel() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8)


@pytest.mark.parametrize(
    ('make', 'change'),
    [
        (lambda: torch.eye(3).to_sparse(), True),
        (compressed, True),
        (lambda: nested(torch.strided), True),
        (lambda: nested(torch.jagged), True),
        (quantised, False),
        (quantised_per_channel, False),
        (lambda: torch.ones(1).expand(3), False),
    ],
    ids=['sparse', 'compressed', 'nested', 'jagged', 'quantised', 'quantised per channel', 'expanded'],
)
def test_tensors_of_any_layout_are_left_as_they_were(make, change):
    model = Holding(make(), change)
    held, before = model.held, str(model.held.coalesce() if model.held.layout is torch.sparse_coo else model.held)
    graph = trace(model, input_size=SIZE)
    assert [node.label for node in graph.nodes] == ['input', 'layer.weight', 'layer.bias']
    assert model.held is held
    assert str(held.coalesce() if held.layout is torch.sparse_coo else held) == before
    assert not model.log


def test_a_nested_buffer_is_refused():
    model = Holding(torch.ones(1), change=False)
    model.register_buffer('buffer', nested(torch.strided))
    with pytest.raises(UnsupportedModelError, match='nested tensor'):
        trace(model, input_size=SIZE)
    assert not model.log


class Meeting(nn.Module):
    """Waits in its forward pass for another thread to come there too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.barrier = threading.Barrier(2)

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(timeout=0.3)
            raise AssertionError('two threads are in a trace')
        return self.layer(x)


def test_one_network_is_traced_at_a_time():
    """A trace borrows the model, and sets the process's random generators and default dtype aside."""
    model = Meeting()
    before = state_of(model), random_states()
    with ThreadPoolExecutor(2) as pool:
        graphs = list(pool.map(lambda _: trace(model, input_size=SIZE), range(2)))
    assert equal(*graphs)
    assert (state_of(model), random_states()) == before


def test_the_comparison_of_states_sees_changes():
    model = NETWORKS['remembering']().model
    before = state_of(model)
    assert state_of(copy.deepcopy(model)) != before
    for change in (
        lambda: model.norm.running_mean.add_(1),
        lambda: model.norm.eval(),
        lambda: model.conv.weight.requires_grad_(False),
        lambda: setattr(model, 'count', 1),
        lambda: model.nested['seen']['widths'].append(1),
        lambda: model.head.register_forward_hook(lambda *_: None),
    ):
        change()
        assert state_of(model) != before
        before = state_of(model)


@CASES
def test_a_graph_depends_neither_on_the_device_nor_on_the_mode_of_a_model(name):
    case = NETWORKS[name]()
    graph = trace(case.model, **case.options)
    for mode in (True, False):
        case.model.train(mode)
        assert equal(trace(case.model, **case.options), graph)
    with torch.device('meta'):
        on_meta = NETWORKS[name]()
    assert equal(trace(on_meta.model, **on_meta.options), graph)


@pytest.mark.parametrize('name', ['frozen', 'partly in eval mode', 'mixed dtypes', 'double', 'hooked'])
def test_a_graph_depends_on_the_network_only(name):
    """Not on requires_grad, mode, dtype and hooks."""
    ours, expected = trace(NETWORKS[name]().model, input_size=SIZE), trace(plain(), input_size=SIZE)
    assert ours.nodes == expected.nodes
    assert torch.equal(ours.edges_E2, expected.edges_E2)


@pytest.mark.parametrize(
    'context',
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast('cpu', dtype=torch.bfloat16),
        lambda: torch.device('meta'),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ],
    ids=['no_grad', 'inference_mode', 'autocast', 'device', 'sdpa_kernel'],
)
def test_a_graph_does_not_depend_on_the_context(context):
    model = timm.create_model('test_vit')
    expected = trace(model)
    with context():
        found = trace(model)
    assert equal(found, expected)


def test_a_graph_does_not_depend_on_the_default_dtype():
    model = timm.create_model('test_vit')
    expected = trace(model)
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(trace(model), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    'name',
    [
        'test_nfnet',
        'test_resnet',
        'test_vit',
        'test_vit_relpos',
        'eva02_tiny_patch14_224',
        'nextvit_small',
        'swin_tiny_patch4_window7_224',
    ],
)
def test_a_graph_does_not_depend_on_gradient_checkpointing(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    expected = trace(model, rules='operators')
    model.set_grad_checkpointing(True)
    assert equal(trace(model, rules='operators'), expected)


class Checkpointed(nn.Module):
    """A block in one of PyTorch's two ways of checkpointing, or in none."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.use_reentrant is None:
            x = self.block(x)
        else:
            x = checkpoint.checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_checkpointed_block_is_part_of_the_graph(use_reentrant):
    assert equal(trace(Checkpointed(use_reentrant), input_size=SIZE), trace(Checkpointed(None), input_size=SIZE))
    assert checkpoint.CheckpointFunction.__name__ == 'CheckpointFunction'


class Spectral(nn.Module):
    """A network that goes through complex numbers."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.stem = nn.Conv2d(3, 8, 1)
        self.filter = nn.Parameter(torch.ones(8, SIZE, SIZE, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.compute(self.stem(x), self.filter).mean((2, 3)))


@pytest.mark.parametrize(
    'compute',
    [
        lambda x, filter: torch.fft.fft2(x).real,
        lambda x, filter: torch.fft.fft2(x).imag,
        lambda x, filter: torch.view_as_real(torch.fft.fft2(x)).sum(-1),
        lambda x, filter: torch.fft.ifft2(torch.fft.fft2(x) * torch.view_as_complex(filter)).real,
    ],
    ids=['real', 'imaginary', 'view_as_real', 'filter'],
)
def test_complex_numbers_are_followed(compute):
    graph = trace(Spectral(compute), input_size=SIZE)
    expected = ['input', 'stem.weight', 'stem.bias', 'MeanBackward1', 'head.weight', 'head.bias']
    assert [node.label for node in graph.nodes] == expected
    assert graph.edges_E2.tolist() == [[index, index + 1] for index in range(5)]
    assert list(graph.kept) == ['filter']


def test_outputs_in_containers_are_followed():
    logits = trace(NETWORKS['tuple']().model, input_size=SIZE)
    for name in ('dictionary', 'dataclass'):
        assert equal(trace(NETWORKS[name]().model, input_size=SIZE), logits)


def test_inputs_may_be_named():
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


def test_a_tied_parameter_is_one_parameter_with_aliases():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    infos = {info.name: info for info in record(model, example_inputs=torch.ones(2, 4)).parameters}
    assert list(infos) == ['0.weight', '0.bias', '2.bias']
    assert infos['0.weight'].aliases == ('2.weight',)
    assert not infos['0.bias'].aliases


def test_a_module_at_two_places_is_one_module():
    shared = nn.Linear(4, 4)
    recording = record(nn.Sequential(shared, nn.ReLU(), shared), example_inputs=torch.ones(2, 4))
    assert [(info.name, info.aliases) for info in recording.parameters] == [
        ('0.weight', ('2.weight',)),
        ('0.bias', ('2.bias',)),
    ]
    assert recording.owners['0.weight'] is shared


def test_nothing_is_computed():
    """A batch for this network would not fit into memory."""
    model = nn.Sequential(nn.Conv2d(3, 4096, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4096, 10))
    assert trace(model, input_size=100_000).input_size == (3, 100_000, 100_000)


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        (lambda: plain(), (3, 224, 224)),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3)), (1, 224, 224)),
        (lambda: timm.create_model('test_resnet'), (3, 160, 160)),
        (lambda: timm.create_model('test_resnet', in_chans=5), (5, 160, 160)),
        (lambda: timm.create_model('test_vit', img_size=96), (3, 96, 96)),
        (lambda: timm.create_model('test_vit', img_size=(96, 64), in_chans=1), (1, 96, 64)),
        (lambda: timm.create_model('inception_v3'), (3, 299, 299)),
        (lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 16), (3, 32, 32)),
    ],
    ids=['unknown', 'one channel', 'timm', 'timm in_chans', 'timm img_size', 'timm both', 'timm 299', 'torchvision'],
)
def test_the_input_size_is_what_the_model_says(model, expected):
    with torch.device('meta'):
        model = model()
    assert resolve_input_size(model) == expected
    assert trace(model).input_size == expected


@pytest.mark.parametrize(
    ('given', 'expected'), [(32, (3, 32, 32)), ((32, 48), (3, 32, 48)), ([1, 32, 48], (1, 32, 48))]
)
def test_a_given_input_size_wins(given, expected):
    assert resolve_input_size(timm.create_model('test_resnet'), given) == expected


@pytest.mark.parametrize('given', [0, -1, (3,), (3, 2, 1, 0), (3, 0, 8), 'big', (3, 8.5, 8), 8.5, {}])
def test_an_input_size_that_is_none_is_refused(given):
    with pytest.raises(UnsupportedModelError, match='expected input_size to be a side'):
        trace(plain(), input_size=given)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        (lambda: nn.Sequential(nn.ReLU()), {}, 'Sequential has no parameters'),
        (lambda: Detached(), {'example_inputs': torch.ones(2, 3)}, 'no parameter of Detached is connected'),
        (lambda: plain(), {'input_size': 1}, r"module 'body\.0' \(Conv2d\).*input_size=\.\.\."),
        (lambda: plain(), {'input_size': (4, 16, 16)}, r"module 'body\.0' \(Conv2d\).*channel"),
        (lambda: plain(), {'example_inputs': torch.ones(2, 3)}, r'example_inputs=\.\.\.'),
        (lambda: plain(), {'example_inputs': (torch.ones(2, 3, 16, 16), 1)}, 'the model itself.*TypeError'),
        (lambda: DependsOnValues(), {}, r'the model itself.*values'),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), {}, 'lazy|uninitialized|initialise'),
    ],
    ids=['no parameters', 'detached', 'small', 'channels', 'rank', 'arguments', 'values', 'lazy'],
)
def test_a_network_that_cannot_be_traced_says_where_and_what_to_do(model, options, message):
    model = model()
    before = list(map(id, model.parameters()))
    with pytest.raises(UnsupportedModelError, match=message):
        trace(model, **options)
    assert list(map(id, model.parameters())) == before


@pytest.mark.parametrize('name', timm.list_models('test_*'))
def test_timms_test_networks_can_be_traced(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    graph = trace(model)
    check_graph(graph, model)
    assert graph.num_classes == model.num_classes
    assert len(graph.kept) < 0.5 * len(graph.parameters)
