"""Sums of a few targets at a time are those of all at once."""

from __future__ import annotations

import itertools

import pytest
import torch

from timm_ghn.ops import Edges, aggregate
from timm_ghn.ops.rows import DenseRows, SparseRows, split_rows


def banded(nodes: int, index: torch.dtype = torch.int64) -> Edges:
    """Edges from the ten rows before each target; none into the first."""
    target, source = (torch.ones(nodes, nodes).tril(-1) - torch.ones(nodes, nodes).tril(-11)).nonzero(as_tuple=True)
    weight = torch.rand(len(source), generator=torch.Generator().manual_seed(0))
    return Edges.of(source.to(index), target.to(index), num_sources=nodes, num_targets=nodes, weight_E=weight)


@pytest.mark.parametrize('index', [torch.int32, torch.int64])
@pytest.mark.parametrize(('backend', 'kind'), [('dense', DenseRows), ('bag', SparseRows)])
def test_parts_make_the_whole(backend, kind, index):
    edges, messages = banded(30, index), torch.randn(30, 3)
    for schedule, sizes in itertools.product((edges, edges.transposed), ([30], [1] * 30, [4, 0, 9, 1, 16])):
        parts = split_rows(schedule, sizes, messages, backend=backend)
        assert {type(part) for part in parts} == {kind}
        assert [len(part.sum(messages)) for part in parts] == sizes
        together = torch.cat([part.sum(messages) for part in parts])
        assert torch.allclose(together, aggregate(messages, schedule), rtol=0, atol=1e-5)


def test_matrices_reach_from_the_first_source_to_the_last():
    parts = split_rows(banded(30), [1] * 30, torch.ones(30, 3), backend='dense')
    assert [part.matrix_nW.shape[1] for part in parts] == [min(row, 10) for row in range(30)]
    assert parts[20].window == slice(10, 20)


def test_parts_are_lists_where_matrices_would_be_mostly_zeros():
    near = banded(400)
    assert isinstance(split_rows(near, [1] * 400, torch.ones(400, 32))[0], DenseRows)
    ends = torch.arange(4000)
    far = Edges.of(ends.flip(0), ends, num_sources=4000, num_targets=4000, weight_E=torch.ones(4000))
    parts = split_rows(far, [2000, 2000], torch.ones(4000, 32))
    assert isinstance(parts[0], SparseRows)
    assert sum(part.edges.weight_E.numel() for part in parts) == 4000
