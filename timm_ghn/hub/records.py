"""What a reader knows of a checkpoint before it reads the weights: where in the file they are, and their shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from timm_ghn.errors import CheckpointError

#: Longest string or number that a pickle may hold, in bytes. Tensors do not count: they are spans of the file.
MAX_INLINE = 1 << 20

#: Most axes of a tensor, and largest number that describes one. More would only cost time to multiply.
MAX_RANK = 32
MAX_SIZE = 1 << 62


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Bytes that stay in the file: the first one's position, and how many."""

    offset: int
    length: int


class Source:
    """A part of an open file, read from its start to its end.

    Args:
        file: Open for reading in binary mode.
        span: The part.
        label: The file's name, for messages.
    """

    def __init__(self, file: BinaryIO, span: Span, label: str) -> None:
        self.file, self.label = file, label
        self._end = span.offset + span.length
        file.seek(span.offset)

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return self._end - self.file.tell()

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, which must exist and be few."""
        if count < 0 or count > MAX_INLINE:
            raise self.error(f'declares a value of {count:,} bytes where at most {MAX_INLINE:,} are expected')
        data = self.file.read(count) if count <= self.left else b''
        if len(data) != count:
            raise self.error('ends too early: it is truncated or damaged')
        return data

    def readline(self) -> bytes:
        """The next line, as the text forms of pickles need it."""
        data = self.file.readline(min(self.left, MAX_INLINE))
        if not data.endswith(b'\n'):
            raise self.error('ends too early: it is truncated or damaged')
        return data

    def take(self, length: int) -> Span:
        """Step over the next ``length`` bytes, which must exist."""
        if not 0 <= length <= self.left:
            raise self.error(f'ends too early: it declares {length:,} more bytes and has {self.left:,}')
        span = Span(self.file.tell(), length)
        self.file.seek(length, 1)
        return span

    def part(self, span: Span) -> Source:
        """Another source over a span of the same file; reading it moves this one."""
        return Source(self.file, span, self.label)

    def error(self, text: str) -> CheckpointError:
        """An error about this file, to be raised by the caller."""
        return CheckpointError(f'{self.label} {text}')


@dataclasses.dataclass(slots=True)
class StorageRecord:
    """Flat memory of tensors: ``span`` is unknown until the container has been read to its end."""

    dtype: torch.dtype
    numel: int
    source: Source
    span: Span | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor that is still in its file.

    Attributes:
        storage: Where its elements are.
        start: Position of its first element in the storage.
        shape: Its shape.
        stride: Distance between neighbours along each axis, in elements.
    """

    storage: StorageRecord
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride) or not are_sizes((self.start, *self.shape[:99], *self.stride[:99])):
            shown = f'{brief(self.shape)} and stride {brief(self.stride)}'
            raise self.storage.source.error(f'holds a tensor of impossible shape {shown}')
        numel = math.prod(self.shape)
        last = self.start + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if numel > self.storage.numel or (numel and last >= self.storage.numel):
            raise self.storage.source.error(
                f'holds a tensor of shape {self.shape} whose storage has only {self.storage.numel:,} elements'
            )

    def squeeze_kernel(self) -> TensorRecord:
        """The weight of a 1 x 1 convolution as that of a linear layer; anything else as it is."""
        if len(self.shape) == 4 and self.shape[2:] == (1, 1):
            return dataclasses.replace(self, shape=self.shape[:2], stride=self.stride[:2])
        return self

    def read(self) -> Tensor:
        """Read the elements into fresh memory on the CPU."""
        span, itemsize = self.storage.span, self.storage.dtype.itemsize
        if span is None or span.length < self.storage.numel * itemsize:
            raise self.storage.source.error(f'lacks the data of a tensor of shape {self.shape}')
        numel = math.prod(self.shape)
        if self.stride == contiguous_stride(self.shape):
            flat = torch.empty(numel, dtype=self.storage.dtype)
            _read_into(self.storage.source, span.offset + self.start * itemsize, flat)
            return flat.view(self.shape)
        flat = torch.empty(self.storage.numel, dtype=self.storage.dtype)
        _read_into(self.storage.source, span.offset, flat)
        return flat.as_strided(self.shape, self.stride, self.start).contiguous()


def memory_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of one dimension, not copied."""
    # Whether an array is a buffer to the type checker depends on the versions of Python and NumPy.
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _read_into(source: Source, offset: int, flat: Tensor) -> None:
    if not flat.numel():
        return
    source.file.seek(offset)
    target = memory_of(flat)
    while target:
        count = source.file.readinto(target)  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            raise source.error('ends too early: it is truncated or damaged')
        target = target[count:]


def are_sizes(numbers: Sequence[object]) -> bool:
    """Whether numbers can be the sizes, or the sizes, strides and start, of a tensor."""
    return len(numbers) <= 2 * MAX_RANK + 1 and all(type(n) is int and 0 <= n <= MAX_SIZE for n in numbers)


def brief(value: object) -> str:
    """What a message says of a value from a file.

    Containers are told by their type, except for flat ones of a few numbers: one that refers to another twice, and so
    on for forty levels, would print as 2^40 characters.
    """
    if isinstance(value, tuple) and len(value) <= MAX_RANK:
        inner = [brief(item) if isinstance(item, (int, float, str)) else type(item).__name__ for item in value]
        return f'({", ".join(inner)})'
    if isinstance(value, int) and abs(value) > MAX_SIZE:
        return 'a huge integer'
    if value is None or isinstance(value, (int, float, str, bytes)):
        return repr(value[:120] if isinstance(value, (str, bytes)) else value)
    return type(value).__name__


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Distances between neighbours along each axis of a tensor in row-major order, in elements."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
