"""The cache of official checkpoints that were converted to our form, so that they are read once and then mapped."""

from __future__ import annotations

import contextlib
import dataclasses
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
from safetensors import SafetensorError, safe_open

from timm_ghn.errors import GHNError, GHNNotFoundError
from timm_ghn.hub.convert import PARTIAL, convert_official
from timm_ghn.hub.entry import GHNEntry
from timm_ghn.hub.formats import read_official
from timm_ghn.hub.storage import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    digest_in_name,
    file_digest,
    read_config,
    read_ghn,
    resolve_place,
)
from timm_ghn.nn.config import Origin
from timm_ghn.nn.ghn import GHN

#: Environment variable with the folder of the cache, or 'off' for none.
VARIABLE = 'TIMM_GHN_CACHE'
OFF = 'off'

#: After how long a folder that is not complete is taken for one of a process that was killed, in seconds.
STALE_AFTER = 24 * 3600.0

#: Raise it when the conversion changes, so that what an older version made is made anew.
VERSION = 2

_FOLDER = 'converted'
_NAME = re.compile(r'([A-Za-z0-9][A-Za-z0-9_-]*)-[0-9a-f]{32}')

_log = logging.getLogger(__name__)
_warned: set[Path] = set()


@dataclasses.dataclass(frozen=True)
class Converted:
    """A GHN in the cache.

    Attributes:
        name: Its name.
        path: Its folder.
        size: Bytes on the disk.
        repo_id: Where it came from, unless it is damaged.
        revision: Commit of the repository.
        flaw: What is wrong with it; None if nothing was found.
    """

    name: str
    path: Path
    size: int
    repo_id: str | None = None
    revision: str | None = None
    flaw: str | None = None


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Where conversions are kept; None if nowhere.

    It is the folder that TIMM_GHN_CACHE names. Without that, it is ``timm_ghn`` beside huggingface_hub's cache
    (``~/.cache/huggingface/timm_ghn``); for another cache of the Hub, ``.timm_ghn`` inside it, since the caller named
    that folder and no other.

    Args:
        cache_dir: Folder of the Hub's cache; huggingface_hub's own if None.
    """
    named = os.environ.get(VARIABLE, '').strip()
    if named.lower() == OFF:
        return None
    if named:
        return Path(named).expanduser().absolute() / _FOLDER
    if cache_dir is not None:
        return Path(cache_dir).absolute() / '.timm_ghn' / _FOLDER
    return Path(constants.HF_HUB_CACHE).absolute().parent / 'timm_ghn' / _FOLDER


def read_through(
    path: Path,
    entry: GHNEntry,
    cache: Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GHN:
    """Read an official file, or what it was converted to before. What cannot be kept is read all the same.

    Args:
        path: The file in the cache of the Hub.
        entry: What the catalogue says of it.
        cache: What :func:`cache_folder` gave.
        revision: Commit of the repository, for the list of conversions.
        device: Where to put the weights; the CPU if None.
        dtype: Floating type of the weights; float32 if None.

    Returns:
        The GHN, in evaluation mode; its ``origin`` names the official file.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list.
        CheckpointError: if it is damaged, is not the GHN of the entry, or holds a weight that is not finite; it is
            not kept.
        ConfigError: if weights cannot be put on the device, or have the type.
    """
    device, dtype = resolve_place(device, dtype)
    origin = Origin(name=entry.name, file=str(path), sha256=file_digest(path))
    place = place_of(path, entry, cache, revision)

    def mapped() -> GHN:
        return read_ghn(place, config=entry.config, device=device, dtype=dtype, origin=origin)

    def unkept() -> GHN:
        return read_official(path, config=entry.config, sha256=expected_digest(path, entry), device=device, dtype=dtype)

    try:
        if place.is_dir():
            try:
                return mapped()
            except GHNError as error:
                _log.info('%s is converted again: %s', entry.name, error)
                discard(place)
        convert_into(place, path, entry, revision)
    except OSError as error:
        _warn(cache, error)
        return unkept()
    try:
        return mapped()
    except GHNError:  # somebody removed it, or the disk does not hold what it is given
        return unkept()


def convert_into(place: Path, path: Path, entry: GHNEntry, revision: str | None) -> None:
    """Convert an official file into the cache, unless another process was faster.

    Raises:
        CheckpointError: as :func:`timm_ghn.hub.convert.convert_official`, which see.
        OSError: if it cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(place.parent)
    facts = {'repo_id': str(entry.repo_id), 'revision': revision or ''}
    digest = expected_digest(path, entry)
    with contextlib.suppress(FileExistsError):
        convert_official(path, place, config=entry.config, sha256=digest, facts=facts)


