"""The containers of the official checkpoints: joblib dumps, and both forms of ``torch.save``.

None of them is unpickled by Python, joblib or torch: see :mod:`timm_ghn.hub.pickles`.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from timm_ghn.errors import CheckpointError, GHNNotFoundError
from timm_ghn.hub.pickles import STORAGE_TYPES, Budget, Global, Unpickler
from timm_ghn.hub.records import Source, Span, StorageRecord, brief

#: First number of the form of ``torch.save`` that is not a zip archive, and of the storages inside joblib dumps.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

#: How much larger than its file compressed data may become. Weights hardly shrink at all.
MAX_EXPANSION = 32

_CHUNK = 1 << 20

_ZIP_MAGIC = b'PK\x03\x04'
_ZIP_HEADER = 30
_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b'\x1f\x8b': lambda file: gzip.GzipFile(fileobj=file),
    b'BZh': bz2.BZ2File,
}
_LZMA_MAGICS = (b'\xfd7zXZ\x00', b'\x5d\x00\x00')
#: Memory that the header of LZMA may ask for, in bytes; its strongest preset needs 65 MiB.
_LZMA_MEMORY = 256 << 20
_ZLIB_MAGICS = (b'\x78\x01', b'\x78\x5e', b'\x78\x9c', b'\x78\xda')


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[Any]:
    """Read what a checkpoint holds, except for the elements of its tensors, which can be read while it is open.

    Args:
        path: A joblib dump, compressed or not, or a file of ``torch.save``.

    Yields:
        Dictionaries, lists, numbers and strings with :class:`timm_ghn.hub.records.TensorRecord` for the tensors.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list; nothing of it was executed.
        CheckpointError: if it is damaged, or no checkpoint at all.
    """
    with contextlib.ExitStack() as stack:
        try:
            file: BinaryIO = stack.enter_context(open(path, 'rb'))
        except OSError as error:
            raise GHNNotFoundError(f'cannot open the GHN file {path}: {error}') from error
        head = file.read(8)
        if not head:
            raise CheckpointError(f'{path} is empty')
        if head.startswith(_ZIP_MAGIC):
            yield _read_zip(file, str(path))
            return
        file.seek(0)
        plain = _expand(file, head, str(path))
        if plain is not None:
            file = stack.enter_context(plain)
        yield _read_stream(_whole(file, str(path)))


def _whole(file: BinaryIO, label: str) -> Source:
    return Source(file, Span(0, file.seek(0, os.SEEK_END)), label)


def _read_stream(source: Source) -> Any:
    """A joblib dump, or the form of ``torch.save`` that starts with a magic number."""
    budget = Budget()
    loaded = Unpickler(source, nested=_read_legacy, budget=budget).load()
    if isinstance(loaded, int) and loaded == LEGACY_MAGIC:
        return _read_legacy(source, budget, after_magic=True)
    return loaded


def _read_legacy(source: Source, budget: Budget, *, after_magic: bool = False) -> Any:
    """A magic number, a version, a description of the machine, the object, names of the storages, the storages."""
    if not after_magic and Unpickler(source, budget=budget).load() != LEGACY_MAGIC:
        raise source.error('nests data that torch.save did not write')
    if Unpickler(source, budget=budget).load() != LEGACY_PROTOCOL:
        raise source.error('is of a version of torch.save that is not known')
    machine = Unpickler(source, budget=budget).load()
    if not isinstance(machine, dict) or machine.get('little_endian') is not True:
        raise source.error('was written on a big-endian machine, which is not supported')
    storages: dict[Any, StorageRecord] = {}

    def storage(record: tuple[Any, ...]) -> StorageRecord:
        _, kind, key, _, numel, *view = record
        if not isinstance(key, str):
            raise source.error('is damaged: it has a storage without a name')
        if any(part is not None for part in view):
            raise source.error('holds a view of a storage, which no GHN file needs')
        return storages.setdefault(key, _storage(source, kind, numel))

    loaded = Unpickler(source, storage=storage, budget=budget).load()
    keys = Unpickler(source, budget=budget).load()
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or set(keys) != set(storages):
        raise source.error('is damaged: it does not list the storages that it refers to')
    for key in keys:
        found = storages[key]
        numel = int.from_bytes(source.read(8), 'little', signed=True)
        if numel != found.numel:
            raise source.error(f'is damaged: a storage has {numel:,} elements where {found.numel:,} are declared')
        found.span = source.take(numel * found.dtype.itemsize)
    return loaded


def _storage(source: Source, kind: Any, numel: Any, span: Span | None = None) -> StorageRecord:
    dtype = STORAGE_TYPES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or type(numel) is not int or numel < 0:
        raise source.error('holds a storage of a type that no GHN has')
    return StorageRecord(dtype, numel, source, span)


def _read_zip(file: BinaryIO, label: str) -> Any:
    """The form of ``torch.save`` since torch 1.6: a zip archive of a pickle and one stored member per storage."""
    whole = _whole(file, label)
    try:
        members = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise whole.error(f'is truncated or damaged: {error}') from error
    pickles = [name for name in members if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(pickles) != 1:
        raise whole.error('is a zip archive, but not one of torch.save: it has no data.pkl')
    root = pickles[0].removesuffix('data.pkl')
    order = members.get(f'{root}byteorder')
    if order is not None and file_bytes(whole, _member(whole, order)) != b'little':
        raise whole.error('was written on a big-endian machine, which is not supported')
    storages: dict[str, StorageRecord] = {}

    def storage(record: tuple[Any, ...]) -> StorageRecord:
        _, kind, key, _, numel = record
        name = f'{root}data/{key}' if isinstance(key, str) else ''
        if name not in members:
            raise whole.error(f'is damaged: its storage {brief(key)} is missing')
        if name not in storages:
            place = whole.file.tell()
            storages[name] = _storage(whole, kind, numel, _member(whole, members[name]))
            whole.file.seek(place)
        return storages[name]

    return Unpickler(whole.part(_member(whole, members[pickles[0]])), storage=storage).load()


def _member(whole: Source, info: zipfile.ZipInfo) -> Span:
    """Where the bytes of a member are: behind its own header, whose names may differ in length from the index's."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise whole.error(f'has a compressed member {info.filename[:40]!r}, which torch.save does not write')
    end = whole.file.seek(0, os.SEEK_END)
    if not 0 <= info.header_offset <= end:
        raise whole.error('is damaged: a member of the archive is not where the index says')
    header = file_bytes(whole, Span(info.header_offset, _ZIP_HEADER))
    if not header.startswith(_ZIP_MAGIC):
        raise whole.error('is damaged: a member of the archive is not where the index says')
    lengths = int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little')
    span = Span(info.header_offset + _ZIP_HEADER + lengths, info.file_size)
    if span.offset + span.length > end:
        raise whole.error('is truncated or damaged: a member of the archive reaches past its end')
    return span


