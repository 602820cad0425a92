"""Post-processing of predicted weights before they are trained: noise and orthogonalisation (arXiv 2207.10049).

Channels of a predicted weight resemble one another, since a GHN decodes them from one embedding and repeats them where
a layer is wide. Gradient descent hardly tells such channels apart; noise and orthogonalisation do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_ghn.errors import ConfigError
from timm_ghn.graph.build import trace
from timm_ghn.nn.precision import full_precision, sum_dtype
from timm_ghn.prediction.checks import check_finite, writable, write_all_
from timm_ghn.prediction.plan import ANY_GHN, ParameterPlan, ParameterRow, plan_parameters

M = TypeVar('M', bound=nn.Module)

#: Columns of a QR decomposition that are handled at a time: fewer make thin products, more leave more to LAPACK.
_BLOCK = 64
#: Columns of a Gram matrix that are computed at a time.
_BLOCK_OF_GRAM = 128

#: What :attr:`PostProcess.scale` can be.
SCALES = ('unit', 'keep')


@dataclasses.dataclass(frozen=True)
class PostProcess:
    """How predicted weights are post-processed.

    Layers are counted from 1, see :func:`layers`.

    Attributes:
        orth: Whether to replace a weight by the orthogonal factor of its QR decomposition.
        beta: Noise, as a share of the spread of the correlations of the weight; 0 for none.
        layer: The first layer to process: an integer is its number (0 and 1 both are the first), a float below 1
            a share of the depth, of which that share stays: 0.7 of 54 layers processes those from number 38 on, as
            floor(0.7 * 54) = 37 stay. 1.0 is refused: it could mean the first layer or none.
        max_size: Only layers with more output or input channels than this are processed, and noise is added from
            this channel on (the published option for channels that a GHN repeats).
        seed: Of the noise.
        scale: 'unit' is the published definition: all singular values are 1. 'keep' multiplies that by a factor such
            that the weight keeps its Frobenius norm.
    """

    orth: bool = True
    beta: float = 3e-5
    layer: int | float = 0
    max_size: int = 0
    seed: int = 0
    scale: str = 'unit'

    def __post_init__(self) -> None:
        share = type(self.layer) is float and 0.0 <= self.layer < 1.0
        for name, holds, expected in (
            ('orth', type(self.orth) is bool, 'to be true or false'),
            ('beta', type(self.beta) in (int, float) and 0 <= self.beta < math.inf, 'of 0 or more'),
            ('layer', share or (type(self.layer) is int and self.layer >= 0), 'to be a number, or a share below 1.0'),
            ('max_size', type(self.max_size) is int and self.max_size >= 0, 'of 0 or more'),
            ('seed', type(self.seed) is int and -(2**63) <= self.seed < 2**63, 'to be an integer'),
            ('scale', self.scale in SCALES, f'to be one of {", ".join(SCALES)}'),
        ):
            if not holds:
                raise ConfigError(f'expected {name} {expected} (got {getattr(self, name)!r})')

    @classmethod
    def of(cls, value: PostProcess | str | None, *, seed: int = 0, auto: str = 'orth') -> PostProcess | None:
        """Options by their name; None for no post-processing.

        Args:
            value: A key of :data:`NAMED`, 'auto', None or 'none', or options, which are returned as they are.
            seed: Of the noise, for options that are named.
            auto: What 'auto' stands for: the :attr:`~timm_ghn.GHNConfig.postprocess` of the GHN.

        Raises:
            ConfigError: if nothing has this name.
        """
        if isinstance(value, cls):
            return value
        name = auto if value == DEFAULT else value
        if name is None or name == 'none':
            return None
        if not isinstance(name, str) or name not in NAMED:
            names = ', '.join(map(repr, (DEFAULT, *NAMED)))
            raise ConfigError(f"expected postprocess to be {names}, 'none', None or a PostProcess (got {value!r})")
        return dataclasses.replace(NAMED[name], seed=seed)

    def first(self, count: int) -> int:
        """Number of the first layer to process in a network of ``count`` layers, counted from 1."""
        if isinstance(self.layer, float):
            return math.floor(self.layer * count + 1e-9) + 1  # 0.29 * 100 is a little less than 29
        return max(self.layer, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """The options in words."""
        parts = ['orthogonalised' + (' at their norm' if self.scale == 'keep' else '')] if self.orth else []
        parts += [f'noise {self.beta:g} (seed {self.seed})'] if self.beta else []
        if isinstance(self.layer, float):
            parts += [f'from {self.layer:g} of the depth on']
        elif self.layer > 1:
            parts += [f'from layer {self.layer} on']
        parts += [f'beyond {self.max_size} channels'] if self.max_size else []
        return ', '.join(parts) if self.orth or self.beta else 'nothing'


#: Post-processing by name: the published orthogonalisation on the last layers, and the noise of GHN-3's trainer.
NAMED = {'orth': PostProcess(layer=0.7), 'noise': PostProcess(orth=False, beta=1e-5)}

#: What initialising a model does if it is not told: what the GHN's configuration recommends.
DEFAULT = 'auto'

#: What arXiv 2207.10049 used before fine-tuning on CIFAR-10: layer3.3.conv3 of 54 layers, stages.2.blocks.24.conv_dw
#: of 113 (its report says 100, by mistake).
RECIPES = {'resnet50': PostProcess(layer=37), 'convnext_base': PostProcess(layer=94)}


def layers(plan: ParameterPlan) -> tuple[ParameterRow, ...]:
    """The layers of a network, in the order of ``named_parameters``: their numbers are their places, from 1 on.

    A layer is a weight with two axes or more: a parameter that is named so and that the plan predicts as one, and the
    weight of the classifier, predicted or kept. These are the reference's numbers for networks of convolutions and
    linear layers; it skips ``in_proj_weight`` of ``nn.MultiheadAttention``, and counts what the forward pass does not
    use.
    """
    return tuple(
        row
        for row in plan
        if (row.role == 'weight' and _is_named_weight(row.name))
        or (row.name in plan.graph.classifier and len(row.shape) > 1)
    )


def processed_layers(plan: ParameterPlan, options: PostProcess) -> tuple[ParameterRow, ...]:
    """Those of the :func:`layers` that options change; never the classifier."""
    counted = layers(plan)
    if not options.orth and not options.beta:
        return ()
    return tuple(
        row
        for row in counted[options.first(len(counted)) - 1 :]
        if row.name not in plan.graph.classifier and max(row.shape[:2]) > options.max_size
    )


def postprocess_(
    model: M,
    options: PostProcess | str | None = DEFAULT,
    *,
    plan: ParameterPlan | None = None,
    input_size: Any = None,
    example_inputs: Any = None,
) -> M:
    """Post-process the weights of a model, in place; the rest of it stays.

    The weights may come from anywhere. Either all are written, and finite, or, if anything fails, none.

    Args:
        model: Any network that takes a batch of images.
        options: Options, or the name of some; None does nothing.
        plan: The plan of the prediction; without it the model is traced.
        input_size: Image size for tracing, see :func:`timm_ghn.trace`.
        example_inputs: Other inputs than one image batch, see :func:`timm_ghn.trace`.

    Returns:
        The same model.

    Raises:
        ConfigError: if there are no such options.
        UnsupportedModelError: if the model cannot be traced, a weight cannot be written, or the plan is another's.
        PredictionError: if a weight is not finite, or cannot be written.
    """
    chosen = PostProcess.of(options)
    if chosen is None:
        return model
    if plan is None:
        plan = plan_parameters(trace(model, input_size=input_size, example_inputs=example_inputs), ANY_GHN)
    rows = processed_layers(plan, chosen)
    parameters = writable(model, rows)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, value in values.items():
        check_finite(f"values of '{name}'", value)
    process_(values, rows, chosen)
    write_all_(parameters, lambda name, weight: weight.copy_(values[name]))
    return model


@torch.no_grad()
def process_(values: dict[str, Tensor], rows: Sequence[ParameterRow], options: PostProcess) -> None:
    """Replace weights by their post-processed ones in a dictionary; the tensors themselves stay.

    The noise is drawn on the CPU, so that it is the same on every device. A PredictionError if a weight is not finite.
    """
    drawn = torch.Generator().manual_seed(options.seed)
    for row in rows:
        with full_precision(values[row.name].device):
            values[row.name] = processed(values[row.name], options, drawn)
        check_finite(f"post-processed values of '{row.name}'", values[row.name])


def processed(weight: Tensor, options: PostProcess, generator: torch.Generator) -> Tensor:
    """A finite weight of two axes or more after post-processing, as a new tensor; computed in float32 at least.

    ``generator`` draws one normal value for each element that gets noise.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    values = weight.to(dtype, copy=True)
    norm = _norm(values) if options.scale == 'keep' else 0.0
    if options.beta:
        spread = correlation_spread(values)
        block = values[options.max_size :, options.max_size :]
        noise = torch.randn(block.shape, generator=generator, dtype=dtype, device=generator.device)
        block.add_(noise.to(block.device), alpha=options.beta * spread)
    if options.orth:
        values = orthogonalised(values)
        if options.scale == 'keep':
            values *= norm / max(float(torch.linalg.vector_norm(values)), 1.0)  # divided by the root of the rank
    return values.to(weight.dtype)


