"""Sums of messages over the edges of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

    The step that all message passing shares (arXiv 1704.01212, equation 1). Half precision is added up in float32.

    Shapes:
        messages_Md: (M, d), float64, float32, bfloat16 or float16. weight_E: (E,). Result: (T, d).

    Args:
        messages_Md: One message for each row that an edge can carry; any strides.
        edges: The sorted edges, on the same device, with or without factors.
        weight_E: Factor of each edge, in the order in which the edges were given, in the dtype of the messages; None
            for those of ``edges``, or for 1.
        backend: ``'index_add'``, ``'bag'`` (torch's embedding bag), ``'scatter'`` (torch-scatter), ``'triton'`` (a
            fused kernel on a GPU, float32 and bfloat16) or ``'auto'``; None for that of
            :func:`timm_ghn.ops.use_backend`.
        deterministic: Whether equal inputs must give equal bits; None asks torch's
            ``are_deterministic_algorithms_enabled``. ``'auto'`` is always deterministic.

    Returns:
        The sums, zero where no edge arrives. Differentiable once, in the messages and in ``weight_E``.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or if the backend does not exist, is not
            installed, or does not support the device, the dtype or ``deterministic``.
    """
    if messages_Md.dim() != 2 or len(messages_Md) != edges.num_sources:
        raise ValueError(f'expected messages of shape ({edges.num_sources}, d) (got {tuple(messages_Md.shape)})')
    if messages_Md.device != edges.source_E.device or not messages_Md.is_floating_point():
        raise ValueError(
            f'expected messages of a float dtype on {edges.source_E.device} '
            f'(got {messages_Md.dtype} on {messages_Md.device})'
        )
    if weight_E is not None and edges.weight_E is not None:
        raise ValueError('expected factors in the schedule or as weight_E (got both)')
    factors = edges.weight_E if weight_E is None else weight_E
    like = edges.source_E.shape, messages_Md.dtype, messages_Md.device
    if factors is not None and (factors.shape, factors.dtype, factors.device) != like:
        raise ValueError(
            f'expected factors of shape ({len(edges)},) in the dtype of the messages, {messages_Md.dtype} on '
            f'{messages_Md.device} (got {tuple(factors.shape)}, {factors.dtype} on {factors.device})'
        )
    chosen = choose_backend(messages_Md, backend, deterministic=deterministic)
    sorted_E = None if weight_E is None else edges.arranged(weight_E)
    total_Td: Tensor = _Sum.apply(messages_Md, sorted_E, edges, chosen)
    return total_Td


def summed(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None, backend: Backend) -> Tensor:
    """The sum without checks and without a gradient; ``weight_E`` is in the order of ``edges``."""
    if not len(edges) or not messages_Md.numel():
        return messages_Md.new_zeros(edges.num_targets, messages_Md.shape[1])
    return backend.sums(messages_Md.contiguous(), edges, edges.weight_E if weight_E is None else weight_E)


class _Sum(torch.autograd.Function):
    """The sum. Its gradient for the messages is a sum along the transposed edges; for the factors, dot products."""

    @staticmethod
    def forward(ctx: Any, messages_Md: Tensor, weight_E: Tensor | None, edges: Edges, backend: Backend) -> Tensor:
        ctx.edges, ctx.backend = edges, backend
        # Without a gradient for the factors the messages need not be kept.
        ctx.save_for_backward(messages_Md if ctx.needs_input_grad[1] else None, weight_E)
        return summed(messages_Md, edges, weight_E, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_Td: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        edges, (messages_Md, weight_E) = ctx.edges, ctx.saved_tensors
        of_messages = of_weight = None
        if ctx.needs_input_grad[0]:
            back = edges.transposed
            weight_back_E = None if weight_E is None else back.arranged(weight_E)
            of_messages = summed(gradient_Td, back, weight_back_E, ctx.backend)
        if ctx.needs_input_grad[1]:
            if len(edges) and messages_Md.numel():
                of_weight = ctx.backend.dots(messages_Md.contiguous(), gradient_Td.contiguous(), edges)
            else:
                of_weight = torch.zeros_like(weight_E)
        return of_messages, of_weight, None, None
