"""A race between starts and learning rates on the user's own data, by successive halving (arXiv 1502.07943).

All starts train a little at every rate; the better half trains on for twice as long, until one is left. The best rate
of the network's own initialisation takes part in every round, so that on the images that the runners are compared on,
the winner is at least as good as that.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.contexts import preserve_modes, preserve_rng, seed_rng
from timm_ghn.errors import ConfigError, GHNError, PredictionError, TrainingError
from timm_ghn.files import read_json, write_json, write_state_dict
from timm_ghn.prediction.batchnorm import calibrate_batchnorm_
from timm_ghn.prediction.checks import write_all_

#: Name of the start that is the network's own initialisation.
OWN = 'own'
#: Most batches, and bytes of them, that are kept; and the share that runners are compared on where no data is for that.
_BATCHES, _BYTES, _SHARE = 64, 1 << 30, 0.25
#: Share of the steps of a round in which the rate rises.
_WARMUP = 0.1
_CALIBRATE = 4

_log = logging.getLogger('timm_ghn.transfer')


@dataclasses.dataclass(eq=False)
class Runner:
    """A start at one learning rate.

    Attributes:
        start: Its name.
        lr: Learning rate.
        rounds: (steps, top1, loss) after each round that it took part in.
    """

    start: str
    lr: float
    rounds: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)

    @property
    def score(self) -> tuple[float, float]:
        """The larger the better: accuracy, then loss; a loss that is not finite is last."""
        if not self.rounds:
            return -1.0, -math.inf
        _, top1, loss = self.rounds[-1]
        return (top1, -loss) if math.isfinite(loss) else (-1.0, -math.inf)


@dataclasses.dataclass(frozen=True)
class Race:
    """What a race found.

    Attributes:
        winner: The start and rate that won; the model has its weights.
        runners: All that took part.
        steps: Optimiser steps of all together.
        seconds: What it took.
        left_out: Why a start could not take part, by its name.
    """

    winner: Runner
    runners: tuple[Runner, ...]
    steps: int
    seconds: float
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        ordered = sorted(self.runners, key=lambda one: (len(one.rounds), one.score), reverse=True)
        width = max(len(one.start) for one in ordered)
        lines = [f'{"start".ljust(width)}  lr        accuracy in % after steps']
        for one in ordered:
            found = ', '.join(f'{top1:.1f} after {steps}' for steps, top1, _ in one.rounds)
            lines.append(f'{one.start.ljust(width)}  {one.lr:<8.3g}  {found}')
        lines += [f'left out: {name} ({reason})' for name, reason in self.left_out.items()]
        lines.append(f'{self.winner.start} at {self.winner.lr:.3g} wins after {self.steps} steps, {self.seconds:.0f} s')
        return '\n'.join(lines)


def race_(
    model: nn.Module,
    starts: Mapping[str, Callable[[nn.Module], object]],
    data: Iterable[Any],
    *,
    val: Iterable[Any] | None = None,
    lrs: Sequence[float] = (3e-4, 1e-3, 3e-3),
    steps: int = 20,
    minutes: float | None = None,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Race:
    """Let starts race, and leave the weights of the winner in the model, in place.

    Each round has a schedule of its own, a short warm-up and a linear decay to zero, so that weights are all that goes
    from one to the next. What the race costs is logged before it begins.

    Args:
        model: The network; its own initialisation takes part as 'own'.
        starts: What writes each other start into the network. One that fails is left out, with a warning.
        data: Batches of images and labels. The first 64 of them (or the first gigabyte) are used, again and again.
        val: Batches to compare on; if None, a quarter of those of the data.
        lrs: Learning rates that each start is tried at.
        steps: Optimiser steps of each runner in the first round, where the time does not allow less.
        minutes: Bound on the time, from which fewer steps follow where they would take longer.
        optimizer: Makes the optimiser of a network and a rate; AdamW with a weight decay of 0.05 if None.
        folder: Where the state of the race is kept; the same call goes on from there after an interruption.
        identity: Plain values that tell this race from another one in the same folder, such as the data set.
        seed: Of what a network draws while it is trained.

    Raises:
        ConfigError: if there are no rates, no steps or too few batches, or the folder holds another race.
        TrainingError: if no runner has a finite loss, or there is no time for a single step.
    """
    if not lrs or min(lrs) <= 0 or steps < 1 or (minutes is not None and minutes <= 0):
        raise ConfigError(f'expected rates, steps and minutes above 0 (got {list(lrs)}, {steps}, {minutes})')
    train = _kept(data)
    cut = max(1, round(_SHARE * len(train))) if val is None else 0
    train, compared = train[cut:], _kept(val) if val is not None else train[:cut]
    if not train or not compared:
        raise ConfigError(f'expected batches to train on and others to compare on (got {len(train)}, {len(compared)})')
    with preserve_rng(), preserve_modes(model):
        field = _Field(model, train, compared, optimizer or _adamw, folder, seed, identity or {})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            return field.race(starts, tuple(lrs), steps, minutes)
        except BaseException:
            _load(model, before)
            raise


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)


def _kept(data: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the first batches."""
    found: list[tuple[Tensor, Tensor]] = []
    size = 0
    for images, labels, *_ in itertools.islice(data, _BATCHES):
        found.append((images, labels))
        size += images.nbytes
        if size >= _BYTES:
            break
    return found


