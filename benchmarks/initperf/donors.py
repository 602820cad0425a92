"""Networks pretrained for so many CPU-minutes: the measure of what a start is worth.

The images are the GHN's own, Tiny-ImageNet at 32 pixels, resized to the network's. A CPU-minute is 60 seconds of
``time.process_time`` on one thread, all that a step needs included. The protocol is one for all networks: AdamW, 128
images a step, flips and crops, warm-up over 50 steps to a rate of 1e-3. For each number of minutes the trunk is trained
at that rate for 80 % of the time, and a branch of it for the rest, at a rate that falls to zero linearly. So one trunk
serves all minutes, and each network is what its minutes alone would have given.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.initperf.cells import Network
from timm_ghn.data.memory import ImageTensors, augmented, load_images, normalised
from timm_ghn.data.options import DataOptions
from timm_ghn.data.splits import load_splits
from timm_ghn.files import atomic_write

#: The protocol; a donor of another one is another file.
BATCH, RATE, WARMUP, DECAY, COOLDOWN, CLASSES, SIDE = 128, 1e-3, 50, 0.05, 0.2, 200, 32


@dataclasses.dataclass(frozen=True)
class Donors:
    """Pretrained networks on the disk.

    Attributes:
        folder: Where they are kept.
        place: Data set to pretrain on.
        minutes: CPU-minutes that are kept when a network is pretrained.
    """

    folder: Path
    place: str
    minutes: tuple[float, ...]

    def path(self, network: Network, minutes: float) -> Path:
        """File of a donor: named by what made it."""
        facts = {**network.facts(), 'place': Path(self.place).name}
        facts |= {'protocol': [BATCH, RATE, WARMUP, DECAY, COOLDOWN, CLASSES, SIDE]}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f'{network.label}-{digest}' / f'{minutes:g}.safetensors'

    def weights(self, network: Network, minutes: float) -> dict[str, Tensor]:
        """Weights after so many minutes; the network is pretrained where they are missing."""
        self.prepare(network, [minutes])
        found: dict[str, Tensor] = load_file(self.path(network, minutes))
        return found

    def images(self, network: Network, minutes: float) -> int:
        """Images that the pretraining has read."""
        with safe_open(self.path(network, minutes), 'pt') as file:
            return int(file.metadata()['images'])

    def load_into_(self, model: nn.Module, network: Network, minutes: float) -> None:
        """Copy what fits, which is all but the classifier."""
        state = model.state_dict()
        same = {name: value for name, value in self.weights(network, minutes).items() if fits(state, name, value)}
        model.load_state_dict(same, strict=False)

    def prepare(self, network: Network, minutes: Sequence[float] | None = None) -> None:
        """Pretrain a network, unless that is done; another process that wants the same one waits."""
        wanted = sorted(self.minutes if minutes is None else {*minutes})
        folder = self.path(network, 1).parent
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / 'lock'):
            missing = [each for each in wanted if not self.path(network, each).exists()]
            if missing:
                # Those that are kept when all are asked for cost little more.
                every = {*missing, *(each for each in self.minutes if each <= max(missing))}
                self._pretrain(network, sorted(each for each in every if not self.path(network, each).exists()))

    def _pretrain(self, network: Network, minutes: Sequence[float]) -> None:
        start = network.start(CLASSES, 0)
        trainer = Trainer(start.model, start.data_config, pretraining_images(self.folder, self.place), network)
        for each in minutes:
            trainer.train(until=60 * each * (1 - COOLDOWN))
            branch = trainer.branch()
            branch.train(until=60 * each, falling=True)
            facts = {'images': str(branch.step * BATCH), 'steps': str(branch.step), 'minutes': f'{each:g}'}
            facts |= {'loss': f'{branch.loss:.4f}', 'network': json.dumps(network.facts())}
            tensors = {name: value.contiguous() for name, value in branch.model.state_dict().items()}
            with atomic_write(self.path(network, each)) as path:
                save_file(tensors, path, metadata=facts)


class Trainer:
    """Pretraining that counts CPU seconds."""

    def __init__(self, model: nn.Module, config: dict[str, object], images: ImageTensors, network: Network) -> None:
        self.model = model.train().to(memory_format=torch.channels_last)
        self.config, self.data, self.network = config, images, network
        self.optimizer = create_optimizer_v2(model, opt='adamw', lr=RATE, weight_decay=DECAY)
        self.step, self.seconds, self.loss = 0, 0.0, float('nan')

    def branch(self) -> Trainer:
        """A copy of the model and of the optimiser's state."""
        other = Trainer(copy.deepcopy(self.model), self.config, self.data, self.network)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.step, other.seconds = self.step, self.seconds
        return other

    def train(self, *, until: float, falling: bool = False) -> None:
        """Train until so many CPU seconds are spent, at a constant rate or at one that falls to zero by then."""
        began, spent = time.process_time(), self.seconds
        first = spent
        while self.seconds < until:
            share = (until - self.seconds) / (until - first) if falling else 1.0
            for group in self.optimizer.param_groups:
                group['lr'] = RATE * share * min(1.0, (self.step + 1) / WARMUP)
            self._step()
            self.seconds = spent + time.process_time() - began

    def _step(self) -> None:
        rng = np.random.default_rng((0, self.step))
        rows = torch.from_numpy(rng.integers(len(self.data), size=BATCH))
        images = normalised(augmented(self.data.images_nchw[rows], rng), self.config)
        side = self.network.image_size
        if side != SIDE:
            images = F.interpolate(images, size=(side, side), mode='bilinear', align_corners=False, antialias=True)
        loss = F.cross_entropy(self.model(images), self.data.labels_n[rows])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.step, self.loss = self.step + 1, float(loss.detach())


