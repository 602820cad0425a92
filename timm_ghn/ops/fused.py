"""Triton kernels: gather, scale and sum at once, without a tensor of one row for each edge.

They add in float32. A program owns the rows that it writes: there are no atomic additions, and equal inputs give equal
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from timm_ghn.ops.edges import Edges

#: Edges that a program of the sum reads at once, and edges that one of the dot products owns.
_EDGES = 16
#: Most features that a program reads at once.
_FEATURES = 128


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    messages, source, pointer, weight, out, width, WEIGHTED: tl.constexpr, EDGES: tl.constexpr, FEATURES: tl.constexpr
):
    """One target and some features: out[t, :] = sum over e of w[e] m[source[e], :]."""
    target = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < width
    begin = tl.load(pointer + target).to(tl.int64)
    end = tl.load(pointer + target + 1).to(tl.int64)
    total = tl.zeros((FEATURES,), dtype=tl.float32)
    for at in range(begin, end, EDGES):
        edge = at + tl.arange(0, EDGES)
        real = edge < end
        row = tl.load(source + edge, mask=real, other=0).to(tl.int64)
        place = row[:, None] * width + feature[None, :]
        carried = tl.load(messages + place, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            carried *= tl.load(weight + edge, mask=real, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(carried, 0)
    tl.store(out + target * width + feature, total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _dot_kernel(  # type: ignore[no-untyped-def]
    messages, gradient, source, target, out, num_edges, width, EDGES: tl.constexpr, FEATURES: tl.constexpr
):
    """Some edges: out[e] = <m[source[e], :], g[target[e], :]>."""
    edge = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    real = edge < num_edges
    row = tl.load(source + edge, mask=real, other=0).to(tl.int64)
    column = tl.load(target + edge, mask=real, other=0).to(tl.int64)
    total = tl.zeros((EDGES,), dtype=tl.float32)
    for at in range(0, width, FEATURES):
        feature = at + tl.arange(0, FEATURES)
        mask = real[:, None] & (feature < width)[None, :]
        carried = tl.load(messages + row[:, None] * width + feature[None, :], mask=mask, other=0.0)
        arriving = tl.load(gradient + column[:, None] * width + feature[None, :], mask=mask, other=0.0)
        total += tl.sum(carried.to(tl.float32) * arriving.to(tl.float32), 1)
    tl.store(out + edge, total.to(out.dtype.element_ty), mask=real)


def fused_sums(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> Tensor:
    """The sums (T, d) in one kernel; arguments as in :class:`timm_ghn.ops.backends.Backend`."""
    width = messages_Md.shape[1]
    out_Td = messages_Md.new_empty(edges.num_targets, width)
    features = min(_FEATURES, triton.next_power_of_2(width))
    _sum_kernel[edges.num_targets, triton.cdiv(width, features)](
        messages_Md,
        edges.source_E,
        edges.pointer_T1,
        messages_Md if weight_E is None else weight_E.contiguous(),
        out_Td,
        width,
        WEIGHTED=weight_E is not None,
        EDGES=_EDGES,
        FEATURES=features,
    )
    return out_Td


def fused_dots(messages_Md: Tensor, gradient_Td: Tensor, edges: Edges) -> Tensor:
    """The dot products (E,) in one kernel; arguments as in :class:`timm_ghn.ops.backends.Backend`."""
    width = messages_Md.shape[1]
    out_E = torch.empty(len(edges), dtype=messages_Md.dtype, device=messages_Md.device)
    _dot_kernel[(triton.cdiv(len(edges), _EDGES),)](
        messages_Md,
        gradient_Td,
        edges.source_E,
        edges.target_E,
        out_E,
        len(edges),
        width,
        EDGES=_EDGES,
        FEATURES=min(_FEATURES, triton.next_power_of_2(width)),
    )
    return out_E
