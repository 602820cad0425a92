"""How different the channels of a weight are: duplicates, stable rank, spectrum of their correlations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from timm_ghn.prediction.plan import ParameterPlan
from timm_ghn.prediction.postprocess import PostProcess, layers, processed, processed_layers

#: Two channels are duplicates of each other if the cosine between them is larger.
DUPLICATE_COSINE = 0.999

#: The weights that are compared.
KINDS = ('predicted', 'postprocessed', 'random')

#: Channels that are compared with all others at once.
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class LayerDiversity:
    """How different the output channels of a weight are, each taken as the vector of its elements.

    Attributes:
        channels: Output channels.
        duplicates: Share of the channels that point in the direction of an earlier one, see :data:`DUPLICATE_COSINE`.
            A channel of zeros has the direction of all others of zeros.
        stable_rank: |W|_F^2 / |W|_2^2 of the weight as the matrix W of (channels, rest): 1 if all channels are
            multiples of one, the smaller side of the matrix if all singular values are equal, 0 for zeros.
        relative_rank: The stable rank as a share of the smaller side.
        effective_rank: Participation ratio of the spectrum, (sum s)^2 / sum s^2: over how many directions the
            correlations are spread; 0 if no channel varies.
        spectrum: Eigenvalues of the correlation matrix of the channels, the largest first, as many as the smaller
            side of the matrix; the others are 0. Their sum is the number of channels that vary.
    """

    channels: int
    duplicates: float
    stable_rank: float
    relative_rank: float
    effective_rank: float
    spectrum: tuple[float, ...] = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain values that ``json`` can write, without the spectrum."""
        return {key: getattr(self, key) for key in ('duplicates', 'stable_rank', 'relative_rank', 'effective_rank')}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A layer, by its number among :func:`~timm_ghn.prediction.postprocess.layers`, under each of :data:`KINDS`."""

    number: int
    name: str
    shape: tuple[int, ...]
    processed: bool
    weights: dict[str, LayerDiversity]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        facts = {key: value for key, value in vars(self).items() if key != 'weights'}
        return {**facts, 'shape': list(self.shape), **{kind: self.weights[kind].to_dict() for kind in KINDS}}


def compare(
    predicted: Mapping[str, Tensor], random: Mapping[str, Tensor], plan: ParameterPlan, options: PostProcess | None
) -> Iterator[Comparison]:
    """Measure each predicted layer as it was predicted, post-processed, and drawn at random, one after the other."""
    changed = {row.name for row in processed_layers(plan, options)} if options else set()
    generator = torch.Generator().manual_seed(options.seed if options else 0)
    for number, row in enumerate(layers(plan), start=1):
        if not row.predicted:
            continue  # a classifier that is kept
        weight = predicted[row.name]
        post = processed(weight, options, generator) if options and row.name in changed else weight
        tensors = (weight, post, random[row.name].detach())
        measured = {kind: measure(tensor) for kind, tensor in zip(KINDS, tensors, strict=True)}
        yield Comparison(number, row.name, row.shape, row.name in changed, measured)


@torch.no_grad()
def measure(weight: Tensor) -> LayerDiversity:
    """Measure a weight, which is finite and has two axes or more."""
    matrix = weight.detach().reshape(weight.shape[0], -1).to(torch.promote_types(weight.dtype, torch.float32))
    matrix = matrix.contiguous()  # sums of the same weight are rounded in the same way
    largest = float(matrix.abs().max())
    matrix = matrix / largest if largest else matrix  # no measure depends on it, and no square leaves the range
    squares = _eigenvalues(matrix)
    stable_rank = float(squares.sum() / squares[0]) if float(squares[0]) > 0 else 0.0
    # A centred row shorter than this is the rounding of its mean.
    rounding = 8 * torch.finfo(matrix.dtype).eps * torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    spectrum = _eigenvalues(_unit_rows(matrix - matrix.mean(dim=1, keepdim=True), floor=rounding))
    total = float(spectrum.sum())
    return LayerDiversity(
        channels=len(matrix),
        duplicates=_duplicates(matrix) / len(matrix),
        stable_rank=stable_rank,
        relative_rank=stable_rank / min(matrix.shape),
        effective_rank=total**2 / float(spectrum.square().sum()) if total else 0.0,
        spectrum=tuple(spectrum.tolist()),
    )


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Squared singular values of a matrix, the largest first, from the smaller of its two Gram matrices."""
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    ascending: Tensor = torch.linalg.eigvalsh((smaller @ smaller.t()).double())
    return ascending.flip(0).clamp(min=0)


def _unit_rows(matrix: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """Rows of length 1; rows that are not longer than ``floor`` become 0."""
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    return matrix / torch.where(lengths > floor, lengths, math.inf)


def _duplicates(matrix: Tensor) -> int:
    """How many rows have the direction of an earlier one."""
    rows = _unit_rows(matrix)
    zeros = int((~rows.any(dim=1)).sum())
    found = max(zeros - 1, 0)
    for start in range(0, len(rows), _CHUNK):
        cosines = rows[start : start + _CHUNK] @ rows[: start + _CHUNK].t()
        found += int((cosines.tril(start - 1) > DUPLICATE_COSINE).any(dim=1).sum())
    return found