def orthogonalised(weight: Tensor) -> Tensor:
    """The orthogonal factor of a weight: W = QR as a matrix of at least as many rows as columns, Q sign(diag(R)).

    The matrix is the weight as (outputs, rest), transposed if that is wide. Its columns become orthonormal; where
    they depend on one another, as those of repeated channels do, rounding decides on the directions that the others
    leave open. A column whose diagonal element in R is exactly 0 becomes 0, since sign(0) = 0: a weight of zeros
    stays one.

    Shapes:
        - weight: (out, in, ...), float32 or float64 and finite; the result has the same shape.
    """
    orthogonal = _orthogonal_factor(_tall(weight))
    return (orthogonal if len(orthogonal) == len(weight) else orthogonal.t()).reshape(weight.shape)


def _orthogonal_factor(matrix: Tensor) -> Tensor:
    """Q sign(diag(R)) of a tall matrix by Householder reflections, of which :data:`_BLOCK` are applied at a time.

    The product of a block's reflections is I - V T V', with T the inverse of the upper triangle of V'V whose diagonal
    is 1 / tau (compact WY form; Puglisi, SIAM J. Sci. Stat. Comput. 13, 1992): all but the narrow panels are products
    of matrices, which LAPACK's own QR has fewer of.

    Shapes:
        - matrix: (m, n) with m >= n, float32 or float64 and finite; the result has the same shape.
    """
    rows, columns = matrix.shape
    orthogonal: Tensor
    if columns < 2 * _BLOCK or matrix.device.type != 'cpu':
        orthogonal, triangular = torch.linalg.qr(matrix)
        return orthogonal.mul_(triangular.diagonal().sign())
    rest = matrix.new_empty(columns, rows).t().copy_(matrix)  # columns one after the other, as LAPACK has them
    reflections, signs = [], []
    for first in range(0, columns, _BLOCK):
        panel, tau = torch.geqrf(rest[first:, first : first + _BLOCK])
        signs.append(panel.diagonal().sign())
        V = panel.tril_(-1)
        V.diagonal().fill_(1)
        inverse = (V.t() @ V).triu_(1)
        inverse.diagonal().copy_(1 / tau)  # infinite for a reflection that is none: its row and column of T are 0
        T = torch.linalg.solve_triangular(inverse, torch.eye(len(tau), dtype=matrix.dtype), upper=True)
        behind = rest[first:, first + _BLOCK :]
        behind.addmm_(V, T.t() @ (V.t() @ behind), alpha=-1)
        reflections.append((first, V, T))
    orthogonal = torch.eye(rows, columns, dtype=matrix.dtype)
    for first, V, T in reversed(reflections):
        behind = orthogonal[first:, first:]
        behind.addmm_(V, T @ (V.t() @ behind), alpha=-1)
    return orthogonal.mul_(torch.cat(signs))


