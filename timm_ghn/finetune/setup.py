"""The parts of a run: the model with its start, the data in batches, and timm's optimiser and schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.data import Mixup, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_ghn.architectures.small_images import adapt_to_small_images_, check_reads, size_arguments
from timm_ghn.architectures.timm_models import build_timm_model, check_model_name, check_side
from timm_ghn.data.images import SMALL_IMAGE, EpochSampler, ImageDataset, eval_transform, train_transform
from timm_ghn.data.splits import Split, Splits
from timm_ghn.errors import ConfigError
from timm_ghn.finetune.options import OTHER_INITS, RACE, FinetuneOptions
from timm_ghn.hub.load import shared_ghn
from timm_ghn.prediction.postprocess import postprocess_
from timm_ghn.prediction.predict import initialise
from timm_ghn.transfer.race import Race
from timm_ghn.transfer.start import candidate, choose_init

Batch = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Start:
    """A model with its initial weights.

    Attributes:
        data_config: timm's data config: input size, mean, std, interpolation, crop.
        arguments: What ``timm.create_model`` was given beside the name.
        edits: Changes of its stem for small images, in words.
        provenance: Facts about the GHN and its prediction; None for another start.
    """

    model: nn.Module
    data_config: dict[str, Any]
    arguments: dict[str, Any]
    edits: tuple[str, ...]
    provenance: dict[str, Any] | None


def build(options: FinetuneOptions, num_classes: int) -> Start:
    """Build a model and initialise it.

    Raises:
        UnsupportedModelError: if timm cannot build it as asked, or it cannot read images of this size.
        GHNError: if the prediction fails.
    """
    init, seed, side = options.init, options.seed, options.image_size
    check_model_name(options.model, ghn_option='--init')
    small = options.small_stem == 'on' or (options.small_stem == 'auto' and side is not None and side <= SMALL_IMAGE)
    arguments: dict[str, Any] = {'num_classes': num_classes}
    if side is not None:
        check_side(side)
        arguments |= size_arguments(options.model, side, small=small)
    arguments |= options.arguments
    pretrained = init == 'pretrained'
    model = build_timm_model(options.model, arguments, seed=seed, pretrained=pretrained, ghn_option='--init')
    config = _data_config(options, model)
    if getattr(model, 'num_classes', None) != num_classes:
        raise ConfigError(f'{options.model!r} with {arguments} has no classifier of {num_classes} classes')
    size = config['input_size']
    edits: tuple[str, ...] = ()
    if small and 'patch_size' not in arguments:
        edits = adapt_to_small_images_(model, size[-1], in_chans=size[0])
    check_reads(model, size)
    facts = None
    if init.startswith('donor:'):
        candidate(init, input_size=size, seed=seed)(model)
    if init in (*OTHER_INITS, RACE) or init.startswith('donor:'):
        postprocess_(model, options.post(), input_size=size)
    else:
        ghn = shared_ghn(init)
        post = options.post(ghn.config.postprocess)
        _, facts = initialise(model, ghn, input_size=size, head=options.head, seed=seed, postprocess=post)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Start(model, config, arguments, edits, facts)


def _data_config(options: FinetuneOptions, model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model, with what the options say about it."""
    own = resolve_data_config(model=model)
    channels, side = options.arguments.get('in_chans', own['input_size'][0]), options.image_size
    size = (channels, *(own['input_size'][1:] if side is None else (side, side)))
    crop = 1.0 if max(size[1:]) <= SMALL_IMAGE and options.crop_pct is None else options.crop_pct
    said = {'input_size': size, 'mean': options.mean, 'std': options.std, 'crop_pct': crop, 'in_chans': channels}
    for name in ('mean', 'std'):
        if said[name] is None and len(own[name]) not in (1, channels):
            said[name] = (sum(own[name]) / len(own[name]),)  # those of colours, for grey images
        if said[name] is not None and len(said[name]) not in (1, channels):
            raise ConfigError(f'expected {name} to have {channels} values, one for each channel (got {said[name]})')
    config: dict[str, Any] = resolve_data_config(args=said, model=model)
    return config


