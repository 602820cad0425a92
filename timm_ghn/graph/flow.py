"""How data flows through a recording: which ops have it, who reads whom, and which parameters join it where."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from timm_ghn.graph.autograd import Op
from timm_ghn.graph.trace import Recording
from timm_ghn.graph.vocabulary import is_layer

#: Ops that multiply data with weights; a chain of ops without data that contains one is a network of its own, if it
#: has several weights or is added to the data (and not multiplied, as a computed kernel is).
COMPUTE = frozenset(
    {'Addmm', 'Mm', 'Bmm', 'Baddbmm', 'Addbmm', 'Convolution', 'ConvolutionOverrideable', 'Mv', 'Addmv'}
)

#: Ops that arrange elements in another way and change none of them.
RESHAPES = frozenset(
    {'Clone', 'Expand', 'Permute', 'Squeeze', 'T', 'ToCopy', 'Transpose', 'UnsafeView', 'Unsqueeze', 'View'}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """A parameter that an op brings to the data.

    Attributes:
        name: Its name.
        through: Kinds of the ops without data on its way to the op.
    """

    name: str
    through: frozenset[str] = frozenset()

    @property
    def unchanged(self) -> bool:
        """Whether its elements reach the op as they are, or normalised (in weight normalisation)."""
        return all(kind in RESHAPES or kind.startswith('WeightNorm') for kind in self.through)


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """The data's way through a recording.

    Attributes:
        recording: What the forward pass did.
        order: Ops in an order in which each comes behind its inputs.
        readers: Ops that read each op.
        data: Whether an op depends on the image, or belongs to a network that computes from constants.
    """

    recording: Recording
    order: tuple[int, ...]
    readers: tuple[tuple[int, ...], ...]
    data: tuple[bool, ...]

    @classmethod
    def of(cls, recording: Recording) -> Flow:
        """Follow the data through a recording."""
        readers: list[list[int]] = [[] for _ in recording.ops]
        for index, op in enumerate(recording.ops):
            for child in op.children:
                readers[child].append(index)
        order = _inputs_first(recording.ops)
        return cls(recording, order, tuple(map(tuple, readers)), _with_data(recording, order))

    @property
    def ops(self) -> tuple[Op, ...]:
        """All ops of the recording."""
        return self.recording.ops

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {info.name: info.shape for info in self.recording.parameters}

    def data_inputs(self, index: int) -> list[int]:
        """Ops with data that an op reads; one that it reads twice is there twice."""
        return [child for child in self.ops[index].children if self.data[child]]

    def joining(self, index: int) -> list[Joined]:
        """Parameters that an op reads directly or through ops without data, each once."""
        found: dict[str, Joined] = {}
        stack: list[tuple[int | str, frozenset[str]]] = [
            (item, frozenset()) for item in reversed(self.ops[index].inputs)
        ]
        while stack:
            item, through = stack.pop()
            if isinstance(item, str):
                found.setdefault(item, Joined(item, through))
            elif not self.data[item]:
                through |= {self.ops[item].kind}
                stack.extend((below, through) for below in reversed(self.ops[item].inputs))
        return list(found.values())

    def owner(self, name: str) -> nn.Module:
        """The layer that a parameter belongs to: also one whose weight is computed from it (a parametrisation)."""
        module = self.recording.owners[name]
        if not isinstance(module, parametrize.ParametrizationList):
            return module
        path = name.split('.')
        return self.recording.model.get_submodule('.'.join(path[: path.index('parametrizations')]))

    @functools.cached_property
    def norms_apart(self) -> frozenset[str]:
        """Parameters that weight normalisation reads as the norm, not as the direction of a weight."""
        pairs = [op.inputs for op in self.ops if op.kind.startswith('WeightNorm') and len(op.inputs) == 2]
        return frozenset(norm for _, norm in pairs if isinstance(norm, str))

    def kernel_of(self, index: int, joined: Joined, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape (out, in, ...) of the kernels that a parameter holds, where its own shape is another one.

        Rows of a matrix may be kernels that the data mixes to one for each image (a conditional convolution); and a
        matrix that data is multiplied with from the left is stored as (in, out).
        """
        op = self.ops[index]
        if len(shape) != 2 or op.kind not in ('Mm', 'Addmm'):
            return None
        at = index
        while len(readers := self.readers[at]) == 1:
            reader = self.ops[readers[0]]
            if reader.kernel is not None and reader.kernel_op == at:
                images, rest = divmod(math.prod(reader.kernel), shape[1])
                if not rest and not reader.kernel[0] % images:
                    return reader.kernel[0] // images, *reader.kernel[1:]
            if reader.kind not in RESHAPES:
                break
            at = readers[0]
        is_right = len(op.inputs) > 1 and op.inputs[-1] == joined.name
        return shape[::-1] if is_right and not is_layer(self.owner(joined.name)) else None

    def blocks_of(self, index: int, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
        """(rows, columns, height, width) of the blocks in which a positional embedding (1, blocks, positions, C) lies.

        None where the data that it is added to is no square map cut into blocks.
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


def _inputs_first(ops: Sequence[Op]) -> tuple[int, ...]:
    """Order in which every op comes behind its inputs."""
    waiting = [len(set(op.children)) for op in ops]
    readers: list[list[int]] = [[] for _ in ops]
    for index, op in enumerate(ops):
        for child in set(op.children):
            readers[child].append(index)
    order = [index for index, count in enumerate(waiting) if not count]
    for index in order:
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                order.append(reader)
    return tuple(order)


def _with_data(recording: Recording, order: Sequence[int]) -> tuple[bool, ...]:
    """Which ops depend on the image, or belong to a network that computes from constants (a position MLP).

    A table that is read by multiplying it with constants is no network: its rank tells it from a layer's weight.
    """
    ops = recording.ops
    shapes = {info.name: info.shape for info in recording.parameters}
    data = [False] * len(ops)
    computes = [False] * len(ops)
    weights: list[frozenset[str]] = [frozenset()] * len(ops)
    for index in order:
        op = ops[index]
        data[index] = op.reads_image or any(data[child] for child in op.children)
        computes[index] = op.kind in COMPUTE or any(computes[child] for child in op.children)
        own = {name for name in op.parameters if len(shapes[name]) > 1}
        weights[index] = frozenset(own).union(*(weights[child] for child in op.children))
    layers = {
        info.name for info in recording.parameters if len(info.shape) == 2 or is_layer(recording.owners[info.name])
    }
    stack = [
        child
        for index, op in enumerate(ops)
        if data[index]
        for child in op.children
        if not data[child]
        and computes[child]
        and (len(weights[child]) > 1 or (op.kind == 'Add' and weights[child] & layers))
    ]
    while stack:
        index = stack.pop()
        if not data[index] and computes[index]:
            data[index] = True
            stack.extend(ops[index].children)
    return tuple(data)
