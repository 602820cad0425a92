"""A schedule is the edges that were given, in another order."""

from __future__ import annotations

import pytest
import torch

from timm_ghn.ops import Edges, aggregate
from timm_ghn.ops.edges import MAX_DENSE_ELEMENTS

SOURCE, TARGET = torch.tensor([3, 0, 1, 1, 2]), torch.tensor([2, 0, 2, 0, 3])


def listed(edges: Edges) -> list[tuple[int, int]]:
    return list(zip(edges.source_E.tolist(), edges.target_E.tolist(), strict=True))


@pytest.mark.parametrize('index', [torch.int32, torch.int64])
def test_edges_are_sorted_by_target_and_their_factors_with_them(index):
    weight = torch.arange(5.0)
    edges = Edges.of(SOURCE.to(index), TARGET.to(index), num_sources=4, num_targets=5, weight_E=weight)
    assert listed(edges) == [(0, 0), (1, 0), (3, 2), (1, 2), (2, 3)]
    assert edges.pointer_T1.tolist() == [0, 2, 2, 4, 5, 5]
    assert edges.weight_E.tolist() == edges.arranged(weight).tolist() == [1, 3, 0, 2, 4]
    assert {edges.source_E.dtype, edges.target_E.dtype, edges.pointer_T1.dtype} == {index}
    assert (len(edges), edges.num_targets) == (5, 5)


def test_sorted_edges_are_not_moved():
    edges = Edges.of(SOURCE, TARGET.sort().values, num_sources=4, num_targets=4)
    assert edges.order_E is None
    assert edges.source_E.tolist() == SOURCE.tolist()


def test_the_transpose_has_the_same_edges_and_twice_transposed_they_are_back():
    edges = Edges.of(SOURCE, TARGET, num_sources=4, num_targets=5, weight_E=torch.arange(5.0))
    back = edges.transposed
    assert sorted((v, u) for u, v in listed(back)) == sorted(listed(edges))
    assert back.source_E.tolist() == edges.target_E[back.order_E].tolist()
    assert back.weight_E.tolist() == back.arranged(edges.weight_E).tolist()
    assert torch.equal(back.dense_TM, edges.dense_TM.T)
    assert torch.equal(back.transposed.dense_TM, edges.dense_TM)
    assert edges.transposed is back


def test_joined_schedules_sum_each_graph_by_itself():
    generator = torch.Generator().manual_seed(0)
    parts, messages, weights = [], [], []
    for nodes, targets, count in ((4, 3, 9), (1, 1, 0), (5, 6, 12)):
        source, target = (torch.randint(high, (count,), generator=generator) for high in (nodes, targets))
        parts.append(Edges.of(source, target, num_sources=nodes, num_targets=targets))
        messages.append(torch.randn(nodes, 2, generator=generator))
        weights.append(torch.rand(count, generator=generator))
    together = aggregate(torch.cat(messages), Edges.joined(parts), torch.cat(weights))
    alone = [aggregate(m, part, w) for m, part, w in zip(messages, parts, weights, strict=True)]
    assert torch.allclose(together, torch.cat(alone))


def test_joined_schedules_have_all_factors_or_none():
    bare = Edges.of(SOURCE, TARGET, num_sources=4, num_targets=5)
    full = Edges.of(SOURCE, TARGET, num_sources=4, num_targets=5, weight_E=torch.arange(5.0))
    joined = Edges.joined([full, full])
    assert torch.equal(joined.weight_E, torch.cat([full.weight_E] * 2))
    assert torch.equal(joined.dense_TM, torch.block_diag(full.dense_TM, full.dense_TM))
    assert Edges.joined([bare, bare]).weight_E is None
    with pytest.raises(ValueError, match='all 2 schedules or of none'):
        Edges.joined([bare, full])


@pytest.mark.parametrize('index', [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ('source', 'target', 'name'),
    [([4], [0], 'source_E in 0..3'), ([-1], [0], 'source_E'), ([0], [5], 'target_E in 0..4'), ([0], [-1], 'target_E')],
)
def test_an_index_out_of_range_is_named(source, target, name, index):
    with pytest.raises(IndexError, match=name):
        Edges.of(torch.tensor(source, dtype=index), torch.tensor(target, dtype=index), num_sources=4, num_targets=5)


@pytest.mark.parametrize(
    ('source', 'target', 'weight', 'message'),
    [
        (SOURCE.float(), TARGET, None, 'source_E as int32 or int64'),
        (SOURCE, TARGET[None], None, 'target_E as int32 or int64'),
        (SOURCE, TARGET[:4], None, 'one length, dtype and device'),
        (SOURCE, TARGET.int(), None, 'one length, dtype and device'),
        (SOURCE, TARGET, torch.ones(4), 'weight_E like source_E'),
    ],
)
def test_what_does_not_fit_is_refused(source, target, weight, message):
    with pytest.raises(ValueError, match=message):
        Edges.of(source, target, num_sources=4, num_targets=5, weight_E=weight)


def test_huge_matrices_are_refused():
    side = int(MAX_DENSE_ELEMENTS**0.5) + 1
    edges = Edges.of(SOURCE, TARGET, num_sources=side, num_targets=side)
    with pytest.raises(ValueError, match='at most 134,217,728 elements'):
        aggregate(torch.ones(side, 1), edges, backend='dense')


def test_without_factors_no_matrix_is_kept():
    with pytest.raises(ValueError, match='factors that stay the same'):
        _ = Edges.of(SOURCE, TARGET, num_sources=4, num_targets=5).dense_TM
