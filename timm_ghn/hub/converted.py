"""Conversion of official checkpoints to the native format, and the cache of what was converted.

A conversion is a folder in the cache, named by the digest of the official file and by all that shapes the conversion.
It appears whole or not at all, is mapped into memory when it is read, and is made again where it is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
import warnings
from pathlib import Path

import torch
from huggingface_hub import constants

from timm_ghn.errors import GHNError, GHNNotFoundError
from timm_ghn.files import PARTIAL, new_folder
from timm_ghn.hub.catalogue import GHNEntry
from timm_ghn.hub.official import open_official, read_official
from timm_ghn.hub.storage import digest_in_name, empty_ghn, file_digest, read_ghn, write_native
from timm_ghn.nn.config import GHNConfig, Origin
from timm_ghn.nn.ghn import GHN

#: Environment variable with the folder of the cache, or 'off' for none.
VARIABLE = 'TIMM_GHN_CACHE'

#: Age in seconds from which an incomplete folder is taken for one of a killed process.
STALE_AFTER = 24 * 3600.0

#: Raise it when the conversion changes, so that what an older version made is made anew.
VERSION = 3

_NAME = re.compile(r'([A-Za-z0-9][A-Za-z0-9_-]*)-[0-9a-f]{32}')

_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """The folder of the conversions, beside huggingface_hub's cache by default; None if they are not kept."""
    named = os.environ.get(VARIABLE, '').strip()
    if named.lower() == 'off':
        return None
    folder = Path(named).expanduser() if named else Path(constants.HF_HUB_CACHE).parent / 'timm_ghn'
    return folder.absolute() / 'converted'


def convert_official(path: Path, folder: Path, config: GHNConfig | None = None) -> None:
    """Write an official file as a folder in the native format, which appears complete or not at all.

    The weights keep the type that they have in the file. All of them are in memory once. Errors are those of
    :func:`~timm_ghn.hub.official.read_official`, and an OSError if the folder cannot be written, or is there already.
    """
    with open_official(path, config) as found, new_folder(folder.absolute()) as partial:
        empty_ghn(found.config, found.shapes, str(path))
        state = {key: record.read() for key, record in found.weights.items()}
        write_native(state, found.config, partial, label=str(path))


def read_converted(
    path: Path,
    entry: GHNEntry,
    cache: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GHN:
    """Read an official file from the Hub through the cache of conversions; without it, where it cannot be written.

    The ``origin`` of the GHN names the official file. Errors are those of
    :func:`~timm_ghn.hub.official.read_official`; a file that has them is not kept.
    """
    origin = Origin(name=entry.name, file=str(path), sha256=file_digest(path))
    stat = path.stat()
    # A Hub cache without symbolic links has no digests: commit, size and time identify the content.
    content = digest_in_name(path) or [str(path.parent), stat.st_size, stat.st_mtime_ns]
    key = json.dumps([VERSION, content, entry.config.to_dict()], sort_keys=True)
    place = cache / f'{entry.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}'
    try:
        for _ in range(2):
            if not place.is_dir():
                _remove_stale(cache)
                try:
                    convert_official(path, place, entry.config)
                except OSError as error:
                    # Another process was faster; it may also have found its folder damaged and removed it by now.
                    existed = cache.is_dir() and error.errno in (errno.EEXIST, errno.ENOTEMPTY)
                    if not existed and not place.is_dir():
                        raise
            try:
                return read_ghn(place, config=entry.config, device=device, dtype=dtype, origin=origin)
            except GHNError as error:
                _log.info('%s is converted again: %s', entry.name, error)
                _discard(place)
    except OSError as error:
        warnings.warn(
            f'converted GHNs cannot be kept in {cache} ({error}), so official checkpoints are read anew each time, '
            f'which is slower. Name another folder in {VARIABLE}, or {VARIABLE}=off',
            UserWarning,
            stacklevel=2,
        )
    return read_official(path, config=entry.config, device=device, dtype=dtype)


def converted_ghns(cache: Path, name: str = 'all') -> dict[Path, tuple[str, int]]:
    """The conversions in the cache: for each folder the name of the GHN, and the bytes that it takes.

    Raises:
        GHNNotFoundError: if there is none of this name.
    """
    found = {}
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        matched = _NAME.fullmatch(path.name)
        if matched and path.is_dir() and not path.is_symlink():
            found[path] = matched[1], sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    chosen = {path: entry for path, entry in found.items() if name in ('all', entry[0])}
    if not chosen and name != 'all':
        known = ', '.join(dict.fromkeys(other for other, _ in found.values())) or 'nothing'
        raise GHNNotFoundError(f'no conversion of {name!r} is in {cache}, which holds {known}')
    return chosen


def remove_converted(cache: Path, name: str) -> dict[Path, tuple[str, int]]:
    """Remove what :func:`converted_ghns` lists; the downloaded files stay.

    'all' also removes what processes that were killed left unfinished.
    """
    chosen = converted_ghns(cache, name)
    for path in chosen:
        _discard(path)
    if name == 'all':
        _remove_stale(cache, age=0.0)
    return chosen


def _discard(place: Path) -> None:
    """Remove a folder atomically, as other processes see it."""
    hidden = place.with_name(f'.{place.name}.{uuid.uuid4().hex}{PARTIAL}')
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        os.rename(place, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_stale(cache: Path, *, age: float = STALE_AFTER) -> None:
    """Remove incomplete folders of killed processes."""
    for partial in cache.glob(f'.*{PARTIAL}'):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime >= age:
                shutil.rmtree(partial)
