"""The best start that can be had for a network: a relative's weights, a GHN's prediction, or both."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from timm_ghn.errors import UnsupportedModelError
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.predict import initialise
from timm_ghn.transfer.race import Race, race_
from timm_ghn.transfer.rank import RankedDonor, rank_donors
from timm_ghn.transfer.transfer import Transfer, plan_transfer

#: Beyond this distance a pretrained network is no relative.
FARTHEST = 0.5

_log = logging.getLogger('timm_ghn.transfer')

GHNLike = GHN | str | os.PathLike[str]
DonorLike = nn.Module | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Start:
    """What a network begins with.

    Attributes:
        origin: 'donor:NAME', 'ghn', or 'own' for the initialisation that it had.
        transfer: What came from the donor, if that is the origin.
        considered: The nearest of timm's pretrained networks, where they were ranked.
        race: What the race between the starts found, if there was data for it.
    """

    origin: str
    transfer: Transfer | None = None
    considered: tuple[RankedDonor, ...] = ()
    race: Race | None = None

    def __str__(self) -> str:
        parts = [f'start: {self.origin}']
        parts += [f'nearest: {one}' for one in self.considered]
        parts += [str(part) for part in (self.transfer, self.race) if part is not None]
        return '\n'.join(parts)


def start_(
    model: nn.Module,
    donors: str | DonorLike | Sequence[DonorLike] | None = 'auto',
    data: Iterable[Any] | None = None,
    *,
    ghn: GHNLike | None = 'ghn',
    input_size: int | Sequence[int] | None = None,
    seed: int = 0,
    **race: Any,
) -> Start:
    """Give a network the best start that can be had, in place.

    A relative's weights are transferred, and what has no partner is predicted; without a relative, everything is. With
    data, these starts and the network's own race on it (:func:`choose_init`), and the winner stays.

    Args:
        model: Any network that takes a batch of images.
        donors: 'auto': the nearest of timm's pretrained networks (:func:`rank_donors`), else the nearest whose weights
            are in the local cache; one donor or several, see :func:`plan_transfer`; None for none.
        data: Batches of preprocessed images and labels, as a list or a loader.
        ghn: What predicts; None for no prediction.
        input_size: Image size, see :func:`timm_ghn.trace`.
        seed: Of all that is random.
        **race: More arguments of :func:`choose_init`.

    Returns:
        What came from where; print it.

    Raises:
        UnsupportedModelError: if a donor that is named cannot be had, or there is nothing to begin with.
        GHNError: as :func:`plan_transfer` and :func:`timm_ghn.ghn_init`.
    """
    considered: tuple[RankedDonor, ...] = ()
    if isinstance(donors, str) and donors == 'auto':
        found, considered = nearest(model, ghn=ghn, input_size=input_size, seed=seed)
        plans = [] if found is None else [found]
    else:
        named = () if donors is None else (donors,) if isinstance(donors, nn.Module | str | os.PathLike) else donors
        plans = [plan_transfer(model, one, ghn=ghn, input_size=input_size, seed=seed) for one in named]
    transfers: dict[str, Transfer] = {}
    for plan in plans:
        name = f'donor:{plan.provenance["donor"]}'
        transfers[name if name not in transfers else f'{name} {len(transfers) + 1}'] = plan
    starts: dict[str, Callable[[nn.Module], object]] = {name: plan.apply_ for name, plan in transfers.items()}
    if ghn is not None:
        starts['ghn'] = lambda target: initialise(target, ghn, input_size=input_size, seed=seed)
    if not starts:
        raise UnsupportedModelError('there is no relative and no GHN to begin with: name a donor, or give ghn=')
    if data is not None:
        decided = race_(model, starts, data, seed=seed, **race)
        return Start(decided.winner.start, transfers.get(decided.winner.start), considered, decided)
    origin = next(iter(starts))
    starts[origin](model)
    return Start(origin, transfers.get(origin), considered)


def nearest(
    model: nn.Module,
    *,
    ghn: GHNLike | None = None,
    input_size: int | Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Transfer | None, tuple[RankedDonor, ...]]:
    """What the nearest pretrained relative gives, and the relatives that were considered; None where none can be had.

    The nearest one is downloaded if it can be; else the nearest in the local cache serves.
    """
    relatives = [one for one in rank_donors(model) if one.distance <= FARTHEST]
    tried = relatives[:1] + [one for one in relatives[1:] if one.cached][:3]
    for one in tried:
        _log.info('takes the weights of %s', one)
        try:
            plan = plan_transfer(model, one.name, ghn=ghn, input_size=input_size, seed=seed)
        except UnsupportedModelError as error:
            warnings.warn(f'{one.name} cannot serve as a donor: {error}', stacklevel=3)
        else:
            return plan, tuple(relatives[:5])
    return None, tuple(relatives[:5])


def candidate(name: str, *, input_size: int | Sequence[int] | None = None, seed: int = 0) -> Callable[[nn.Module], Any]:
    """The start of a name: 'donor:NAME', 'donor:auto', or the name or path of a GHN."""
    kind, colon, rest = name.partition(':')
    if not (colon and kind == 'donor'):
        return lambda model: initialise(model, name, input_size=input_size, seed=seed)

    def give(model: nn.Module) -> Transfer:
        plan = plan_transfer(model, rest, input_size=input_size, seed=seed) if rest != 'auto' else None
        if plan is None:
            plan, _ = nearest(model, input_size=input_size, seed=seed)
        if plan is None:
            raise UnsupportedModelError('timm has no pretrained relative of this network that can be had; name one')
        plan.apply_(model)
        return plan

    return give


def choose_init(
    model: nn.Module,
    data: Iterable[Any],
    candidates: Sequence[str] = ('ghn', 'donor:auto'),
    *,
    input_size: int | Sequence[int] | None = None,
    seed: int = 0,
    **race: Any,
) -> Race:
    """Let starts race on the user's data, and leave the winner in the model; see :func:`timm_ghn.transfer.race.race_`.

    Args:
        model: The network; its own initialisation always takes part.
        data: Batches of preprocessed images and labels, as a list or a loader.
        candidates: 'donor:NAME', 'donor:auto', and names or paths of GHNs. What cannot be had is left out with a
            warning.
        input_size: Image size, see :func:`timm_ghn.trace`.
        seed: Of all that is random.
        **race: More arguments of :func:`timm_ghn.transfer.race.race_`.
    """
    starts = {name: candidate(name, input_size=input_size, seed=seed) for name in candidates}
    return race_(model, starts, data, seed=seed, **race)
