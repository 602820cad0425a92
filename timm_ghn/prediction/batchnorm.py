"""Statistics of batch normalisation, which are not predicted: computed from a few batches, or from each batch itself.

A predicted network has the running statistics of an untrained one, so that its output in eval mode means nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_ghn.contexts import preserve_modes
from timm_ghn.errors import ConfigError
from timm_ghn.prediction.checks import check_finite

M = TypeVar('M', bound=nn.Module)

#: Where a batch that is a mapping holds its images.
IMAGE_KEYS = ('image', 'images', 'pixel_values')


def calibrate_batchnorm_(model: M, batches: Iterable[Any]) -> M:
    """Compute the running statistics of batch normalisation anew, in place.

    Each statistic becomes the mean over the batches, of equal weight. Only batch normalisation is in training mode
    meanwhile: dropout and stochastic depth are off. A model without batch normalisation is returned as it is.

    Args:
        model: The network.
        batches: Images, as tensors, as tuples that begin with them, or as mappings under one of :data:`IMAGE_KEYS`.
            They are moved to where the model is. All of it is used: give a few batches, drawn at random over the
            classes, of the size used in training.

    Returns:
        The same model, in the modes that it was in.

    Raises:
        ConfigError: if there is no batch, no image in one, or too few.
        PredictionError: if a statistic is not finite. After this error, as after any other, the statistics are as
            they were.
    """
    norms = _norms(model)
    if not norms:
        return model
    before = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
    momenta = {norm: norm.momentum for norm in norms}
    device = next(model.parameters(), torch.empty(0)).device
    try:
        with preserve_modes(model), torch.no_grad():
            model.eval()
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
            count = 0
            for batch in batches:
                _run(model, _images(batch).to(device))
                count += 1
            if not count:
                raise ConfigError('expected at least one batch to calibrate batch normalisation with (got none)')
        for name, buffer in model.named_buffers():
            if name.endswith(('running_mean', 'running_var')):
                check_finite(f"batch statistics '{name}'", buffer)
    except BaseException:
        for buffer, value in before.items():
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return model


@contextlib.contextmanager
def batch_statistics(model: M) -> Iterator[M]:
    """Let batch normalisation use the statistics of each batch, as the papers evaluate predicted networks.

    Within the context all else is in eval mode, and running statistics are neither read nor changed. Afterwards all
    modes are as they were.

    Args:
        model: The network.
    """
    tracked = {norm: norm.track_running_stats for norm in _norms(model)}
    with preserve_modes(model):
        try:
            model.eval()
            for norm in tracked:
                norm.track_running_stats = False
                norm.training = True
            yield model
        finally:
            for norm, flag in tracked.items():
                norm.track_running_stats = flag


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise ConfigError('a batch has too few images: a layer sees a single value of each channel') from error


def _images(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        batch = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ConfigError(
            'expected batches to be image tensors, tuples that begin with one, or mappings with one of the keys '
            f'{", ".join(IMAGE_KEYS)} (got {type(batch).__name__})'
        )
    return batch


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
