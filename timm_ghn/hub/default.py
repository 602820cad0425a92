"""Which GHN the name 'ghn' means."""

from __future__ import annotations

import dataclasses
import os

from timm_ghn.errors import GHNNotFoundError
from timm_ghn.hub.locate import DEFAULT, locate

#: Environment variable that names the default GHN: a name or a path.
VARIABLE = 'TIMM_GHN_DEFAULT'
#: The default where nobody chose one.
PUBLISHED = 'ghn3_xlm16'
#: What serves where that cannot be had.
EMBEDDED = 'ghn_tiny'

_chosen: str | None = None


@dataclasses.dataclass(frozen=True)
class Default:
    """The default GHN.

    Attributes:
        name: Its name or path.
        chosen_by: 'set_default_ghn', 'TIMM_GHN_DEFAULT', or None where nobody chose it. Only then another one may
            serve in its place.
    """

    name: str
    chosen_by: str | None


def set_default_ghn(name_or_path: str | os.PathLike[str] | None) -> None:
    """Choose the GHN that the name 'ghn' means in this process.

    Args:
        name_or_path: A name, a repository on the Hub or a path (kept absolute); None, or 'ghn', to undo the choice.

    Raises:
        GHNNotFoundError: if it is the name of no GHN. Nothing is loaded yet.
    """
    global _chosen
    if name_or_path is None or name_or_path == DEFAULT:
        _chosen = None
        return
    place = locate(name_or_path)
    _chosen = str(place.path.resolve()) if place.path is not None else os.fspath(name_or_path)


def resolve_default() -> Default:
    """The GHN that the name 'ghn' means: of :func:`set_default_ghn`, else of the environment, else the published one.

    Raises:
        GHNNotFoundError: if the environment names no GHN.
    """
    if _chosen is not None:
        return Default(_chosen, 'set_default_ghn')
    named = os.environ.get(VARIABLE, '').strip()
    if named in ('', DEFAULT):
        return Default(PUBLISHED, None)
    try:
        place = locate(named)
    except GHNNotFoundError as error:
        raise GHNNotFoundError(f'{VARIABLE}={named} in the environment: {error}') from error
    return Default(named if place.path is None else str(place.path), VARIABLE)
