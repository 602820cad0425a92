"""A race between starts and learning rates on the user's own data, by successive halving (arXiv 1502.07943).

All starts train a little at every rate; the better half trains on for twice as long, until one is left. The best rate
of the network's own initialisation takes part in every round, so that on the images that the runners are compared on,
the winner is at least as good as that.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.contexts import preserve_modes, preserve_rng, seed_rng
from timm_ghn.errors import ConfigError, GHNError, PredictionError, TrainingError
from timm_ghn.prediction.batchnorm import calibrate_batchnorm_
from timm_ghn.prediction.checks import write_all_

#: Name of the start that is the network's own initialisation.
OWN = 'own'
#: Most batches, and bytes of them, that are used; and the share to compare on where no data is given for that.
_BATCHES, _BYTES, _SHARE = 64, 1 << 30, 0.25
#: Share of the steps of a round in which the rate rises.
_WARMUP = 0.1
_CALIBRATE = 4

_log = logging.getLogger('timm_ghn.transfer')

State = dict[str, Tensor]


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
        seed: Of what a network draws while it is trained.

    Raises:
        ConfigError: if there are no rates, no steps or too few batches.
        TrainingError: if no runner has a finite loss, or there is no time for a single step.
    """
    if not lrs or min(lrs) <= 0 or steps < 1 or (minutes is not None and minutes <= 0):
        raise ConfigError(f'expected rates, steps and minutes above 0 (got {list(lrs)}, {steps}, {minutes})')
    train = _first_batches(data)
    cut = max(1, round(_SHARE * len(train))) if val is None else 0
    train, compared = train[cut:], train[:cut] if val is None else _first_batches(val)
    if not train or not compared:
        raise ConfigError(f'expected batches to train on and others to compare on (got {len(train)}, {len(compared)})')
    own = _state_of(model)
    with preserve_rng(), preserve_modes(model):
        try:
            states, left_out = _states_of_starts(model, own, starts)
            weights = {Runner(start, lr): state for start, state in states.items() for lr in lrs}
            track = _Track(model, train, compared, optimizer or _adamw, seed)
            return _run_rounds(track, weights, left_out, steps, minutes)
        except BaseException:
            _load(model, own)
            raise


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)


def _first_batches(data: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the first batches."""
    found: list[tuple[Tensor, Tensor]] = []
    size = 0
    for images, labels, *_ in itertools.islice(data, _BATCHES):
        found.append((images, labels))
        size += images.nbytes
        if size >= _BYTES:
            break
    return found


def _state_of(model: nn.Module) -> State:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _load(model: nn.Module, state: State) -> None:
    with torch.no_grad():
        write_all_(model.state_dict(), lambda name, tensor: tensor.copy_(state[name]))


def _states_of_starts(
    model: nn.Module, own: State, starts: Mapping[str, Callable[[nn.Module], object]]
) -> tuple[dict[str, State], dict[str, str]]:
    """The weights that each start begins with, and why others cannot take part."""
    states, left_out = {OWN: own}, {}
    for name, write in starts.items():
        try:
            write(model)
            states[name] = _state_of(model)
        except GHNError as error:
            left_out[name] = str(error)
            warnings.warn(f'{name} does not take part in the race: {error}', stacklevel=3)
        _load(model, own)
    return states, left_out


def _run_rounds(
    track: _Track, weights: dict[Runner, State], left_out: dict[str, str], steps: int, minutes: float | None
) -> Race:
    """All rounds of a race; the winner's weights are in the model afterwards."""
    began = time.monotonic()
    runners = tuple(weights)
    steps = track.affordable_steps(weights, steps, minutes)
    total, standing = 0, list(runners)
    for number in range(len(_rounds(len(runners)))):
        length = steps * 2**number
        total += length * len(standing)
        for runner in standing:
            weights[runner] = track.run_round(runner, weights[runner], length)
        standing = _best_half(standing)
        weights = {runner: weights[runner] for runner in standing}
    (winner,) = standing
    if winner.score[0] < 0:
        raise TrainingError('the loss of every start is not finite; try lower learning rates')
    _load(track.model, weights[winner])
    return Race(winner, runners, total, time.monotonic() - began, left_out)


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


@dataclasses.dataclass(frozen=True)
class _Track:
    """The network that all runners use in turn, and the data."""

    model: nn.Module
    train: Sequence[tuple[Tensor, Tensor]]
    val: Sequence[tuple[Tensor, Tensor]]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def affordable_steps(self, weights: Mapping[Runner, State], steps: int, minutes: float | None) -> int:
        """Steps of the first round that the time allows; logs what the race costs."""
        rounds = _rounds(len(weights))
        units = sum(count * 2**number for number, count in enumerate(rounds))  # steps, if the first round has one
        runner, state = next(iter(weights.items()))
        began = time.monotonic()
        self._train(runner.lr, range(1))
        trained = time.monotonic()
        self._compare()
        step, comparisons = trained - began, (time.monotonic() - trained) * sum(rounds)
        _load(self.model, state)
        if minutes is not None:
            steps = min(steps, int((60 * minutes - comparisons) / (step * units)))
        if steps < 1:
            raise TrainingError(
                f'a race of {len(weights)} runners takes {(step * units + comparisons) / 60:.2g} minutes at least, '
                f'more than {minutes}: allow more, or give fewer starts, rates or batches to compare on'
            )
        cost = (step * units * steps + comparisons) / 60
        _log.info('the race: %d runners, %d steps, about %.1f minutes', len(weights), units * steps, cost)
        return steps

    def run_round(self, runner: Runner, state: State, steps: int) -> State:
        """Train a runner for a round and compare it; its weights afterwards."""
        done = runner.rounds[-1][0] if runner.rounds else 0
        _load(self.model, state)
        finite = self._train(runner.lr, range(done, done + steps))
        top1, loss = self._compare() if finite else (0.0, math.nan)
        runner.rounds.append((done + steps, top1, loss))
        _log.info('%s at %.3g: %.1f %% after %d steps', runner.start, runner.lr, top1, done + steps)
        return _state_of(self.model)

    def _train(self, lr: float, steps: range) -> bool:
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
