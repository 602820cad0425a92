"""The published GHNs: from the names and shapes in their files to a configuration of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from timm_ghn.errors import CheckpointError, ConfigError
from timm_ghn.hub.checkpoints import open_checkpoint
from timm_ghn.hub.records import TensorRecord, are_sizes, brief
from timm_ghn.hub.storage import build_ghn, expect_config, file_digest
from timm_ghn.nn.config import IMAGENET_MEAN, IMAGENET_STD, GHNConfig, Origin
from timm_ghn.nn.ghn import GHN

#: Statistics of the images that the published CIFAR-10 GHNs were trained on.
CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)

#: What a bare state dictionary does not tell.
NOT_IN_WEIGHTS = frozenset({'virtual_edges', 'weight_norm', 'rules', 'mean', 'std', 'trained', 'postprocess'})

#: Cut-off of the shortest paths that all GHNs with virtual edges were published with.
VIRTUAL_EDGES = 50

_MOVED = ('centrality_embed_in.', 'centrality_embed_out.', 'input_dist_embed.')
_CONVOLUTIONS = ('decoder.conv.', 'decoder.class_layer_predictor.')

_log = logging.getLogger(__name__)


def read_official(
    path: Path,
    *,
    config: GHNConfig | None = None,
    sha256: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GHN:
    """Read a GHN in one of the forms that its authors published: GHN-3's joblib dumps, GHN-2's ``torch.save`` files.

    Args:
        path: The file. Nothing in it is executed.
        config: What the catalogue says of it; inferred from the file if None.
        sha256: Its digest, if it is known; nothing is unpickled if it has another.
        device: Where to put the weights; the CPU if None.
        dtype: Floating type of the weights; float32 if None.

    Returns:
        The GHN, in evaluation mode.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list.
        CheckpointError: if it is damaged, is no GHN, differs from ``config`` or ``sha256``, or holds a weight that is
            not finite.
    """
    with open_official(path, config=config, sha256=sha256) as found:
        ghn = build_ghn(
            found.config,
            found.shapes,
            lambda key: found.weights[key].read(),
            device=device,
            dtype=dtype,
            label=str(path),
        )
    ghn.origin = Origin(name=found.config.name, file=str(path), sha256=file_digest(path))
    return ghn


@dataclasses.dataclass(frozen=True)
class OfficialGHN:
    """An open file of the authors.

    Attributes:
        config: Its hyper-parameters.
        weights: Its tensors by our names, still in the file.
    """

    config: GHNConfig
    weights: Mapping[str, TensorRecord]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: record.shape for key, record in self.weights.items()}


@contextlib.contextmanager
def open_official(path: Path, *, config: GHNConfig | None = None, sha256: str | None = None) -> Iterator[OfficialGHN]:
    """Open a file of the authors and find its hyper-parameters; the weights can be read while it is open.

    Args:
        path: The file. Nothing in it is executed.
        config: What the catalogue says of it; inferred from the file if None.
        sha256: Its digest, if it is known; nothing is unpickled if it has another.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list.
        CheckpointError: if it is damaged, is no GHN, or differs from ``config`` or ``sha256``.
    """
    label = str(path)
    with open_checkpoint(path, sha256) as loaded:
        weights, options = _parts(loaded, label)
        weights = our_keys(weights)
        inferred = infer_config({key: record.shape for key, record in weights.items()}, options, label)
        if config is not None:
            expect_config(inferred, config, label, ignore=NOT_IN_WEIGHTS)
            inferred = config
        elif inferred.name is None:
            inferred = dataclasses.replace(inferred, name=path.stem)
        yield OfficialGHN(inferred, weights)


def _parts(loaded: Any, label: str) -> tuple[dict[str, TensorRecord], dict[str, Any] | None]:
    """The state dictionary of a file and, if it has one, its configuration."""
    options = None
    if isinstance(loaded, dict) and 'state_dict' in loaded:
        options, loaded = loaded.get('config'), loaded['state_dict']
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f'{label} is no GHN: expected a dictionary of tensors (got {type(loaded).__name__})')
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, TensorRecord):
            raise CheckpointError(f'{label} is no GHN: expected tensors by name (got {brief(key)})')
    total, size = sum(value.nbytes for value in loaded.values()), next(iter(loaded.values())).storage.source.size
    if total > size:
        raise CheckpointError(f'{label} holds tensors of {total:,} bytes in {size:,}: they share their memory')
    if options is not None and not isinstance(options, dict):
        raise CheckpointError(f'{label} is damaged: its configuration is not a dictionary')
    return loaded, options


def our_keys(weights: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Rename and reshape what the releases name or shape differently.

    The Hub's GHN-3 files hold three embeddings at the top level that belong to the first layer; GHN-2's files hold
    linear layers as 1 x 1 convolutions.
    """
    renamed: dict[str, TensorRecord] = {}
    for key, record in weights.items():
        if key.startswith(_CONVOLUTIONS):
            record = record.squeeze_kernel()
        renamed[f'gnn.0.{key}' if key.startswith(_MOVED) else key] = record
    return renamed


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], options: Mapping[str, Any] | None = None, label: str = 'the file'
) -> GHNConfig:
    """Find the hyper-parameters of a published GHN.

    Args:
        shapes: Shape of every tensor, by our names.
        options: The configuration in the file, if it has one; it decides what the shapes do not.
        label: Name of the file, for messages.

    Raises:
        CheckpointError: if these are not the weights of a GHN.
    """
    options = options or {}
    try:
        hid = shapes['embed.weight'][1]
        num_classes = shapes['bias_class.1.weight'][0]
        decoder = 'mlp' if 'decoder.mlp.fc.0.weight' in shapes else 'conv'
        gnn = _gnn_of(shapes)
        if 'max_shape' in options:
            max_shape = options['max_shape']
            if not isinstance(max_shape, (tuple, list)) or len(max_shape) != 4 or not are_sizes(max_shape):
                raise CheckpointError(f'{label} states an impossible max_shape: {brief(max_shape)}')
            max_shape = tuple(max_shape)
        elif decoder == 'mlp':
            raise CheckpointError(f'{label} has the MLP decoder and no configuration, which would tell its max_shape')
        else:
            outs = shapes['decoder.class_layer_predictor.1.weight'][1]
            ins = shapes['decoder.conv.2.weight'][0] // outs
            size = math.isqrt(shapes['decoder.fc.0.weight'][0] // (4 * hid))
            max_shape = (outs, ins, size, size)
        heads = shapes['gnn.0.attn.proj_e.2.weight'][0] if gnn == 'graphormer' else 8
        layers = sum(key.startswith('gnn.') and key.endswith('.ln1.weight') for key in shapes)
        virtual = bool(options.get('ve', gnn == 'graphormer' or 'gnn.mlp_ve.fc.0.weight' in shapes))
        unnormalised = gnn == 'gated' and not virtual  # GHN-1
        unread = sorted(str(key) for key in options.keys() - _READ)
        if unread:
            _log.debug('%s: options that do not shape the GHN were not read: %s', label, ', '.join(unread))
        return GHNConfig(
            hid=hid,
            max_shape=max_shape,
            num_classes=num_classes,
            gnn=gnn,
            layers=max(layers, 1),
            heads=heads,
            virtual_edges=VIRTUAL_EDGES if virtual else 1,
            layernorm='ln.weight' in shapes,
            weight_norm=bool(options.get('weight_norm', not unnormalised)),
            decoder=decoder,
            window='center' if gnn == 'graphormer' else 'corner',
            mean=CIFAR10_MEAN if num_classes == 10 else IMAGENET_MEAN,
            std=CIFAR10_STD if num_classes == 10 else IMAGENET_STD,
        )
    except (KeyError, IndexError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f'{label} does not hold the weights of a GHN: {type(error).__name__} {error}') from error
    except ConfigError as error:
        raise CheckpointError(f'{label} does not hold the weights of a GHN: {error}') from error


_READ = frozenset({'max_shape', 'num_classes', 'hypernet', 'decoder', 'weight_norm', 've', 'layernorm', 'hid'})


def _gnn_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if 'gnn.0.attn.to_qkv.weight' in shapes:
        return 'graphormer'
    return 'gated' if any(key.startswith('gnn.gru.') for key in shapes) else 'mlp'
