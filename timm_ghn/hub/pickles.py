"""A reader of pickles that runs nothing.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program names. This one
interprets the same program over inert records: a global is a name on an allow-list or an error, a call makes one of
the records below, and the bytes of the tensors stay in the file until somebody asks for them, so a number in the
file that claims more than the file holds costs nothing.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any, cast

import torch

from timm_ghn.errors import CheckpointError, UnsafeCheckpointError
from timm_ghn.hub.records import (
    MAX_RANK,
    Source,
    Span,
    StorageRecord,
    TensorRecord,
    are_sizes,
    brief,
    contiguous_stride,
)

#: Most instructions of all pickles of a file, and items that they copy. The largest published GHN has some 10,000.
MAX_STEPS = 2_000_000

#: Type of a storage by the name of its class in torch.
STORAGE_TYPES = {
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
_ARRAY_TYPES = {
    'f8': torch.float64,
    'f4': torch.float32,
    'f2': torch.float16,
    'i8': torch.int64,
    'i4': torch.int32,
    'i2': torch.int16,
    'i1': torch.int8,
    'u1': torch.uint8,
    'b1': torch.bool,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name on the allow-list; only a name, whatever it stands for in Python."""

    name: str


@dataclasses.dataclass(slots=True)
class Namespace:
    """Stands for ``argparse.Namespace``, in which trainers keep their options."""

    values: dict[str, Any]


@dataclasses.dataclass(slots=True)
class _Dtype:
    """Stands for ``numpy.dtype``."""

    code: object
    order: object = '<'


class _Array:
    """Stands for joblib's record of a numpy array, until its state is known and it becomes a tensor record."""

    __slots__ = ('tensor',)

    def __init__(self) -> None:
        self.tensor: TensorRecord | None = None

    def fill(self, state: dict[str, Any], source: Source) -> None:
        dtype = state['dtype']
        known = isinstance(dtype, _Dtype) and isinstance(dtype.code, str)
        torch_type = _ARRAY_TYPES.get(dtype.code) if known else None
        if torch_type is None or dtype.order not in ('<', '|', '='):
            shown = f'{brief(dtype.code)}, {brief(dtype.order)}' if isinstance(dtype, _Dtype) else brief(dtype)
            raise source.error(f'holds an array of a type that no GHN has: {shown}')
        if state['subclass'] != Global('numpy.ndarray'):
            raise source.error('holds an array that is not a plain numpy.ndarray')
        shape = state['shape']
        if not isinstance(shape, tuple) or len(shape) > MAX_RANK or not are_sizes(shape):
            raise source.error(f'holds an array of impossible shape {brief(shape)}')
        if state.get('numpy_array_alignment_bytes') is not None:
            source.take(source.read(1)[0])
        numel = math.prod(shape)
        span = source.take(numel * torch_type.itemsize)
        column_major = contiguous_stride(shape[::-1])[::-1]
        stride = column_major if state['order'] == 'F' else contiguous_stride(shape)
        self.tensor = TensorRecord(StorageRecord(torch_type, numel, source, span), 0, shape, stride)


class Budget:
    """The instructions that the pickles of a file may still take together.

    Without it, a short file could copy a long container, or read a nested pickle, again and again.
    """

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int, source: Source) -> None:
        """Count steps.

        Raises:
            CheckpointError: if they are too many.
        """
        self.left -= steps
        if self.left < 0:
            raise source.error(f'has pickles of more than {MAX_STEPS:,} instructions')


LoadBytes = Callable[[Source, Budget], Any]

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


