"""Loading GHNs by name or path."""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from pathlib import Path

import torch

from timm_ghn.errors import GHNFallbackWarning, GHNNotFoundError, first_line
from timm_ghn.hub.catalogue import (
    DEFAULT,
    EMBEDDED,
    PUBLISHED,
    VARIABLE,
    GHNEntry,
    chosen_default,
    known_ghns,
    locate,
)
from timm_ghn.hub.converted import cache_folder, read_converted
from timm_ghn.hub.fetch import Access, fetch
from timm_ghn.hub.official import read_official
from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE, device_of, dtype_of, is_native, read_ghn
from timm_ghn.nn.ghn import GHN


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a GHN on this machine (a folder or its weights, or an official file), and where they are from."""

    path: Path
    entry: GHNEntry | None = None
    repo_id: str | None = None


def load_ghn(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> GHN:
    """Load a GHN, from the Hub if need be. Nothing in its file is executed.

    Args:
        name_or_path: One of

            - ``'ghn'``: the default: the GHN of :func:`set_default_ghn`, else the one that the environment variable
              TIMM_GHN_DEFAULT names, else the Hub's ghn3_xlm16. Where that last one can be reached neither on the
              Hub nor in its cache, the GHN inside the package serves, with a warning.
            - an existing path: a folder of :func:`timm_ghn.save_ghn`, its ``model.safetensors``, or a file of the
              authors of GHN-2 or GHN-3. Names of GHNs win: a folder of such a name is ``'./ghn2'``;
            - a name of :func:`timm_ghn.list_ghns`, e.g. ``'ghn3_tm8'``. An official file from the Hub is converted to
              the native format at first, which is kept and mapped into memory from then on (TIMM_GHN_CACHE names
              the folder, or is 'off');
            - a repository on the Hub in the native format: ``'user/repository'``.
        device: Where to put the weights; the CPU if None.
        dtype: Floating type of the weights; float32 if None.
        revision: Branch, tag or commit of the repository on the Hub; the catalogue's if None.
        cache_dir: Folder of the Hub's cache; huggingface_hub's own if None.
        token: For private repositories; huggingface_hub's own if None.
        local_files_only: Whether to look in the cache only.

    Returns:
        The GHN, in evaluation mode; its ``origin`` says where it came from.

    Raises:
        GHNNotFoundError: if there is no such GHN, or it can be reached neither on the Hub nor in the cache.
        UnsafeCheckpointError: if its file names something outside the allow-list.
        CheckpointError: if its file is damaged, does not fit its configuration, or holds values that are not finite.
        ConfigError: if its configuration is wrong, or of a newer version of this package.
    """
    device, dtype = device_of(device), dtype_of(dtype)  # before anything is downloaded
    access = Access(revision, None if cache_dir is None else Path(cache_dir), token, local_files_only)
    return _read(find_files(name_or_path, access), device=device, dtype=dtype)


def shared_ghn(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    device: torch.device | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> GHN:
    """As :func:`load_ghn`, but the last GHN is cached, and returned again for the same files.

    For callers that only predict with it, since they share one object.
    """
    access = Access(cache_dir=None if cache_dir is None else Path(cache_dir))
    device, found = device_of(device), find_files(name_or_path, access)
    files = [found.path / name for name in (CONFIG_FILE, WEIGHTS_FILE)] if found.path.is_dir() else [found.path]
    stats = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
    key = found, device, found.path.resolve(), stats
    with _lock:
        if not _last or _last[0][0] != key:
            _last.clear()  # before another one takes as much memory
            _last.append((key, _read(found, device=device, dtype=None)))
        return _last[0][1]


#: The GHN that :func:`shared_ghn` loaded last, with its key.
_last: list[tuple[object, GHN]] = []
_lock = threading.Lock()


def find_files(name_or_path: str | os.PathLike[str], access: Access) -> Found:
    """Bring the files of a GHN to this machine; arguments and errors are those of :func:`load_ghn`."""
    name = chosen_default() if name_or_path == DEFAULT else name_or_path
    if name is not None:
        return _fetch_place(locate(name), access)
    try:
        return _fetch_place(known_ghns()[PUBLISHED], access)
    except GHNNotFoundError as error:
        # Only a GHN that cannot be reached is replaced: a damaged file is an error.
        warnings.warn(
            f'the default GHN {PUBLISHED} can be reached neither on the Hub nor in its cache '
            f'({first_line(error.__cause__ or error)}), so the GHN inside the package, {EMBEDDED}, serves in its place.'
            " It is small and was trained on images of 32 pixels. To use another one, name it (ghn='ghn3_tm8', a path "
            f'or a repository on the Hub), call timm_ghn.set_default_ghn(...) or set {VARIABLE}',
            GHNFallbackWarning,
            stacklevel=3,
        )
        return _fetch_place(known_ghns()[EMBEDDED], access)


def _fetch_place(place: Path | GHNEntry | str, access: Access) -> Found:
    if isinstance(place, Path):
        return Found(place)
    if isinstance(place, str):
        return Found(_fetch_folder(place, access), repo_id=place)
    if place.place is not None:
        return Found(place.place, place)
    repo_id, access = str(place.repo_id), dataclasses.replace(access, revision=access.revision or place.revision)
    if place.filename is None:
        return Found(_fetch_folder(repo_id, access), place, repo_id)
    return Found(fetch(repo_id, place.filename, access), place, repo_id)


def _fetch_folder(repo_id: str, access: Access) -> Path:
    config = fetch(repo_id, CONFIG_FILE, access, prefer_cache=False)
    # The revision of the configuration, so that both files are of one commit.
    return fetch(repo_id, WEIGHTS_FILE, dataclasses.replace(access, revision=_commit(config))).parent


def _commit(path: Path) -> str | None:
    """Commit of a file or folder in the Hub's cache, which is part of its path."""
    parts = path.parts
    return parts[parts.index('snapshots') + 1] if 'snapshots' in parts[:-1] else None


def _read(found: Found, *, device: torch.device | str | None, dtype: torch.dtype | None) -> GHN:
    path, entry = found.path, found.entry
    config = None if entry is None else entry.config
    cache = cache_folder()
    if is_native(path):
        ghn = read_ghn(path, config=config, device=device, dtype=dtype)
    elif found.repo_id is not None and entry is not None and cache is not None:
        ghn = read_converted(path, entry, cache, device=device, dtype=dtype)
    else:
        ghn = read_official(path, config=config, device=device, dtype=dtype)
    assert ghn.origin is not None
    ghn.origin = dataclasses.replace(
        ghn.origin,
        name=ghn.origin.name if entry is None else entry.name,
        repo_id=found.repo_id,
        revision=None if found.repo_id is None else _commit(path),
        embedded=entry is not None and entry.embedded,
    )
    return ghn
