"""What a reader knows of a checkpoint before it reads the weights: where in the file they are, and their shapes."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, BinaryIO

import torch
from torch import Tensor

from timm_ghn.errors import CheckpointError

#: Most bytes that are read of a file, the contents of tensors not counted. The largest published GHN has some 110,000.
#: Without a limit, a short file could have a nested pickle read again and again.
MAX_PICKLED = 1 << 20

#: Most axes of a tensor, and largest number that describes one. More would only cost time to multiply.
MAX_RANK = 32
MAX_SIZE = 1 << 62


class CheckpointFile:
    """An open file, as :mod:`pickle` and :mod:`zipfile` read it, but for the bytes of tensors, which are stepped over.

    Args:
        file: Open for reading in binary mode.
        label: Its name, for messages.
    """

    def __init__(self, file: BinaryIO, label: str) -> None:
        self.file, self.label = file, label
        self.size = file.seek(0, os.SEEK_END)
        self._left = MAX_PICKLED
        self.seek(0)

    def error(self, text: str) -> CheckpointError:
        """An error about this file, to be raised by the caller."""
        return CheckpointError(f'{self.label} {text}')

    def tell(self) -> int:
        """Where the file is read next."""
        return self.file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another place."""
        return self.file.seek(offset, whence)

    def read(self, count: int = -1) -> bytes:
        """The next ``count`` bytes, which must exist and be few; all that are left if negative."""
        count = self.size - self.tell() if count < 0 else count
        if not 0 <= count <= self._left:
            raise self.error(f'is damaged, or has more than {MAX_PICKLED:,} bytes beside its tensors')
        self._left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.error('ends too early: it is truncated or damaged')
        return data

    def readline(self) -> bytes:
        """The next line."""
        data = self.file.readline(self._left)
        self._left -= len(data)
        if not data.endswith(b'\n'):
            raise self.error('ends too early: it is truncated or damaged')
        return data

    def skip(self, length: int) -> int:
        """Step over the next ``length`` bytes, which must exist; where they begin."""
        start = self.tell()
        if not 0 <= length <= self.size - start:
            raise self.error(f'ends too early: it declares {length:,} more bytes and has {self.size - start:,}')
        self.seek(start + length)
        return start

    def read_into(self, offset: int, flat: Tensor) -> None:
        """Fill a tensor of one dimension with the bytes from ``offset`` on."""
        self.seek(offset)
        target = memory_of(flat)
        while target:
            count = self.file.readinto(target)  # type: ignore[attr-defined]  # every binary file has it
            if not count:
                raise self.error('ends too early: it is truncated or damaged')
            target = target[count:]


@dataclasses.dataclass(eq=False, slots=True)
class StorageRecord:
    """Flat memory of tensors; ``offset`` is unknown until its container has been read to its end."""

    source: CheckpointFile
    dtype: torch.dtype
    numel: int
    offset: int | None = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
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
        error = self.storage.source.error
        if not all(map(are_sizes, ((self.start,), self.shape, self.stride))) or len(self.shape) != len(self.stride):
            raise error(f'holds a tensor of impossible shape {brief(self.shape)} and stride {brief(self.stride)}')
        # Also where a stride is 0: what is read is bounded by the file.
        if max(math.prod(self.shape), self.start + self._extent) > self.storage.numel:
            raise error(f'holds a tensor of shape {self.shape} whose storage has only {self.storage.numel:,} elements')

    @property
    def _extent(self) -> int:
        """How many elements of the storage there are from its first to its last."""
        steps = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return 1 + steps if math.prod(self.shape) else 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, or that are read for it where those are more."""
        return max(math.prod(self.shape), self._extent) * self.storage.dtype.itemsize

    def squeeze_kernel(self) -> TensorRecord:
        """The weight of a 1 x 1 convolution as that of a linear layer; anything else as it is."""
        if len(self.shape) == 4 and self.shape[2:] == (1, 1):
            return dataclasses.replace(self, shape=self.shape[:2], stride=self.stride[:2])
        return self

    def read(self) -> Tensor:
        """Read the elements into fresh memory on the CPU."""
        storage = self.storage
        if storage.offset is None:
            raise storage.source.error(f'lacks the data of a tensor of shape {self.shape}')
        flat = torch.empty(self._extent, dtype=storage.dtype, device='cpu')
        if flat.numel():
            storage.source.read_into(storage.offset + self.start * storage.dtype.itemsize, flat)
        return flat.as_strided(self.shape, self.stride).contiguous()


def memory_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of one dimension, not copied."""
    # Whether an array is a buffer to the type checker depends on the versions of Python and NumPy.
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def are_sizes(numbers: Any) -> bool:
    """Whether numbers can be the sizes or the strides of a tensor."""
    few = isinstance(numbers, (tuple, list)) and len(numbers) <= MAX_RANK
    return few and all(type(n) is int and 0 <= n <= MAX_SIZE for n in numbers)


def brief(value: object) -> str:
    """What a message says of a value from a file.

    Containers are told by their type, except for flat ones of a few numbers: one that refers to another twice, and so
    on for forty levels, would print as 2^40 characters.
    """
    if isinstance(value, tuple) and len(value) <= MAX_RANK:
        return f'({", ".join(type(item).__name__ if isinstance(item, tuple) else brief(item) for item in value)})'
    if value is None or isinstance(value, (int, float, str)):
        return repr(value[:120] if isinstance(value, str) else value)
    return type(value).__name__
