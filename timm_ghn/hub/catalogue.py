"""The known GHNs, one JSON file each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_ghn.errors import ConfigError
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.storage import read_json

_PACKAGE = Path(__file__).resolve().parents[1]
#: In an installed package; in a checkout, where the files are beside the package.
_FOLDERS = (_PACKAGE / 'hub_configs', _PACKAGE.parent / 'hub_configs')

#: How the file of a GHN is read: as the authors' joblib dump, or as a folder of ours.
FORMATS = ('joblib', 'timm_ghn')


@dataclasses.dataclass(frozen=True)
class GHNEntry:
    """What the catalogue says of a GHN.

    Attributes:
        name: Under which it is loaded.
        description: One line for people.
        format: One of :data:`FORMATS`.
        config: Its hyper-parameters; the file must agree.
        license: SPDX identifier in lower case, as the Hub writes it.
        num_parameters: Number of its parameters.
        paper: Address of the paper, if there is one.
        repo_id: Repository on the Hub; None for the GHN inside the package.
        filename: File in the repository.
        revision: Branch, tag or commit of the repository.
        path: Folder inside the package; None for a GHN on the Hub.
        norms: L2 norm over all parameters of torchvision networks that it predicts, as published, by architecture.
    """

    name: str
    description: str
    format: str
    config: GHNConfig
    license: str
    num_parameters: int
    paper: str | None = None
    repo_id: str | None = None
    filename: str | None = None
    revision: str = 'main'
    path: str | None = None
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f'expected format of {self.name} to be one of {", ".join(FORMATS)} (got {self.format!r})')
        if (self.path is None) == (self.repo_id is None) or (self.repo_id is None) != (self.filename is None):
            raise ConfigError(f'expected {self.name} to have either a path, or a repo_id and a filename')

    @property
    def source(self) -> str:
        """Where it is, for people."""
        return 'in the package' if self.path is not None else f'{self.repo_id}/{self.filename}'

    @property
    def folder(self) -> Path:
        """Its folder on disk, for a GHN inside the package."""
        if self.path is None:
            raise ConfigError(f'{self.name} is not inside the package')
        return _PACKAGE / self.path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, 'config': self.config.to_dict(), 'norms': dict(self.norms)}


def known_ghns() -> dict[str, GHNEntry]:
    """The GHNs of the catalogue by name, in alphabetical order.

    Raises:
        ConfigError: if the installation is incomplete, or a file of the catalogue is wrong.
    """
    return dict(_entries())


@functools.cache
def _entries() -> dict[str, GHNEntry]:
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise ConfigError(f'the catalogue of GHNs is missing (looked in {", ".join(map(str, _FOLDERS))}): reinstall')
    entries = [read_entry(path) for path in sorted(folder.glob('*.json'))]
    return {entry.name: entry for entry in entries}


def read_entry(path: Path) -> GHNEntry:
    """Read one file of the catalogue.

    Raises:
        ConfigError: if it has unknown or missing keys, or a name that is not the file's.
        CheckpointError: if it is not JSON.
    """
    record = read_json(path)
    if record.get('name') != path.stem:
        raise ConfigError(f'expected the name of {path.name} to be {path.stem!r} (got {record.get("name")!r})')
    try:
        return GHNEntry(**{**record, 'config': GHNConfig.from_dict({'name': path.stem, **record['config']})})
    except (TypeError, KeyError) as error:
        raise ConfigError(f'{path} is no entry of the catalogue: {error}') from error
