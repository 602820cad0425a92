"""What the name of a GHN means, without asking the network."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path

from timm_ghn.errors import GHNNotFoundError, printable
from timm_ghn.hub.catalogue import known_ghns, refused_ghns
from timm_ghn.hub.entry import DEFAULT as DEFAULT, REPO, GHNEntry

_FILES = ('.safetensors', '.pt', '.pth', '.pkl', '.joblib', '.bin', '.json', '.gz')


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a GHN is: exactly one of the three.

    Attributes:
        path: An existing file or folder.
        entry: An entry of the catalogue.
        repo_id: A repository on the Hub, in our form.
    """

    path: Path | None = None
    entry: GHNEntry | None = None
    repo_id: str | None = None


def locate(name_or_path: str | os.PathLike[str]) -> Place:
    """Find what a name stands for: a name of the catalogue, else an existing path, else a repository on the Hub.

    A file or folder that has the name of a GHN is loaded by a path with a separator (``./ghn2``) or a path object.

    Raises:
        GHNNotFoundError: if it can be none of these.
    """
    name = os.fspath(name_or_path)
    path = os.path.expanduser(name)
    known, refused = ({}, {}) if _is_path(name_or_path) else (known_ghns(), refused_ghns())
    if name in known:
        return Place(entry=known[name])
    if name in refused:
        raise GHNNotFoundError(f'the GHN {name!r} is not known, because its file is wrong: {refused[name]}')
    if name and os.path.exists(path):  # unlike Path's, neither raises for names that no file can have
        return Place(path=Path(path))
    if isinstance(name_or_path, str) and REPO.fullmatch(name) and not name.endswith(_FILES):
        return Place(repo_id=name)
    if _is_path(name_or_path) or name.endswith(_FILES):
        raise GHNNotFoundError(f'expected a GHN in {name!r}: there is no such file or folder')
    near = difflib.get_close_matches(name, [DEFAULT, *known], n=1, cutoff=0.5)
    hint = f'Did you mean {near[0]!r}? ' if near else ''
    raise GHNNotFoundError(
        f'no GHN has the name {printable(name)!r}. {hint}Known are {", ".join(known)}, and {DEFAULT!r} for the '
        "default; a path and 'user/repository' of the Hub are taken as well"
    )


def _is_path(name: str | os.PathLike[str]) -> bool:
    """Whether it can only be a path, or a repository on the Hub."""
    separators = [sep for sep in (os.sep, os.altsep) if sep]
    return not isinstance(name, str) or name.startswith(('.', '~')) or any(sep in name for sep in separators)
