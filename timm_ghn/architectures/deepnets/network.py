"""The networks of DeepNets-1M: a stem, cells made by a genotype, and a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.architectures.deepnets.layers import (
    OPS,
    FactorizedReduce,
    PosEnc,
    Subsample,
    Zero,
    make_norm,
    make_op,
    relu_conv_norm,
)
from timm_ghn.errors import ConfigError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class Genotype:
    """The operations of a normal and of a reduction cell.

    Attributes:
        normal: (operation, input) pairs, two for each sum; inputs 0 and 1 are the outputs of the two cells before,
            input 2 + j is sum j.
        normal_concat: Inputs whose concatenation is the output of the cell.
        reduce: The same for a reduction cell.
        reduce_concat: Likewise.
    """

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for kind in ('normal', 'reduce'):
            pairs = tuple((str(op), int(state)) for op, state in getattr(self, kind))
            concat = tuple(map(int, getattr(self, f'{kind}_concat')))
            vars(self).update({kind: pairs, f'{kind}_concat': concat})
            if not pairs or len(pairs) % 2 or any(op not in OPS for op, _ in pairs):
                raise ConfigError(f'expected two known operations for each sum of a cell (got {pairs})')
            if any(not 0 <= state < 2 + index // 2 for index, (_, state) in enumerate(pairs)):
                raise ConfigError(f'expected inputs that come before their use (got {pairs})')
            if not concat or any(not 2 <= state < 2 + len(pairs) // 2 for state in concat):
                raise ConfigError(f'expected to concatenate sums of the cell (got {concat})')

    @property
    def ops(self) -> tuple[str, ...]:
        """Operations of both cells."""
        return tuple(op for op, _ in self.normal + self.reduce)

    @property
    def is_vit(self) -> bool:
        """Whether there is an attention: such networks cut the image into patches and keep their resolution."""
        return 'msa' in self.ops

    @property
    def reaches_output(self) -> bool:
        """Whether each cell makes something of its inputs: 'none' may leave a cell zeros alone."""
        for pairs, concat in ((self.normal, self.normal_concat), (self.reduce, self.reduce_concat)):
            known = [True, True]
            for first in range(0, len(pairs), 2):
                known.append(any(op != 'none' and known[state] for op, state in pairs[first : first + 2]))
            if not any(known[state] for state in concat):
                return False
        return True


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """A network of DeepNets-1M by the names of the reference.

    Attributes:
        genotype: Its cells.
        n_cells: Number of cells; those at a third and at two thirds are reduction cells.
        C: Channels of the first cells.
        C_mult: Factor of the channels at each reduction.
        ks: Kernel size of the stem.
        stem_type: 0 for one convolution, 1 for a stem of three, whose two outputs differ in size.
        stem_pool: Whether a max-pooling follows the stem of type 0.
        norm: 'bnorm', 'bn-track' (with running statistics) or None.
        preproc: Whether the inputs of a cell go through a 1x1 convolution.
        glob_avg: Whether the last map is averaged; it is flattened otherwise.
        fc_layers: Layers of the classifier.
        fc_dim: Width of its hidden layers.
    """

    genotype: Genotype
    n_cells: int
    C: int = 32
    C_mult: int = 1
    ks: int = 3
    stem_type: int = 0
    stem_pool: bool = False
    norm: str | None = 'bnorm'
    preproc: bool = True
    glob_avg: bool = True
    fc_layers: int = 1
    fc_dim: int = 256

    def __post_init__(self) -> None:
        concat = max(len(self.genotype.normal_concat), len(self.genotype.reduce_concat))
        if not self.preproc and (concat > 1 or self.C_mult > 1):
            raise ConfigError('expected preproc where cells concatenate several sums or widen')
        if min(self.n_cells, self.C, self.fc_layers) < 1 or self.stem_type not in (0, 1):
            raise ConfigError(f'expected cells, channels, a classifier and a stem of type 0 or 1 (got {self})')

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkConfig:
        """The record that ``dataclasses.asdict`` or the reference's JSON gives; what it does not know is left out."""
        known = {field.name for field in dataclasses.fields(cls)} & set(values)
        try:
            return cls(**{**{name: values[name] for name in known}, 'genotype': Genotype(**values['genotype'])})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f'expected the description of a DeepNets-1M network ({error})') from error


