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
import statistics
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.pool import Pool
from timm_ghn.architectures.samplers import NamesSampler, TimmSampler, evaluation_set, parts_of, timm_parts
from timm_ghn.contexts import preserve_rng
from timm_ghn.data.memory import evaluation_batches, load_images, training_batch
from timm_ghn.data.splits import load_splits
from timm_ghn.errors import ConfigError, TrainingError
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.nn.precision import sum_dtype
from timm_ghn.runs.run import Progress, Result, Run, session
from timm_ghn.train.blueprints import Blueprints
from timm_ghn.train.options import OF_CONFIG, TrainOptions
from timm_ghn.train.step import accuracies_of, sum_gradients, train_step

#: Folder of the trained GHN: its averaged weights, where there are any.
TRAINED = 'ghn'

#: Normalisation of the images, which the GHN's configuration states.
IMAGES = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}

#: Rate of AdamW beside Muon, whose updates are a fifth of its rate.
_FALLBACK = 0.5


@dataclasses.dataclass
class TrainProgress(Progress):
    """Where a run stands.

    Attributes:
        skipped: Networks left out so far, because their loss or gradient was not finite.
        steps_without_finite_loss: Such steps in a row, of all networks.
        window: Sums since the last line of the log: losses, shares of images that were right, networks.
    """

    skipped: int = 0
    steps_without_finite_loss: int = 0
    window: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])


def train(options: TrainOptions) -> Result:
    """Train a GHN; in several processes where ``accelerate launch`` started them.

    Raises:
        GHNError: if the options, the data, an architecture or the training are at fault.
    """
    with session(options) as accelerator:
        return _TrainRun(options, accelerator).run()


def _ghn(options: TrainOptions, num_classes: int) -> GHN:
    """The GHN before training; what depends on the classes is new where another GHN knows other ones."""
    config = options.config_for(num_classes)
    with preserve_rng(options.seed):
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
    state |= {name: tensor for name, tensor in ghn.state_dict().items() if tensor.shape == state[name].shape}
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
    muon = options.opt == 'muon'
    kinds: dict[str, list[Tensor]] = {'templates': [], 'matrices': [], 'others': []}
    for name, parameter in ghn.named_parameters():
        kind = 'matrices' if parameter.dim() > 1 and 'embed' not in name else 'others'
        kinds['templates' if muon and name.endswith('.templates') else kind].append(parameter)
    groups: list[dict[str, Any]] = [
        {'params': found, 'weight_decay': 0.0 if kind == 'others' else options.weight_decay}
        # Said for each group: by its own rule timm takes wide matrices for embeddings.
        | ({'use_muon': kind == 'templates'} if muon else {})
        for kind, found in kinds.items()
        if found
    ]
    more: dict[str, Any] = {'momentum': 0.95, 'fallback_lr_scale': _FALLBACK} if muon else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=options.opt, lr=options.lr, betas=(0.9, 0.99), **more
    )
    return optimizer


