"""Aggregation is a sum over edges."""

from __future__ import annotations

import torch

from timm_ghn.ops.aggregate import aggregate


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(high, (20,), generator=generator) for high in (7, 4))
    messages = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.rand(20, dtype=torch.float64, generator=generator, requires_grad=True)
    return messages, source, target, weight


def test_it_is_the_sum_edge_by_edge():
    messages, source, target, weight = example()
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for u, v, w in zip(source, target, weight, strict=True):
        expected[v] += w * messages[u]
    assert torch.allclose(aggregate(messages, source, target, weight, 6), expected)
    assert not expected[4:].any()


def test_no_edges_give_zeros():
    messages, *_ = example()
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(aggregate(messages, none, none, none.double(), 2), torch.zeros(2, 3, dtype=torch.float64))


def test_gradients_are_right():
    messages, source, target, weight = example()
    assert torch.autograd.gradcheck(lambda m, w: aggregate(m, source, target, w, 6), (messages, weight))
