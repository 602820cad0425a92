"""Sums for consecutive targets at a time, for networks that need the first ones before the others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from timm_ghn.ops.aggregation import summed
from timm_ghn.ops.backends import Backend, choose_backend
from timm_ghn.ops.edges import Edges

#: Multiplications of a matrix that cost as much as the start of a sum over edges, and as one multiplication there.
#: Fitted to times of both, float32, one thread of an AMD EPYC with AVX-512: a product with a matrix takes 2.3
#: microseconds and 1 / 40 ns for each of its multiplications, a bag 4.0 microseconds and 1 / 28 ns.
#: benchmarks/scatter.py checks the choice.
DENSE_START = 64_000
DENSE_PER_EDGE = 1.4


@dataclasses.dataclass(frozen=True, eq=False)
class DenseRows:
    """The edges into n consecutive targets as a matrix (n, W) over a window of W rows of the messages.

    The window reaches from the first source of an edge to the last.
    """

    window: slice
    matrix_nW: Tensor

    def sum(self, messages_Md: Tensor) -> Tensor:
        """The sums (n, d), without a gradient. Rows of the window that no edge carries must be finite."""
        return self.matrix_nW @ messages_Md[self.window]


@dataclasses.dataclass(frozen=True, eq=False)
class SparseRows:
    """The edges into n consecutive targets, and the backend that sums over them."""

    edges: Edges
    backend: Backend

    def sum(self, messages_Md: Tensor) -> Tensor:
        """The sums (n, d), without a gradient."""
        return summed(messages_Md, self.edges, None, self.backend)


Rows = DenseRows | SparseRows


def split_rows(edges: Edges, sizes: Sequence[int], like: Tensor, *, backend: str = 'auto') -> tuple[Rows, ...]:
    """Cut sorted edges into parts of consecutive targets.

    ``'auto'`` makes them matrices where that is faster on a CPU. In one graph, the matrix of a few targets reaches over
    few sources. In several graphs that are merged, the sources of one lie among those of the others: the matrices of 64
    graphs would be a hundred times as large as the lists of edges.

    Args:
        edges: Edges with factors.
        sizes: Number of targets of each part; T in all.
        like: Messages (M, d) of the device, dtype and number of features that will be summed.
        backend: ``'dense'`` for matrices, one of :data:`timm_ghn.ops.backends.BACKENDS`, or ``'auto'``.

    Raises:
        ValueError: if the backend cannot run.
    """
    starts = list(itertools.accumulate(sizes, initial=0))
    counts = edges.pointer_T1.cpu()[starts].diff().tolist()
    windows = [_window(source_e) for source_e in edges.source_E.cpu().split(counts)]
    elements = sum(size * (window.stop - window.start) for size, window in zip(sizes, windows, strict=True))
    on_cpu = like.device.type == 'cpu'
    budget = len(sizes) * DENSE_START + DENSE_PER_EDGE * len(edges) * like.shape[1]
    if backend == 'dense' or (backend == 'auto' and on_cpu and elements * like.shape[1] <= budget):
        return tuple(_matrices(edges, starts, windows))
    return tuple(_lists(edges, starts, counts, choose_backend(like, backend)))


def _window(source_e: Tensor) -> slice:
    """From the first source to the last."""
    if not len(source_e):
        return slice(0, 0)
    first, last = source_e.aminmax()
    return slice(int(first), int(last) + 1)


def _matrices(edges: Edges, starts: Sequence[int], windows: Sequence[slice]) -> Iterator[DenseRows]:
    assert edges.weight_E is not None
    size_P = torch.tensor(starts, device='cpu').diff()
    width_P = torch.tensor([window.stop - window.start for window in windows], device='cpu')
    first_P = torch.tensor([window.start for window in windows], device='cpu')
    begin_P = (size_P * width_P).cumsum(0) - size_P * width_P
    # Where target 0 and source 0 would be in the matrix of each part, all matrices one after another.
    origin_P = begin_P - torch.tensor(starts[:-1], device='cpu') * width_P - first_P
    target_E = edges.target_E.cpu()
    part_E = torch.arange(len(windows), device='cpu').repeat_interleave(size_P)[target_E]
    place_E = (origin_P[part_E] + target_E * width_P[part_E]).to(edges.source_E.device) + edges.source_E
    elements = edges.weight_E.new_zeros(int((size_P * width_P).sum()))
    elements.index_put_((place_E,), edges.weight_E, accumulate=True)
    matrices = elements.split((size_P * width_P).tolist())
    for matrix, size, window in zip(matrices, size_P.tolist(), windows, strict=True):
        yield DenseRows(window, matrix.view(size, window.stop - window.start))


def _lists(edges: Edges, starts: Sequence[int], counts: list[int], backend: Backend) -> Iterator[SparseRows]:
    assert edges.weight_E is not None
    lists = zip(edges.source_E.split(counts), edges.weight_E.split(counts), strict=True)
    for start, stop, (source_e, weight_e) in zip(starts[:-1], starts[1:], lists, strict=True):
        pointer_n1 = edges.pointer_T1[start : stop + 1]
        yield SparseRows(Edges(source_e, pointer_n1 - pointer_n1[0], edges.num_sources, weight_e), backend)