class Unpickler:
    """Interprets one pickle.

    Args:
        source: Where the pickle starts; left just behind it.
        storage: Called with the record that a container keeps in place of a storage, for containers that do.
        nested: Called with the bytes that ``torch.storage._load_from_bytes`` would load, where that is allowed.
        budget: Shared by the pickles of a file.
    """

    def __init__(
        self,
        source: Source,
        *,
        storage: Callable[[tuple[Any, ...]], StorageRecord] | None = None,
        nested: LoadBytes | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.budget = budget or Budget()
        self.source, self.storage, self.nested = source, storage, nested
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What the pickle describes, in plain containers and inert records.

        Raises:
            UnsafeCheckpointError: if it names a global outside the allow-list.
            CheckpointError: if it is damaged, or asks for anything that a checkpoint does not need.
        """
        try:
            return self._run()
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise self.source.error(f'is damaged: {type(error).__name__} while reading its records') from error
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise self.source.error(f'is damaged: {error}') from error

    def _run(self) -> Any:
        while True:
            self.budget.spend(1, self.source)
            code = self.source.read(1)
            opcode = _OPCODES.get(code.decode('latin-1'))
            if opcode is None:
                raise self.source.error(f'is no pickle, or damaged: it holds an instruction {code!r}')
            if opcode.name == 'STOP':
                return self.stack.pop()
            if opcode.name in _SPANS:
                width = _SPANS[opcode.name]
                self.stack.append(self.source.take(int.from_bytes(self.source.read(width), 'little')))
                continue
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise self.source.error(f'asks for the pickle instruction {opcode.name}, which no checkpoint needs')
            handler(self, self._argument(opcode))

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        if opcode.name in _LINES:
            # As they stand: nothing here needs their escapes, about which pickletools' reader may warn.
            return '.'.join(self.source.readline().decode()[:-1] for _ in range(_LINES[opcode.name]))
        return opcode.arg.reader(cast(IO[bytes], self.source)) if opcode.arg is not None else None

    def cut(self) -> list[Any]:
        """Take what is on the stack above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, index: object) -> None:
        """Keep the top of the stack under an index."""
        self.memo[int(str(index))] = self.stack[-1]

    def name(self, qualified: str) -> Global:
        """A global of the allow-list; any other is refused."""
        if qualified not in _MAKERS:
            shown = qualified if len(qualified) <= 120 else f'{qualified[:120]}...'
            raise UnsafeCheckpointError(
                f'{self.source.label} asks for {shown}, which is not on the list of what a GHN file may name; '
                'nothing of it was executed. If you trust its author, ask for the weights as safetensors'
            )
        return Global(qualified)

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for the result of a call; nothing is called but a maker of records."""
        maker = _MAKERS.get(function.name) if isinstance(function, Global) else None
        if maker is None or not isinstance(arguments, tuple):
            shown = function.name if isinstance(function, Global) else brief(function)
            raise self.source.error(f'calls something that cannot be called: {shown}')
        return maker(self, *arguments)

    def build(self, state: Any) -> None:
        """Give the record on top of the stack its state."""
        target = self.stack[-1]
        if isinstance(target, Namespace) and isinstance(state, dict):
            self.copying(state)
            target.values.update(state)
        elif isinstance(target, _Array):
            target.fill(state, self.source)
            self._replace(target, target.tensor)
        elif isinstance(target, _Dtype):
            target.order = state[1]
        elif type(target) is not dict:  # attributes of an ordered dictionary, such as a state dictionary's versions
            raise self.source.error(f'sets the state of something that has none: {brief(target)}')

    def copying(self, items: Any) -> Any:
        """Count what is copied as instructions."""
        self.budget.spend(len(items), self.source)
        return items

    def _replace(self, old: object, new: object) -> None:
        self.stack[-1] = new
        for index in reversed(self.memo):  # memoised just before its state was set
            self.budget.spend(1, self.source)
            if self.memo[index] is old:
                self.memo[index] = new
                break

    def persistent(self, record: Any) -> StorageRecord:
        """The storage that a container keeps outside the pickle."""
        if self.storage is None or not isinstance(record, tuple) or record[:1] != ('storage',):
            raise self.source.error('refers to an object outside the file')
        return self.storage(record)


def _load_from_bytes(machine: Unpickler, data: Span) -> Any:
    if machine.nested is None:
        raise machine.source.error('nests one checkpoint in another')
    place = machine.source.file.tell()
    loaded = machine.nested(machine.source.part(data), machine.budget)
    machine.source.file.seek(place)
    return loaded


def _tensor(machine: Unpickler, storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise machine.source.error('holds a tensor without a storage')
    return TensorRecord(storage, start, tuple(machine.copying(shape)), tuple(machine.copying(stride)))


def _ordered(machine: Unpickler, items: Any = ()) -> dict[Any, Any]:
    return dict(_with_plain_keys((key, value) for key, value in machine.copying(items)))


def _device(machine: Unpickler, *arguments: Any) -> str:
    return ':'.join(map(brief, arguments[:2]))


def _array_type(machine: Unpickler, code: Any, *_: Any) -> _Dtype:
    return _Dtype(code)


#: Every global that a checkpoint may name, and what stands for a call of it (None: a name that cannot be called).
_MAKERS: dict[str, Callable[..., Any] | None] = {
    'argparse.Namespace': lambda machine: Namespace({}),
    'collections.OrderedDict': _ordered,
    'joblib.numpy_pickle.NumpyArrayWrapper': lambda machine: _Array(),
    'numpy.dtype': _array_type,
    'numpy.ndarray': None,
    'torch.Size': lambda machine, sizes: tuple(machine.copying(sizes)),
    'torch._utils._rebuild_parameter': lambda machine, tensor, *_: tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch.device': _device,
    'torch.storage._load_from_bytes': _load_from_bytes,
    **dict.fromkeys(STORAGE_TYPES),
}

#: Instructions whose argument stays in the file, with the width of its length in bytes.
_SPANS = {'SHORT_BINBYTES': 1, 'BINBYTES': 4, 'BINBYTES8': 8, 'BYTEARRAY8': 8}

#: Instructions whose argument is text, with the number of its lines.
_LINES = {'STRING': 1, 'GLOBAL': 2, 'INST': 2}


def _push(machine: Unpickler, value: object) -> None:
    machine.stack.append(value)


def _pop(machine: Unpickler, _: object) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _pop_mark(machine: Unpickler, _: object) -> None:
    machine.cut()


def _tuple(count: int) -> Callable[[Unpickler, object], None]:
    def handler(machine: Unpickler, _: object) -> None:
        if len(machine.stack) < count:
            raise IndexError('the stack is too short')
        items = machine.stack[len(machine.stack) - count :]
        del machine.stack[len(machine.stack) - count :]
        machine.stack.append(tuple(items))

    return handler


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return _with_plain_keys(zip(items[::2], items[1::2], strict=True))


def _with_plain_keys(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Pairs whose keys are text or numbers: the hash of a tuple may take forever, or more stack than there is."""
    found = list(pairs)
    for key, _ in found:
        if key is not None and not isinstance(key, (str, int, float)):
            raise TypeError('expected keys that are text or numbers')
    return found


