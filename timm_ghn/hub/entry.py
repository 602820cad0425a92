"""What is known of a named GHN before its file is read: one frozen record, checked where it is made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from timm_ghn.errors import ConfigError
from timm_ghn.files import read_json
from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE
from timm_ghn.nn.config import GHNConfig

_PACKAGE = Path(__file__).resolve().parents[1]

#: How the file of a GHN is read: as the authors' joblib dump or torch file, or as a folder of ours.
FORMATS = ('joblib', 'timm_ghn')

#: The name of the default GHN, whichever that is.
DEFAULT = 'ghn'

#: 'user/name' on the Hub.
REPO = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', re.ASCII)

#: A name is also a tag of timm, a word of the command line and part of the name of a folder.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,63}')
_REVISION = re.compile(r'[\w][\w./-]{0,254}', re.ASCII)
_LONGEST = 1000


@dataclasses.dataclass(frozen=True)
class GHNEntry:
    """What the catalogue says of a GHN.

    Attributes:
        name: Under which it is loaded.
        description: One line for people.
        format: One of :data:`FORMATS`.
        config: Its hyper-parameters; the file must agree.
        license: SPDX identifier in lower case, as the Hub writes it; None if it is not known.
        num_parameters: Number of its parameters; None if it is not known.
        paper: Address of the paper, if there is one.
        repo_id: Repository on the Hub; None for a GHN on this machine.
        filename: File in the repository; None for a repository in our form.
        revision: Branch, tag or commit of the repository.
        sha256: Digest that the official file must have before anything in it is read; None where it is not known: then
            that by which the Hub names the file.
        path: Folder inside the package; None for all others.
        file: Folder or file on this machine, for a GHN that a user made known.
        within: Folder that ``file`` and what it links to must not lie outside of; None where a program named the file.
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
    sha256: str | None = None
    path: str | None = None
    file: str | None = None
    within: str | None = None
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        self._check_types()
        if self.format not in FORMATS:
            raise ConfigError(f'expected format of {self.name} to be one of {", ".join(FORMATS)} (got {self.format!r})')
        if sum(place is not None for place in (self.path, self.file, self.repo_id)) != 1:
            raise ConfigError(f'expected {self.name} to have either a path, or a repo_id and a filename')
        ours_on_the_hub = self.repo_id is not None and self.format == 'timm_ghn'
        if (self.filename is not None) != (self.repo_id is not None and not ours_on_the_hub):
            raise ConfigError(
                f'expected {self.name} to have either a path, or a repo_id and a filename; a repo_id alone for a '
                "repository in our form (format 'timm_ghn')"
            )
        self._check_repository()
        if self.sha256 is not None:
            official = self.format != 'timm_ghn'
            if not official or not isinstance(self.sha256, str) or not re.fullmatch('[0-9a-f]{64}', self.sha256):
                raise ConfigError(
                    f'expected sha256 of {self.name}, of an official file, as 64 hexadecimal digits in lower case '
                    f'(got {_short(self.sha256)})'
                )

    def _check_types(self) -> None:
        texts = {'description': self.description, 'format': self.format, 'revision': self.revision}
        for field in ('license', 'paper', 'repo_id', 'filename', 'path', 'file', 'within'):
            if getattr(self, field) is not None:
                texts[field] = getattr(self, field)
        for field, text in texts.items():
            if not isinstance(text, str) or len(text) > _LONGEST or not text.isprintable():
                raise ConfigError(
                    f'expected {field} of {self.name} as a line of at most {_LONGEST} characters (got {_short(text)})'
                )
        count = self.num_parameters
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 0 < count < 2**63):
            raise ConfigError(f'expected num_parameters of {self.name} to be a positive integer (got {_short(count)})')
        if not isinstance(self.norms, Mapping):
            raise ConfigError(f'expected norms of {self.name} by architecture (got {_short(self.norms)})')
        for arch, norm in self.norms.items():
            number = isinstance(norm, (int, float)) and not isinstance(norm, bool) and abs(norm) < 2**63
            if not isinstance(arch, str) or not number or not math.isfinite(norm):
                raise ConfigError(
                    f'expected a number as the norm of {_short(arch)} of {self.name} (got {_short(norm)})'
                )

    def _check_repository(self) -> None:
        if self.repo_id is not None and not REPO.fullmatch(self.repo_id):
            raise ConfigError(f"expected repo_id of {self.name} to be 'user/name' (got {_short(self.repo_id)})")
        if self.filename is not None and not _stays_inside(self.filename):
            raise ConfigError(
                f'expected filename of {self.name} to be a path inside the repository (got {_short(self.filename)})'
            )
        if not _REVISION.fullmatch(self.revision) or '..' in self.revision:
            raise ConfigError(
                f'expected revision of {self.name} to be a branch, tag or commit (got {_short(self.revision)})'
            )

    @property
    def source(self) -> str:
        """Where it is, for people."""
        if self.path is not None:
            return 'in the package'
        if self.file is not None:
            return self.file
        return f'{self.repo_id}/{self.filename}' if self.filename is not None else str(self.repo_id)

    @property
    def folder(self) -> Path:
        """Its folder on disk, for a GHN inside the package."""
        if self.path is None:
            raise ConfigError(f'{self.name} is not inside the package')
        return _PACKAGE / self.path

    @property
    def place(self) -> Path | None:
        """Its folder or file on this machine, None for a GHN on the Hub.

        Raises:
            ConfigError: if it lies, or links, outside the folder that it must not leave.
        """
        if self.file is None:
            return self.folder if self.path is not None else None
        place = Path(self.file)
        if self.within is not None:
            root = Path(self.within).resolve()
            single = place.suffix == '.safetensors'
            for file in (place, *((place.parent if single else place) / name for name in (CONFIG_FILE, WEIGHTS_FILE))):
                if not _resolved(file).is_relative_to(root):
                    raise ConfigError(f'expected the GHN {self.name!r} inside {str(root)!r} ({str(file)!r} is not)')
        return place

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, 'config': self.config.to_dict(), 'norms': dict(self.norms)}


