"""The containers of the official checkpoints: joblib dumps, and both forms of ``torch.save``.

All three are pickles and storages, and :mod:`timm_ghn.hub.pickles` reads the pickles of all three.
``torch.load(weights_only=True)`` does not execute anything either, but a pickle of 500 bytes (a dictionary with a tuple
of tuples of tuples as its key) keeps it busy for centuries, and it allocates whatever a file claims to hold.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timm_ghn.errors import CheckpointError, GHNNotFoundError
from timm_ghn.files import sha256_of
from timm_ghn.hub.pickles import BytesRecord, read_pickle
from timm_ghn.hub.records import CheckpointFile, StorageRecord, brief

#: Begins the form of ``torch.save`` that is no zip archive, and the storages inside joblib dumps: a magic number and a
#: version, pickled.
LEGACY_HEAD = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.'

_ZIP_MAGIC = b'PK\x03\x04'
_ZIP_HEADER = 30
#: How joblib's compressed dumps begin: zlib, gzip, bz2, xz, lzma.
_COMPRESSED = (b'\x78\x01', b'\x78\x5e', b'\x78\x9c', b'\x78\xda', b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x5d\x00\x00')


@contextlib.contextmanager
def open_checkpoint(path: Path, sha256: str | None = None) -> Iterator[Any]:
    """Read what a checkpoint holds, except for the elements of its tensors, which can be read while it is open.

    Args:
        path: A joblib dump that is not compressed, or a file of ``torch.save``.
        sha256: Its digest, if it is known; nothing is unpickled if it has another.

    Yields:
        Dictionaries, lists, numbers and strings with :class:`timm_ghn.hub.records.TensorRecord` for the tensors.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list; nothing of it was executed.
        CheckpointError: if it is damaged, has another digest, or is no checkpoint at all.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f'expected a file in {path}, which is none: pipes and devices are not read')
    try:
        file = open(path, 'rb')  # noqa: SIM115  # closed below
    except OSError as error:
        raise GHNNotFoundError(f'cannot open the GHN file {path}: {error}') from error
    with file:
        if sha256 is not None and (found := sha256_of(path)) != sha256:
            raise CheckpointError(
                f'{path} is damaged or another file: its SHA-256 is {found} where {sha256} is expected. Nothing in it '
                'was read; remove it, and load it again'
            )
        source = CheckpointFile(file, str(path))
        head = file.read(len(LEGACY_HEAD))
        file.seek(0)
        if not head:
            raise source.error('is empty')
        if head.startswith(_COMPRESSED):
            raise source.error('is compressed, as no published GHN is: dump it again with joblib, not compressed')
        if head.startswith(_ZIP_MAGIC):
            yield _read_zip(source)
        elif head == LEGACY_HEAD:
            yield _read_legacy(source)
        else:
            yield _read_joblib(source)


def _read_joblib(source: CheckpointFile) -> Any:
    """One pickle; the storage of each tensor is a file of ``torch.save`` of its own."""

    def nested(data: Any) -> object:
        if not isinstance(data, BytesRecord):
            raise TypeError('expected bytes')
        place = source.tell()
        source.seek(data.offset)
        loaded = _read_legacy(source)
        source.seek(place)
        return loaded

    return read_pickle(source, nested=nested)


def _read_legacy(source: CheckpointFile) -> Any:
    """Magic number and version, a description of the machine, the object, names of the storages, the storages."""
    if source.read(len(LEGACY_HEAD)) != LEGACY_HEAD:
        raise source.error('nests data that torch.save did not write')
    machine = read_pickle(source)
    if not isinstance(machine, dict) or machine.get('little_endian') is not True:
        raise source.error('was written on a big-endian machine, which is not supported')
    storages: dict[str, StorageRecord] = {}

    def storage(record: tuple[Any, ...]) -> StorageRecord:
        _, kind, key, _, numel, *view = record
        if any(part is not None for part in view):
            raise source.error('holds a view of a storage, which no GHN file needs')
        if not isinstance(key, str):
            raise source.error('is damaged: it has a storage without a name')
        return storages.setdefault(key, _storage(source, kind, numel))

    loaded = read_pickle(source, storage=storage)
    keys = read_pickle(source)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise source.error('is damaged: it does not list the storages that it refers to')
    for key in keys:
        found = storages[key]
        numel = int.from_bytes(source.read(8), 'little', signed=True)
        if numel != found.numel:
            raise source.error(f'is damaged: a storage has {numel:,} elements where {found.numel:,} are declared')
        found.offset = source.skip(numel * found.dtype.itemsize)
    return loaded


def _read_zip(source: CheckpointFile) -> Any:
    """The form of ``torch.save`` since torch 1.6: a zip archive of a pickle and one stored member per storage."""
    try:
        members = {info.filename: info for info in zipfile.ZipFile(source).infolist()}
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise source.error(f'is truncated or damaged: {error}') from error
    pickles = [name for name in members if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(pickles) != 1:
        raise source.error('is a zip archive, but not one of torch.save: it has no data.pkl')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}byteorder' in members:
        _enter(source, members[f'{root}byteorder'])
        if source.read(6) != b'little':
            raise source.error('was written on a big-endian machine, which is not supported')
    storages: dict[str, StorageRecord] = {}

    def storage(record: tuple[Any, ...]) -> StorageRecord:
        _, kind, key, _, numel = record
        name = f'{root}data/{key}' if isinstance(key, str) else ''
        if name not in members:
            raise source.error(f'is damaged: its storage {brief(key)} is missing')
        if name not in storages:
            place = source.tell()
            found = _storage(source, kind, numel)
            _enter(source, members[name])
            found.offset = source.skip(numel * found.dtype.itemsize)
            source.seek(place)
            storages[name] = found
        return storages[name]

    _enter(source, members[pickles[0]])
    return read_pickle(source, storage=storage)


def _storage(source: CheckpointFile, kind: Any, numel: Any) -> StorageRecord:
    if not isinstance(kind, torch.dtype) or type(numel) is not int or numel < 0:
        raise source.error('holds a storage of a type that no GHN has')
    return StorageRecord(source, kind, numel)


def _enter(source: CheckpointFile, info: zipfile.ZipInfo) -> None:
    """Go to the first byte of a member: behind its own header, whose names may differ in length from the index's."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise source.error(f'has a compressed member {info.filename[:40]!r}, which torch.save does not write')
    source.seek(min(max(info.header_offset, 0), source.size))
    header = source.read(_ZIP_HEADER)
    if not header.startswith(_ZIP_MAGIC):
        raise source.error('is damaged: a member of the archive is not where the index says')
    source.skip(int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little'))
