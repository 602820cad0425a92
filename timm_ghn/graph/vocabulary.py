"""What a parameter or an operator is, in the vocabulary of the published GHNs."""

from __future__ import annotations

import functools
import math

from torch import nn

from timm_ghn.graph.primitives import Primitive

#: Autograd operators that are nodes of their own.
OPERATORS = {
    'Mean': Primitive.GLOB_AVG,
    'AdaptiveAvgPool2D': Primitive.GLOB_AVG,
    'MaxPool2DWithIndices': Primitive.MAX_POOL,
    'AvgPool2D': Primitive.AVG_POOL,
    'Softmax': Primitive.MSA,
    'SafeSoftmax': Primitive.MSA,
    'Mul': Primitive.CSE,
    'Add': Primitive.SUM,
    'Cat': Primitive.CONCAT,
}

_LINEAR_LIKE = frozenset(
    {
        'torch.nn.modules.conv.Conv2d',
        'torch.nn.modules.linear.Linear',
        'torch.nn.modules.linear.NonDynamicallyQuantizableLinear',
        'torch.nn.modules.activation.MultiheadAttention',
        'transformers.pytorch_utils.Conv1D',
    }
)
_TABLE = {
    **dict.fromkeys(_LINEAR_LIKE, Primitive.CONV),
    'torch.nn.modules.batchnorm.BatchNorm2d': Primitive.BN,
    'torch.nn.modules.normalization.LayerNorm': Primitive.LN,
    'torchvision.models.convnext.LayerNorm2d': Primitive.LN,
    'torch.nn.modules.sparse.Embedding': Primitive.POS_ENC,
    'torchvision.models.vision_transformer.Encoder': Primitive.POS_ENC,
    'timm_ghn.architectures.deepnets.layers.PosEnc': Primitive.POS_ENC,
}


@functools.lru_cache(1024)
def operator_primitive(kind: str) -> Primitive | None:
    """Primitive of an operator by its autograd name.

    A table entry matches all names that begin with it, as in the reference: ``Addmm`` with a computed bias (in
    torchvision's Swin v2) is a sum.
    """
    return next((primitive for name, primitive in OPERATORS.items() if kind.startswith(name)), None)


def class_path(module: nn.Module | type) -> str:
    """Import path of a module's class, e.g. ``'torch.nn.modules.conv.Conv2d'``."""
    kind = module if isinstance(module, type) else type(module)
    return f'{kind.__module__}.{kind.__qualname__}'


def published_kind(module: nn.Module) -> str | None:
    """Class path of the nearest base class that the published GHNs know, None where there is none."""
    return next((path for kind in type(module).__mro__ if (path := class_path(kind)) in _TABLE), None)


def is_layer(module: nn.Module) -> bool:
    """Whether a module multiplies data with its weight: a linear layer or a convolution of any kind."""
    return published_kind(module) in _LINEAR_LIKE or isinstance(module, nn.modules.conv._ConvNd)


def is_norm_bias(name: str, module: nn.Module) -> bool:
    """Whether a parameter is the bias of a normalisation layer, which the node of the weight predicts."""
    return 'norm' in type(module).__name__.lower() and name.endswith('.bias')


def published_primitive(name: str, module: nn.Module) -> Primitive | None:
    """Primitive of a parameter, None for one that the published GHNs do not know."""
    kind = published_kind(module)
    if kind is None or is_norm_bias(name, module):
        return None
    if kind not in _LINEAR_LIKE:
        return _TABLE[kind]
    if 'bias' in name:
        return Primitive.BIAS
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return Primitive.DIL_CONV if min(module.dilation) > 1 else Primitive.SEP_CONV
    return Primitive.CONV


