"""Edges in the order in which kernels read them: sorted by target."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """Edges sorted by their targets, as compressed rows: those into target t are at pointer[t] to pointer[t + 1].

    :meth:`of` sorts and checks; the constructor takes what is sorted already, and checks nothing. Made once for many
    sums, it caches what they need, the transpose for their gradients included.

    Attributes:
        source_E: Index (E,), int32 or int64: row of the messages that each edge carries.
        pointer_T1: (T + 1,) of the same dtype: where the edges into each target begin, and where the last ones end.
        num_sources: Number M of rows that an edge can carry.
        weight_E: (E,): factor of each edge in this order, if it is the same in all sums.
        order_E: (E,): position of each edge among those that were given; None if they were in this order.
    """

    source_E: Tensor
    pointer_T1: Tensor
    num_sources: int
    weight_E: Tensor | None = None
    order_E: Tensor | None = None

    @classmethod
    def of(
        cls, source_E: Tensor, target_E: Tensor, *, num_sources: int, num_targets: int, weight_E: Tensor | None = None
    ) -> Edges:
        """Sort edges by target. Those of one target keep their order, so that sums are the same each time.

        Args:
            source_E: int32 or int64 (E,): row of the messages that each edge carries.
            target_E: The same dtype, (E,): row of the result that each edge adds to, in any order.
            num_sources: Number M of rows of the messages.
            num_targets: Number T of rows of the result.
            weight_E: (E,): factor of each edge, if it is the same in all sums.

        Raises:
            ValueError: if shapes, dtypes or devices are not the expected ones.
            IndexError: if an edge names a row outside of 0..M-1 or 0..T-1.
        """
        for name, index_E in (('source_E', source_E), ('target_E', target_E)):
            if index_E.dtype not in (torch.int32, torch.int64) or index_E.dim() != 1:
                raise ValueError(f'expected {name} as int32 or int64 of shape (E,) (got {_described(index_E)})')
        like = source_E.shape, source_E.device
        for name, other in (('target_E', target_E), ('weight_E', source_E if weight_E is None else weight_E)):
            if (other.shape, other.device) != like or (other is target_E and other.dtype != source_E.dtype):
                raise ValueError(f'expected {name} like source_E, {_described(source_E)} (got {_described(other)})')
        _check_range('source_E', source_E, num_sources)
        _check_range('target_E', target_E, num_targets)
        order_E = None
        if bool((target_E[1:] < target_E[:-1]).any()):
            target_E, order_E = target_E.sort(stable=True)
            source_E = source_E[order_E]
            weight_E = None if weight_E is None else weight_E[order_E]
        # Kernels do not read strided tensors.
        source_E, weight_E = source_E.contiguous(), None if weight_E is None else weight_E.contiguous()
        return cls(source_E, _pointer(target_E, num_targets), num_sources, weight_E, order_E)

    def __len__(self) -> int:
        return len(self.source_E)

    @property
    def num_targets(self) -> int:
        """Number T of rows of a result."""
        return len(self.pointer_T1) - 1

    @functools.cached_property
    def target_E(self) -> Tensor:
        """(E,): row of the result that each edge adds to, ascending."""
        rows = torch.arange(self.num_targets, dtype=self.source_E.dtype, device=self.source_E.device)
        return rows.repeat_interleave(self.pointer_T1.diff(), output_size=len(self))

    @functools.cached_property
    def transposed(self) -> Edges:
        """The edges from target to source, sorted by source: gradients of messages are sums along them.

        Their :attr:`order_E` holds positions among these edges.
        """
        source_E, order_E = self.source_E.sort(stable=True)
        weight_E = None if self.weight_E is None else self.weight_E[order_E]
        pointer = _pointer(source_E, self.num_sources)
        return Edges(self.target_E[order_E], pointer, self.num_targets, weight_E, order_E)

    def arranged(self, values_E: Tensor) -> Tensor:
        """Values of the edges, given in the caller's order, in the sorted one."""
        return values_E if self.order_E is None else values_E.index_select(0, self.order_E)


def _described(tensor: Tensor) -> str:
    return f'{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}'


def _check_range(name: str, index_E: Tensor, limit: int) -> None:
    if len(index_E):
        least, most = index_E.aminmax()
        if least < 0 or most >= limit:
            raise IndexError(f'expected {name} in 0..{limit - 1} (got {int(least)}..{int(most)})')


def _pointer(sorted_E: Tensor, rows: int) -> Tensor:
    """(rows + 1,): where each row begins. By bisection: counting is not deterministic on a GPU."""
    row = torch.arange(rows + 1, dtype=sorted_E.dtype, device=sorted_E.device)
    return torch.searchsorted(sorted_E.contiguous(), row, out_int32=sorted_E.dtype == torch.int32)
