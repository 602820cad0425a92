"""A race between starts and learning rates on the user's own data, by successive halving (arXiv 1502.07943).

All starts train a little at every rate; the better half trains on for twice as long, until one is left. The best rate
of the network's own initialisation takes part in every round, so that on the images that the runners are compared on,
the winner is at least as good as that. What is compared is the mean probability of the right class: with few images it
is less noisy than the accuracy, and unlike the loss it does not dwell on images that a network is sure and wrong of.

Where torch.distributed has several processes, they share the runners of each round, and find what one process would.
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
import torch.distributed as dist
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
        rounds: (steps, accuracy, mean probability of the right class), in percent, after each round that it was in.
    """

    start: str
    lr: float
    rounds: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)

    @property
    def score(self) -> float:
        """The larger the better; below 0 before the first round, and where the loss or the outputs are not finite."""
        probability = self.rounds[-1][2] if self.rounds else -1.0
        return probability if math.isfinite(probability) else -1.0


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
    from one to the next. What the race costs is logged before it begins. Where torch.distributed has several processes,
    all of them call this with the same arguments, on one machine if there is a folder.

    Args:
        model: The network; its own initialisation takes part as 'own'.
        starts: What writes each other start into the network. One that fails is left out, with a warning.
        data: Batches of images and labels. The first 64 of them (or the first gigabyte) are used, again and again.
        val: Batches to compare on; if None, a quarter of those of the data.
        lrs: Learning rates that each start is tried at.
        steps: Optimiser steps of each runner in the first round, where the time does not allow less.
        minutes: Bound on the time, from which fewer steps follow where they would take longer, and fewer rounds where
            steps take longer than the first one told.
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


def _gathered(value: Any) -> list[Any]:
    """What each process has there."""
    found = [value]
    if dist.is_available() and dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        write_all_(model.state_dict(), lambda name, tensor: tensor.copy_(state[name]))


