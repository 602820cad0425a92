"""The meta-training loop: sample architectures, predict their parameters, train the GHN, evaluate on unseen ones.

Architectures, images and augmentation of a step depend on the seed and the step alone. Several processes share the
architectures of a step and average their gradients; a run in two processes therefore equals one in a single process,
and a run that was killed one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.pool import Pool
from timm_ghn.architectures.samplers import (
    ArchitectureSampler,
    NamesSampler,
    TimmSampler,
    evaluation_set,
    parts_of,
    timm_parts,
)
from timm_ghn.data.memory import ImageTensors, evaluation_batches, load_images, training_batch
from timm_ghn.data.splits import load_splits
from timm_ghn.errors import ConfigError, TrainingError
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.nn.precision import sum_dtype
from timm_ghn.runs.results import CURVES, RESULTS, read_results, versions
from timm_ghn.runs.run import Run, build_accelerator, exclusive_output, local_arguments, undisturbed
from timm_ghn.train.blueprints import Blueprints
from timm_ghn.train.curves import plot_training
from timm_ghn.train.options import OF_CONFIG, TrainOptions
from timm_ghn.train.step import accuracies_of, sum_gradients, train_step

#: Folder of the trained GHN: its averaged weights, where there are any.
TRAINED = 'ghn'

#: Normalisation of the images, which the GHN's configuration states.
IMAGES = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}

#: Options that may change when a run goes on.
_FREE = (
    'init',
    'output',
    'resume',
    'cache',
    'time_limit',
    'checkpoint_steps',
    'checkpoint_hist',
    'log_with',
    'log_steps',
)

#: Rate of AdamW beside Muon, whose updates are a fifth of its rate.
_FALLBACK = 0.5

_logger = logging.getLogger('timm_ghn.train')


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: Steps done.
        skipped: Networks left out so far, because their loss or gradient was not finite.
        barren: Steps in a row without a finite loss and gradient.
        seconds: Time spent in earlier runs.
        window: Sums since the last line of the log: losses, shares of images that were right, networks.
    """

    step: int = 0
    skipped: int = 0
    barren: int = 0
    seconds: float = 0.0
    window: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        output: Folder with results.jsonl, curves.png, checkpoints, and the GHN in ``ghn``.
        steps: Steps done.
        finished: Whether all are; else the run can go on with ``resume``.
        evaluations: Metrics of each evaluation.
    """

    output: Path
    steps: int
    finished: bool
    evaluations: tuple[dict[str, Any], ...]


def train(options: TrainOptions) -> Result:
    """Train a GHN; in several processes where ``accelerate launch`` started them.

    Raises:
        GHNError: if the options, the data, an architecture or the training are at fault.
    """
    with undisturbed():
        return _trained(options)


def _trained(options: TrainOptions) -> Result:
    started = time.monotonic()
    shared_gpu = 0 < torch.cuda.device_count() < int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    accelerator = build_accelerator(
        options,
        'timm_ghn.train',
        # NCCL refuses several processes on one GPU, which a GHN for small networks needs to keep it busy.
        kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')] if shared_gpu else None,
    )
    with exclusive_output(options, main=accelerator.is_main_process):
        return _run(options, accelerator, started)


def _run(options: TrainOptions, accelerator: Accelerator, started: float) -> Result:
    if options.meta_batch % (accelerator.num_processes * options.accumulate):
        raise ConfigError(
            f'expected meta_batch to be a multiple of {accelerator.num_processes} processes times accumulate '
            f'{options.accumulate} (got {options.meta_batch})'
        )
    with accelerator.main_process_first():
        splits = load_splits(options, seed=options.seed)
    size = (3, options.image_size, options.image_size)
    train_data = load_images(splits.train, size, progress=accelerator.is_main_process).to(accelerator.device)
    if len(train_data) < options.images_in_step:
        raise ConfigError(
            f'expected at least {options.images_in_step} training images, those of a step (got {len(train_data)})'
        )
    val_data = load_images(splits.val, size).to(accelerator.device)
    ghn = _ghn(options, len(splits.classes))
    run = _Run(options, accelerator, ghn, train_data, val_data, len(splits.classes), started)
    run.facts = {
        'arguments': options.to_dict(),
        'local': local_arguments(options.to_dict()),
        'config': ghn.config.to_dict(),
        'parameters': sum(parameter.numel() for parameter in ghn.parameters()),
        'processes': accelerator.num_processes,
        'images': {'train': len(train_data), 'val': len(val_data)},
        'damaged': {'train': train_data.damaged, 'val': val_data.damaged},
        'versions': versions(),
        'device': accelerator.device.type,
    }
    with run.closing():
        return run.run()


def _ghn(options: TrainOptions, num_classes: int) -> GHN:
    """The GHN before training; what depends on the classes is new where another GHN knows other ones."""
    config = options.config_for(num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        found = GHN(config)
    if options.init is None:
        return found
    ghn = load_ghn(options.init)
    differs = [
        f'{name} is {getattr(ghn.config, name)!r} there and {getattr(config, name)!r} here'
        for name in (*OF_CONFIG, 'max_shape', 'rules')
        if name != 'name' and getattr(ghn.config, name) != getattr(config, name)
    ]
    if differs:
        raise ConfigError(f'{options.init!r} is another GHN than the options describe: {"; ".join(differs)}')
    state = found.state_dict()
    for name, tensor in ghn.state_dict().items():
        if tensor.shape == state[name].shape:
            state[name] = tensor
    found.load_state_dict(state)
    found.shape_enc.take_(ghn.shape_enc)
    return found


def rate(options: TrainOptions, step: int) -> float:
    """Learning rate of a step.

    After a linear warm-up it is half a cosine to zero (arXiv 2303.04143, appendix A); or, with ``decay_steps``, it is
    constant until a linear decay to zero: longer at the full rate, and the number of steps stays open until then.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.decay_steps:
        return options.lr * min(1.0, (options.steps - step) / options.decay_steps)
    passed = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))


