"""Slices taken together are those taken one by one, and so is their gradient."""

from __future__ import annotations

import torch

from timm_ghn.ops.slices import take_slices

CUTS = [(slice(2), slice(None), slice(1, 3)), (slice(None), slice(1)), (slice(1, 2),), (slice(3, 4), slice(2, 5))]


def test_values_and_gradients_equal_those_of_indexing():
    whole = torch.randn(4, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    taken, expected = take_slices(whole, CUTS), [whole[cut] for cut in CUTS]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=True))
    # The third slice stays unused, the first is used twice.
    losses = [(s[0] * s[0].cos()).sum() + s[1].exp().sum() + s[3].square().sum() for s in (taken, expected)]
    ours, theirs = (torch.autograd.grad(loss, whole)[0] for loss in losses)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(taken, expected, strict=True)), 'views'
    assert not any(piece.requires_grad for piece in take_slices(whole.detach(), CUTS))
