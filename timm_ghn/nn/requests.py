"""What a GHN can be asked to decode, and how requests are put together so that the matrix products are large."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from timm_ghn.graph.channels import PLAIN, ChannelLayout
from timm_ghn.nn.config import GHNConfig

#: Elements of each temporary tensor, unless told otherwise: 8 MiB in float32.
CHUNK_ELEMENTS = 2**21
#: Multiplications that take as long as the overhead of one more matrix product.
CALL_WORK = 2**24
#: Channels that are multiplied at once; products of other numbers of them are slower.
VECTOR = 16

T = TypeVar('T')


class DecodeKind(enum.Enum):
    """Which decoder answers a request."""

    TENSOR = 'tensor'
    HEAD_WEIGHT = 'head_weight'
    WEIGHT_1D = 'weight_1d'
    BIAS_1D = 'bias_1d'
    HEAD_BIAS = 'head_bias'


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One tensor to decode.

    Attributes:
        kind: What it is.
        node: Row of the node embeddings that it is decoded from.
        size: Wanted (out, in, height, width); (n, 1, 1, 1) for the 1-D kinds.
        layout: How rows and columns of a tensor are numbered.
    """

    kind: DecodeKind
    node: int
    size: tuple[int, int, int, int]
    layout: ChannelLayout = PLAIN

    def __post_init__(self) -> None:
        if len(self.size) != 4 or min(self.size) < 1:
            raise ValueError(f'expected a size of four positive numbers (got {self.size})')
        if self.node < 0:
            raise ValueError(f'expected the row of an embedding, 0 or more (got {self.node})')


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Part of the decoded map that a kernel is cut from."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns of the map."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A tensor with two channel axes to decode: a request, clipped to what the decoder puts out.

    Attributes:
        index: Of the request.
        node: Row of the node embeddings.
        window: Part of the decoded map.
        outputs: Rows o of channels that are needed; all of them for a classifier.
        inputs: Columns i of channels.
        size: Wanted height and width; the window's, or larger where the kernel exceeds the map.
        classes: Rows of a classifier, which the class predictor makes of the channels; 0 for other tensors.
    """

    index: int
    node: int
    window: Window
    outputs: int
    inputs: int
    size: tuple[int, int]
    classes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A rectangle of channels, and the tensors that reach over all of it: they share a matrix product.

    Attributes:
        outputs: Rows of channels.
        inputs: Columns of channels.
        jobs: The tensors.
    """

    outputs: slice
    inputs: slice
    jobs: tuple[Job, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Part of a decoded tensor.

    Attributes:
        index: Of the request.
        values: (o, i, height, width), (k, i) for a classifier, (n,) for a vector.
        output: First row of the tensor that it holds.
        input: First column.
        last: Whether it completes the tensor.
    """

    index: int
    values: Tensor
    output: int = 0
    input: int = 0
    last: bool = True


def joined(blocks: Sequence[Block]) -> Tensor:
    """The tensor that blocks make up: each set of columns in parts with ascending rows."""
    if len(blocks) == 1:
        return blocks[0].values
    columns: dict[int, list[Tensor]] = {}
    for block in blocks:
        columns.setdefault(block.input, []).append(block.values)
    return torch.cat([torch.cat(columns[first]) for first in sorted(columns)], 1)


def window_of(height: int, width: int, config: GHNConfig) -> Window:
    """Part of the map of height H and width W that a kernel is cut from.

    'center' (GHN-3): rows max(0, c - floor(h / 2)) to c + ceil(h / 2) - 1 with c = floor(H / 2), columns likewise;
    'corner' (GHN-1, GHN-2): the first ones. A kernel that exceeds the map takes all of it.
    """
    size = config.max_shape[2]
    top = left = 0
    if config.window == 'center':
        top, left = (max(0, size // 2 - wanted // 2) for wanted in (height, width))
    return Window(top, left, min(height, size), min(width, size))


def job_of(index: int, request: DecodeRequest, config: GHNConfig) -> Job:
    """What a request of the kinds TENSOR and HEAD_WEIGHT needs of the decoder."""
    head = request.kind is DecodeKind.HEAD_WEIGHT
    outputs, inputs, height, width = request.size
    if head:
        height = width = 1
    return Job(
        index,
        request.node,
        window_of(height, width, config),
        config.max_shape[0] if head else min(outputs, config.max_shape[0]),
        min(inputs, config.max_shape[1]),
        (height, width),
        min(outputs, config.num_classes) if head else 0,
    )


def by_window(jobs: Iterable[Job]) -> dict[Window, list[Job]]:
    """Jobs by the window that they are cut from, in the order of first appearance."""
    groups: dict[Window, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.window, []).append(job)
    return groups


def cells_of(jobs: Sequence[Job], *, work: int, elements: int) -> list[Cell]:
    """Divide the channels that tensors need among cells, so that few matrix products do little more than is needed.

    Each tensor needs a rectangle of channels for each of its pixels, all rectangles have a corner in common. Their
    other borders divide the channels into cells. A border is left out where the products that it saves cost less than
    one more call does. Borders of broad tensors are multiples of a vector's length; narrow ones, depthwise kernels
    above all, have cells to themselves.

    Args:
        jobs: Tensors.
        work: Multiplications for one pixel of one channel.
        elements: Bound on what a cell puts out; a row of channels of one cell may exceed it.

    Returns:
        Cells in ascending order of columns and then of rows, for each tensor.
    """
    broad = [job for job in jobs if min(job.outputs, job.inputs) >= VECTOR]
    narrow = [job for job in jobs if min(job.outputs, job.inputs) < VECTOR]
    cells = []
    for group, multiple in ((broad, VECTOR), (narrow, 1)):
        rows = borders([(job.outputs, work * job.inputs * job.window.area) for job in group], multiple)
        columns = borders([(job.inputs, work * job.outputs * job.window.area) for job in group], multiple)
        cells += _cells_between(rows, columns, sorted(group, key=lambda job: -job.outputs), elements)
    return cells


def _cells_between(rows: Sequence[int], columns: Sequence[int], deepest: Sequence[Job], elements: int) -> list[Cell]:
    """Cells between borders; tensors come with the highest number of rows first."""
    cells = []
    for left, right in zip((0, *columns), columns, strict=False):
        reaching = [job for job in deepest if job.inputs > left]
        for top, bottom in zip((0, *rows), rows, strict=False):
            while top < bottom and (members := tuple(job for job in reaching if job.outputs > top)):
                inputs = slice(left, min(right, max(job.inputs for job in members)))
                pixels = sum(job.window.area for job in members)
                step = max(1, elements // (pixels * (inputs.stop - left)))
                outputs = slice(top, min(top + step, bottom, members[0].outputs))
                cells.append(Cell(outputs, inputs, members))
                top = outputs.stop
    return cells


def borders(sizes: Iterable[tuple[int, int]], multiple: int) -> list[int]:
    """Sizes to round up to, so that the waste is small and so is their number.

    Args:
        sizes: Each with the multiplications that one more of it costs.
        multiple: What the results are multiples of.

    Returns:
        Ascending; the last is not below the largest size.
    """
    cost: dict[int, int] = {}
    for size, multiplications in sizes:
        rounded = -(-size // multiple) * multiple
        cost[rounded] = cost.get(rounded, 0) + multiplications
    found: list[int] = []
    waste = pending = last = 0
    for size in sorted(cost):
        waste += pending * (size - last)
        if waste > CALL_WORK:
            found.append(last)
            waste = pending = 0
        pending += cost[size]
        last = size
    return [*found, last] if last else []


def chunks(jobs: Sequence[T], costs: Sequence[int], budget: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into consecutive parts whose costs stay within a budget; a part has at least one member."""
    first = spent = 0
    for index, cost in enumerate(costs):
        if index > first and spent + cost > budget:
            yield jobs[first:index]
            first, spent = index, 0
        spent += cost
    if first < len(jobs):
        yield jobs[first:]
