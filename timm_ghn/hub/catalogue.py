"""The catalogue of GHNs by name, the default GHN, and how a name or path is resolved."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_ghn.errors import ConfigError, GHNNotFoundError, printable
from timm_ghn.files import read_json
from timm_ghn.hub.fetch import Access, fetch
from timm_ghn.hub.official import open_official
from timm_ghn.hub.storage import CONFIG_FILE, is_native, read_config
from timm_ghn.nn.config import GHNConfig

#: The name of the default GHN, whichever that is.
DEFAULT = 'ghn'
#: Environment variable that names the default GHN: a name or a path.
VARIABLE = 'TIMM_GHN_DEFAULT'
#: The default if none was chosen.
PUBLISHED = 'ghn3_xlm16'
#: The fallback where that cannot be reached.
EMBEDDED = 'ghn_tiny'

#: 'user/name' on the Hub.
REPO = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', re.ASCII)

#: A name is also a tag of timm, a word of the command line and part of the name of a folder.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,63}')

_PACKAGE = Path(__file__).resolve().parents[1]
#: In an installed package; in a checkout, where the files are beside the package.
_FOLDERS = (_PACKAGE / 'hub_configs', _PACKAGE.parent / 'hub_configs')

_registered: dict[str, GHNEntry] = {}
_default: str | None = None


@dataclasses.dataclass(frozen=True)
class GHNEntry:
    """An entry of the catalogue; what is not known is None.

    Attributes:
        config: Its hyper-parameters; the file must agree.
        license: SPDX identifier in lower case, as the Hub writes it.
        paper: Address of the paper.
        repo_id: Repository on the Hub; None for a GHN on this machine.
        filename: Official file in the repository; None for a repository in the native format.
        path: Folder or file on this machine, relative inside the package; None for a GHN on the Hub.
        norms: L2 norm over all parameters of torchvision networks that it predicts, as published, by architecture.
    """

    name: str
    description: str
    config: GHNConfig
    license: str | None = None
    num_parameters: int | None = None
    paper: str | None = None
    repo_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    path: str | None = None
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        """Whether it is inside the package."""
        return self.path is not None and not os.path.isabs(self.path)

    @property
    def source(self) -> str:
        """Human-readable place."""
        return 'in the package' if self.embedded else self.path or '/'.join(filter(None, (self.repo_id, self.filename)))

    @property
    def place(self) -> Path | None:
        """Its folder or file on this machine; None for a GHN on the Hub."""
        return None if self.path is None else _PACKAGE / self.path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        return {**vars(self), 'config': self.config.to_dict(), 'norms': dict(self.norms)}


@functools.cache
def _entries() -> dict[str, GHNEntry]:
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    entries = {}
    for path in folder.glob('*.json'):
        record = read_json(path)
        config = GHNConfig.from_dict({'name': path.stem, **record.pop('config')})
        entries[path.stem] = GHNEntry(config=config, **record)
    return entries


def known_ghns() -> dict[str, GHNEntry]:
    """The GHNs of the catalogue and those of :func:`timm_ghn.register_ghn` by name, in alphabetical order."""
    return dict(sorted((_entries() | _registered).items()))


def list_ghns() -> list[str]:
    """The names that :func:`timm_ghn.load_ghn` knows, in alphabetical order; each is a tag of timm as well."""
    return list(known_ghns())


def register_ghn(name: str, path_or_repo: str | os.PathLike[str]) -> None:
    """Give a GHN a name in this process: for :func:`timm_ghn.load_ghn`, the command line, and as a tag of timm.

    ``register_ghn('mine', 'train-out/ghn')`` makes ``timm.create_model('resnet18.mine')`` predict with it. Weights are
    read when the GHN is loaded. Its configuration is read here, of a repository from the Hub.

    Args:
        name: Letters, digits, '_' and '-'. An architecture's own tag of that name keeps its meaning.
        path_or_repo: A folder of :func:`timm_ghn.save_ghn`, its ``model.safetensors``, a file of the authors of GHN-2
            or GHN-3, or a repository in the native format on the Hub, 'user/name'. A path is kept absolute.

    Raises:
        ConfigError: if the name is impossible, or another GHN has it.
        GHNNotFoundError: if there is no such path, or the repository cannot be reached.
        CheckpointError: if the file is damaged or holds no GHN.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == DEFAULT:
        raise ConfigError(
            f"expected the name of a GHN, other than {DEFAULT!r}, of at most 64 letters, digits, '_' and '-' that "
            f'begins with a letter or digit (got {printable(repr(name))})'
        )
    place = locate(path_or_repo)
    if isinstance(place, GHNEntry):
        raise ConfigError(f'expected a path or a repository (got {path_or_repo!r}, which has a name already)')
    if isinstance(place, str):
        entry = GHNEntry(name, '', read_config(fetch(place, CONFIG_FILE, Access())), repo_id=place)
    else:
        path = place.absolute()
        if is_native(path):
            config = read_config((path if path.is_dir() else path.parent) / CONFIG_FILE)
        else:
            with open_official(path) as found:
                config = found.config
        entry = GHNEntry(name, '', config, path=str(path))
    known = known_ghns().get(name)
    if known is not None and known.source != entry.source:
        raise ConfigError(f'a GHN named {name!r} is known already ({known.source}): choose another name')
    _registered[name] = entry


def set_default_ghn(name_or_path: str | os.PathLike[str] | None) -> None:
    """Choose the GHN that the name 'ghn' means in this process.

    Args:
        name_or_path: A name, a repository on the Hub or a path (kept absolute); None, or 'ghn', to undo the choice.

    Raises:
        GHNNotFoundError: if it is the name of no GHN. Nothing is loaded yet.
    """
    global _default
    if name_or_path is None or name_or_path == DEFAULT:
        _default = None
        return
    place = locate(name_or_path)
    _default = str(place.resolve()) if isinstance(place, Path) else os.fspath(name_or_path)


def chosen_default() -> str | None:
    """The default GHN of :func:`set_default_ghn`, else of the environment; None if neither names one.

    Only then the GHN inside the package may replace the published one. A GHNNotFoundError if the environment names none
    that there is.
    """
    named = os.environ.get(VARIABLE, '').strip()
    if _default is not None or named in ('', DEFAULT):
        return _default
    try:
        locate(named)
    except GHNNotFoundError as error:
        raise GHNNotFoundError(f'{VARIABLE}={named} in the environment: {error}') from error
    return named


def locate(name_or_path: str | os.PathLike[str]) -> Path | GHNEntry | str:
    """Resolve a name of the catalogue, else an existing path, else a repository, without asking the network.

    A file or folder that has the name of a GHN is loaded by a path with a separator (``./ghn2``) or a path object.

    Raises:
        GHNNotFoundError: if it can be none of these.
    """
    name, is_text = os.fspath(name_or_path), isinstance(name_or_path, str)
    known = known_ghns()
    if is_text and name in known:
        return known[name]
    path = os.path.expanduser(name)
    if name and os.path.exists(path):  # unlike Path's, neither raises for names that no file can have
        return Path(path)
    if is_text and REPO.fullmatch(name):
        return name
    raise GHNNotFoundError(
        f'no GHN has the name {printable(name)!r}, and there is no such file or folder. Known are {", ".join(known)}, '
        f"and {DEFAULT!r} for the default; a path and 'user/repository' of the Hub are taken as well"
    )
