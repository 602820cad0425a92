"""The accelerate loop: train the whole network, validate, keep what is needed to go on.

What is random depends on the seed, the epoch, the batch and the process alone, so that no state of a random generator
has to survive a run that is killed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import load_file
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_ghn.data.images import NO_LABEL, EpochSampler
from timm_ghn.data.splits import load_splits
from timm_ghn.errors import DataError, PredictionError, TrainingError
from timm_ghn.files import write_state_dict
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.push import check_start, check_target, push_when_done
from timm_ghn.finetune.setup import (
    Batch,
    Start,
    build,
    class_count,
    loaders,
    loss_of,
    optimizer_of,
    scheduler_of,
    updates_per_epoch,
)
from timm_ghn.nn.precision import sum_dtype
from timm_ghn.prediction.batchnorm import calibrate_batchnorm_
from timm_ghn.runs.results import CURVES, RESULTS, plot_curves, read_results, versions
from timm_ghn.runs.run import CHECKPOINTS, Run, build_accelerator, exclusive_output, local_arguments, undisturbed

WEIGHTS = 'model.safetensors'
BEST_WEIGHTS = 'model_best.safetensors'
AVERAGED_WEIGHTS = 'model_ema.safetensors'

#: Options that may change when a run goes on.
_FREE = (
    'output', 'resume', 'max_steps', 'time_limit', 'checkpoint_steps', 'checkpoint_hist', 'log_with', 'workers',
    'val_batch_size', 'torchcompile', 'channels_last', 'push_to_hub', 'hub_private', 'hub_revision', 'hub_create_pr',
    'hub_license',
)  # fmt: skip

#: Steps between looks at the loss on a GPU, where looking waits for it.
_LOOK = 20

_logger = logging.getLogger('timm_ghn.finetune')


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: Epoch in progress, from 0.
        batch: Batches of it that are done, of each process.
        step: Optimiser steps done.
        loss: Sum of the losses of the images of this epoch.
        images: Number of these images.
        damaged: Damaged images met in this epoch.
        best: Best accuracy so far, in percent.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    images: int = 0
    damaged: int = 0
    best: float = -1.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        output: Folder with results.jsonl, curves.png, checkpoints and weights.
        epochs: The metrics after each epoch; those of epoch 0 are from before the training.
        steps: Optimiser steps done.
        finished: Whether all epochs are done; else the run can go on with ``resume``.
        test_top1: Accuracy of the best weights on the test split, in percent; None where the data set has none, where
            it was used to train or validate on, or where the run is not finished.
        pushed: Address of the commit, or of the pull request, on the Hub, in the process that made it.
    """

    output: Path
    epochs: tuple[dict[str, Any], ...]
    steps: int
    finished: bool
    test_top1: float | None = None
    pushed: str | None = None


def finetune(options: FinetuneOptions) -> Result:
    """Fine-tune a model; in several processes where ``accelerate launch`` started them.

    Raises:
        HubError: if the model is to be pushed and that cannot be done, which is found out before the training where it
            can be; after it, the weights are on the disk.
        GHNError: if the options, the data, the model or the training are at fault.
    """
    with undisturbed():
        return _finetune(options)


def _finetune(options: FinetuneOptions) -> Result:
    started = time.monotonic()
    accelerator = build_accelerator(
        options,
        'timm_ghn.finetune',
        gradient_accumulation_steps=options.grad_accum_steps,
        dynamo_backend='inductor' if options.torchcompile else None,
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        step_scheduler_with_optimizer=False,
    )
    with exclusive_output(options, main=accelerator.is_main_process):
        return _fine_tuned(options, accelerator, started)


def _fine_tuned(options: FinetuneOptions, accelerator: Accelerator, started: float) -> Result:
    if accelerator.is_main_process:
        check_target(options)
    with accelerator.main_process_first():
        splits = load_splits(options, seed=options.seed, shots=options.shots, shots_seed=options.shots_seed)
    num_classes = class_count(options, splits)
    with accelerator.main_process_first():
        start = build(options, num_classes)
    if accelerator.is_main_process:
        check_start(options, start)
    batches = loaders(options, splits, start.data_config, accelerator.num_processes)
    run = _Run(options, accelerator, start, *batches, num_classes, started)
    run.facts = {
        'arguments': options.to_dict(),
        'local': local_arguments(options.to_dict()),
        'processes': accelerator.num_processes,
        'classes': list(splits.classes),
        'images': {'train': len(splits.train), 'val': len(splits.val), 'test': len(splits.test or ())},
        'splits': list(splits.names),
        'model_args': start.arguments,
        'stem': list(start.edits),
        'provenance': start.provenance,
        'data_config': {name: _plain(value) for name, value in start.data_config.items()},
        'versions': versions(),
        'device': accelerator.device.type,
    }
    main = accelerator.is_main_process
    with run.closing():
        result = run.run()
    return dataclasses.replace(result, pushed=push_when_done(options, finished=result.finished)) if main else result


