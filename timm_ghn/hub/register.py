"""A user's own GHNs, by names of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.files import read_json
from timm_ghn.hub.catalogue import add_entry
from timm_ghn.hub.entry import REPO, GHNEntry, check_name
from timm_ghn.hub.fetch import Access, HubFile, fetch
from timm_ghn.hub.formats import open_official
from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE
from timm_ghn.nn.config import GHNConfig


def register_ghn(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    repo_id: str | None = None,
    filename: str | None = None,
    revision: str = 'main',
    config: GHNConfig | None = None,
    description: str = '',
    license: str | None = None,
    paper: str | None = None,
    norms: Mapping[str, float] | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> GHNEntry:
    """Give a GHN a name in this process: for :func:`timm_ghn.load_ghn`, the command line, and as a tag of timm.

    ``register_ghn('mine', 'train-out/ghn')`` makes ``timm.create_model('resnet18.mine')`` predict with it. For a name
    that all processes know, put the entry into a folder that the environment variable TIMM_GHN_CONFIGS names.

    Weights are read when the GHN is loaded. Its configuration is read here, unless it is given: from the file, or, for
    a repository in our form, from its ``config.json`` on the Hub.

    Args:
        name: Letters, digits, '_' and '-'. An architecture's own tag of that name keeps its meaning.
        path: Folder of :func:`timm_ghn.save_ghn`, its ``model.safetensors``, or a file of the authors; kept absolute.
        repo_id: Repository on the Hub, 'user/name', in place of a path.
        filename: Official file in the repository; None for a repository in our form.
        revision: Branch, tag or commit of the repository.
        config: Hyper-parameters, which the file must have; required with ``filename``.
        description: One line for people.
        license: SPDX identifier in lower case, for the cards of models that are predicted with it.
        paper: Address of a paper.
        norms: Norms of predicted torchvision networks by architecture, for ``timm-ghn verify``.
        token: To read the configuration from a private repository; huggingface_hub's own if None.
        overwrite: Whether another GHN of this name is replaced.

    Returns:
        The entry.

    Raises:
        ConfigError: if the name is taken or impossible, or if what is given contradicts itself.
        GHNNotFoundError: if there is no such path, or the repository cannot be reached.
        CheckpointError: if the file is damaged or holds no GHN.
    """
    check_name(name)
    if (path is None) == (repo_id is None) or (filename is not None and repo_id is None):
        raise ConfigError(f'expected {name!r} to have either a path, or a repo_id and perhaps a filename')
    count = None
    place = None
    if path is not None:
        place = Path(path).expanduser().absolute()
        found, count = _of_path(place)
        config, ours = config or found, place.is_dir() or place.suffix == '.safetensors'
    else:
        ours = filename is None
        config = config or _of_repository(name, str(repo_id), filename, revision, token)
    entry = GHNEntry(
        name=name,
        description=description,
        format='timm_ghn' if ours else 'joblib',
        config=config,
        license=license,
        num_parameters=count,
        paper=paper,
        repo_id=repo_id,
        filename=filename,
        revision=revision,
        file=None if place is None else str(place),
        norms=dict(norms or {}),
    )
    add_entry(entry, overwrite=overwrite)
    return entry


def _of_path(place: Path) -> tuple[GHNConfig, int]:
    """Hyper-parameters and number of parameters, without reading a weight."""
    if not place.exists():
        raise GHNNotFoundError(f'expected a GHN in {str(place)!r}: there is no such file or folder')
    if not place.is_dir() and place.suffix != '.safetensors':
        with open_official(place) as found:
            return found.config, _count(found.shapes.values())
    weights = place / WEIGHTS_FILE if place.is_dir() else place
    for file in (weights.parent / CONFIG_FILE, weights):
        if not file.is_file():
            raise GHNNotFoundError(f'expected a GHN in {str(weights.parent)!r}, which has no file {file.name}')
    config = GHNConfig.from_dict(read_json(weights.parent / CONFIG_FILE))
    try:
        with safe_open(weights, framework='pt', device='cpu') as file:
            return config, _count(file.get_slice(key).get_shape() for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'{weights} is truncated or damaged: {error}') from error


def _count(shapes: Iterable[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _of_repository(name: str, repo_id: str, filename: str | None, revision: str, token: str | bool | None) -> GHNConfig:
    if not isinstance(repo_id, str) or not REPO.fullmatch(repo_id):
        raise ConfigError(f"expected repo_id of {name!r} to be 'user/name' (got {repo_id!r})")
    if filename is not None:
        raise ConfigError(
            f'expected config=GHNConfig(...) for {name!r}, the hyper-parameters of {filename}, which would have to be '
            'downloaded to find them'
        )
    path = fetch(HubFile(repo_id, CONFIG_FILE, revision), Access(token=token))
    return GHNConfig.from_dict(read_json(path))
