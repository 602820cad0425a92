"""What a GHN can be asked to decode, and how requests are put together so that the matrix products are large."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from timm_ghn.nn.config import GHNConfig

#: Elements of temporary tensors in one chunk, unless told otherwise: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24

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
    """

    kind: DecodeKind
    node: int
    size: tuple[int, int, int, int]

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
class Cut:
    """What is decoded from the pixels of a window; requests with the same cut share a matrix product.

    Attributes:
        outputs: Rows o of the decoder that are needed.
        inputs: Columns i.
        height: Wanted height; the window's, or larger where the kernel exceeds the map.
        width: Wanted width.
        head: Whether the rows go through the class predictor.
    """

    outputs: int
    inputs: int
    height: int
    width: int
    head: bool


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


def group_requests(
    requests: Iterable[tuple[int, DecodeRequest]], config: GHNConfig
) -> dict[Window, list[tuple[Cut, int, int]]]:
    """Group requests for tensors by the window that they are cut from.

    Args:
        requests: Requests of the kinds TENSOR and HEAD_WEIGHT, with their indices.
        config: Of the GHN.

    Returns:
        For each window its (cut, index, node), equal cuts next to each other. Everything is in the order of first
        appearance.
    """
    groups: dict[Window, dict[Cut, list[tuple[Cut, int, int]]]] = {}
    for index, request in requests:
        head = request.kind is DecodeKind.HEAD_WEIGHT
        outputs, inputs, height, width = request.size
        if head:
            height = width = 1
        outputs = min(outputs, config.num_classes if head else config.max_shape[0])
        cut = Cut(outputs, min(inputs, config.max_shape[1]), height, width, head)
        by_cut = groups.setdefault(window_of(height, width, config), {})
        by_cut.setdefault(cut, []).append((cut, index, request.node))
    return {window: [job for jobs in by_cut.values() for job in jobs] for window, by_cut in groups.items()}


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