def correlation_spread(weight: Tensor) -> float:
    """Unbiased standard deviation of all entries of the correlation matrix C = ZZ' between the n rows of a weight.

    The rows are those of the matrix that :func:`orthogonalised` decomposes. C has n * n entries, so it is not formed:
    with the mean row z of Z and D = Z - 1z', whose columns sum to 0, the deviations from the mean of all entries are
    C - |z|^2 11' = 1(Dz)' + (Dz)1' + DD', three parts whose products vanish or repeat:

        (n^2 - 1) sigma^2 = 2 n |Dz|^2 + |D'D|^2

    A row without variance has no correlation, by the definition NaN; here it is taken as 0. So is the spread of a
    weight with a single column, all of whose rows are such.

    Shapes:
        - weight: (out, in, ...), float32 or float64 and finite.
    """
    matrix = _tall(weight)
    rows, columns = matrix.shape
    if columns < 2:
        return 0.0
    z = matrix.contiguous()
    lengths = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    z = z - z.mean(dim=1, keepdim=True)
    centred = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    varies = centred > 8 * torch.finfo(z.dtype).eps * lengths  # less is the rounding of the mean
    z /= torch.where(varies, centred, math.inf)
    mean = z.mean(dim=0)
    z -= mean
    squares = 2 * rows * _norm(z @ mean) ** 2
    for first in range(0, columns, _BLOCK_OF_GRAM):  # D'D is symmetric: what is right of the diagonal counts twice
        products = z[:, first : first + _BLOCK_OF_GRAM].t() @ z[:, first:]
        squares += 2 * _norm(products) ** 2 - _norm(products[:, :_BLOCK_OF_GRAM]) ** 2
    return math.sqrt(squares / (rows**2 - 1))


def _tall(weight: Tensor) -> Tensor:
    """A weight as a matrix (outputs, rest), transposed if it has more columns than rows."""
    matrix = weight.reshape(weight.shape[0], -1)
    return matrix.t() if matrix.shape[0] < matrix.shape[1] else matrix


def _norm(values: Tensor) -> float:
    """Euclidean norm over all elements; those of rows are summed up in float64 where the device has it."""
    rows = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
    return float(torch.linalg.vector_norm(rows, dtype=sum_dtype(values.device)))


def _is_named_weight(name: str) -> bool:
    """Whether a parameter is called a weight, or computes one (``parametrizations.weight.original1``)."""
    parts = name.split('.')
    return 'weight' in (parts[-2] if 'parametrizations' in parts else parts[-1])
