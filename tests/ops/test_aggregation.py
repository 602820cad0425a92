"""Aggregation is a sum over edges, whatever computes it, and so are its gradients."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch

from timm_ghn.ops import Edges, aggregate, backends, use_backend
from timm_ghn.ops.backends import BACKENDS, choose_backend, missing_package

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 2e-2}

#: (edges, sources, targets, features) of random graphs; the others are given edge by edge.
RANDOM = {
    'random': (40, 7, 9, 5),
    'empty neighbourhoods': (4, 6, 10, 3),
    'no edges': (0, 7, 9, 5),
    'no nodes': (0, 0, 0, 5),
    'no features': (40, 7, 9, 0),
    'many features': (30, 6, 5, 200),
}
GIVEN = {
    'sorted': (torch.arange(9) % 7, torch.arange(9), 7, 9, 5),
    'self-loops': (torch.arange(6), torch.arange(6), 6, 6, 3),
    'the same edge twice': (torch.tensor([1, 1, 0]), torch.tensor([2, 2, 2]), 2, 3, 2),
    'all into one': (torch.arange(70) % 8, torch.full((70,), 3), 8, 5, 3),
}


def case(name: str) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """(source, target, number of sources, number of targets, features)."""
    if name in GIVEN:
        return GIVEN[name]
    edges, sources, targets, width = RANDOM[name]
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(max(1, high), (edges,), generator=generator) for high in (sources, targets))
    return source, target, sources, targets, width


@pytest.fixture(params=[*BACKENDS, 'auto'])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == 'scatter' and missing_package('torch_scatter'):
        request.getfixturevalue('scatter_double')
    return request.param


def usable_dtypes(backend: str, device: str, *dtypes: torch.dtype) -> list[torch.dtype]:
    """Those of the dtypes in which a backend computes here; skips the test if there are none."""
    if backend == 'auto':
        return list(dtypes)
    problems = {dtype: BACKENDS[backend].problem(device, dtype, deterministic=False) for dtype in dtypes}
    usable = [dtype for dtype, problem in problems.items() if problem is None]
    if not usable:
        pytest.skip(f'{backend} {problems[dtypes[-1]]}')
    return usable


def definition(messages, source, target, weight, num_targets):
    """Edge by edge."""
    rows = [torch.zeros_like(messages[:1].sum(0)) for _ in range(num_targets)]
    for u, v, w in zip(source.tolist(), target.tolist(), weight, strict=True):
        rows[v] = rows[v] + w * messages[u]
    return torch.stack(rows) if rows else messages.new_zeros(0, messages.shape[1])


@pytest.mark.parametrize('device', DEVICES)
def test_sums_and_gradients_are_those_edge_by_edge(backend, device):
    """With factors that are given, in the schedule or 1; in half precision too where sums or rows are long."""
    dtypes = usable_dtypes(backend, device, *TOLERANCE)
    for name, dtype, factors in itertools.product((*RANDOM, *GIVEN), dtypes, ('given', 'in the schedule', 'none')):
        if dtype.itemsize > 2 or name in ('many features', 'all into one'):
            check_sums_and_gradients(name, dtype, factors, backend, device)


def check_sums_and_gradients(name, dtype, factors, backend, device):
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
    inputs = ours if factors == 'given' else ours[:1]
    found = torch.autograd.grad(total, inputs, outer.to(device))
    for tensor, right in zip((total, *found), (expected, *wanted), strict=False):
        assert tensor.dtype == dtype
        torch.testing.assert_close(
            tensor.double().cpu(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=f'{name} {dtype} {factors}'
        )


@pytest.mark.parametrize('index', [torch.int32, torch.int64])
def test_indices_of_both_kinds_and_strided_tensors_are_read_right(index, backend):
    usable_dtypes(backend, 'cpu', torch.float32)
    source, target, sources, targets, _ = case('random')
    messages, weight = torch.randn(3, sources).T, torch.rand(2 * len(source))[::2]
    expected = definition(messages.double(), source, target, weight.double(), targets)
    strided = torch.stack((source, target), 1).to(index)
    edges = Edges.of(strided[:, 0], strided[:, 1], num_sources=sources, num_targets=targets)
    total = aggregate(messages, edges, weight, backend=backend)
    assert torch.allclose(total.double(), expected, rtol=0, atol=1e-5)


def test_gradients_of_factors_in_several_chunks(monkeypatch):
    monkeypatch.setattr(backends, 'CHUNK_ELEMENTS', 12)
    for name in ('random', 'many features'):
        check_sums_and_gradients(name, torch.float64, 'given', 'bag', 'cpu')


def test_equal_inputs_give_equal_bits_in_autocast_too(backend):
    usable_dtypes(backend, 'cpu', torch.float32)
    source, target, sources, targets, width = case('all into one')
    edges = Edges.of(source, target, num_sources=sources, num_targets=targets)
    messages, weight = torch.randn(sources, width), torch.rand(len(source))
    first, second = (aggregate(messages, edges, weight, backend=backend, deterministic=True) for _ in range(2))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = aggregate(messages, edges, weight, backend=backend)
    assert torch.equal(first, second)
    assert torch.equal(first, inside)


@pytest.fixture
def edges() -> Edges:
    return Edges.of(*case('random')[:2], num_sources=7, num_targets=9)


def test_a_backend_that_is_not_deterministic_is_refused_on_request(edges, monkeypatch):
    assert 'not deterministic' in BACKENDS['index_add'].problem('cuda', torch.float32, deterministic=True)
    assert BACKENDS['index_add'].problem('cuda', torch.float32, deterministic=False) is None
    monkeypatch.setitem(BACKENDS, 'bag', dataclasses.replace(BACKENDS['bag'], deterministic_on=()))
    messages = torch.ones(7, 2)
    aggregate(messages, edges, backend='bag')
    with pytest.raises(ValueError, match='not deterministic on cpu'):
        aggregate(messages, edges, backend='bag', deterministic=True)
    monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
    with pytest.raises(ValueError, match='not deterministic on cpu'):
        aggregate(messages, edges, backend='bag')


def test_the_automatic_choice_is_the_first_that_can_run(monkeypatch):
    assert choose_backend(torch.ones(7, 5), 'auto').name == 'bag'
    monkeypatch.setattr(backends, '_PREFERRED', {'cpu': ('triton', 'index_add', 'bag')})
    can_run = BACKENDS['triton'].problem('cpu', torch.float32, deterministic=True) is None
    assert choose_backend(torch.ones(7, 5), 'auto').name == ('triton' if can_run else 'index_add')
    assert choose_backend(torch.ones(7, 5, dtype=torch.float64), 'auto').name == 'index_add'


def test_a_context_chooses_the_backend_of_all_sums(edges, monkeypatch):
    called = []

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


def test_messages_are_not_kept_where_no_factor_needs_a_gradient(edges):
    messages = torch.randn(7, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        aggregate(messages, edges, torch.rand(40))
        assert [tuple(tensor.shape) for tensor in kept] == [(40,)]
        aggregate(messages, edges, torch.rand(40, requires_grad=True))
    assert (7, 2) in [tuple(tensor.shape) for tensor in kept]


def test_arguments_that_do_not_fit_are_refused(edges, monkeypatch):
    factors = dataclasses.replace(edges, weight_E=torch.ones(40))
    monkeypatch.setitem(sys.modules, 'torch_scatter', None)
    backends.missing_package.cache_clear()
    for change, message in (
        ({'messages_Md': torch.ones(8, 2)}, r'shape \(7, d\)'),
        ({'messages_Md': torch.ones(7, 2, dtype=torch.int64)}, 'float dtype'),
        ({'messages_Md': torch.ones(7, 2, device='meta')}, 'float dtype on cpu'),
        ({'weight_E': torch.ones(39)}, r'shape \(40,\)'),
        ({'weight_E': torch.ones(40, dtype=torch.float64)}, 'dtype of the messages'),
        ({'weight_E': torch.ones(40), 'edges': factors}, 'got both'),
        ({'backend': 'scatter'}, "'scatter' needs torch-scatter"),
        ({'messages_Md': torch.ones(7, 2, dtype=torch.float64), 'backend': 'triton'}, 'computes in torch.float32'),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate(**{'messages_Md': torch.ones(7, 2), 'edges': edges, **change})
    backends.missing_package.cache_clear()