def check_name(name: object) -> None:
    """Refuse what cannot name a GHN.

    Raises:
        ConfigError: if it is not of letters, digits, '_' and '-' (so that it is no path), or is that of the default.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"expected the name of a GHN of at most 64 letters, digits, '_' and '-' that begins with a letter or "
            f'digit (got {_short(name)})'
        )
    if name == DEFAULT:
        raise ConfigError(f'{DEFAULT!r} names the default GHN; timm_ghn.set_default_ghn(...) chooses which one that is')


def read_entry(path: Path) -> GHNEntry:
    """Read one file of the package's catalogue.

    Raises:
        ConfigError: if it has unknown or missing keys or wrong values, or a name that is not the file's.
        CheckpointError: if it is not JSON.
    """
    return _entry_of(read_json(path), path)


def read_users_entry(path: Path) -> GHNEntry:
    """Read one file of a user's folder of entries, where a path is relative to the folder and does not leave it.

    Raises:
        ConfigError: if it has unknown or missing keys or wrong values, or a name that is not the file's, or a path
            that is absolute or leads out of the folder.
        CheckpointError: if it is not JSON.
    """
    record = read_json(path)
    for key in ('file', 'within'):
        if key in record:
            raise ConfigError(f'{path} is no entry of the catalogue: unexpected {key!r}')
    inside = record.pop('path', None)
    if inside is not None:
        if not isinstance(inside, str) or not _stays_inside(inside):
            raise ConfigError(
                f'expected the path in {path} to be relative to its folder, without ".." (got {_short(inside)}); '
                'timm_ghn.register_ghn takes any path'
            )
        root = path.parent.resolve()
        record |= {'file': str(root / inside), 'within': str(root)}
    entry = _entry_of(record, path)
    _ = entry.place  # refuses a path that leaves the folder through a link
    return entry


def _entry_of(record: dict[str, Any], path: Path) -> GHNEntry:
    if record.get('name') != path.stem:
        raise ConfigError(f'expected the name of {path.name} to be {path.stem!r} (got {_short(record.get("name"))})')
    try:
        return GHNEntry(**{**record, 'config': GHNConfig.from_dict({'name': path.stem, **record['config']})})
    except (TypeError, KeyError) as error:
        raise ConfigError(f'{path} is no entry of the catalogue: {error}') from error


def _stays_inside(text: str) -> bool:
    """Whether a path is relative and never goes up, for POSIX and for Windows."""
    parts = PureWindowsPath(text).parts
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or PureWindowsPath(text).root
    return bool(text) and '\0' not in text and not absolute and '..' not in parts


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ConfigError(f'{str(path)!r} cannot be followed: {error}') from error


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f'a huge {type(value).__name__}'
    return text if len(text) <= 80 else f'{text[:80]}...'
