"""How data flows through a recording: which ops depend on the image, and where parameters join it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from timm_ghn.graph.autograd import Op
from timm_ghn.graph.paths import reachable, topological_order
from timm_ghn.graph.trace import Recording
from timm_ghn.graph.vocabulary import MULTIPLIES, is_layer

#: Ops that rearrange elements without changing them.
RESHAPES = frozenset(
    {'Clone', 'Expand', 'Permute', 'Squeeze', 'T', 'ToCopy', 'Transpose', 'UnsafeView', 'Unsqueeze', 'View'}
)


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """How data flows through a recording.

    Attributes:
        recording: What the forward pass did.
        order: Ops in topological order.
        data: Whether each op depends on the image, or belongs to a network that computes from constants; such ops
            are called ops with data.
    """

    recording: Recording
    order: tuple[int, ...]
    data: tuple[bool, ...]

    @classmethod
    def of(cls, recording: Recording) -> Flow:
        """Follow the data through a recording."""
        order = topological_order({index: op.children for index, op in enumerate(recording.ops)}) or ()
        return cls(recording, tuple(order), _with_data(recording, order))

    @property
    def ops(self) -> tuple[Op, ...]:
        """All ops of the recording."""
        return self.recording.ops

    def data_inputs(self, index: int) -> list[int]:
        """Ops with data that an op reads, as often as it reads them."""
        return [child for child in self.ops[index].children if self.data[child]]

    def joining(self, index: int) -> dict[str, bool]:
        """Parameters that an op reads directly or through ops without data.

        Returns:
            For each, whether its elements reach the op as they are, or normalised (in weight normalisation).
        """
        found: dict[str, bool] = {}
        stack: list[tuple[int | str, bool]] = [(item, True) for item in reversed(self.ops[index].inputs)]
        while stack:
            item, unchanged = stack.pop()
            if isinstance(item, str):
                found.setdefault(item, unchanged)
            elif not self.data[item]:
                kind = self.ops[item].kind
                unchanged = unchanged and (kind in RESHAPES or kind.startswith('WeightNorm'))
                stack.extend((below, unchanged) for below in reversed(self.ops[item].inputs))
        return found

    def owner(self, name: str) -> nn.Module:
        """The layer that a parameter belongs to, also if the layer's weight is computed from it (parametrisation)."""
        module = self.recording.owners[name]
        if not isinstance(module, parametrize.ParametrizationList):
            return module
        path = name.split('.')
        return self.recording.model.get_submodule('.'.join(path[: path.index('parametrizations')]))

    @functools.cached_property
    def norms_apart(self) -> frozenset[str]:
        """Parameters that hold the norm of a weight in weight normalisation (the others hold its direction)."""
        pairs = [op.inputs for op in self.ops if op.kind.startswith('WeightNorm') and len(op.inputs) == 2]
        return frozenset(norm for _, norm in pairs if isinstance(norm, str))

    def kernel_of(self, index: int, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape (out, in, ...) of the kernels that a parameter holds, where its own shape is another one.

        Rows of a matrix may be kernels that are mixed into one for each image (a conditional convolution); and the
        matrix of ``data @ matrix`` is stored as (in, out).
        """
        op = self.ops[index]
        if len(shape) != 2 or op.kind not in ('Mm', 'Addmm'):
            return None
        at = index
        while len(readers := self.recording.readers[at]) == 1:
            reader = self.ops[readers[0]]
            if reader.kernel is not None and reader.kernel_op == at:
                images, rest = divmod(math.prod(reader.kernel), shape[1])
                if not rest and not reader.kernel[0] % images:
                    return reader.kernel[0] // images, *reader.kernel[1:]
            if reader.kind not in RESHAPES:
                break
            at = readers[0]
        is_right = len(op.inputs) > 1 and op.inputs[-1] == name
        return shape[::-1] if is_right and not is_layer(self.owner(name)) else None

    def blocks_of(self, index: int, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
        """(rows, columns, height, width) of the blocks in which a positional embedding (1, blocks, positions, C) lies.

        None unless it is added to a square map that was cut into blocks.
        """
        children = self.data_inputs(index)
        if len(shape) != 4 or len(children) != 1 or shape[1] == shape[2] or shape[1] == 1:
            return None
        at = children[0]
        inner = self.ops[at].sizes
        while self.ops[at].kind in RESHAPES and len(below := self.data_inputs(at)) == 1:
            at = below[0]
            outer = self.ops[at].sizes
            if inner is not None and outer is not None and (len(inner), len(outer)) == (6, 4):
                _, rows, columns, height, width, _ = inner
                cut = (rows * columns, height * width) == shape[1:3]
                square = outer[1] == outer[2]
                whole = (rows * height, columns * width) == outer[1:3]
                return (rows, columns, height, width) if cut and square and whole else None
        return None


def _with_data(recording: Recording, order: Sequence[int]) -> tuple[bool, ...]:
    """Which ops depend on the image, or belong to a network that computes from constants (a position MLP).

    Such a network multiplies, and has several weights or is added to the data (a computed kernel is multiplied). A
    table that is read by multiplying it with constants is no network: its rank tells it from a layer's weight.
    """
    ops, shapes = recording.ops, recording.shapes
    data = [False] * len(ops)
    computes = [False] * len(ops)
    weights: list[frozenset[str]] = [frozenset()] * len(ops)
    for index in order:
        op = ops[index]
        data[index] = op.reads_image or any(data[child] for child in op.children)
        computes[index] = op.kind in MULTIPLIES or any(computes[child] for child in op.children)
        own = {name for name in op.parameters if len(shapes[name]) > 1}
        weights[index] = frozenset(own).union(*(weights[child] for child in op.children))
    layers = {name for name, shape in shapes.items() if len(shape) == 2 or is_layer(recording.owners[name])}
    start = [
        child
        for index, op in enumerate(ops)
        if data[index]
        for child in op.children
        if not data[child]
        and computes[child]
        and (len(weights[child]) > 1 or (op.kind == 'Add' and weights[child] & layers))
    ]
    for index in reachable(start, lambda at: [c for c in ops[at].children if computes[c] and not data[c]]):
        data[index] = True
    return tuple(data)