def pretraining_images(folder: Path, place: str) -> ImageTensors:
    """All training images, decoded once and kept on the disk, from where they are mapped into memory."""
    path = folder / f'{Path(place).name}-{SIDE}.safetensors'
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix('.lock')):
        if not path.exists():
            images = load_images(load_splits(DataOptions(dataset=place)).train, (3, SIDE, SIDE))
            with atomic_write(path) as part:
                save_file({'images': images.images_nchw, 'labels': images.labels_n}, part)
    tensors = load_file(path)
    return ImageTensors(tensors['images'], tensors['labels'], 0)


def fits(state: dict[str, Tensor], name: str, value: Tensor) -> bool:
    """Whether a state dict has a tensor of this name and shape."""
    return name in state and state[name].shape == value.shape


@torch.no_grad()
def resize_into_(model: nn.Module, weights: dict[str, Tensor], donor: nn.Module) -> None:
    """Write the parameters of a smaller or larger network of the same family.

    A parameter takes that of the donor with the same name; where a stage has more blocks than the donor's, the numbers
    in the name are brought down to the last one that the donor has. Along each axis what is too long is cut, and what
    is too short is repeated from the beginning; an axis of inputs that is repeated is divided by how often, so that the
    sums stay. What has no counterpart stays as timm made it.
    """
    targets = dict(model.named_parameters())
    names = [name for name, _ in donor.named_parameters()]
    for name, target in targets.items():
        source = _counterpart(name, names)
        if source is not None and weights[source].ndim == target.ndim:
            target.copy_(_resized(weights[source], target.shape))


def _counterpart(name: str, names: Sequence[str]) -> str | None:
    """Name of the donor's parameter for one of the model; of the same name but for numbers, which are not larger."""
    if name in names:
        return name
    numbers = [int(number) for number in re.findall(r'\d+', name)]
    pattern = re.compile(r'(\d+)'.join(map(re.escape, re.split(r'\d+', name))))
    found = [
        ([int(number) for number in match.groups()], other)
        for other in names
        if (match := pattern.fullmatch(other)) and numbers
    ]
    below = [pair for pair in found if all(a <= b for a, b in zip(pair[0], numbers, strict=True))]
    return max(below)[1] if below else None


def _resized(value: Tensor, shape: torch.Size) -> Tensor:
    for axis, length in enumerate(shape):
        have = value.shape[axis]
        rows = torch.arange(length) % have
        value = value.index_select(axis, rows)
        if axis == 1 and length > have:
            value = value * (have / length)
    return value


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