class Cell(nn.Module):
    """Sums of pairs of operations over the outputs of the two cells before, and their concatenation."""

    def __init__(
        self, config: NetworkConfig, in_channels: tuple[int, int], channels: int, *, reduction: bool, reduced: bool
    ) -> None:
        super().__init__()
        genotype, norm = config.genotype, config.norm
        self.pairs = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        halve = reduced and not genotype.is_vit
        if config.preproc:
            self.preprocess0 = (
                FactorizedReduce(in_channels[0], channels, norm)
                if halve
                else relu_conv_norm(in_channels[0], channels, 1, 1, norm)
            )
            self.preprocess1 = relu_conv_norm(in_channels[1], channels, 1, 1, norm)
        else:
            self.preprocess0 = Subsample(2) if halve else nn.Identity()
            self.preprocess1 = nn.Identity()
        strided = reduction and not genotype.is_vit
        self._ops = nn.ModuleList(
            make_op(op, channels, 2 if strided and state < 2 else 1, norm) for op, state in self.pairs
        )

    def forward(self, s0_nchw: Tensor, s1_nchw: Tensor) -> Tensor:
        """The output of the cell from those of the two cells before."""
        # None stands for zeros; what an operation makes of them is left out, as in the reference.
        states: list[Tensor | None] = [self.preprocess0(s0_nchw), self.preprocess1(s1_nchw)]
        for first in range(0, len(self.pairs), 2):
            outputs = []
            for i in (first, first + 1):
                op, state = self._ops[i], states[self.pairs[i][1]]
                if state is not None and not isinstance(op, Zero):
                    outputs.append(op(state))
            states.append(sum(outputs[1:], outputs[0]) if outputs else None)
        chosen = [states[i] for i in self.concat]
        known = next((state for state in chosen if state is not None), None)
        if known is None:
            raise UnsupportedModelError('a cell of this network gives zeros alone')
        filled = [torch.zeros_like(known) if state is None else state for state in chosen]
        return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)


class DeepNet(nn.Module):
    """A network of DeepNets-1M.

    The stem divides the resolution by four for images of more than 64 pixels.

    Attributes:
        graph_rules: How :func:`timm_ghn.trace` reads it. The published rules, which look at the places of ops in a
            list, lose softmaxes and gates that are in the official files.
    """

    graph_rules = 'operators'

    def __init__(
        self, config: NetworkConfig, *, image_size: int = 32, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        large, vit, channels = image_size > 64, config.genotype.is_vit, config.C
        widths = self._make_stem(config, image_size, in_chans)
        reductions = {config.n_cells // 3, 2 * config.n_cells // 3} - {0}
        reduced = config.stem_type == 1
        cells = []
        for index in range(config.n_cells):
            reduction = index in reductions
            channels *= config.C_mult if reduction else 1
            cell = Cell(config, widths, channels, reduction=reduction, reduced=reduced)
            cells.append(cell)
            widths, reduced = (widths[1], len(cell.concat) * channels), reduction
        self.cells = nn.ModuleList(cells)
        self.glob_avg = nn.AdaptiveAvgPool2d(1) if config.glob_avg else nn.Identity()
        features = widths[1]
        if not config.glob_avg:
            shrunk = (4 if large else 1) * (2 if config.stem_type == 1 or config.stem_pool else 1)
            features *= (-(-image_size // (1 if vit else 4 * shrunk))) ** 2
        layers: list[nn.Module] = []
        for _ in range(config.fc_layers - 1):
            layers += [nn.Linear(features, config.fc_dim), nn.ReLU(inplace=True), nn.Dropout(0.5)]
            features = config.fc_dim
        self.classifier = nn.Sequential(*layers, nn.Linear(features, num_classes))
        #: Where timm, and this package, look for the size of the images and for the last layer.
        self.pretrained_cfg = {
            'input_size': (in_chans, image_size, image_size),
            'num_classes': num_classes,
            'classifier': f'classifier.{len(layers)}',
        }

    def _make_stem(self, config: NetworkConfig, image_size: int, in_chans: int) -> tuple[int, int]:
        """Make the stem, and say the channels of its two outputs."""
        large, norm, channels = image_size > 64, config.norm, config.C
        padding = config.ks // 2
        self.stem0: nn.Module
        if config.genotype.is_vit:
            patch, pad = (16, 0) if large else (3, 1)
            self.stem0 = nn.Conv2d(in_chans, channels, patch, patch, pad, bias=False)
            self.pos_enc = PosEnc(channels, (image_size + 2 * pad - patch) // patch + 1)
        elif config.stem_type == 0:
            channels *= 3 if config.preproc and not large else 1
            first = nn.Conv2d(in_chans, channels, config.ks, 4 if large else 1, padding, bias=False)
            pool = [nn.MaxPool2d(3, stride=2, padding=1)] if config.stem_pool else []
            self.stem = nn.Sequential(first, make_norm(norm, channels), *pool)
        else:
            stride = 2 if large else 1
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_chans, channels // 2, config.ks, stride, padding, bias=False),
                make_norm(norm, channels // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels // 2, channels, 3, stride, 1, bias=False),
                make_norm(norm, channels),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1, bias=False), make_norm(norm, channels)
            )
        return channels, channels

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Logits (n, classes)."""
        if self.config.genotype.is_vit:
            s0 = s1 = self.pos_enc(self.stem0(x_nchw))
        elif self.config.stem_type == 0:
            s0 = s1 = self.stem(x_nchw)
        else:
            s0 = self.stem0(x_nchw)
            s1 = self.stem1(s0)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        logits: Tensor = self.classifier(self.glob_avg(s1).flatten(1))
        return logits
