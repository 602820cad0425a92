"""A restricted unpickler for checkpoints, which executes nothing.

It is :class:`pickle._Unpickler`, the one in Python, with a smaller table of opcodes: these make numbers, text and
containers. A global must be on a short list, and stands for a function of this module, never for what it names. Bytes
and the elements of tensors stay in the file until they are read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from timm_ghn.errors import CheckpointError, UnsafeCheckpointError

#: Most bytes that are read of a file, the contents of tensors not counted. The largest published GHN has some 110,000.
#: Without a limit, a short file could have a nested pickle read again and again.
MAX_PICKLED = 1 << 20

#: Longest integer, in bytes: longer ones could be made to share one hash.
_MAX_INTEGER = 8

#: Most axes of a tensor, and largest number that describes one. More would only cost time to multiply.
_MAX_RANK = 32
_MAX_SIZE = 1 << 62


class CheckpointFile:
    """A file, open in binary mode, for :mod:`pickle` and :mod:`zipfile`, in which the bytes of tensors are skipped."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self.file, self.label = file, label
        self.size = file.seek(0, os.SEEK_END)
        self.tell, self.seek = file.tell, file.seek
        self._left = MAX_PICKLED
        self.seek(0)

    def error(self, text: str) -> CheckpointError:
        """An error about this file, to be raised by the caller."""
        return CheckpointError(f'{self.label} {text}')

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


@dataclasses.dataclass(eq=False, slots=True)
class StorageRecord:
    """Flat memory of tensors; ``offset`` is unknown until its container has been read to its end."""

    source: CheckpointFile
    dtype: torch.dtype
    numel: int
    offset: int | None = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TensorRecord:
    """A tensor that is still in its file; ``start`` and ``stride`` count elements of the storage."""

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

    def read(self) -> Tensor:
        """Read the elements into fresh memory on the CPU."""
        storage = self.storage
        if storage.offset is None:
            raise storage.source.error(f'lacks the data of a tensor of shape {self.shape}')
        flat = torch.empty(self._extent, dtype=storage.dtype, device='cpu')
        if flat.numel():
            storage.source.seek(storage.offset + self.start * storage.dtype.itemsize)
            array: Any = flat.view(torch.uint8).numpy()
            if storage.source.file.readinto(memoryview(array)) != flat.nbytes:  # type: ignore[attr-defined]
                raise storage.source.error('ends too early: it is truncated or damaged')
        return flat.as_strided(self.shape, self.stride).contiguous()


def are_sizes(numbers: Any) -> bool:
    """Whether numbers can be the sizes or the strides of a tensor."""
    few = isinstance(numbers, (tuple, list)) and len(numbers) <= _MAX_RANK
    return few and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in numbers)


def brief(value: object) -> str:
    """A value from a file, as an error message shows it.

    Containers are shown as their type, except for flat ones of a few numbers: one that refers to another twice, and so
    on for forty levels, would print as 2^40 characters.
    """
    if isinstance(value, tuple) and len(value) <= _MAX_RANK:
        return f'({", ".join(type(item).__name__ if isinstance(item, tuple) else brief(item) for item in value)})'
    if value is None or isinstance(value, (int, float, str)):
        return repr(value[:120] if isinstance(value, str) else value)
    return type(value).__name__


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class BytesRecord:
    """Bytes that stay in the file."""

    offset: int


class _Dictionary(dict[Any, Any]):
    """A dictionary of text and integers: to hash a tuple may take forever, or more stack than there is."""

    def __setitem__(self, key: object, value: object) -> None:
        if type(key) not in (str, int):
            raise TypeError('expected keys that are text or integers')
        super().__setitem__(key, value)


def _rebuild_tensor(storage: Any, start: Any, shape: Any, stride: Any, gradient: Any, hooks: Any) -> TensorRecord:
    return TensorRecord(storage, start, shape, stride)


#: Every global that a checkpoint may name, and its substitute.
_GLOBALS: dict[str, object] = {
    'argparse.Namespace': lambda: _Dictionary(),  # in which trainers keep their options
    'collections.OrderedDict': lambda: _Dictionary(),
    'torch._utils._rebuild_parameter': lambda tensor, gradient, hooks: tensor,
    'torch._utils._rebuild_tensor_v2': _rebuild_tensor,
    'torch.device': lambda kind, index=None: None,
    'torch.DoubleStorage': torch.float64,
    'torch.FloatStorage': torch.float32,
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.LongStorage': torch.int64,
    'torch.IntStorage': torch.int32,
    'torch.ShortStorage': torch.int16,
    'torch.CharStorage': torch.int8,
    'torch.ByteStorage': torch.uint8,
    'torch.BoolStorage': torch.bool,
}
#: Allowed where one checkpoint may be nested in another.
_NESTED = 'torch.storage._load_from_bytes'

