"""Sums of messages over the edges of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_ghn.ops.backends import Backend, choose_backend
from timm_ghn.ops.edges import Edges


def aggregate(
    messages_Md: Tensor,
    edges: Edges,
    weight_E: Tensor | None = None,
    *,
    backend: str | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Weighted sum of the messages that arrive at each node: out[t] = sum over e into t of w[e] m[source[e]].

    The step that all message passing shares (arXiv 1704.01212, equation 1). Several graphs go through it together when
    their nodes are numbered through. Half precision is added up in float32.

    ==========  =====================================================================================
    index_add   plain torch, a temporary row for each edge
    bag         torch's embedding bag: no temporary rows
    scatter     torch-scatter's ``segment_csr`` and ``gather_csr``, where it is installed
    triton      one fused kernel for each of sum and gradients; float32 and bfloat16, on a GPU
    ==========  =====================================================================================

    Shapes:
        messages_Md: (M, d), float64, float32, bfloat16 or float16. weight_E: (E,). Result: (T, d).

    Args:
        messages_Md: One message for each row that an edge can carry; any strides.
        edges: The schedule, on the same device. If it has factors, they are used.
        weight_E: Factor of each edge, in the order in which the edges were given, in the dtype of the messages; None
            for those of the schedule, or for 1.
        backend: One of the names above, or ``'auto'``; None for that of :func:`timm_ghn.ops.use_backend`.
        deterministic: Whether equal inputs must give equal bits; None asks torch's
            ``are_deterministic_algorithms_enabled``. What ``'auto'`` takes is deterministic.

    Returns:
        Zero where no edge arrives. Differentiable in the messages and in ``weight_E``, as often as wanted.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or a backend does not exist, is not installed, or
            cannot do what is asked.
    """
    _check(messages_Md, edges, weight_E)
    chosen = choose_backend(messages_Md, backend, deterministic=deterministic)
    arranged_E = None if weight_E is None else edges.arranged(weight_E)
    total_Td: Tensor = _Sum.apply(messages_Md, arranged_E, edges, chosen)
    return total_Td


def _check(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> None:
    if messages_Md.dim() != 2 or len(messages_Md) != edges.num_sources:
        raise ValueError(f'expected messages of shape ({edges.num_sources}, d) (got {tuple(messages_Md.shape)})')
    if messages_Md.device != edges.source_E.device:
        raise ValueError(f'expected messages on {edges.source_E.device} (got {messages_Md.device})')
    if not messages_Md.is_floating_point():
        raise ValueError(f'expected messages of a float dtype (got {messages_Md.dtype})')
    if weight_E is not None:
        if edges.weight_E is not None:
            raise ValueError('expected factors in the schedule or as weight_E (got both)')
        if weight_E.shape != edges.source_E.shape or weight_E.device != messages_Md.device:
            raise ValueError(
                f'expected weight_E of shape ({len(edges)},) on {messages_Md.device} '
                f'(got {tuple(weight_E.shape)} on {weight_E.device})'
            )
    factors = edges.weight_E if weight_E is None else weight_E
    if factors is not None and factors.dtype != messages_Md.dtype:
        raise ValueError(f'expected factors in the dtype of the messages, {messages_Md.dtype} (got {factors.dtype})')


def summed(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None, backend: Backend) -> Tensor:
    """The sum without checks and without a gradient; factors in the order of the schedule."""
    if not len(edges) or not messages_Md.numel():
        return messages_Md.new_zeros(edges.num_targets, messages_Md.shape[1])
    return backend.sums(messages_Md.contiguous(), edges, weight_E)


class _Sum(torch.autograd.Function):
    """The sum. Its gradient for the messages is a sum along the transposed edges; for the factors, dot products."""

    @staticmethod
    def forward(ctx: Any, messages_Md: Tensor, weight_E: Tensor | None, edges: Edges, backend: Backend) -> Tensor:
        ctx.edges, ctx.backend = edges, backend
        # Without a gradient for the factors the messages need not be kept.
        ctx.save_for_backward(messages_Md if ctx.needs_input_grad[1] else None, weight_E)
        return summed(messages_Md, edges, weight_E, backend)

    @staticmethod
    def backward(ctx: Any, gradient_Td: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        messages_Md, weight_E = ctx.saved_tensors
        of_messages = of_weight = None
        if ctx.needs_input_grad[0]:
            back = ctx.edges.transposed
            weights = None if weight_E is None else back.arranged(weight_E)
            of_messages = _Sum.apply(gradient_Td, weights, back, ctx.backend)
        if ctx.needs_input_grad[1]:
            of_weight = _Dot.apply(messages_Md, gradient_Td, ctx.edges, ctx.backend)
        return of_messages, of_weight, None, None


class _Dot(torch.autograd.Function):
    """<m[source[e]], g[target[e]]> for each edge e; bilinear, so its gradients are sums along the edges again."""

    @staticmethod
    def forward(ctx: Any, messages_Md: Tensor, gradient_Td: Tensor, edges: Edges, backend: Backend) -> Tensor:
        ctx.edges, ctx.backend = edges, backend
        ctx.save_for_backward(messages_Md, gradient_Td)
        if not len(edges) or not messages_Md.numel():
            return messages_Md.new_zeros(len(edges))
        return backend.dots(messages_Md.contiguous(), gradient_Td, edges)

    @staticmethod
    def backward(ctx: Any, gradient_E: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        messages_Md, gradient_Td = ctx.saved_tensors
        of_messages = of_gradient = None
        if ctx.needs_input_grad[0]:
            back = ctx.edges.transposed
            of_messages = _Sum.apply(gradient_Td, back.arranged(gradient_E), back, ctx.backend)
        if ctx.needs_input_grad[1]:
            of_gradient = _Sum.apply(messages_Md, gradient_E, ctx.edges, ctx.backend)
        return of_messages, of_gradient, None, None
