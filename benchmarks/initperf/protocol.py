"""One run: a network, a start, a learning rate, a seed; the accuracies on the way.

All arms of a cell share the images, their order and augmentation, the classifier, the optimiser (AdamW, weight decay
0.05 on weights alone, gradients clipped to norm 5), and a rate that rises linearly over the first tenth of the steps
and falls to zero by a cosine. Batch normalisation is evaluated with the running statistics that the training left.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.initperf.arms import ArmData, find_arm, write_start
from benchmarks.initperf.cells import NETWORKS, PARTS, Cell, DataSet, Images, Network, load_part
from benchmarks.initperf.donors import Donors
from timm_ghn.contexts import preserve_rng, seed_rng
from timm_ghn.data.memory import ImageTensors, normalised, training_batch
from timm_ghn.finetune.setup import Start

BATCH = 32

#: The rates that every arm of every cell chooses from.
RATES = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3)

#: Shares of the steps after which the accuracy is measured; before the last one on fewer images.
CURVE = (0.25, 0.5, 0.75, 1.0)
CURVE_IMAGES = 256

WARMUP, DECAY, CLIP = 0.1, 0.05, 5.0

#: Seeds of the runs that choose a rate begin here, those that are reported at 0.
SELECTION_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides the numbers of a run, beside the versions of packages.

    Attributes:
        cell: Network, data set and steps.
        arm: Name of the arm.
        part: Part of the data set, see :data:`~benchmarks.initperf.cells.PARTS`.
        rate: Learning rate.
        seed: Of the classifier, the images, their order, and what the arm draws.
        steps: Steps of training; fewer than those of the cell where rates are chosen.
    """

    cell: Cell
    arm: str
    part: str
    rate: float
    seed: int
    steps: int

    def record(self) -> dict[str, Any]:
        """As it stands in the results."""
        own = {name: getattr(self, name) for name in ('arm', 'part', 'rate', 'seed')}
        return {**dataclasses.asdict(self.cell), 'run_steps': self.steps, **own}

    @staticmethod
    def of(record: Mapping[str, Any]) -> Run:
        """The run of a line of the results."""
        cell = Cell(record['network'], record['data'], record['steps'])
        return Run(cell, record['arm'], record['part'], record['rate'], record['seed'], record['run_steps'])


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where things are.

    Attributes:
        data: Data sets by name.
        ghns: Names or folders of GHNs, by what stands behind the @ of an arm; '' for the first.
        hashes: Of the GHNs' weights, by the same.
        donors: Pretrained networks.
        versions: Of packages, for the results.
    """

    data: Mapping[str, DataSet]
    ghns: Mapping[str, str]
    hashes: Mapping[str, str]
    donors: Donors
    versions: Mapping[str, str]


def prepare(
    network: Network, data: DataSet, part: str, seed: int, setting: Setting, ghn: str = ''
) -> tuple[Images, ImageTensors, Start, ArmData]:
    """Images of a part, those of a seed to train on, the network as timm initialises it, and what an arm may use."""
    images = load_part(data, network.image_size, part)
    train = images.train(seed)
    start = network.start(images.num_classes, seed)
    config, steps = start.data_config, max(2, len(train) // BATCH)
    arm_data = ArmData(
        network=network,
        batches=tuple(training_batch(train, step, BATCH, seed=seed, config=config) for step in range(steps)),
        input_size=config['input_size'],
        num_classes=images.num_classes,
        seed=seed,
        ghn=setting.ghns[ghn],
        donors=setting.donors,
    )
    return images, train, start, arm_data


def execute(run: Run, setting: Setting) -> dict[str, Any]:
    """Fine-tune once; the line of the results, with everything that is needed to make it again.

    Raises:
        NotApplicableError: if the arm has nothing to do for this network.
    """
    if run.part not in PARTS:
        raise ValueError(f'expected a part of {PARTS} (got {run.part!r})')
    began, wall = time.process_time(), time.time()
    network, data = NETWORKS[run.cell.network], setting.data[run.cell.data]
    label = run.arm.partition('@')[2]
    images, train, start, arm_data = prepare(network, data, run.part, run.seed, setting, label)
    write_start(run.arm, start.model, arm_data)
    initialised = time.process_time()
    with preserve_rng():
        seed_rng(run.seed)
        curve, losses = _train(start.model, train, images.test, start.data_config, run)
    line = {
        **run.record(),
        'accuracy': curve[-1][1],
        'curve': curve,
        'loss': losses[-1],
        'diverged': not math.isfinite(losses[-1]),
        'network_spec': network.facts(),
        'shots': data.shots,
        'train_images': len(train),
        'test_images': len(images.test),
        'batch': BATCH,
        'init_seconds': round(initialised - began, 3),
        'cpu_seconds': round(time.process_time() - began, 3),
        'time': round(wall),
        'versions': dict(setting.versions),
    }
    if find_arm(run.arm).of_ghn:
        line |= {'ghn': Path(setting.ghns[label]).name, 'ghn_sha256': setting.hashes[label]}
    if run.arm.startswith('pretrain:'):
        line['pretraining_images'] = setting.donors.images(network, float(run.arm.partition(':')[2]))
    return line


def rate_at(step: int, steps: int) -> float:
    """Share of the rate at a step: a linear rise over the first tenth, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _train(
    model: nn.Module, train: ImageTensors, test: ImageTensors, config: Mapping[str, Any], run: Run
) -> tuple[list[tuple[int, float]], list[float]]:
    """Train; (step, accuracy in percent) on the way and the loss of each step. A loss that is not finite ends it."""
    optimizer = create_optimizer_v2(model, opt='adamw', lr=run.rate, weight_decay=DECAY)
    marks = {max(1, round(share * run.steps)) for share in CURVE} if run.part == 'report' else {run.steps}
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    model.train().to(memory_format=torch.channels_last)  # faster on a CPU as well
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group['lr'] = run.rate * rate_at(step, run.steps)
        images, labels = training_batch(train, step, BATCH, seed=run.seed, config=config)
        loss = F.cross_entropy(model(images), labels)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            chance = 100.0 / (int(train.labels_n.max()) + 1)
            return [*curve, *((mark, chance) for mark in sorted(marks) if mark > step)], losses
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step + 1 in marks:
            most = len(test) if step + 1 == run.steps else CURVE_IMAGES
            curve.append((step + 1, _accuracy(model, test, most, config)))
    return curve, losses


@torch.no_grad()
def _accuracy(model: nn.Module, test: ImageTensors, most: int, config: Mapping[str, Any]) -> float:
    """Accuracy in percent on the first images, which are in no order."""
    model.eval()
    right = 0
    images, labels = test.images_nchw[:most], test.labels_n[:most]
    for some, their in zip(images.split(128), labels.split(128), strict=True):
        logits: Tensor = model(normalised(some, config))
        right += int((logits.argmax(dim=1) == their).sum())
    model.train()
    return 100 * right / len(labels)
