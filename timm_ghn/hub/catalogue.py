"""The known GHNs by name: those of the package, of a user's folders, and of :func:`timm_ghn.register_ghn`."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import warnings
from pathlib import Path

from timm_ghn.errors import ConfigError, GHNError
from timm_ghn.hub.entry import (
    FORMATS as FORMATS,
    GHNEntry as GHNEntry,
    read_entry as read_entry,
    read_users_entry,
)

#: Environment variable with a user's folders of entries, one JSON file each; separated as in PATH.
VARIABLE = 'TIMM_GHN_CONFIGS'

#: Most files of a user's folder that are read.
MAX_ENTRIES = 1000

_PACKAGE = Path(__file__).resolve().parents[1]
#: In an installed package; in a checkout, where the files are beside the package.
_FOLDERS = (_PACKAGE / 'hub_configs', _PACKAGE.parent / 'hub_configs')

_registered: dict[str, GHNEntry] = {}
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Users:
    """What a user's folders hold.

    Attributes:
        entries: Sound entries by name.
        refused: For each file that is not used, why, by the name that it would have; for a missing folder, by its path.
    """

    entries: dict[str, GHNEntry]
    refused: dict[str, str]


def known_ghns() -> dict[str, GHNEntry]:
    """The GHNs of the catalogue by name, in alphabetical order.

    They are those of the package, those of the folders in the environment variable TIMM_GHN_CONFIGS, and those of
    :func:`timm_ghn.register_ghn`. A wrong file in a user's folder is told in a warning and left out.

    Raises:
        ConfigError: if the installation is incomplete, or a file of the package's catalogue is wrong.
    """
    known = {**_entries(), **_users().entries, **_registered}
    return {name: known[name] for name in sorted(known)}


def list_ghns() -> list[str]:
    """The names that :func:`timm_ghn.load_ghn` knows, in alphabetical order; each is a tag of timm as well.

    Raises:
        ConfigError: if the installation is incomplete.
    """
    return list(known_ghns())


def refused_ghns() -> dict[str, str]:
    """Why files of a user's folders are not used, by the names that they would have."""
    return dict(_users().refused)


def add_entry(entry: GHNEntry, *, overwrite: bool = False) -> None:
    """Make an entry known in this process.

    Raises:
        ConfigError: if another GHN has its name, unless that is to be replaced.
    """
    with _lock:
        if not overwrite and entry.name in known_ghns():
            raise ConfigError(
                f'a GHN named {entry.name!r} is known already ({known_ghns()[entry.name].source}): choose another '
                'name, or replace it with overwrite=True'
            )
        _registered[entry.name] = entry


@functools.cache
def _entries() -> dict[str, GHNEntry]:
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise ConfigError(f'the catalogue of GHNs is missing (looked in {", ".join(map(str, _FOLDERS))}): reinstall')
    entries = [read_entry(path) for path in sorted(folder.glob('*.json'))]
    return {entry.name: entry for entry in entries}


def _users() -> _Users:
    named = os.environ.get(VARIABLE, '')
    folders = tuple(dict.fromkeys(os.path.abspath(os.path.expanduser(p)) for p in named.split(os.pathsep) if p.strip()))
    return _read_users(tuple((folder, _listing(folder)) for folder in folders)) if folders else _Users({}, {})


def _listing(folder: str) -> tuple[tuple[str, int, int], ...] | None:
    """Files of a folder with time and size, so that it is read again when one changes; None if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            files = [(item.name, item.stat()) for item in found if item.name.endswith('.json') and item.is_file()]
    except OSError:
        return None
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in files))


@functools.lru_cache(maxsize=8)
def _read_users(folders: tuple[tuple[str, tuple[tuple[str, int, int], ...] | None], ...]) -> _Users:
    users = _Users({}, {})
    for folder, listing in folders:
        if listing is None:
            users.refused[folder] = f'the folder {folder!r} cannot be read'
            continue
        for name, _, _ in listing[:MAX_ENTRIES]:
            _read_file(Path(folder, name), users)
        if len(listing) > MAX_ENTRIES:
            users.refused[folder] = f'the folder {folder!r} has more than {MAX_ENTRIES:,} entries'
    for reason in users.refused.values():
        warnings.warn(f'{VARIABLE} in the environment: {reason}; it is left out', UserWarning, stacklevel=4)
    return users


def _read_file(path: Path, users: _Users) -> None:
    try:
        if path.stem in _entries() or path.stem in users.entries:
            other = 'the package' if path.stem in _entries() else str(users.entries[path.stem].within)
            raise ConfigError(f'{path} has the name of a GHN of {other}: rename it')
        users.entries[path.stem] = read_users_entry(path)
    except GHNError as error:
        users.refused[path.stem] = str(error) if str(path) in str(error) else f'{path}: {error}'
