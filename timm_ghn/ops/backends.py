"""Backends: ways to compute one sum over edges and the dot products that are the gradient of its factors.

All of them read the same sorted edges and agree up to rounding. :mod:`timm_ghn.ops.aggregation` makes them
differentiable.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from timm_ghn.ops.edges import Edges

#: Elements of a temporary (edges, d) tensor: a few megabytes, which stay in the cache of a processor.
CHUNK_ELEMENTS = 2**20

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _rows(table: Tensor, index_E: Tensor) -> Tensor:
    """Rows of a table, half precision as float32: all backends add in at least float32."""
    return table.index_select(0, index_E).to(torch.promote_types(table.dtype, torch.float32))


def _carried(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> Tensor:
    """The message of each edge, multiplied by its factor."""
    carried_Ed = _rows(messages_Md, edges.source_E)
    return carried_Ed if weight_E is None else carried_Ed * weight_E[:, None]


def _gathered_dots(messages_Md: Tensor, gradient_Td: Tensor, edges: Edges) -> Tensor:
    step = max(1, CHUNK_ELEMENTS // max(1, messages_Md.shape[1]))
    parts = zip(edges.source_E.split(step), edges.target_E.split(step), strict=True)
    dots = [(_rows(messages_Md, source) * _rows(gradient_Td, target)).sum(1) for source, target in parts]
    return torch.cat(dots).to(messages_Md.dtype)


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to sum over edges.

    Attributes:
        name: Its name in ``backend=`` and :func:`use_backend`.
        sums: (messages_Md, edges, weight_E) -> (T, d). The messages are contiguous; ``weight_E``, in the order of the
            sorted edges, takes the place of ``edges.weight_E``; None stands for factors of 1.
        dots: (messages_Md, gradient_Td, edges) -> (E,): <m[source[e]], g[target[e]]>; both tensors are contiguous.
        deterministic_on: Types of device on which equal inputs give equal bits.
        dtypes: Of the messages.
        missing: What it lacks to run on a type of device, or None.
    """

    name: str
    sums: Callable[[Tensor, Edges, Tensor | None], Tensor]
    dots: Callable[[Tensor, Tensor, Edges], Tensor] = _gathered_dots
    deterministic_on: tuple[str, ...] = ('cpu', 'cuda')
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    missing: Callable[[str], str | None] = lambda device: None

    def problem(self, device: str, dtype: torch.dtype, *, deterministic: bool) -> str | None:
        """Why it cannot run, in words that follow its name; None if it can."""
        if dtype not in self.dtypes:
            return f'computes in {", ".join(map(str, self.dtypes))} (got {dtype})'
        if deterministic and device not in self.deterministic_on:
            return f'is not deterministic on {device}'
        return self.missing(device)


def _index_add(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> Tensor:
    carried_Ed = _carried(messages_Md, edges, weight_E)
    total_Td = carried_Ed.new_zeros(edges.num_targets, messages_Md.shape[1])
    return total_Td.index_add_(0, edges.target_E, carried_Ed).to(messages_Md.dtype)


def _bag(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> Tensor:
    """An embedding bag is this sum: rows of a table, scaled, added up bag by bag, without a copy for each edge."""
    scale_by_frequency, mode_sum, sparse, with_end = False, 0, False, True
    total_Td: Tensor = torch.embedding_bag(
        messages_Md, edges.source_E, edges.pointer_T1, scale_by_frequency, mode_sum, sparse, weight_E, with_end
    )[0]
    return total_Td


def _segments(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> Tensor:
    """torch-scatter's ``segment_csr`` (pytorch-scatter.readthedocs.io): sum of each run of rows."""
    segment_csr = importlib.import_module('torch_scatter').segment_csr
    total_Td: Tensor = segment_csr(_carried(messages_Md, edges, weight_E), edges.pointer_T1.long(), reduce='sum')
    return total_Td.to(messages_Md.dtype)


def _fused(messages_Md: Tensor, edges: Edges, weight_E: Tensor | None) -> Tensor:
    from timm_ghn.ops.fused import fused_sums

    return fused_sums(messages_Md, edges, weight_E)


def _fused_dots(messages_Md: Tensor, gradient_Td: Tensor, edges: Edges) -> Tensor:
    from timm_ghn.ops.fused import fused_dots

    return fused_dots(messages_Md, gradient_Td, edges)


@functools.cache
def missing_package(module: str) -> str | None:
    """Why an optional package cannot be used: it is absent, or built for another torch; None if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f'needs {module.replace("_", "-")}: {error}'
    return None


def _triton_missing(device: str) -> str | None:
    problem = missing_package('triton')
    if problem or device == 'cuda' or os.environ.get('TRITON_INTERPRET') == '1':
        return problem
    return f'needs a GPU (got {device}), or TRITON_INTERPRET=1 in the environment to be tested without one'


#: By name. On a GPU index_add adds in any order; the others add the edges of a target one after another, or in a tree
#: of fixed shape.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend('index_add', _index_add, deterministic_on=('cpu',)),
        Backend('bag', _bag),
        Backend('scatter', _segments, missing=lambda device: missing_package('torch_scatter')),
        Backend('triton', _fused, _fused_dots, dtypes=(torch.float32, torch.bfloat16), missing=_triton_missing),
    )
}

#: What 'auto' tries in this order. On a CPU the embedding bag is the fastest (benchmarks/scatter.py); on a GPU nothing
#: has been measured yet.
_PREFERRED = {'cpu': ('bag',), 'cuda': ('triton', 'scatter', 'bag')}

_asked_for: contextvars.ContextVar[str] = contextvars.ContextVar('backend', default='auto')


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let all sums over edges within the context, those of GHN-1 and GHN-2 included, use one backend.

    Args:
        name: One of :data:`BACKENDS`, or ``'auto'``.

    Raises:
        ValueError: if there is none of that name.
    """
    _check_name(name)
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


def backend_in_use() -> str:
    """The name that :func:`use_backend` gave, ``'auto'`` outside of it."""
    return _asked_for.get()


def choose_backend(like: Tensor, name: str | None = None, *, deterministic: bool | None = None) -> Backend:
    """The backend that sums messages like these.

    Args:
        like: Messages, or any tensor of their device and dtype.
        name: One of :data:`BACKENDS`; ``'auto'`` for the fastest deterministic one that can run; None for
            :func:`backend_in_use`.
        deterministic: Whether equal inputs must give equal bits; None asks torch's
            ``are_deterministic_algorithms_enabled``.

    Raises:
        ValueError: if the named backend does not exist or cannot run, see :meth:`Backend.problem`.
    """
    name = backend_in_use() if name is None else name
    device, dtype = like.device.type, like.dtype
    if name == 'auto':
        names = _PREFERRED.get(device, ('bag',))
        return next(b for b in map(BACKENDS.__getitem__, names) if not b.problem(device, dtype, deterministic=True))
    _check_name(name)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    problem = BACKENDS[name].problem(device, dtype, deterministic=deterministic)
    if problem is not None:
        raise ValueError(f"backend {name!r} {problem}; 'auto' takes one that can run")
    return BACKENDS[name]


def _check_name(name: str) -> None:
    if name not in ('auto', *BACKENDS):
        raise ValueError(f"expected a backend among 'auto', {', '.join(map(repr, BACKENDS))} (got {name!r})")