#: The opcodes of Python's unpickler that are kept. Those in the last line call the results of find_class and
#: persistent_load.
_KEPT = [
    'PROTO', 'MARK', 'STOP', 'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'BINFLOAT',
    'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_LIST',
    'APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'MEMOIZE', 'BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET',
    'GLOBAL', 'STACK_GLOBAL', 'BINPERSID', 'REDUCE',
]  # fmt: skip


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f'it has the opcode {code:#x}, which no checkpoint needs')


#: The complete table of opcodes.
_OPCODES: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)


class _Unpickler(pickle._Unpickler):
    # Attributes that load() sets.
    read: Callable[[int], bytes]
    append: Callable[[object], None]
    stack: list[Any]

    def __init__(
        self,
        source: CheckpointFile,
        storage: Callable[[Any], StorageRecord] | None,
        nested: Callable[[BytesRecord], object] | None,
    ) -> None:
        super().__init__(source)
        self.source, self.storage, self.nested = source, storage, nested

    def find_class(self, module: str, name: str) -> Any:
        qualified = f'{module}.{name}'
        if qualified == _NESTED and self.nested is not None:
            return self.nested
        if qualified not in _GLOBALS:
            raise UnsafeCheckpointError(
                f'{self.source.label} asks for {qualified[:120]!r}, which is not on the list of what a GHN file may '
                'name; nothing of it was executed. If you trust its author, ask for the weights as safetensors'
            )
        return _GLOBALS[qualified]

    def persistent_load(self, pid: Any) -> StorageRecord:
        if self.storage is None or not isinstance(pid, tuple) or pid[:1] != ('storage',):
            raise pickle.UnpicklingError('it refers to an object outside the file')
        return self.storage(pid)

    def load_frame(self) -> None:
        self.read(8)  # the length of the frame

    def load_dictionary(self) -> None:
        self.append(_Dictionary())

    def load_integer(self) -> None:
        length = self.read(1)[0]
        if length > _MAX_INTEGER:
            raise pickle.UnpicklingError(f'it has an integer of {length} bytes')
        self.append(int.from_bytes(self.read(length), 'little', signed=True))

    def load_bytes(self, width: int) -> None:
        self.append(BytesRecord(self.source.skip(int.from_bytes(self.read(width), 'little'))))

    def load_build(self) -> None:
        self.stack.pop()  # versions of modules, or the options of a trainer, which nobody reads

    dispatch = _Dispatch(
        {code: _OPCODES[code] for code in (getattr(pickle, name)[0] for name in _KEPT)}
        | {
            pickle.FRAME[0]: load_frame,
            pickle.EMPTY_DICT[0]: load_dictionary,
            pickle.LONG1[0]: load_integer,
            pickle.SHORT_BINBYTES[0]: lambda self: self.load_bytes(1),
            pickle.BINBYTES[0]: lambda self: self.load_bytes(4),
            pickle.BINBYTES8[0]: lambda self: self.load_bytes(8),
            pickle.NEWOBJ[0]: _OPCODES[pickle.REDUCE[0]],
            pickle.BUILD[0]: load_build,
        }
    )


def read_pickle(
    source: CheckpointFile,
    *,
    storage: Callable[[Any], StorageRecord] | None = None,
    nested: Callable[[BytesRecord], object] | None = None,
) -> Any:
    """Read a pickle, at whose beginning the file is, as plain containers and records; the file is left just behind it.

    ``storage`` is called with the persistent id of a storage, ``nested`` with the bytes that
    ``torch.storage._load_from_bytes`` would load, where either may occur.

    Raises:
        UnsafeCheckpointError: if it names a global outside the list.
        CheckpointError: if it is damaged, or asks for anything that a checkpoint does not need.
    """
    try:
        return _Unpickler(source, storage, nested).load()
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise source.error(f'is damaged, or no checkpoint: {error}') from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise source.error(f'is damaged: {type(error).__name__} while reading its records') from error