#: Learning rates of a race, as multiples of the one that was asked for.
_RACE_LRS = (1 / 3, 1.0, 3.0)


def race(
    options: FinetuneOptions,
    start: Start,
    batches: tuple[Iterable[Batch], Iterable[Batch]],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Race:
    """Let starts race on batches to train on and to compare on; the model has the winner's weights afterwards."""
    return choose_init(
        start.model.to(device),
        batches[0],
        options.race_inits,
        val=batches[1],
        lrs=[options.lr * factor for factor in _RACE_LRS],
        steps=options.race_steps,
        minutes=options.race_minutes,
        optimizer=lambda model, lr: optimizer_of(dataclasses.replace(options, lr=lr), model),
        folder=options.output / 'race',
        identity=identity,
        input_size=start.data_config['input_size'],
        seed=options.seed,
    )


def loaders(
    options: FinetuneOptions, splits: Splits, config: dict[str, Any], processes: int
) -> tuple[DataLoader[Batch], DataLoader[Batch], DataLoader[Batch] | None]:
    """Batches to train on, to validate on and to test on, before they are shared among processes."""
    channels = config['input_size'][0]
    train = ImageDataset(
        splits.train, train_transform(config, options), channels=channels, seed=options.seed, training=True
    )
    whole = len(train) >= options.batch_size * processes
    # With mixup each batch of an even size is mixed with itself in reverse.
    if options.mixed and (options.batch_size % 2 or not whole):
        raise ConfigError(
            f'mixup and cutmix need whole batches of an even size (got batch_size {options.batch_size} in {processes} '
            f'processes, {len(train)} training images)'
        )
    common: dict[str, Any] = {
        'num_workers': options.workers,
        'persistent_workers': options.workers > 0,
        'pin_memory': torch.cuda.is_available(),
    }
    sampler = EpochSampler(len(train), seed=options.seed)
    # A last batch of a few images would be noise; but few-shot sets may have no whole batch at all.
    first: DataLoader[Any] = DataLoader(train, options.batch_size, sampler=sampler, drop_last=whole, **common)

    def in_order(split: Split) -> DataLoader[Any]:
        data = ImageDataset(split, eval_transform(config), channels=channels)
        return DataLoader(data, options.val_batch_size or options.batch_size, **common)

    return first, in_order(splits.val), None if splits.test is None else in_order(splits.test)


def optimizer_of(options: FinetuneOptions, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser; a ConfigError if timm has none of this name, or refuses its options."""
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            filter_bias_and_bn=not options.decay_norms,
            layer_decay=options.layer_decay,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'timm has no optimiser as asked ({options.opt!r}): {error}') from error
    return optimizer


def scheduler_of(options: FinetuneOptions, optimizer: torch.optim.Optimizer, batches: int) -> Scheduler | None:
    """timm's schedule for epochs of so many batches, None for a constant rate; a ConfigError if it has none."""
    if options.sched == 'none':
        return None
    if options.sched == 'plateau':
        raise ConfigError("the schedule 'plateau' waits for a metric, which runs here do not give it; try 'cosine'")
    if options.warmup_epochs >= options.epochs:
        raise ConfigError(
            f'expected warmup_epochs below epochs (got {options.warmup_epochs} of {options.epochs}): '
            'the rate would never be reached'
        )
    scheduler: Scheduler | None = None
    with contextlib.suppress(ValueError):
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=options.sched,
            num_epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            warmup_lr=options.warmup_lr,
            min_lr=options.min_lr,
            step_on_epochs=not options.sched_on_updates,
            updates_per_epoch=math.ceil(batches / options.grad_accum_steps),
        )
    if scheduler is None:
        raise ConfigError(f'timm has no schedule {options.sched!r}')
    return scheduler


def loss_of(options: FinetuneOptions, num_classes: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Mixup | None]:
    """Training loss, and what mixes the batches."""
    smoothing = options.smoothing
    if not options.mixed:
        return nn.CrossEntropyLoss(label_smoothing=smoothing), None
    mixup = Mixup(options.mixup, options.cutmix, label_smoothing=smoothing, num_classes=num_classes)
    return SoftTargetCrossEntropy(), mixup
