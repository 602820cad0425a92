"""Sorted edges are the edges that were given, in another order."""

from __future__ import annotations

import pytest
import torch

from timm_ghn.ops import Edges

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
    in_order = Edges.of(SOURCE, TARGET.sort().values, num_sources=4, num_targets=4)
    assert in_order.order_E is None
    assert in_order.source_E.tolist() == SOURCE.tolist()


def test_the_transpose_has_the_same_edges_and_twice_transposed_they_are_back():
    edges = Edges.of(SOURCE, TARGET, num_sources=4, num_targets=5, weight_E=torch.arange(5.0))
    back = edges.transposed
    assert sorted((v, u) for u, v in listed(back)) == sorted(listed(edges))
    assert back.source_E.tolist() == edges.target_E[back.order_E].tolist()
    assert back.weight_E.tolist() == back.arranged(edges.weight_E).tolist()
    assert sorted(listed(back.transposed)) == sorted(listed(edges))
    assert edges.transposed is back


@pytest.mark.parametrize(
    ('source', 'target', 'weight', 'error', 'message'),
    [
        (SOURCE + 1, TARGET, None, IndexError, 'source_E in 0..3'),
        (SOURCE.int(), TARGET.int() + 2, None, IndexError, 'target_E in 0..4'),
        (SOURCE.int(), TARGET.int() - 1, None, IndexError, 'target_E'),
        (SOURCE.float(), TARGET, None, ValueError, 'source_E as int32 or int64'),
        (SOURCE, TARGET[None], None, ValueError, 'target_E as int32 or int64'),
        (SOURCE, TARGET[:4], None, ValueError, 'target_E like source_E'),
        (SOURCE, TARGET.int(), None, ValueError, 'target_E like source_E'),
        (SOURCE, TARGET, torch.ones(4), ValueError, 'weight_E like source_E'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(source, target, weight, error, message):
    with pytest.raises(error, match=message):
        Edges.of(source, target, num_sources=4, num_targets=5, weight_E=weight)