class _Run(Run):
    """A run in progress."""

    def __init__(
        self,
        options: FinetuneOptions,
        accelerator: Accelerator,
        start: Start,
        train: DataLoader[Batch],
        val: DataLoader[Batch],
        test: DataLoader[Batch] | None,
        num_classes: int,
        started: float,
    ) -> None:
        super().__init__(options, accelerator, started, _logger)
        self.options = options
        self.num_classes = num_classes
        self.progress = Progress()
        self.plain_train = train
        if not isinstance(train.sampler, EpochSampler):
            raise TypeError('expected a loader with an EpochSampler')
        self.sampler: EpochSampler = train.sampler
        loss, self.mixup = loss_of(options, num_classes)
        self.loss: Callable[[Tensor, Tensor], Tensor] = loss
        optimizer = optimizer_of(options, start.model)
        self.model, self.optimizer, self.train, self.val = accelerator.prepare(start.model, optimizer, train, val)
        self.test = None if test is None else accelerator.prepare_data_loader(test)
        updates = updates_per_epoch(len(self.train), options.grad_accum_steps)
        self.scheduler: Scheduler | None = scheduler_of(options, optimizer, updates)
        self.average: ModelEmaV3 | None = None
        if options.model_ema:
            self.average = ModelEmaV3(self.bare, decay=options.model_ema_decay)
        # Sums over this process since the last checkpoint: loss, images, damaged images.
        self.sums = torch.zeros(3, dtype=sum_dtype(accelerator.device), device=accelerator.device)

    @property
    def bare(self) -> nn.Module:
        """The model without what accelerate wraps around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same when the run goes on."""
        options = {name: value for name, value in self.options.to_dict().items() if name not in _FREE}
        return {**options, 'processes': self.accelerator.num_processes}

    def run(self) -> Result:
        """Go on from the last checkpoint, or begin; train to the end."""
        options = self.options
        found = self._restored(self.identity, self.average, 'epoch')
        if found is not None:
            self.progress = Progress(**found)
        if options.log_with is not None:
            self.accelerator.init_trackers('timm_ghn', config=_flat(options.to_dict()))
        if found is None:
            self._record('run', self.facts)
            self._calibrate()
            self._set_rate()
            self._evaluated(0)
        else:
            self._say('going on from step %d, epoch %d', self.progress.step, self.progress.epoch)
        while self.progress.epoch < options.epochs and not self._stopped():
            self._train_epoch()
        return self._end()

    def _end(self) -> Result:
        options, progress = self.options, self.progress
        finished = progress.epoch >= options.epochs
        out_of_time = not finished and not self._out_of_steps()
        if not finished:
            self._checkpoint()
            if not out_of_time:
                # To look at. The run that goes on knows nothing of it, so it keeps no weights either.
                self._evaluated(round(progress.epoch + progress.batch / len(self.train), 3), keep=False)
            self._say('stopped after %d steps; go on with --resume', progress.step)
        self._expect_finite_weights(progress.step, *self._weights)
        if self.accelerator.is_main_process:
            self._write(self.bare, WEIGHTS)
            if self.average is not None:
                self._write(self.average.module, AVERAGED_WEIGHTS)
        tested = self._tested() if finished else {}
        if self.accelerator.is_main_process:
            self._record('end', {'steps': progress.step, 'finished': finished, **tested, 'seconds': self._seconds()})
            lines = read_results(options.output / RESULTS)
            title = f'{options.model}, {options.init}, {Path(options.dataset).name}'
            if not plot_curves(lines, options.output / CURVES, title):
                self._say('no picture of the curves: matplotlib is not installed')
        self.accelerator.wait_for_everyone()
        lines = read_results(options.output / RESULTS)
        epochs = tuple(line for line in lines if line['kind'] == 'epoch')
        return Result(options.output, epochs, progress.step, finished, tested.get('test_top1'))

    def _tested(self) -> dict[str, Any]:
        """Metrics of the best weights on the test split, by which nothing is chosen; none where there is no such split.

        The model has the best weights afterwards.
        """
        self.accelerator.wait_for_everyone()
        best = self.options.output / BEST_WEIGHTS
        if self.test is None or not best.is_file():
            return {}
        self.bare.load_state_dict(load_file(best))
        metrics = self._evaluate(self.model, self.test, 'test')
        self._say('test split, best weights: test_loss %.4g, test_top1 %.4g', metrics['loss'], metrics['top1'])
        return {f'test_{name}': value for name, value in metrics.items()}

    def _train_epoch(self) -> None:
        """Train for what is left of an epoch, unless a limit is met."""
        options, progress = self.options, self.progress
        self.sampler.set_epoch(progress.epoch)
        self.train.set_epoch(progress.epoch)
        batches = skip_first_batches(self.train, progress.batch) if progress.batch else self.train
        self.model.train()
        bar = tqdm(
            batches,
            desc=f'epoch {progress.epoch + 1}/{options.epochs}',
            initial=progress.batch,
            total=len(self.train),
            disable=None if self.accelerator.is_main_process else True,
            leave=False,
        )
        began = time.monotonic()
        for batch in bar:
            loss = self._train_batch(batch)
            progress.batch += 1
            if not self.accelerator.sync_gradients:
                continue
            self._after_step(loss)
            if self._stopped():
                break
            if options.checkpoint_steps and progress.step % options.checkpoint_steps == 0:
                self._checkpoint()
        bar.close()
        if progress.batch < len(self.train):
            return
        self._end_epoch(time.monotonic() - began)

    def _end_epoch(self, seconds: float) -> None:
        options, progress = self.options, self.progress
        self._gather_sums()
        mean = progress.loss / max(progress.images, 1)
        metrics: dict[str, Any] = {
            'train_loss': mean,
            'train_damaged': progress.damaged,
            'train_seconds': round(seconds, 3),
        }
        rate = self._rate()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss, progress.images, progress.damaged = 0.0, 0, 0
        if self.scheduler is not None and not options.sched_on_updates:
            self.scheduler.step(progress.epoch)
        self._evaluated(progress.epoch, lr=rate, **metrics)
        self._checkpoint()

    def _train_batch(self, batch: Batch) -> Tensor:
        """One forward and backward pass, and an optimiser step where enough gradients are summed."""
        images, labels, damaged = batch
        _seed(self.options.seed, self.progress.epoch, self.progress.batch, self.accelerator.process_index)
        targets = labels
        if isinstance(self.mixup, Mixup):
            images, targets = self.mixup(images, labels)
        images = self._laid_out(images)
        with self.accelerator.accumulate(self.model):
            loss = self.loss(self.model(images).float(), targets)
            self.accelerator.backward(loss * self._share_of_step())
            if self.accelerator.sync_gradients and self.options.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        detached = loss.detach().to(self.sums)
        count = torch.full_like(detached, len(labels))
        self.sums += torch.stack((detached * count, count, damaged.sum().to(detached)))
        return detached

    def _share_of_step(self) -> float:
        """What makes up for accelerate's division in the last step of an epoch, which may sum fewer batches."""
        whole = self.options.grad_accum_steps
        part = len(self.train) % whole
        return whole / part if part and self.progress.batch >= len(self.train) - part else 1.0

    def _after_step(self, loss: Tensor) -> None:
        progress = self.progress
        progress.step += 1
        look = self.accelerator.device.type == 'cpu' or progress.step % _LOOK == 0
        if look:
            self._expect_finite(float(loss))
        if self.average is not None:
            self.average.update(self.bare, step=progress.step)
        if self.scheduler is not None and self.options.sched_on_updates:
            self.scheduler.step_update(num_updates=progress.step)

    def _expect_finite(self, loss: float) -> None:
        """Refuse to go on, and above all to write a checkpoint, with weights that are lost."""
        if math.isfinite(loss):
            return
        left = any((self.options.output / CHECKPOINTS).glob('step_*[0-9]'))
        raise TrainingError(
            f'the loss is {loss} by step {self.progress.step}; begin again with a smaller --lr or --clip-grad, or from '
            'another start' + ('. The checkpoints before it are in the output folder' if left else '')
        )

    @property
    def _weights(self) -> list[nn.Module]:
        """What has weights that are written: the model, and its average."""
        return [self.bare, *([self.average.module] if self.average is not None else [])]

    def _evaluated(self, epoch: float, *, keep: bool = True, **more: Any) -> None:
        """Validate, write down what comes out, and keep the best weights."""
        if self.accelerator.num_processes > 1:
            for module in self._weights:
                distribute_bn(module, self.accelerator.num_processes, reduce=True)
        self._expect_finite_weights(self.progress.step, *self._weights)
        metrics = self._evaluate(self.model, self.val, 'validation')
        values = {'epoch': epoch, 'step': self.progress.step, **more, **{f'val_{k}': v for k, v in metrics.items()}}
        best, source = metrics['top1'], self.bare
        if self.average is not None:
            averaged = self._evaluate(self.average.module, self.val, 'validation')
            values |= {f'ema_{key}': averaged[key] for key in ('loss', 'top1', 'top5')}
            if averaged['top1'] > best:
                best, source = averaged['top1'], self.average.module
        if keep and best > self.progress.best:
            self.progress.best = best
            if self.accelerator.is_main_process:
                self._write(source, BEST_WEIGHTS, epoch=epoch, top1=best)
        values |= {'best_top1': self.progress.best, 'seconds': self._seconds()}
        self._record('epoch', values)
        told = ('train_loss', 'val_loss', 'val_top1', 'ema_top1')
        said = ', '.join(f'{key} {value:.4g}' for key, value in values.items() if key in told)
        self._say('epoch %g: %s', epoch, said)
        if self.options.log_with is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=self.progress.step)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, batches: DataLoader[Batch], split: str) -> dict[str, Any]:
        """Loss and accuracies in percent on a split; each image counts once, damaged ones never."""
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        damaged = 0
        bar = tqdm(batches, desc=split, leave=False, disable=None if self.accelerator.is_main_process else True)
        for images, labels, _ in bar:
            with self.accelerator.autocast():
                logits = model(self._laid_out(images)).float()
            losses = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction='none')
            ranked = logits.topk(min(5, self.num_classes), dim=1).indices == labels[:, None]
            row = torch.stack((losses, ranked[:, 0].float(), ranked.any(1).float(), (labels != NO_LABEL).float()), 1)
            row = self.accelerator.gather_for_metrics(row).cpu().double()
            sums += row.sum(0)
            damaged += int((row[:, 3] == 0).sum())
        if not sums[3]:
            raise DataError(f'none of the {split} images can be read')
        loss, top1, top5 = (sums[:3] / sums[3]).tolist()
        return {'loss': loss, 'top1': 100 * top1, 'top5': 100 * top5, 'images': int(sums[3]), 'damaged': damaged}

    def _laid_out(self, images: Tensor) -> Tensor:
        """A batch as the convolutions like it: some (of NFNets) shape their weights anew and follow their input."""
        return images.contiguous(memory_format=torch.channels_last) if self.options.channels_last else images

    def _calibrate(self) -> None:
        """Batch-norm statistics of a start that has none, the same in every process."""
        if self.options.init == 'pretrained' or not self.options.calibrate_batches:
            return
        size = self.options.batch_size * self.accelerator.num_processes
        whole = len(self.sampler) >= size  # a last batch of a few images would count as much as the others
        images: Iterator[Any] = iter(DataLoader(self.plain_train.dataset, size, sampler=self.sampler, drop_last=whole))
        try:
            calibrate_batchnorm_(
                self.bare, itertools.islice(images, self.options.calibrate_batches), device=self.accelerator.device
            )
        except PredictionError as error:
            warnings.warn(f'the accuracy before training means nothing: {error}', stacklevel=2)

    def _checkpoint(self) -> None:
        self._gather_sums()
        self._expect_finite_weights(self.progress.step, *self._weights)
        self._save(dataclasses.asdict(self.progress), self.identity, self.average)

    def _gather_sums(self) -> None:
        """Add what all processes did to the progress, which they share."""
        loss, images, damaged = self.accelerator.reduce(self.sums, reduction='sum').tolist()
        self._expect_finite(loss)
        self.progress.loss += loss
        self.progress.images += int(images)
        self.progress.damaged += int(damaged)
        self.sums.zero_()

    def _out_of_steps(self) -> bool:
        return self.options.max_steps is not None and self.progress.step >= self.options.max_steps

    def _stopped(self) -> bool:
        """Whether a limit is met; all processes agree."""
        return self._out_of_steps() or self._late()

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def _set_rate(self) -> None:
        """The learning rate of the first step."""
        if self.scheduler is not None and self.options.sched_on_updates:
            self.scheduler.step_update(num_updates=0)
        elif self.scheduler is not None:
            self.scheduler.step(0)

    def _rate(self) -> float:
        return max(float(group['lr']) for group in self.optimizer.param_groups)

    def _write(self, model: nn.Module, name: str, **more: Any) -> None:
        header = {'architecture': self.options.model, **self.facts['model_args'], **more}
        header |= {'timm_ghn': json.dumps({key: self.facts[key] for key in ('arguments', 'stem', 'data_config')})}
        write_state_dict(model.state_dict(), self.options.output / name, header)


def _seed(*values: int) -> None:
    """Seed all that a training step draws: dropout, stochastic depth, mixup."""
    words = np.random.SeedSequence(values).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """What every tracker takes as hyper-parameters."""
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
