"""Aggregation is a sum over edges, whatever computes it, and so are its gradients."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from timm_ghn.ops import Edges, aggregate, backends, use_backend
from timm_ghn.ops.backends import BACKENDS, choose_backend

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def case(name: str) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """(source, target, number of sources, number of targets, features)."""
    generator = torch.Generator().manual_seed(0)

    def random(edges: int, sources: int, targets: int, width: int):
        source, target = (torch.randint(max(1, high), (edges,), generator=generator) for high in (sources, targets))
        return source, target, sources, targets, width

    if name == 'sorted':
        source, target, *rest = random(40, 7, 9, 5)
        return source, target.sort().values, *rest
    if name == 'self-loops':
        return torch.arange(6), torch.arange(6), 6, 6, 3
    if name == 'one node':
        return torch.tensor([0]), torch.tensor([0]), 1, 1, 4
    if name == 'the same edge twice':
        return torch.tensor([1, 1, 0]), torch.tensor([2, 2, 2]), 2, 3, 2
    if name == 'all into one':
        return torch.arange(70) % 8, torch.full((70,), 3), 8, 5, 3
    return random(*{
        'random': (40, 7, 9, 5),
        'empty neighbourhoods': (6, 20, 30, 3),
        'no edges': (0, 7, 9, 5),
        'no nodes': (0, 0, 0, 5),
        'no features': (40, 7, 9, 0),
        'one feature': (40, 7, 9, 1),
        'many features': (30, 6, 5, 200),
    }[name])  # fmt: skip


CASES = (
    'random', 'sorted', 'empty neighbourhoods', 'self-loops', 'one node', 'no edges', 'no nodes', 'no features',
    'one feature', 'many features', 'the same edge twice', 'all into one',
)  # fmt: skip


@pytest.fixture(params=[*BACKENDS, 'auto'])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def is_usable(backend: str, device: str, dtype: torch.dtype) -> bool:
    return backend == 'auto' or BACKENDS[backend].problem(device, dtype, deterministic=False) is None


def skip_unless_usable(backend: str, device: str, dtype: torch.dtype) -> None:
    if is_usable(backend, device, dtype):
        return
    pytest.skip(f'{backend} {BACKENDS[backend].problem(device, dtype, deterministic=False)}')


def definition(messages, source, target, weight, num_targets):
    """Edge by edge."""
    rows = [torch.zeros_like(messages[:1].sum(0)) for _ in range(num_targets)]
    for u, v, w in zip(source.tolist(), target.tolist(), weight, strict=True):
        rows[v] = rows[v] + w * messages[u]
    return torch.stack(rows) if rows else messages.new_zeros(0, messages.shape[1])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', CASES)
def test_sums_and_gradients_are_those_edge_by_edge(name, backend, device):
    """With given factors, those of the schedule or none; in half precision where sums or rows are long."""
    half = (torch.bfloat16, torch.float16) if name in ('many features', 'all into one') else ()
    usable = [d for d in (torch.float64, torch.float32, *half) if is_usable(backend, device, d)]
    if not usable:
        skip_unless_usable(backend, device, torch.float32)
    for dtype, factors in itertools.product(usable, ('given', 'in the schedule', 'none')):
        check_sums_and_gradients(name, factors, dtype, backend, device)


def check_sums_and_gradients(name, factors, dtype, backend, device):
    source, target, sources, targets, width = case(name)
    generator = torch.Generator().manual_seed(1)
    messages = torch.randn(sources, width, dtype=torch.float64, generator=generator).to(dtype)
    weight = (torch.rand(len(source), dtype=torch.float64, generator=generator) + 0.1).to(dtype)
    weight = torch.ones_like(weight) if factors == 'none' else weight
    outer = torch.randn(targets, width, dtype=torch.float64, generator=generator).to(dtype)
    exact = [tensor.double().requires_grad_() for tensor in (messages, weight)]
    expected = definition(exact[0], source, target, exact[1], targets) + 0 * sum(part.sum() for part in exact)
    wanted = torch.autograd.grad(expected, exact, outer.double(), allow_unused=True, materialize_grads=True)

    ours = [tensor.to(device).requires_grad_() for tensor in (messages, weight)]
    fixed = {'weight_E': ours[1].detach()} if factors == 'in the schedule' else {}
    edges = Edges.of(source.to(device), target.to(device), num_sources=sources, num_targets=targets, **fixed)
    total = aggregate(ours[0], edges, ours[1] if factors == 'given' else None, backend=backend)
    assert total.dtype == dtype
    bound = TOLERANCE[dtype] * 10
    assert torch.allclose(total.double().cpu(), expected, rtol=bound, atol=bound)
    inputs = ours if factors == 'given' else ours[:1]
    for found, right in zip(torch.autograd.grad(total, inputs, outer.to(device)), wanted, strict=False):
        assert torch.allclose(found.double().cpu(), right, rtol=bound, atol=bound)


@pytest.mark.parametrize('index', [torch.int32, torch.int64])
def test_indices_of_both_kinds_and_strided_tensors_are_read_right(index, backend):
    skip_unless_usable(backend, 'cpu', torch.float32)
    source, target, sources, targets, _ = case('random')
    messages, weight = torch.randn(3, sources).T, torch.rand(2 * len(source))[::2]
    expected = definition(messages.double(), source, target, weight.double(), targets)
    strided = torch.stack((source, target), 1).to(index)
    edges = Edges.of(strided[:, 0], strided[:, 1], num_sources=sources, num_targets=targets)
    total = aggregate(messages, edges, weight, backend=backend)
    assert torch.allclose(total.double(), expected, rtol=0, atol=1e-5)
    fixed = Edges.of(strided[:, 0], strided[:, 1], num_sources=sources, num_targets=targets, weight_E=weight)
    assert torch.allclose(aggregate(messages, fixed, backend=backend).double(), expected, rtol=0, atol=1e-5)


def test_first_and_second_derivatives_pass_the_numerical_check(backend):
    skip_unless_usable(backend, 'cpu', torch.float64)
    source, target, sources, targets, _ = case('random')
    edges = Edges.of(source, target, num_sources=sources, num_targets=targets)
    messages = torch.randn(sources, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(source), dtype=torch.float64, requires_grad=True)

    def function(m, w):
        return aggregate(m, edges, w, backend=backend)

    assert gradcheck(function, (messages, weight))
    assert gradgradcheck(function, (messages, weight))


def test_a_million_edges(backend):
    if backend == 'triton':
        pytest.skip('an interpreter takes minutes')
    skip_unless_usable(backend, 'cpu', torch.float32)
    nodes, count = 100_000, 1_000_000
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(nodes, (2, count), generator=generator)
    weight = torch.rand(count, generator=generator).requires_grad_()
    messages = torch.randn(nodes, 2, generator=generator).requires_grad_()
    edges = Edges.of(source, target, num_sources=nodes, num_targets=nodes)
    total = aggregate(messages, edges, weight, backend=backend)
    of_messages, of_weight = torch.autograd.grad(total.square().sum() / 2, (messages, weight))
    carried = messages.detach().double()[source] * weight.detach().double()[:, None]
    expected = torch.zeros(nodes, 2, dtype=torch.float64).index_add_(0, target, carried)
    assert torch.allclose(total.double(), expected, rtol=0, atol=1e-4)
    back = expected[target] * weight.detach()[:, None]
    wanted = torch.zeros(nodes, 2, dtype=torch.float64).index_add_(0, source, back)
    assert torch.allclose(of_messages.double(), wanted, rtol=0, atol=1e-3)
    dots = (messages.detach().double()[source] * expected[target]).sum(1)
    assert torch.allclose(of_weight.double(), dots, rtol=0, atol=1e-3)


def test_equal_inputs_give_equal_bits(backend):
    skip_unless_usable(backend, 'cpu', torch.float32)
    source, target, sources, targets, width = case('all into one')
    edges = Edges.of(source, target, num_sources=sources, num_targets=targets)
    messages, weight = torch.randn(sources, width), torch.rand(len(source))
    first, second = (aggregate(messages, edges, weight, backend=backend, deterministic=True) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_not_deterministic_is_refused_on_request(monkeypatch):
    assert 'not deterministic' in BACKENDS['index_add'].problem('cuda', torch.float32, deterministic=True)
    assert BACKENDS['index_add'].problem('cuda', torch.float32, deterministic=False) is None
    monkeypatch.setitem(BACKENDS, 'bag', dataclasses.replace(BACKENDS['bag'], deterministic_on=()))
    edges, messages = Edges.of(*case('random')[:2], num_sources=7, num_targets=9), torch.ones(7, 2)
    aggregate(messages, edges, backend='bag')
    with pytest.raises(ValueError, match='not deterministic on cpu'):
        aggregate(messages, edges, backend='bag', deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match='not deterministic on cpu'):
            aggregate(messages, edges, backend='bag')
        aggregate(messages, edges, backend='bag', deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_automatic_choice_is_the_first_that_can_run(monkeypatch):
    assert choose_backend(torch.ones(7, 5), 'auto').name == 'bag'
    monkeypatch.setattr(backends, '_PREFERRED', {'cpu': ('triton', 'index_add', 'bag')})
    expected = 'triton' if is_usable('triton', 'cpu', torch.float32) else 'index_add'
    assert choose_backend(torch.ones(7, 5), 'auto').name == expected
    assert choose_backend(torch.ones(7, 5, dtype=torch.float64), 'auto').name == 'index_add'


def test_a_context_chooses_the_backend_of_all_sums(monkeypatch):
    edges, called = Edges.of(*case('random')[:2], num_sources=7, num_targets=9), []

    def counting(*args):
        called.append(args)
        return BACKENDS['bag'].sums(*args)

    monkeypatch.setitem(BACKENDS, 'index_add', dataclasses.replace(BACKENDS['index_add'], sums=counting))
    with use_backend('index_add'):
        aggregate(torch.ones(7, 2), edges)
        aggregate(torch.ones(7, 2), edges, backend='bag')
        with use_backend('auto'):
            aggregate(torch.ones(7, 2), edges)
    aggregate(torch.ones(7, 2), edges)
    assert len(called) == 1
    with (
        pytest.raises(ValueError, match="'auto', 'index_add', 'bag', 'scatter', 'triton'.*got 'fast'"),
        use_backend('fast'),
    ):
        pass


def test_autocast_changes_nothing(backend):
    skip_unless_usable(backend, 'cpu', torch.float32)
    source, target, sources, targets, width = case('random')
    edges = Edges.of(source, target, num_sources=sources, num_targets=targets)
    messages, weight = torch.randn(sources, width), torch.rand(len(source))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = aggregate(messages, edges, weight, backend=backend)
    assert torch.equal(inside, aggregate(messages, edges, weight, backend=backend))


def test_messages_are_not_kept_where_no_factor_needs_a_gradient():
    edges = Edges.of(*case('random')[:2], num_sources=7, num_targets=9)
    messages = torch.randn(7, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        aggregate(messages, edges, torch.rand(40))
        assert [tuple(tensor.shape) for tensor in kept] == [(40,)]
        aggregate(messages, edges, torch.rand(40, requires_grad=True))
    assert (7, 2) in [tuple(tensor.shape) for tensor in kept]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'messages_Md': torch.ones(8, 2)}, r'shape \(7, d\)'),
        ({'messages_Md': torch.ones(7)}, r'shape \(7, d\)'),
        ({'messages_Md': torch.ones(7, 2, dtype=torch.int64)}, 'float dtype'),
        ({'messages_Md': torch.ones(7, 2, device='meta')}, 'messages on cpu'),
        ({'weight_E': torch.ones(39)}, r'shape \(40,\)'),
        ({'weight_E': torch.ones(40, dtype=torch.float64)}, 'dtype of the messages'),
        ({'backend': 'fast'}, "'auto', 'index_add'"),
        ({'messages_Md': torch.ones(7, 2, dtype=torch.float64), 'backend': 'triton'}, 'computes in torch.float32'),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    edges = Edges.of(*case('random')[:2], num_sources=7, num_targets=9)
    with pytest.raises(ValueError, match=message):
        aggregate(**{'messages_Md': torch.ones(7, 2), 'edges': edges, **change})


def test_factors_come_from_one_place():
    edges = Edges.of(*case('random')[:2], num_sources=7, num_targets=9, weight_E=torch.ones(40))
    with pytest.raises(ValueError, match='got both'):
        aggregate(torch.ones(7, 2), edges, torch.ones(40))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_scatter', None)
    backends.torch_scatter.cache_clear()
    edges = Edges.of(*case('random')[:2], num_sources=7, num_targets=9)
    try:
        with pytest.raises(ValueError, match="'scatter' needs torch-scatter"):
            aggregate(torch.ones(7, 2), edges, backend='scatter')
    finally:
        backends.torch_scatter.cache_clear()


def test_torch_scatter_is_called_as_its_documentation_says(scatter_double):
    test_sums_and_gradients_are_those_edge_by_edge('random', 'scatter', 'cpu')
    test_first_and_second_derivatives_pass_the_numerical_check('scatter')
    test_indices_of_both_kinds_and_strided_tensors_are_read_right(torch.int32, 'scatter')
