"""The catalogue of GHNs by name, the default GHN, and how a name or path is resolved."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_ghn.errors import ConfigError, GHNNotFoundError, printable
from timm_ghn.files import read_json
from timm_ghn.hub.fetch import Access, HubFile, fetch
from timm_ghn.hub.official import open_official
from timm_ghn.hub.storage import CONFIG_FILE, is_native, read_config, read_shapes
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
_SUFFIXES = ('.safetensors', '.pt', '.pth', '.pkl', '.joblib', '.bin', '.json', '.gz')

_PACKAGE = Path(__file__).resolve().parents[1]
#: In an installed package; in a checkout, where the files are beside the package.
_FOLDERS = (_PACKAGE / 'hub_configs', _PACKAGE.parent / 'hub_configs')

_registered: dict[str, GHNEntry] = {}
_default: str | None = None


@dataclasses.dataclass(frozen=True)
class GHNEntry:
    """An entry of the catalogue.

    Attributes:
        name: Under which it is loaded.
        description: One human-readable line.
        format: 'joblib' for the authors' dump or torch file, or 'timm_ghn' for the native format.
        config: Its hyper-parameters; the file must agree.
        license: SPDX identifier in lower case, as the Hub writes it; None if it is not known.
        num_parameters: Number of its parameters; None if it is not known.
        paper: Address of the paper, if there is one.
        repo_id: Repository on the Hub; None for a GHN on this machine.
        filename: Official file in the repository; None for a repository in the native format.
        revision: Branch, tag or commit of the repository.
        path: Folder inside the package; None for all others.
        file: Folder or file on this machine, for a GHN that a user registered.
        norms: L2 norm over all parameters of torchvision networks that it predicts, as published, by architecture.
    """

    name: str
    description: str
    format: str
    config: GHNConfig
    license: str | None = None
    num_parameters: int | None = None
    paper: str | None = None
    repo_id: str | None = None
    filename: str | None = None
    revision: str = 'main'
    path: str | None = None
    file: str | None = None
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"expected the name of a GHN of at most 64 letters, digits, '_' and '-' that begins with a letter or "
                f'digit (got {printable(repr(self.name))})'
            )
        if self.name == DEFAULT:
            raise ConfigError(f'the name {DEFAULT!r} is that of the default GHN: timm_ghn.set_default_ghn chooses it')

    @property
    def source(self) -> str:
        """Human-readable place."""
        if self.path is not None:
            return 'in the package'
        return self.file or '/'.join(filter(None, (self.repo_id, self.filename)))

    @property
    def place(self) -> Path | None:
        """Its folder or file on this machine; None for a GHN on the Hub."""
        if self.path is not None:
            return _PACKAGE / self.path
        return None if self.file is None else Path(self.file)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, 'config': self.config.to_dict(), 'norms': dict(self.norms)}


def read_entry(path: Path) -> GHNEntry:
    """Read one file of the package's catalogue.

    Raises:
        ConfigError: if it has unknown or missing keys or wrong values, or a name that is not the file's.
        CheckpointError: if it is not JSON.
    """
    record = read_json(path)
    if record.get('name') != path.stem:
        raise ConfigError(f'expected the name of {path.name} to be {path.stem!r} (got {record.get("name")!r})')
    try:
        return GHNEntry(**{**record, 'config': GHNConfig.from_dict({'name': path.stem, **record['config']})})
    except (TypeError, KeyError) as error:
        raise ConfigError(f'{path} is no entry of the catalogue: {error}') from error


@functools.cache
def _entries() -> dict[str, GHNEntry]:
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise ConfigError(f'the catalogue of GHNs is missing (looked in {", ".join(map(str, _FOLDERS))}): reinstall')
    return {path.stem: read_entry(path) for path in folder.glob('*.json')}


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
    place = locate(path_or_repo)
    if place.entry is not None:
        raise ConfigError(f'expected a path or a repository (got {path_or_repo!r}, which has a name already)')
    file = None if place.path is None else place.path.absolute()
    if file is None:
        config = read_config(fetch(HubFile(str(place.repo_id), CONFIG_FILE), Access()))
        entry = GHNEntry(name, '', 'timm_ghn', config, repo_id=place.repo_id)
    elif is_native(file):
        config, shapes = read_shapes(file)
        entry = GHNEntry(name, '', 'timm_ghn', config, num_parameters=_count(shapes), file=str(file))
    else:
        with open_official(file) as found:
            entry = GHNEntry(name, '', 'joblib', found.config, num_parameters=_count(found.shapes), file=str(file))
    known = known_ghns().get(name)
    if known is not None and known.source != entry.source:
        raise ConfigError(f'a GHN named {name!r} is known already ({known.source}): choose another name')
    _registered[name] = entry


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


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
    _default = str(place.path.resolve()) if place.path is not None else os.fspath(name_or_path)


def chosen_default() -> str | None:
    """The default GHN of :func:`set_default_ghn`, else of the environment; None if neither names one.

    Only then the GHN inside the package may replace the published one.

    Raises:
        GHNNotFoundError: if the environment names no GHN.
    """
    if _default is not None:
        return _default
    named = os.environ.get(VARIABLE, '').strip()
    if named in ('', DEFAULT):
        return None
    try:
        locate(named)
    except GHNNotFoundError as error:
        raise GHNNotFoundError(f'{VARIABLE}={named} in the environment: {error}') from error
    return named


@dataclasses.dataclass(frozen=True)
class Place:
    """Location of a GHN: exactly one of the three.

    Attributes:
        path: An existing file or folder.
        entry: An entry of the catalogue.
        repo_id: A repository on the Hub, in the native format.
    """

    path: Path | None = None
    entry: GHNEntry | None = None
    repo_id: str | None = None


def locate(name_or_path: str | os.PathLike[str]) -> Place:
    """Resolve a name or path, without asking the network.

    It is a name of the catalogue, else an existing path, else a repository on the Hub. A file or folder that has the
    name of a GHN is loaded by a path with a separator (``./ghn2``) or a path object.

    Raises:
        GHNNotFoundError: if it can be none of these.
    """
    name = os.fspath(name_or_path)
    separators = [sep for sep in (os.sep, os.altsep) if sep]
    is_path = not isinstance(name_or_path, str) or name.startswith(('.', '~')) or any(sep in name for sep in separators)
    known = {} if is_path else known_ghns()
    if name in known:
        return Place(entry=known[name])
    path = os.path.expanduser(name)
    if name and os.path.exists(path):  # unlike Path's, neither raises for names that no file can have
        return Place(path=Path(path))
    if isinstance(name_or_path, str) and REPO.fullmatch(name) and not name.endswith(_SUFFIXES):
        return Place(repo_id=name)
    if is_path or name.endswith(_SUFFIXES):
        raise GHNNotFoundError(f'expected a GHN in {name!r}: there is no such file or folder')
    near = difflib.get_close_matches(name, [DEFAULT, *known], n=1, cutoff=0.5)
    hint = f'Did you mean {near[0]!r}? ' if near else ''
    raise GHNNotFoundError(
        f'no GHN has the name {printable(name)!r}. {hint}Known are {", ".join(known)}, and {DEFAULT!r} for the '
        "default; a path and 'user/repository' of the Hub are taken as well"
    )