def encoded_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Shape of a parameter as the shape encoder sees it.

    A positional embedding (1, T, C) becomes (1, C, s, s) with s = floor(sqrt(T)).
    """
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        return encoded_position(shape)
    padded = (*shape, 1, 1, 1, 1)[:4]
    return padded[0], padded[1], padded[2], padded[3]


#: A parameter (1, n, C) of at most so many rows holds class or register tokens, not positions.
_MOST_TOKENS = 8

#: Ops that add a bias.
_ADDS = frozenset({'Add', 'Addmm', 'Baddbmm', 'Convolution'})

#: Ops that multiply data with a weight matrix or kernel.
MULTIPLIES = frozenset(
    {'Addmm', 'Mm', 'Bmm', 'Baddbmm', 'Addbmm', 'Convolution', 'ConvolutionOverrideable', 'Mv', 'Addmv'}
)


def norm_primitive(module: nn.Module) -> Primitive | None:
    """Primitive of a normalisation layer of any kind, None for another module."""
    kind = published_kind(module)
    if kind is not None:
        return _TABLE[kind] if _TABLE[kind] in (Primitive.BN, Primitive.LN) else None
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return Primitive.BN
    if isinstance(module, nn.GroupNorm):
        return Primitive.LN
    name = type(module).__name__.lower()
    weight = module._parameters.get('weight')
    if 'norm' in name and weight is not None and weight.dim() == 1:
        return Primitive.BN if 'batch' in name else Primitive.LN
    return None


def parameter_primitive(
    name: str, module: nn.Module, shape: tuple[int, ...], kind: str, *, table: bool = False, unchanged: bool = True
) -> Primitive | None:
    """Primitive of a parameter of any network, from its module and the operator that reads it.

    Args:
        name: Dotted parameter name.
        module: Module that holds it.
        shape: Its shape.
        kind: Operator that brings it to the data.
        table: Whether it is a table of relative positions.
        unchanged: Whether that operator reads its elements as they are.

    Returns:
        None for a parameter that has no node: the bias of a normalisation layer, or one that is kept.
    """
    leaf = name.rpartition('.')[2]
    norm = norm_primitive(module)
    if norm is not None and len(shape) == 1:
        return norm if leaf == 'weight' else None
    if table:
        return None
    is_matrix = len(shape) == 2 and kind in MULTIPLIES and unchanged
    if 'weight' not in leaf and 'bias' not in leaf and sum(n > 1 for n in shape) <= 1 and not is_matrix:
        return None  # a gain, such as that of a weight-standardised convolution
    published = published_primitive(name, module)
    if published is not None and published is not Primitive.POS_ENC:
        return published
    if len(shape) > 1 and kind in MULTIPLIES and is_token(shape) and leaf != 'weight':
        return None  # a token from which a query is made
    if len(shape) > 1 and kind in MULTIPLIES:
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            return Primitive.DIL_CONV if min(module.dilation) > 1 else Primitive.SEP_CONV
        return Primitive.CONV
    if len(shape) == 1 and kind in _ADDS and 'bias' in leaf:
        return Primitive.BIAS
    if positional_size(shape) is not None:
        # Positions may be added to slices in place; some versions of torch record no more about that.
        in_place = kind in ('CopySlices', 'IndexAdd') and 'pos' in leaf
        return Primitive.POS_ENC if kind == 'Add' or in_place else None
    return None


def is_token(shape: tuple[int, ...]) -> bool:
    """Whether a parameter has the shape of class or register tokens: (1, n, C) with a small n."""
    return len(shape) == 3 and shape[0] == 1 and shape[1] <= _MOST_TOKENS


def positional_size(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Tokens T and features C of a positional embedding; None for other shapes.

    Known are (T, C), (1, T, C), maps (1, H, W, C) and, if height and width are equal, (1, C, H, W).
    """
    if len(shape) == 2 and min(shape) > 1:
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        return shape[1], shape[2]
    if len(shape) == 4 and shape[0] == 1 and min(shape[2:]) > 1:
        if has_features_first(shape):
            return shape[2] * shape[3], shape[1]
        return shape[1] * shape[2], shape[3]
    return None


def has_features_first(shape: tuple[int, ...]) -> bool:
    """Whether a positional embedding is a map (1, C, H, W)."""
    return len(shape) == 4 and shape[2] == shape[3] != shape[1] > 1


def encoded_position(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Shape of a positional embedding as the shape encoder sees it: (1, C, s, s) with s = floor(sqrt(T)).

    Raises:
        ValueError: if the shape is not that of a positional embedding.
    """
    size = positional_size(shape)
    if size is None:
        raise ValueError(f'expected the shape of a positional embedding (got {shape})')
    side = math.isqrt(size[0])
    return 1, size[1], side, side


UNUSED = 'not used in the forward pass'
TOKEN = 'class or register token'
GAIN = 'layer scale or gain'
RELATIVE_POSITIONS = 'relative position table'
AXIS_POSITIONS = 'rotary or axis-wise position table'
NORM_APART = 'norm that weight normalisation keeps apart from the direction'
NOT_FLOATING = 'not of a floating-point type'
NO_ELEMENTS = 'has no elements'

#: Reasons to keep a parameter that lie in the parameter, not in the limits of the graph rules.
ARCHITECTURAL = (UNUSED, TOKEN, GAIN, RELATIVE_POSITIONS, AXIS_POSITIONS, NORM_APART, NOT_FLOATING, NO_ELEMENTS)

#: Names of parameters that scale features, where the shape does not show it.
GAIN_NAMES = ('alpha', 'beta', 'gamma', 'gain', 'scale', 'tau', 'temperature', 'v')
