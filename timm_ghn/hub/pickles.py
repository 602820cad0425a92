"""Pickles of checkpoints, read by Python's own machine without anything that could run.

:class:`pickle._Unpickler` is the machine in Python, whose table of instructions can be cut down. What is left makes
numbers, text and containers. A global is a name on a short list, which stands for a function of ours and never for
what it names; bytes stay in the file until the tensor is read that they belong to.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable
from typing import Any

import torch

from timm_ghn.errors import CheckpointError, UnsafeCheckpointError
from timm_ghn.hub.records import CheckpointFile, StorageRecord, TensorRecord

#: Longest integer, in bytes: longer ones could be made to share one hash.
_MAX_INTEGER = 8


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


#: Every global that a checkpoint may name, and what stands for it.
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

#: The instructions that are left as they are. Those in the last line call what find_class and persistent_load gave.
_KEPT = [
    'PROTO', 'MARK', 'STOP', 'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'BINFLOAT',
    'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_LIST',
    'APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'MEMOIZE', 'BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET',
    'GLOBAL', 'STACK_GLOBAL', 'BINPERSID', 'REDUCE',
]  # fmt: skip


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f'it asks for the instruction {code:#x}, which no checkpoint needs')


#: The machine's own table.
_MACHINE: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)


class _Unpickler(pickle._Unpickler):
    # What the machine sets when it begins.
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
        self.read(8)  # how much may be read ahead

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
        {code: _MACHINE[code] for code in (getattr(pickle, name)[0] for name in _KEPT)}
        | {
            pickle.FRAME[0]: load_frame,
            pickle.EMPTY_DICT[0]: load_dictionary,
            pickle.LONG1[0]: load_integer,
            pickle.SHORT_BINBYTES[0]: lambda self: self.load_bytes(1),
            pickle.BINBYTES[0]: lambda self: self.load_bytes(4),
            pickle.BINBYTES8[0]: lambda self: self.load_bytes(8),
            pickle.NEWOBJ[0]: _MACHINE[pickle.REDUCE[0]],
            pickle.BUILD[0]: load_build,
        }
    )


def read_pickle(
    source: CheckpointFile,
    *,
    storage: Callable[[Any], StorageRecord] | None = None,
    nested: Callable[[BytesRecord], object] | None = None,
) -> Any:
    """What a pickle describes, in plain containers and records.

    Args:
        source: A file, where the pickle starts; left just behind it.
        storage: Called with the record that a container keeps in place of a storage, for containers that do.
        nested: Called with the bytes that ``torch.storage._load_from_bytes`` would load, where that is allowed.

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