def _best_half(runners: Sequence[Runner]) -> list[Runner]:
    """The better half, the best one of the network's own initialisation among them unless one alone is left."""
    ordered = sorted(runners, key=lambda one: one.score, reverse=True)
    kept = ordered[: math.ceil(len(ordered) / 2)]
    if len(kept) > 1 and not any(one.start == OWN for one in kept):
        kept[-1] = next(one for one in ordered if one.start == OWN)
    return kept


def _rounds(runners: int) -> list[int]:
    """How many runners take part in each round."""
    found = [runners]
    while found[-1] > 2:
        found.append(math.ceil(found[-1] / 2))
    return found


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        write_all_(model.state_dict(), lambda name, tensor: tensor.copy_(state[name]))


class _Field:
    """The network that all runners use in turn, the data, and the weights of each runner."""

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[tuple[Tensor, Tensor]],
        val: Sequence[tuple[Tensor, Tensor]],
        optimizer: Callable[[nn.Module, float], torch.optim.Optimizer],
        folder: Path | None,
        seed: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.train, self.val, self.optimizer = model, train, val, optimizer
        self.folder, self.seed, self.identity = folder, seed, dict(identity)
        self.state: dict[str, Any] = {}
        self.device = next(model.parameters()).device
        self.weights: dict[str, dict[str, Tensor]] = {}

    def race(
        self,
        starts: Mapping[str, Callable[[nn.Module], object]],
        lrs: tuple[float, ...],
        steps: int,
        minutes: float | None,
    ) -> Race:
        """All rounds; the winner's weights are in the model afterwards."""
        began = time.monotonic()
        said = {'starts': list(starts), 'lrs': lrs, 'steps': steps, 'seed': self.seed, **self.identity}
        self.state = json.loads(json.dumps(said))  # as it is read back
        saved = self._saved()
        left_out: dict[str, str] = saved.get('left_out', {})
        runners = [Runner(start, lr) for start in (OWN, *starts) if start not in left_out for lr in lrs]
        if not saved:
            left_out = self._prepare(starts)
            runners = [one for one in runners if one.start not in left_out]
            steps = self._affordable(runners, steps, minutes)
            self.state |= {'left_out': left_out, 'affordable': steps}
        else:
            self._resume(starts, saved, runners)
            steps = int(saved['affordable'])
        total, standing = 0, list(runners)
        for number, count in enumerate(_rounds(len(runners))):
            length = steps * 2**number
            total += count * length
            for one in standing:
                if len(one.rounds) <= number:
                    self._round(one, length, runners)
            standing = _best_half(standing)
            for one in runners:
                if one not in standing:
                    self.weights.pop(self._key(one), None)
                    if self.folder is not None:
                        self._file(one, runners).unlink(missing_ok=True)
        (winner,) = standing
        if winner.score[0] < 0:
            raise TrainingError('the loss of every start is not finite; try lower learning rates')
        _load(self.model, self._weights_of(winner))
        return Race(winner, tuple(runners), total, time.monotonic() - began, left_out)

    def _prepare(self, starts: Mapping[str, Callable[[nn.Module], object]]) -> dict[str, str]:
        """Make the weights that each start begins with."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.weights[OWN], left_out = own, {}
        for name, give in starts.items():
            try:
                give(self.model)
            except GHNError as error:
                left_out[name] = str(error)
                warnings.warn(f'{name} does not take part in the race: {error}', stacklevel=4)
            else:
                self.weights[name] = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
            _load(self.model, own)
        return left_out

    def _affordable(self, runners: Sequence[Runner], steps: int, minutes: float | None) -> int:
        """Steps of the first round that the time allows; says what the race costs."""
        rounds = _rounds(len(runners))
        units = sum(count * 2**number for number, count in enumerate(rounds))  # steps, if the first round has one
        began = time.monotonic()
        self._run(runners[0].lr, range(1))
        step = time.monotonic() - began
        began = time.monotonic()
        self._compare()
        looks = (time.monotonic() - began) * sum(rounds)
        _load(self.model, self.weights[OWN])
        if minutes is not None:
            steps = min(steps, int((60 * minutes - looks) / (step * units)))
        if steps < 1:
            raise TrainingError(
                f'a race of {len(runners)} runners takes {(step * units + looks) / 60:.2g} minutes at least, more than '
                f'{minutes}: allow more, or give fewer starts, rates or batches to compare on'
            )
        cost = (step * units * steps + looks) / 60
        _log.info('the race: %d runners, %d steps, about %.1f minutes', len(runners), units * steps, cost)
        return steps

    def _round(self, one: Runner, steps: int, runners: Sequence[Runner]) -> None:
        done = one.rounds[-1][0] if one.rounds else 0
        _load(self.model, self._weights_of(one))
        finite = self._run(one.lr, range(done, done + steps))
        top1, loss = self._compare() if finite else (0.0, math.nan)
        one.rounds.append((done + steps, top1, loss))
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        _log.info('%s at %.3g: %.1f %% after %d steps', one.start, one.lr, top1, done + steps)
        self.weights[self._key(one)] = state
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_state_dict(state, self._file(one, runners), {})  # before the list that counts it
        # JSON has no word for what is not finite.
        found = [[[s, a, b if math.isfinite(b) else None] for s, a, b in runner.rounds] for runner in runners]
        write_json({**self.state, 'rounds': found}, self.folder / 'race.json')
        for old in self.folder.glob(f'runner-{runners.index(one)}-*.safetensors'):
            if old != self._file(one, runners):
                old.unlink()

    def _saved(self) -> dict[str, Any]:
        """What an interrupted race of the same starts left in the folder; empty where there is none."""
        path = None if self.folder is None else self.folder / 'race.json'
        if path is None or not path.is_file():
            return {}
        found = read_json(path)
        if any(found.get(key) != value for key, value in self.state.items()):
            raise ConfigError(f'{str(path)!r} is of another race (starts, rates, steps, seed): choose another folder')
        self.state = {key: value for key, value in found.items() if key != 'rounds'}
        return found

    def _resume(
        self, starts: Mapping[str, Callable[[nn.Module], object]], saved: Mapping[str, Any], runners: Sequence[Runner]
    ) -> None:
        """Go on from what an interrupted race found."""
        for one, rounds in zip(runners, saved['rounds'], strict=True):
            one.rounds = [(int(s), float(a), math.nan if b is None else float(b)) for s, a, b in rounds]
            if one.rounds and self._file(one, runners).is_file():  # else it was dropped
                self.weights[self._key(one)] = load_file(self._file(one, runners))
        pending = {one.start for one in runners if not one.rounds}
        failed = self._prepare({name: give for name, give in starts.items() if name in pending})
        if failed:
            raise TrainingError(f'the race cannot go on without {", ".join(failed)}')

    @staticmethod
    def _key(one: Runner) -> str:
        return f'{one.start} at {one.lr!r}'

    def _file(self, one: Runner, runners: Sequence[Runner]) -> Path:
        assert self.folder is not None
        return self.folder / f'runner-{runners.index(one)}-{len(one.rounds)}.safetensors'

    def _weights_of(self, one: Runner) -> Mapping[str, Tensor]:
        return self.weights.get(self._key(one)) or self.weights[one.start]

    def _run(self, lr: float, steps: range) -> bool:
        """Train for some steps, with the batches that every runner sees at them; whether the loss stays finite."""
        self.model.train()
        optimizer = self.optimizer(self.model, lr)
        for number, step in enumerate(steps):
            rise = min(1.0, (number + 1) / max(1, round(_WARMUP * len(steps))))
            for group in optimizer.param_groups:
                group['lr'] = lr * group.get('lr_scale', 1.0) * rise * (1 - number / len(steps))
            images, labels = (tensor.to(self.device) for tensor in self.train[step % len(self.train)])
            seed_rng(self.seed, step)
            loss = F.cross_entropy(self.model(images).float(), labels)
            if not bool(loss.isfinite()):
                return False
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return True

    @torch.no_grad()
    def _compare(self) -> tuple[float, float]:
        """Accuracy in percent and loss, with statistics of batch normalisation from the training images."""
        try:
            calibrate_batchnorm_(self.model, [images for images, _ in self.train[:_CALIBRATE]])
        except PredictionError:  # a statistic that is not finite
            return 0.0, math.nan
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in self.val:
            images, labels = (tensor.to(self.device) for tensor in batch)
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels, reduction='sum')
            known = int((labels >= 0).sum())  # damaged images have no label
            sums += torch.tensor([float((logits.argmax(1) == labels).sum()), float(loss), known])
        correct, loss_sum, count = sums.tolist()
        return 100 * correct / max(count, 1), loss_sum / max(count, 1)