def _optimizer(options: TrainOptions, ghn: GHN) -> torch.optim.Optimizer:
    """AdamW, or Muon for the templates: it lets rare directions change as fast as common ones.

    Norms, biases and embeddings are not decayed.
    """
    groups: dict[str, dict[str, Any]] = {
        'templates': {'params': [], 'weight_decay': options.weight_decay},
        'matrices': {'params': [], 'weight_decay': options.weight_decay},
        'others': {'params': [], 'weight_decay': 0.0},
    }
    for name, parameter in ghn.named_parameters():
        if options.opt == 'muon' and name == 'decoder.templates':
            kind = 'templates'
        else:
            kind = 'matrices' if parameter.dim() > 1 and 'embed' not in name else 'others'
        groups[kind]['params'].append(parameter)
    more: dict[str, Any] = {}
    if options.opt == 'muon':
        # Said for each group: by its own rule timm takes wide matrices for embeddings.
        for kind, group in groups.items():
            group['use_muon'] = kind == 'templates'
        more = {'momentum': 0.95, 'fallback_lr_scale': _FALLBACK}
    used = [group for group in groups.values() if group['params']]
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        used, opt=options.opt, lr=options.lr, betas=(0.9, 0.99), **more
    )
    return optimizer


class _Run(Run):
    """A run in progress."""

    def __init__(
        self,
        options: TrainOptions,
        accelerator: Accelerator,
        ghn: GHN,
        train_data: ImageTensors,
        val_data: ImageTensors,
        num_classes: int,
        started: float,
    ) -> None:
        super().__init__(options, accelerator, started, _logger)
        self.options = options
        self.train_data, self.val_data = train_data, val_data
        self.sampler: ArchitectureSampler = options.sampler_for(num_classes)
        cache = options.cache or options.output / 'architectures'
        self.pool = Pool(self.sampler, options.seed, cache / 'drawn')
        self.progress = Progress()
        self.blueprints = Blueprints(ghn.config, cache)
        optimizer = _optimizer(options, ghn)
        # Gradients are averaged below: which parameters get one depends on the architectures of a process.
        self.ghn: GHN = accelerator.prepare_model(ghn, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.average = ModelEmaV3(self.ghn, decay=options.ema_decay, use_warmup=True) if options.ema_decay else None

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same when the run goes on; the number of processes may change."""
        # A constant rate leaves the number of steps open: a run may go on for longer than it was meant to.
        free = (*_FREE, 'steps') if self.options.decay_steps else _FREE
        implied = {'max_channels': self.ghn.config.max_shape[0]}
        return {name: value for name, value in {**self.options.to_dict(), **implied}.items() if name not in free}

    def run(self) -> Result:
        """Go on from the last checkpoint, or begin; train to the end."""
        options = self.options
        found = self._restored(self.identity, self.average, 'step')
        if found is not None:
            self.progress = Progress(**found)
        if options.log_with is not None:
            self.accelerator.init_trackers('timm_ghn', config={k: str(v) for k, v in options.to_dict().items()})
        if found is None:
            self._record('run', self.facts)
        else:
            self._say('going on from step %d', self.progress.step)
        self._train()
        finished = self.progress.step >= options.steps
        self._checkpoint()
        if self.accelerator.is_main_process:
            save_ghn(self.shipped, options.output / TRAINED)
            self._record('end', {'step': self.progress.step, 'finished': finished, 'seconds': self._seconds()})
        self.accelerator.wait_for_everyone()
        lines = read_results(options.output / RESULTS)
        if self.accelerator.is_main_process:
            title = f'{options.name}: {Path(options.dataset).name}, {self.progress.step} steps'
            plot_training(lines, options.output / CURVES, title, chance=100 / self.ghn.config.num_classes)
        evaluations = tuple(line for line in lines if line['kind'] == 'eval')
        return Result(options.output, self.progress.step, finished, evaluations)

    def _train(self) -> None:
        options, progress = self.options, self.progress
        bar = tqdm(
            total=options.steps,
            initial=progress.step,
            desc='training',
            unit='step',
            disable=None if self.accelerator.is_main_process else True,
        )
        while progress.step < options.steps and not self._late():
            self._step(progress.step)
            progress.step += 1
            bar.update()
            if progress.step % options.log_steps == 0:
                self._log()
            if progress.step % options.eval_steps == 0 or progress.step == options.steps:
                self._evaluate()
            if progress.step % options.checkpoint_steps == 0:
                self._checkpoint()
        bar.close()

    def _step(self, step: int) -> None:
        """Sample, predict, differentiate, and change the GHN."""
        options, accelerator = self.options, self.accelerator
        blueprints = [self.blueprints(architecture) for architecture in self.architectures(step)]
        images, labels = self._batch(step)
        part = len(blueprints) // options.accumulate
        outcomes = [
            train_step(
                self.ghn,
                blueprints[first : first + part],
                images[first : first + part] if options.own_images else images,
                labels[first : first + part] if options.own_images else labels,
                networks=options.meta_batch,
                clip=options.clip_network,
                smoothing=options.smoothing,
                autocast=accelerator.autocast,
            )
            for first in range(0, len(blueprints), part)
        ]
        losses = [loss for outcome in outcomes for loss in outcome.losses if not math.isnan(loss)]
        rights = [share for outcome in outcomes for share in outcome.accuracies if not math.isnan(share)]
        skipped = sum(outcome.skipped for outcome in outcomes)
        sums = self._share(
            torch.tensor([sum(losses), sum(rights), len(losses), skipped], dtype=sum_dtype(accelerator.device))
        )
        loss, right, counted, skipped = sums.tolist()
        self.progress.skipped += int(skipped)
        useful = counted > 0 and math.isfinite(self._clip())
        self.progress.barren = 0 if useful else self.progress.barren + 1
        if self.progress.barren >= options.max_skipped:
            raise TrainingError(
                f'no network had a finite loss and gradient in {self.progress.barren} steps (now {step + 1}); begin '
                'again with a smaller --lr or --clip-grad, in another --output. --init may name a GHN to begin with'
            )
        for group in self.optimizer.param_groups:
            group['lr'] = rate(options, step)
        if useful:
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.ghn, step=step + 1)
        self.optimizer.zero_grad()
        window = self.progress.window
        self.progress.window = [old + new for old, new in zip(window, (loss, right, counted), strict=True)]

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step: a batch for all architectures, or one for each that this process takes."""
        options = self.options
        images, labels = training_batch(
            self.train_data, step, options.images_in_step, seed=options.seed, config=IMAGES, augment=options.augment
        )
        if not options.own_images:
            return images, labels
        each = (options.meta_batch, options.batch_size)
        return images.unflatten(0, each)[self._own], labels.unflatten(0, each)[self._own]

    @property
    def _own(self) -> slice:
        """The architectures of a step that this process takes."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def architectures(self, step: int) -> list[Architecture]:
        """Those that this process takes in a step."""
        options, own = self.options, self._own
        rng = np.random.default_rng((options.seed, 4, step))
        if not options.pool:
            return [self.sampler.sample(rng) for _ in range(options.meta_batch)][own]
        return [self.pool[int(member)] for member in rng.integers(options.pool, size=options.meta_batch)[own]]

    def _share(self, values: Tensor) -> Tensor:
        """Sum over processes of what they counted, and of their gradients."""
        if self.accelerator.num_processes == 1:
            return values
        sum_gradients(self.ghn, functools.partial(self.accelerator.reduce, reduction='sum'))
        summed: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction='sum')
        return summed

    def _clip(self) -> float:
        """Scale the gradient down to the largest norm; the norm that it had."""
        norm = torch.nn.utils.clip_grad_norm_(self.ghn.parameters(), self.options.clip_grad)
        return float(norm)

    @property
    def shipped(self) -> GHN:
        """The GHN that is evaluated and saved."""
        chosen = self.ghn if self.average is None else self.average.module
        if not isinstance(chosen, GHN):
            raise TypeError(f'expected a GHN (got {type(chosen).__name__})')
        return chosen

    @functools.cached_property
    def evaluated(self) -> dict[str, tuple[Architecture, ...]]:
        """Architectures to evaluate: 'known' for designs of trained families, 'unseen' for other families."""
        options = self.options
        known: list[Architecture] = []
        for part in parts_of(self.sampler):
            if isinstance(part, TimmSampler):
                known += evaluation_set(part, seed=0, count=options.eval_count, split='val')
            elif isinstance(part, NamesSampler):
                known += [part.architecture(name) for name in part.models]
            else:
                rng = np.random.default_rng((options.seed, 6))
                known += [part.sample(rng) for _ in range(8 * options.eval_count)]
        groups = {'known': tuple(known)}
        drawn = timm_parts(self.sampler)
        if drawn and options.unseen_families():
            unseen = dataclasses.replace(drawn[0], families=options.unseen_families())
            groups['unseen'] = evaluation_set(unseen, seed=0, count=options.eval_count, split='val')
        return groups

    def _evaluate(self) -> None:
        """Accuracy of predicted networks without any training, the networks shared among the processes."""
        options, accelerator = self.options, self.accelerator
        batches = list(
            evaluation_batches(self.val_data, options.eval_images, options.batch_size, seed=0, config=IMAGES)
        )
        ghn = self.shipped.eval()
        values: dict[str, Any] = {}
        for group, architectures in self.evaluated.items():
            found = torch.zeros(len(architectures), dtype=sum_dtype(accelerator.device), device=accelerator.device)
            for index, architecture in enumerate(architectures):
                if index % accelerator.num_processes == accelerator.process_index:
                    found[index] = accuracies_of(ghn, self.blueprints(architecture), batches)[0]
            shares = accelerator.reduce(found, reduction='sum').tolist()
            values[group] = sum(shares) / len(shares)
            families: dict[str, list[float]] = {}
            for architecture, share in zip(architectures, shares, strict=True):
                families.setdefault(architecture.family, []).append(share)
            values |= {f'{group}/{name}': sum(part) / len(part) for name, part in families.items()}
        self._record('eval', {'step': self.progress.step, **values, 'seconds': self._seconds()})
        self._say(
            'step %d: predicted, no training: %s',
            self.progress.step,
            ', '.join(f'{name} {values[name]:.1f} %' for name in ('known', 'unseen') if name in values),
        )
        if options.log_with is not None:
            accelerator.log(values, step=self.progress.step)

    def _log(self) -> None:
        loss, right, count = self.progress.window
        self.progress.window = [0.0, 0.0, 0.0]
        values = {
            'step': self.progress.step,
            'loss': loss / max(count, 1),
            'top1': 100 * right / max(count, 1),
            'lr': rate(self.options, self.progress.step),
            'skipped': self.progress.skipped,
            'seconds': self._seconds(),
        }
        self._record('train', values)
        self._say('step %d: loss %.3f, accuracy in training %.1f %%', values['step'], values['loss'], values['top1'])
        if self.options.log_with is not None:
            self.accelerator.log(values, step=self.progress.step)

    def _checkpoint(self) -> None:
        self._expect_finite_weights(self.progress.step, self.ghn, None if self.average is None else self.average.module)
        progress = {**dataclasses.asdict(self.progress), 'seconds': self._seconds()}
        self._save(progress, self.identity, self.average)

    def _seconds(self) -> float:
        return round(self.progress.seconds + time.monotonic() - self.started, 1)
