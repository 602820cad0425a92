"""Fine-tuning: train the whole network, validate, keep the best weights.

What is random depends on the seed, the epoch, the batch and the process alone, so that no state of a random generator
has to survive a run that is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import load_file
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from timm_ghn.contexts import seed_rng
from timm_ghn.data.images import NO_LABEL
from timm_ghn.data.splits import load_splits
from timm_ghn.errors import ConfigError, DataError, PredictionError
from timm_ghn.files import write_state_dict
from timm_ghn.finetune.options import RACE, FinetuneOptions
from timm_ghn.finetune.push import check_start, push_when_done
from timm_ghn.finetune.setup import Batch, Start, build, loaders, loss_of, optimizer_of, race, scheduler_of
from timm_ghn.nn.precision import sum_dtype
from timm_ghn.prediction.batchnorm import calibrate_batchnorm_
from timm_ghn.publish.push import check_access
from timm_ghn.runs.run import Progress, Result, Run, session

WEIGHTS = 'model.safetensors'
BEST_WEIGHTS = 'model_best.safetensors'
AVERAGED_WEIGHTS = 'model_ema.safetensors'

#: Steps between looks at the loss on a GPU, where looking waits for it.
_LOOK = 20


@dataclasses.dataclass
class FinetuneProgress(Progress):
    """Where a run stands.

    Attributes:
        epoch: Epoch in progress, from 0.
        batch: Batches of it that are done, of each process.
        loss: Sum over the images of this epoch; with their number and that of damaged ones.
        best: Best accuracy so far, in percent.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    images: int = 0
    damaged: int = 0
    best: float = -1.0


def finetune(options: FinetuneOptions) -> Result:
    """Fine-tune a model; in several processes where ``accelerate launch`` started them.

    Raises:
        HubError: if the model is to be pushed and that cannot be done, which is found out before the training where it
            can be; after it, the weights are on the disk.
        GHNError: if the options, the data, the model or the training are at fault.
    """
    with session(
        options,
        gradient_accumulation_steps=options.grad_accum_steps,
        dynamo_backend='inductor' if options.torchcompile else None,
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        step_scheduler_with_optimizer=False,
    ) as accelerator:
        result = _FinetuneRun(options, accelerator).run()
        if accelerator.is_main_process:
            result = dataclasses.replace(result, pushed=push_when_done(options, finished=result.finished))
        return result