class _Field:
    """The network that the runners use in turn, the data, and the weights of each runner.

    Attributes:
        runners: All of them; below they go by their numbers.
        starts: Weights that each start begins with.
        weights: Of the runners that this process holds.
        holders: The process that holds the weights of each runner.
    """

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
        self.device = next(model.parameters()).device
        distributed = dist.is_available() and dist.is_initialized()
        self.process, self.processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.runners: list[Runner] = []
        self.starts: dict[str, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.holders: dict[int, int] = {}

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
        said = json.loads(json.dumps(said))  # as it is read back
        saved = _gathered(self._saved(said) if self.process == 0 else None)[0]
        left_out = saved['left_out'] if saved else self._prepare(starts)
        self.runners = [Runner(start, lr) for start in (OWN, *starts) if start not in left_out for lr in lrs]
        if saved:
            steps = saved['affordable']
            self._resume(starts, saved['rounds'])
        else:
            steps = self._affordable(steps, minutes)
            if self.process == 0:
                self._keep('race', {**said, 'left_out': left_out, 'affordable': steps})
        total, standing = 0, list(range(len(self.runners)))
        round_began = time.monotonic()
        for index, count in enumerate(_rounds(len(self.runners))):
            now = time.monotonic()
            # Rounds take about the same time.
            late = bool(index and minutes is not None and now + (now - round_began) > began + 60 * minutes)
            if _gathered(late or index == saved.get('ended_before'))[0]:
                if self.process == 0:  # the same call finds this end again, however much time it has
                    self._keep('race', {**said, 'left_out': left_out, 'affordable': steps, 'ended_before': index})
                _log.info('the time does not suffice for another round')
                break
            round_began = now
            length = steps * 2**index
            total += count * length
            self._share([number for number in standing if len(self.runners[number].rounds) <= index], length)
            kept = _best_half([self.runners[number] for number in standing])
            for number in standing:
                if self.runners[number] not in kept:
                    self._drop(number)
            standing = [number for number in standing if self.runners[number] in kept]
        standing.sort(key=lambda number: self.runners[number].score, reverse=True)
        winner = self.runners[standing[0]]
        if winner.score < 0:
            raise TrainingError('the loss of every start is not finite; try lower learning rates')
        self._move(standing[0], None)
        _load(self.model, self._weights_of(standing[0]))
        return Race(winner, tuple(self.runners), total, time.monotonic() - began, left_out)

    def _prepare(self, starts: Mapping[str, Callable[[nn.Module], object]]) -> dict[str, str]:
        """Make the weights that each start begins with; gives the reason of each one that some process cannot make."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.starts[OWN] = own
        left_out: dict[str, str] = {}
        for name, give in starts.items():
            try:
                give(self.model)
            except GHNError as error:
                left_out[name] = str(error)
                warnings.warn(f'{name} does not take part in the race: {error}', stacklevel=4)
            else:
                self.starts[name] = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
            _load(self.model, own)
        return {name: reason for part in _gathered(left_out) for name, reason in part.items()}

    def _affordable(self, steps: int, minutes: float | None) -> int:
        """Steps of the first round that the time allows; says what the race costs."""
        rounds = [math.ceil(count / self.processes) for count in _rounds(len(self.runners))]
        units = sum(count * 2**index for index, count in enumerate(rounds))  # steps, if the first round has one
        began = time.monotonic()
        self._run(self.runners[0].lr, range(1))
        step = time.monotonic() - began
        began = time.monotonic()
        self._compare()
        looks = (time.monotonic() - began) * sum(rounds)
        _load(self.model, self.starts[OWN])
        step, looks = _gathered((step, looks))[0]
        if minutes is not None:
            steps = min(steps, int((60 * minutes - looks) / (step * units)))
        if steps < 1:
            raise TrainingError(
                f'a race of {len(self.runners)} runners takes {(step * units + looks) / 60:.2g} minutes at least, more '
                f'than {minutes}: allow more, or give fewer starts, rates or batches to compare on'
            )
        cost = (step * units * steps + looks) / 60
        _log.info('the race: %d runners, %d steps, about %.1f minutes', len(self.runners), units * steps, cost)
        return steps

    def _share(self, numbers: Sequence[int], steps: int) -> None:
        """Train runners, each in one of the processes."""
        for place, number in enumerate(numbers):
            self._move(number, place % self.processes)
        for number in numbers:
            if self.holders[number] == self.process:
                self._round(number, steps)
        for part in _gathered({number: self.runners[number].rounds for number in numbers if number in self.weights}):
            for number, rounds in part.items():
                self.runners[number].rounds = rounds

    def _move(self, number: int, target: int | None) -> None:
        """Bring the weights of a runner to a process, or to all of them; those of a start are there already."""
        holder = self.holders.get(number)
        if self.processes > 1 and holder is not None and holder != target:
            parcel = [self.weights.pop(number, None)]
            dist.broadcast_object_list(parcel, holder)
            if parcel[0] is not None and target in (None, self.process):
                self.weights[number] = parcel[0]
        if target is not None:
            self.holders[number] = target

    def _round(self, number: int, steps: int) -> None:
        one = self.runners[number]
        done = one.rounds[-1][0] if one.rounds else 0
        _load(self.model, self._weights_of(number))
        finite = self._run(one.lr, range(done, done + steps))
        top1, probability = self._compare() if finite else (0.0, math.nan)
        one.rounds.append((done + steps, top1, probability))
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        _log.info('%s at %.3g: %.1f %% after %d steps', one.start, one.lr, top1, done + steps)
        self.weights[number] = state
        if self.folder is None:
            return
        path = self._file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state_dict(state, path, {})  # before the list that counts it
        # JSON has no word for what is not finite.
        rounds = [[s, a, b if math.isfinite(b) else None] for s, a, b in one.rounds]
        self._keep(f'runner-{number}', {'rounds': rounds})
        for old in self.folder.glob(f'runner-{number}-*.safetensors'):
            if old != path:
                old.unlink()

    def _drop(self, number: int) -> None:
        self.weights.pop(number, None)
        if self.folder is not None and self.process == 0:
            self._file(number).unlink(missing_ok=True)

    def _keep(self, name: str, values: Mapping[str, Any]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(values, self.folder / f'{name}.json')

    def _saved(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What an interrupted race of the same starts left in the folder; empty where there is none."""
        path = None if self.folder is None else self.folder / 'race.json'
        if path is None or not path.is_file():
            return {}
        found = read_json(path)
        if any(found.get(key) != value for key, value in said.items()):
            raise ConfigError(f'{str(path)!r} is of another race (starts, rates, steps, seed): choose another folder')
        parts = {int(part.stem.partition('-')[2]): read_json(part) for part in path.parent.glob('runner-*.json')}
        return {**found, 'rounds': {number: part['rounds'] for number, part in parts.items()}}

    def _resume(
        self, starts: Mapping[str, Callable[[nn.Module], object]], rounds: Mapping[int, Sequence[Sequence[Any]]]
    ) -> None:
        """Go on from what an interrupted race found."""
        for number, found in rounds.items():
            self.runners[number].rounds = [(int(s), float(a), math.nan if b is None else float(b)) for s, a, b in found]
            self.holders[number] = 0
            if self.process == 0 and self._file(number).is_file():  # else it was dropped
                self.weights[number] = load_file(self._file(number))
        pending = {one.start for one in self.runners if not one.rounds}
        failed = self._prepare({name: give for name, give in starts.items() if name in pending})
        if failed:
            raise TrainingError(f'the race cannot go on without {", ".join(failed)}')

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f'runner-{number}-{len(self.runners[number].rounds)}.safetensors'

    def _weights_of(self, number: int) -> Mapping[str, Tensor]:
        return self.weights.get(number) or self.starts[self.runners[number].start]

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
        """Accuracy and mean probability of the right class; batch normalisation has statistics of training images."""
        try:
            calibrate_batchnorm_(self.model, [images for images, _ in self.train[:_CALIBRATE]])
        except PredictionError:  # a statistic that is not finite
            return 0.0, math.nan
        self.model.eval()
        found = []  # of each image: whether it is told right, and the probability of its class
        for images, labels in self.val:
            probabilities = self.model(images.to(self.device)).float().softmax(1).cpu()
            labels = labels.cpu()
            known = labels >= 0  # damaged images have no label
            right = probabilities.argmax(1) == labels
            found.append(torch.stack((right, probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]), 1)[known])
        top1, probability = (100 * torch.cat(found).double()).mean(0).tolist()
        return (top1, probability) if math.isfinite(probability) else (0.0, math.nan)