def expected_digest(path: Path, entry: GHNEntry) -> str | None:
    """SHA-256 that an official file is to have: the catalogue's, or that by which the Hub names it, if it does."""
    return entry.sha256 or digest_in_name(path)


def place_of(path: Path, entry: GHNEntry, cache: Path, revision: str | None) -> Path:
    """Folder in the cache for an official file: named by its content, and by all that shapes the conversion."""
    stat = path.stat()
    content = [expected_digest(path, entry)] if digest_in_name(path) else [revision, stat.st_size, stat.st_mtime_ns]
    told = [VERSION, entry.repo_id, entry.filename, *content, entry.config.to_dict()]
    return cache / f'{entry.name}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]}'


def converted_ghns(cache: Path) -> list[Converted]:
    """What the cache holds, by name.

    Raises:
        OSError: if it cannot be listed.
    """
    folders = [path for path in cache.iterdir() if _is_ours(path)] if cache.is_dir() else []
    return sorted(map(_describe, folders), key=lambda converted: (converted.name, converted.path))


def remove_converted(cache: Path, name: str) -> list[Converted]:
    """Remove conversions; the downloaded files stay.

    Args:
        cache: What :func:`cache_folder` gave.
        name: Name of a GHN, or 'all', which also removes what processes that were killed left unfinished.

    Returns:
        What was removed.

    Raises:
        GHNNotFoundError: if there is none of this name.
        OSError: if it cannot be removed.
    """
    found = converted_ghns(cache)
    chosen = [converted for converted in found if name in ('all', converted.name)]
    if not chosen and name != 'all':
        known = ', '.join(dict.fromkeys(converted.name for converted in found)) or 'nothing'
        raise GHNNotFoundError(f'no conversion of {name!r} is in {cache}, which holds {known}')
    for converted in chosen:
        discard(converted.path)
    if name == 'all':
        _remove_stale(cache, age=0.0)
    return chosen


def _is_ours(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _describe(path: Path) -> Converted:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    matched = _NAME.fullmatch(path.name)
    name = matched[1] if matched else path.name
    try:
        read_config(path / CONFIG_FILE)
        with safe_open(path / WEIGHTS_FILE, framework='pt', device='cpu') as file:
            facts = file.metadata() or {}
    except (GHNError, SafetensorError, OSError) as error:
        return Converted(name, path, size, flaw=f'{path} is truncated or was changed: {error}')
    return Converted(name, path, size, facts.get('repo_id'), facts.get('revision') or None)


def discard(place: Path) -> None:
    """Remove a folder; nobody sees half of it."""
    aside = place.with_name(f'.{place.name}.{uuid.uuid4().hex}{PARTIAL}')
    with contextlib.suppress(FileNotFoundError):  # another process had the same thought
        os.rename(place, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(cache: Path, *, age: float = STALE_AFTER) -> None:
    """Remove what processes that were killed left unfinished."""
    for partial in cache.glob(f'.*{PARTIAL}'):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime >= age:
                shutil.rmtree(partial)


def _warn(cache: Path, error: OSError) -> None:
    """Tell once that a cache is of no use."""
    if cache not in _warned:
        _warned.add(cache)
        warnings.warn(
            f'converted GHNs cannot be kept in {cache} ({error}), so official checkpoints are read anew each '
            f'time, which is slower. Name another folder in {VARIABLE}, or {VARIABLE}={OFF}',
            UserWarning,
            stacklevel=2,
        )