class _TrainRun(Run):
    options: TrainOptions
    progress: TrainProgress
    model: GHN
    ordered_by = 'step'
    may_change = (
        'init', 'output', 'resume', 'cache', 'time_limit', 'checkpoint_steps', 'checkpoint_hist', 'log_with',
        'log_steps',
    )  # fmt: skip
    logger = logging.getLogger('timm_ghn.train')

    def __init__(self, options: TrainOptions, accelerator: Accelerator) -> None:
        super().__init__(options, accelerator, TrainProgress())
        if options.meta_batch % accelerator.num_processes:
            count = accelerator.num_processes
            raise ConfigError(f'expected meta_batch to be a multiple of {count} processes (got {options.meta_batch})')
        with accelerator.main_process_first():
            splits = load_splits(options)
        size = (3, options.image_size, options.image_size)
        data = load_images(splits.train, size, progress=accelerator.is_main_process)
        if len(data) < (least := options.images_in_step):
            raise ConfigError(f'expected at least {least} training images, those of a step (got {len(data)})')
        self.train_data = data.to(accelerator.device)
        self.val_data = load_images(splits.val, size).to(accelerator.device)
        self.sampler = options.sampler_for(len(splits.classes))
        cache = options.cache or options.output / 'architectures'
        self.pool = Pool(self.sampler, options.seed, cache / 'drawn')
        ghn = _ghn(options, len(splits.classes))
        self.blueprints = Blueprints(ghn.config, cache)
        optimizer = _optimizer(options, ghn)
        # Gradients are averaged below: which parameters get one depends on the architectures of a process.
        self.model = accelerator.prepare_model(ghn, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        if options.ema_decay:
            self.average = ModelEmaV3(self.model, decay=options.ema_decay, use_warmup=True)
        self.facts |= {
            'config': ghn.config.to_dict(),
            'parameters': sum(parameter.numel() for parameter in ghn.parameters()),
            'images': {'train': len(self.train_data), 'val': len(self.val_data)},
            'damaged': {'train': self.train_data.damaged, 'val': self.val_data.damaged},
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same when the run goes on; the number of processes may change."""
        identity = {**super().identity, 'max_channels': self.model.config.max_shape[0]}
        if self.options.decay_steps:
            # A constant rate leaves the number of steps open: a run may go on for longer than it was meant to.
            del identity['steps']
        return identity

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.options.steps

    def train(self) -> None:
        options, progress = self.options, self.progress
        bar = self.progress_bar(total=options.steps, initial=progress.step, desc='training', unit='step')
        while not self.finished and not self.should_stop():
            self._step(progress.step)
            progress.step += 1
            bar.update()
            if progress.step % options.log_steps == 0:
                self._log()
            if progress.step % options.eval_steps == 0 or self.finished:
                self._evaluate()
            if progress.step % options.checkpoint_steps == 0:
                self.save_checkpoint()
        bar.close()

    def finish(self) -> dict[str, Any]:
        if self.accelerator.is_main_process:
            save_ghn(self._shipped, self.options.output / TRAINED)
        return {'step': self.progress.step}

    def plot(self, log: list[dict[str, Any]], path: Path) -> None:
        from timm_ghn.plots import plot_training

        options = self.options
        title = f'{options.name}: {Path(options.dataset).name}, {self.progress.step} steps'
        plot_training(log, path, title, chance=100 / self.model.config.num_classes)

    def _step(self, step: int) -> None:
        options, accelerator = self.options, self.accelerator
        outcome = train_step(
            self.model,
            [self.blueprints(architecture) for architecture in self._architectures(step)],
            *self._batch(step),
            networks=options.meta_batch,
            clip=options.clip_network,
            smoothing=options.smoothing,
            autocast=accelerator.autocast,
        )
        sums = [sum(outcome.losses), sum(outcome.accuracies), len(outcome.losses), outcome.skipped]
        loss, right, counted, skipped = self._share(torch.tensor(sums, dtype=sum_dtype(accelerator.device))).tolist()
        progress = self.progress
        progress.skipped += int(skipped)
        useful = counted > 0 and math.isfinite(clip_grad_norm_(self.model.parameters(), options.clip_grad))
        progress.steps_without_finite_loss = 0 if useful else progress.steps_without_finite_loss + 1
        if progress.steps_without_finite_loss >= options.max_skipped:
            raise TrainingError(
                f'no network had a finite loss and gradient in {progress.steps_without_finite_loss} steps (now '
                f'{step + 1}); begin again with a smaller --lr or --clip-grad, in another --output. --init may name a '
                'GHN to begin with'
            )
        for group in self.optimizer.param_groups:
            group['lr'] = rate(options, step)
        if useful:
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.model, step=step + 1)
        self.optimizer.zero_grad()
        progress.window = [old + new for old, new in zip(progress.window, (loss, right, counted), strict=True)]

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step: a batch for all architectures, or one for each that this process takes."""
        options = self.options
        images, labels = training_batch(
            self.train_data, step, options.images_in_step, seed=options.seed, config=IMAGES, augment=options.augment
        )
        if options.own_images:
            each = (options.meta_batch, options.batch_size)
            images, labels = images.unflatten(0, each)[self._own], labels.unflatten(0, each)[self._own]
        return images, labels

    @property
    def _own(self) -> slice:
        """The architectures of a step that this process takes."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def _architectures(self, step: int) -> list[Architecture]:
        options, own = self.options, self._own
        rng = np.random.default_rng((options.seed, 4, step))
        if not options.pool:
            return [self.sampler.sample(rng) for _ in range(options.meta_batch)][own]
        return [self.pool[int(member)] for member in rng.integers(options.pool, size=options.meta_batch)[own]]

    def _share(self, values: Tensor) -> Tensor:
        """Sum over processes of what they counted, and of their gradients."""
        if self.accelerator.num_processes == 1:
            return values
        sum_gradients(self.model, functools.partial(self.accelerator.reduce, reduction='sum'))
        summed: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction='sum')
        return summed

    @property
    def _shipped(self) -> GHN:
        """The GHN that is evaluated and saved."""
        return self.model if self.average is None else cast(GHN, self.average.module)

    @functools.cached_property
    def evaluated(self) -> dict[str, tuple[Architecture, ...]]:
        """Architectures to evaluate: 'known' for designs of trained families, 'unseen' for other families."""
        options = self.options
        known: list[Architecture] = []
        for part in parts_of(self.sampler):
            if isinstance(part, TimmSampler):
                known += evaluation_set(part, seed=0, count=options.eval_count, split='val')
            elif isinstance(part, NamesSampler):
                known += map(part.architecture, part.models)
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
        sizes = options.eval_images, options.batch_size
        batches = list(evaluation_batches(self.val_data, *sizes, seed=0, config=IMAGES))
        ghn = self._shipped.eval()
        values: dict[str, Any] = {}
        for group, architectures in self.evaluated.items():
            found = torch.zeros(len(architectures), dtype=sum_dtype(accelerator.device), device=accelerator.device)
            for index in range(accelerator.process_index, len(architectures), accelerator.num_processes):
                found[index] = accuracies_of(ghn, self.blueprints(architectures[index]), batches)[0]
            shares = accelerator.reduce(found, reduction='sum').tolist()
            values[group] = statistics.fmean(shares)
            families: dict[str, list[float]] = {}
            for architecture, share in zip(architectures, shares, strict=True):
                families.setdefault(architecture.family, []).append(share)
            values |= {f'{group}/{name}': statistics.fmean(part) for name, part in families.items()}
        self.record_metrics('eval', {'step': self.progress.step, **values})
        shown = ', '.join(f'{name} {values[name]:.1f} %' for name in self.evaluated)
        self.say('step %d: predicted, no training: %s', self.progress.step, shown)

    def _log(self) -> None:
        loss, right, count = self.progress.window
        self.progress.window = [0.0, 0.0, 0.0]
        values = {
            'step': self.progress.step,
            'loss': loss / max(count, 1),
            'top1': 100 * right / max(count, 1),
            'lr': rate(self.options, self.progress.step),
            'skipped': self.progress.skipped,
        }
        self.record_metrics('train', values)
        self.say('step %d: loss %.3f, accuracy in training %.1f %%', values['step'], values['loss'], values['top1'])