class _FinetuneRun(Run):
    options: FinetuneOptions
    progress: FinetuneProgress
    ordered_by = 'epoch'
    may_change = (
        'output', 'resume', 'max_steps', 'time_limit', 'checkpoint_steps', 'checkpoint_hist', 'log_with', 'workers',
        'val_batch_size', 'torchcompile', 'channels_last', 'push_to_hub', 'hub_private', 'hub_revision',
        'hub_create_pr', 'hub_license',
    )  # fmt: skip
    logger = logging.getLogger('timm_ghn.finetune')

    def __init__(self, options: FinetuneOptions, accelerator: Accelerator) -> None:
        super().__init__(options, accelerator, FinetuneProgress())
        if accelerator.is_main_process and options.target is not None:
            # Before hours go into a model that could not be pushed.
            check_access(options.target)
        with accelerator.main_process_first():
            splits = load_splits(options, shots=options.shots, shots_seed=options.shots_seed)
            self.num_classes = len(splits.classes)
            start = build(options, self.num_classes)
        if accelerator.is_main_process:
            check_start(options, start)
        train, val, test = loaders(options, splits, start.data_config, accelerator.num_processes)
        self.images: Any = train.dataset
        self.sampler: Any = train.sampler
        # Some convolutions (of NFNets) shape their weights anew and follow the layout of their input.
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.loss, self.mixup = loss_of(options, self.num_classes)
        lr = options.lr
        if options.init == RACE:
            lr = self._race(start, train, val)
        optimizer = optimizer_of(dataclasses.replace(options, lr=lr), start.model)
        self.model, self.optimizer, self.batches, self.val = accelerator.prepare(start.model, optimizer, train, val)
        self.test = None if test is None else accelerator.prepare_data_loader(test)
        self.scheduler: Scheduler | None = scheduler_of(options, optimizer, len(self.batches))
        if options.model_ema:
            self.average = ModelEmaV3(self.trained, decay=options.model_ema_decay)
        # Sums over this process since the last checkpoint: loss, images, damaged images.
        self.sums = torch.zeros(3, dtype=sum_dtype(accelerator.device), device=accelerator.device)
        self.facts |= {
            'classes': list(splits.classes),
            'images': {'train': len(splits.train), 'val': len(splits.val), 'test': len(splits.test or ())},
            'splits': list(splits.names),
            'model_args': start.arguments,
            'stem': list(start.edits),
            'provenance': start.provenance,
            'data_config': start.data_config,
        }

    def _race(self, start: Start, train: DataLoader[Batch], val: DataLoader[Batch]) -> float:
        """Give the model the weights that win the race; returns the winner's learning rate."""
        found = race(self.options, start, (train, val), {'run': self.identity}, self.accelerator.device)
        self.facts['race'] = found.to_dict()
        for line in str(found).splitlines():
            self.say('%s', line)
        if self.accelerator.is_main_process:
            with contextlib.suppress(ConfigError):  # no matplotlib
                from timm_ghn.plots import plot_race

                plot_race([(one.start, one.rounds) for one in found.runners], self.options.output / 'race.png')
        return found.winner.lr

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, 'processes': self.accelerator.num_processes}

    @property
    def finished(self) -> bool:
        return self.progress.epoch >= self.options.epochs

    def train(self) -> None:
        if self.progress.best < 0:
            self._calibrate()
            if self.scheduler is not None:  # it counts either steps or epochs, and passes over the others
                self.scheduler.step_update(num_updates=0)
                self.scheduler.step(0)
            self._validate(0)
        while not self.finished and not self.should_stop():
            self._train_epoch()

    def finish(self) -> dict[str, Any]:
        self._write(self.trained, WEIGHTS)
        if self.average is not None:
            self._write(self.average.module, AVERAGED_WEIGHTS)
        return {'steps': self.progress.step, **(self._test() if self.finished else {})}

    def plot(self, log: list[dict[str, Any]], path: Path) -> None:
        from timm_ghn.plots import plot_curves

        options = self.options
        plot_curves(log, path, f'{options.model}, {options.init}, {Path(options.dataset).name}')

    def should_stop(self) -> bool:
        steps = self.options.max_steps
        return (steps is not None and self.progress.step >= steps) or super().should_stop()

    def save_checkpoint(self) -> None:
        self._gather_sums()
        super().save_checkpoint()

    def _test(self) -> dict[str, Any]:
        """Metrics of the best weights, which the model has afterwards, on the test split, if there is one."""
        self.accelerator.wait_for_everyone()
        best = self.options.output / BEST_WEIGHTS
        if self.test is None or not best.is_file():
            return {}
        self.trained.load_state_dict(load_file(best))
        metrics = self._evaluate(self.model, self.test, 'test')
        self.say('test split, best weights: test_loss %.4g, test_top1 %.4g', metrics['loss'], metrics['top1'])
        return {f'test_{name}': value for name, value in metrics.items()}

    def _train_epoch(self) -> None:
        """Train for what is left of an epoch, unless a limit is met."""
        options, progress, began = self.options, self.progress, time.monotonic()
        self.sampler.set_epoch(progress.epoch)
        self.batches.set_epoch(progress.epoch)
        batches = skip_first_batches(self.batches, progress.batch) if progress.batch else self.batches
        self.model.train()
        name, total = f'epoch {progress.epoch + 1}/{options.epochs}', len(self.batches)
        bar = self.progress_bar(batches, desc=name, initial=progress.batch, total=total, leave=False)
        for batch in bar:
            loss = self._train_batch(batch)
            progress.batch += 1
            if not self.accelerator.sync_gradients:
                continue
            self._after_step(loss)
            if self.should_stop():
                break
            if options.checkpoint_steps and progress.step % options.checkpoint_steps == 0:
                self.save_checkpoint()
        bar.close()
        if progress.batch == total:
            self._end_epoch(time.monotonic() - began)

    def _end_epoch(self, seconds: float) -> None:
        progress = self.progress
        self._gather_sums()
        metrics: dict[str, Any] = {
            'lr': max(float(group['lr']) for group in self.optimizer.param_groups),
            'train_loss': progress.loss / max(progress.images, 1),
            'train_damaged': progress.damaged,
            'train_seconds': round(seconds, 3),
        }
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss, progress.images, progress.damaged = 0.0, 0, 0
        if self.scheduler is not None:
            self.scheduler.step(progress.epoch)
        self._validate(progress.epoch, **metrics)
        self.save_checkpoint()

    def _train_batch(self, batch: Batch) -> Tensor:
        """One forward and backward pass, and an optimiser step where enough gradients are summed."""
        images, labels, damaged = batch
        drawn = self.options.seed, self.progress.epoch, self.progress.batch, self.accelerator.process_index
        seed_rng(*drawn, accelerators=True)
        images, targets = self.mixup(images, labels) if self.mixup else (images, labels)
        with self.accelerator.accumulate(self.model):
            loss = self.loss(self.model(images.contiguous(memory_format=self.layout)).float(), targets)
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
        part = len(self.batches) % whole
        return whole / part if part and self.progress.batch >= len(self.batches) - part else 1.0

    def _after_step(self, loss: Tensor) -> None:
        self.progress.step += 1
        if self.accelerator.device.type == 'cpu' or self.progress.step % _LOOK == 0:
            self.expect_finite_loss(float(loss))
        if self.average is not None:
            self.average.update(self.trained, step=self.progress.step)
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.progress.step)

    def _validate(self, epoch: int, **metrics: Any) -> None:
        """Validate, write down what comes out, and keep the best weights."""
        if self.accelerator.num_processes > 1:
            for module in self.weights:
                distribute_bn(module, self.accelerator.num_processes, reduce=True)
        self.expect_finite_weights()
        found = self._evaluate(self.model, self.val, 'validation')
        values = {'epoch': epoch, 'step': self.progress.step, **metrics, **{f'val_{k}': v for k, v in found.items()}}
        best, source = found['top1'], self.trained
        if self.average is not None:
            averaged = self._evaluate(self.average.module, self.val, 'validation')
            values |= {f'ema_{key}': averaged[key] for key in ('loss', 'top1', 'top5')}
            if averaged['top1'] > best:
                best, source = averaged['top1'], self.average.module
        if best > self.progress.best:
            self.progress.best = best
            self._write(source, BEST_WEIGHTS, epoch=epoch, top1=best)
        self.record_metrics('epoch', {**values, 'best_top1': self.progress.best})
        shown = ('train_loss', 'val_loss', 'val_top1', 'ema_top1')
        self.say('epoch %d: %s', epoch, ', '.join(f'{key} {values[key]:.4g}' for key in shown if key in values))

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, batches: DataLoader[Batch], split: str) -> dict[str, Any]:
        """Loss and accuracies in percent on a split; each image counts once, damaged ones never."""
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        damaged = 0
        for images, labels, _ in self.progress_bar(batches, desc=split, leave=False):
            with self.accelerator.autocast():
                logits = model(images.contiguous(memory_format=self.layout)).float()
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

    def _calibrate(self) -> None:
        """Batch-norm statistics of a start that has none, the same in every process."""
        if self.options.init == 'pretrained' or not self.options.calibrate_batches:
            return
        size = self.options.batch_size * self.accelerator.num_processes
        whole = len(self.sampler) >= size  # a last batch of a few images would count as much as the others
        images: Iterator[Any] = iter(DataLoader(self.images, size, sampler=self.sampler, drop_last=whole))
        try:
            calibrate_batchnorm_(self.trained, itertools.islice(images, self.options.calibrate_batches))
        except PredictionError as error:
            warnings.warn(f'the accuracy before training means nothing: {error}', stacklevel=2)

    def _gather_sums(self) -> None:
        """Add what all processes did to the progress, which they share."""
        loss, images, damaged = self.accelerator.reduce(self.sums, reduction='sum').tolist()
        self.expect_finite_loss(loss)
        self.progress.loss += loss
        self.progress.images += int(images)
        self.progress.damaged += int(damaged)
        self.sums.zero_()

    def _write(self, model: nn.Module, name: str, **more: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        header = {'architecture': self.options.model, **self.facts['model_args'], **more}
        header |= {'timm_ghn': json.dumps({key: self.facts[key] for key in ('arguments', 'stem', 'data_config')})}
        write_state_dict(model.state_dict(), self.options.output / name, header)