def file_bytes(whole: Source, span: Span) -> bytes:
    """A few bytes from anywhere in a file."""
    return whole.part(span).read(span.length)


def _expand(file: BinaryIO, head: bytes, label: str) -> BinaryIO | None:
    """Decompress a joblib dump to a file that vanishes when it is closed; None if it is not compressed."""
    if head.startswith(_ZLIB_MAGICS):
        chunks = _inflate(file)
    elif head.startswith(_LZMA_MAGICS):
        chunks = _expand_lzma(file)
    else:
        opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
        if opener is None:
            return None
        chunks = iter(functools.partial(opener(file).read, _CHUNK), b'')
    limit = MAX_EXPANSION * os.fstat(file.fileno()).st_size + _CHUNK
    plain = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  # the caller closes it
    try:
        for chunk in chunks:
            plain.write(chunk)
            if plain.tell() > limit:
                raise CheckpointError(f'{label} expands to more than {MAX_EXPANSION} times its size: no GHN file does')
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        plain.close()
        raise CheckpointError(f'{label} is truncated or damaged: {error}') from error
    except CheckpointError:
        plain.close()
        raise
    return plain


def _inflate(file: BinaryIO) -> Iterator[bytes]:
    machine = zlib.decompressobj()
    while not machine.eof:
        data = machine.unconsumed_tail or file.read(_CHUNK)
        if not data:
            raise EOFError('the compressed data ends too early')
        yield machine.decompress(data, _CHUNK)


def _expand_lzma(file: BinaryIO) -> Iterator[bytes]:
    machine = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
    while not machine.eof:
        data = file.read(_CHUNK) if machine.needs_input else b''
        if not data and machine.needs_input:
            raise EOFError('the compressed data ends too early')
        yield machine.decompress(data, _CHUNK)
