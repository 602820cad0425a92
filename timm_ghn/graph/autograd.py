"""Read the autograd graph of some outputs into plain records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One backward function of the autograd graph.

    Attributes:
        name: Its class name, e.g. ``'AddBackward0'``.
        inputs: What it reads, in order: the index of another op, or the name of a parameter.
        reads_image: Whether it reads the network's input directly.
        kernel_size: Saved kernel size of a pooling operator, if any.
        dims: Dimensions that a reduction reduces, if it saved them.
        rank: Number of dimensions of what a reduction reduces, if it saved them.
        kernel: Shape of a convolution's kernel, if the kernel is computed by an op.
        kernel_op: Index of that op.
        sizes: Shape of the input of a view.
        kind: The operator's name: the class name up to ``Backward``.
        parameters: Names of the parameters that it reads directly.
        children: Indices of the ops that it reads, in order.
    """

    name: str
    inputs: tuple[int | str, ...]
    reads_image: bool = False
    kernel_size: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    rank: int | None = None
    kernel: tuple[int, ...] | None = None
    kernel_op: int | None = None
    sizes: tuple[int, ...] | None = None
    kind: str = dataclasses.field(init=False, repr=False, compare=False)
    parameters: tuple[str, ...] = dataclasses.field(init=False, repr=False, compare=False)
    children: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Computed here because they are read very often.
        object.__setattr__(self, 'kind', self.name.partition('Backward')[0])
        object.__setattr__(self, 'parameters', tuple(item for item in self.inputs if isinstance(item, str)))
        object.__setattr__(self, 'children', tuple(item for item in self.inputs if isinstance(item, int)))


def walk(outputs: Sequence[Tensor], names: Mapping[int, str]) -> tuple[tuple[Op, ...], tuple[int, ...]]:
    """List the autograd graph depth first from the outputs.

    Args:
        outputs: Tensors; those without a gradient are passed over.
        names: Names of the parameters by the ``id`` of the tensor.

    Returns:
        The ops in depth-first pre-order, and the indices of those that made the outputs.
    """
    order: dict[Any, int] = {}
    below: list[list[Any]] = []
    roots = [output.grad_fn for output in outputs if output.grad_fn is not None]
    stack = roots[::-1]
    while stack:
        function = stack.pop()
        if function in order:
            continue
        order[function] = len(below)
        below.append([child for child, _ in function.next_functions if child is not None])
        stack.extend(child for child in reversed(below[-1]) if not hasattr(child, 'variable'))
    ops = []
    for function, children in zip(order, below, strict=True):
        inputs: list[int | str] = []
        reads_image = False
        for child in children:
            variable = getattr(child, 'variable', None)
            if variable is None:
                inputs.append(order[child])
            elif id(variable) in names:
                inputs.append(names[id(variable)])
            else:
                reads_image = True
        op = _op(function, tuple(inputs), reads_image)
        if op.kind == 'Convolution' and (computes := function.next_functions[1][0]) in order:
            # Not function._saved_weight: reading a saved tensor makes activation checkpointing recompute its block.
            computed = computes._input_metadata[function.next_functions[1][1]]
            op = dataclasses.replace(op, kernel=tuple(map(int, computed.shape)), kernel_op=order[computes])
        ops.append(op)
    return tuple(ops), tuple(dict.fromkeys(order[root] for root in roots))


def _op(function: Any, inputs: tuple[int | str, ...], reads_image: bool) -> Op:
    """A backward function as a record."""
    name = type(function).__name__
    if name.endswith('Backward'):
        name += '0'  # of a stand-in: autograd appends the number of the overload
    kernel_size = dims = rank = sizes = None
    if 'Pool' in name and hasattr(function, '_saved_kernel_size'):
        kernel_size = tuple(int(k) for k in function._saved_kernel_size)
    if name.startswith('Mean') and hasattr(function, '_saved_self_sym_sizes'):
        rank = len(function._saved_self_sym_sizes)
        saved = getattr(function, '_saved_dim', None)
        # Negative dimensions are saved as unsigned 64-bit numbers.
        dims = None if saved is None else tuple((int(d) + 2**63) % 2**64 - 2**63 for d in saved)
        dims = tuple(range(rank)) if dims is None else tuple(d % rank for d in dims)
    if name.startswith(('ViewBackward', 'UnsafeViewBackward')):
        sizes = tuple(int(n) for n in function._saved_self_sym_sizes)
    return Op(name, inputs, reads_image, kernel_size, dims, rank, sizes=sizes)