def _set_items(machine: Unpickler, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict:
        raise TypeError('expected a dictionary')
    target.update(_pairs(items))


def _extend(machine: Unpickler, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise TypeError('expected a list')
    target.extend(items)


def _pop_two(machine: Unpickler) -> list[Any]:
    last = machine.stack.pop()
    return [machine.stack.pop(), last]


def _global(machine: Unpickler, qualified: str) -> None:
    machine.stack.append(machine.name(qualified))


def _instance(machine: Unpickler, qualified: str) -> None:
    _global(machine, qualified)
    raise machine.source.error('makes an instance in a way that no checkpoint needs')


def _stack_global(machine: Unpickler, _: object) -> None:
    parts = _pop_two(machine)
    if not all(isinstance(part, str) for part in parts):
        raise TypeError('expected the name of a global as text')
    machine.stack.append(machine.name('.'.join(parts)))


def _call(machine: Unpickler, _: object) -> None:
    machine.stack.append(machine.call(*_pop_two(machine)))


_HANDLERS: dict[str, Callable[[Unpickler, Any], None]] = {
    'PROTO': lambda machine, version: None,
    'FRAME': lambda machine, length: None,
    'MARK': lambda machine, _: machine.marks.append(len(machine.stack)),
    'POP': _pop,
    'POP_MARK': _pop_mark,
    'NONE': lambda machine, _: _push(machine, None),
    'NEWTRUE': lambda machine, _: _push(machine, True),
    'NEWFALSE': lambda machine, _: _push(machine, False),
    'EMPTY_TUPLE': lambda machine, _: _push(machine, ()),
    'EMPTY_LIST': lambda machine, _: _push(machine, []),
    'EMPTY_DICT': lambda machine, _: _push(machine, {}),
    'TUPLE': lambda machine, _: _push(machine, tuple(machine.cut())),
    'LIST': lambda machine, _: _push(machine, machine.cut()),
    'DICT': lambda machine, _: _push(machine, dict(_pairs(machine.cut()))),
    'TUPLE1': _tuple(1),
    'TUPLE2': _tuple(2),
    'TUPLE3': _tuple(3),
    'SETITEM': lambda machine, _: _set_items(machine, _pop_two(machine)),
    'SETITEMS': lambda machine, _: _set_items(machine, machine.cut()),
    'APPEND': lambda machine, _: _extend(machine, [machine.stack.pop()]),
    'APPENDS': lambda machine, _: _extend(machine, machine.cut()),
    'MEMOIZE': lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(('PUT', 'BINPUT', 'LONG_BINPUT'), Unpickler.put),
    **dict.fromkeys(
        ('GET', 'BINGET', 'LONG_BINGET'), lambda machine, index: _push(machine, machine.memo[int(str(index))])
    ),
    **dict.fromkeys(
        ('INT', 'LONG', 'FLOAT', 'STRING', 'UNICODE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
        _push,
    ),
    **dict.fromkeys(
        ('BINSTRING', 'SHORT_BINSTRING', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'),
        _push,
    ),
    'GLOBAL': _global,
    'INST': _instance,
    'STACK_GLOBAL': _stack_global,
    'REDUCE': _call,
    'NEWOBJ': _call,
    'BUILD': lambda machine, _: machine.build(machine.stack.pop()),
    'BINPERSID': lambda machine, _: _push(machine, machine.persistent(machine.stack.pop())),
}
