"""Slices of one tensor with one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Cut = tuple[slice, ...]


class _TakeSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.cuts = whole.shape, cuts
        ctx.set_materialize_grads(False)
        return tuple(whole[cut] for cut in cuts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        total: Tensor | None = None
        for cut, gradient in zip(ctx.cuts, gradients, strict=True):
            if gradient is not None:
                total = gradient.new_zeros(ctx.shape) if total is None else total
                total[cut] += gradient
        return total, None


def take_slices(whole: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
    """``tuple(whole[cut] for cut in cuts)``: views, not to be written to.

    Indexing gives every slice a gradient as large as the whole, and adds them up. Here the gradients of all slices
    are added into one. Slices may overlap or stay unused. Not twice differentiable.
    """
    if whole.requires_grad and torch.is_grad_enabled():
        taken: tuple[Tensor, ...] = _TakeSlices.apply(whole, cuts)
        return taken
    return tuple(whole[cut] for cut in cuts)
