"""From decoded tensors to parameters: repeated by index modulo what was decoded, scaled by fan-in."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from timm_ghn import GHNConfig
from timm_ghn.nn.requests import DecodeKind
from timm_ghn.prediction.fit import (
    Fit,
    fan_in_scale,
    fit_of,
    fitted,
    random_tokens,
    repeated,
    scaled,
    write_repeated,
)

CONFIG = GHNConfig(hid=8, max_shape=(8, 6, 7, 7), num_classes=10, heads=2)
PLAIN = GHNConfig(hid=8, max_shape=(8, 6, 7, 7), num_classes=10, heads=2, weight_norm=False)

VECTORS = [(5,), (8,), (16,), (17,), (2, 3, 5)]
TENSORS = [
    (8, 6), (3, 2), (20, 13), (1, 17), (9, 7, 5), (16, 12, 1, 1), (19, 11, 2, 5), (30, 1, 3, 3), (10, 13, 3, 2, 4)
]  # fmt: skip


def decoded_for(kind: DecodeKind, shape: tuple[int, ...], config: GHNConfig = CONFIG) -> tuple[Tensor, Fit]:
    """What a GHN answers to the request for a parameter: its size clipped to what can be decoded."""
    (out, inputs, height, width), fit = fit_of(kind, shape, config)
    if kind is DecodeKind.TENSOR:
        size = min(out, config.max_shape[0]), min(inputs, config.max_shape[1]), height, width
    elif kind is DecodeKind.HEAD_WEIGHT:
        size = min(out, config.num_classes), min(inputs, config.max_shape[1])
    else:
        size = (min(out, config.num_classes if kind is DecodeKind.HEAD_BIAS else max(config.max_shape[:2])),)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)), fit


def literal(decoded: Tensor, shape: tuple[int, ...]) -> Tensor:
    """W[o, i, ...] = s[o mod s0, i mod s1, ...], one element after another."""
    target = torch.empty(shape)
    if decoded.dim() == 1:
        for index in range(target.numel()):
            target.view(-1)[index] = decoded[index % len(decoded)]
        return target
    kernel = decoded.reshape(*decoded.shape[:2], *((1,) * (len(shape) - 4)), *decoded.shape[2:])
    for index in itertools.product(*map(range, shape)):
        place = [n % size for n, size in zip(index, kernel.shape, strict=False)]
        target[index] = kernel[tuple(place[: kernel.dim()])].reshape(-1)[0]
    return target


def activated(decoded: Tensor, kind: DecodeKind, shape: tuple[int, ...]) -> Tensor:
    if kind is DecodeKind.WEIGHT_1D:
        return 2 * torch.sigmoid(decoded / 2)
    if decoded.dim() == 1:
        return torch.tanh(decoded / 5)
    return decoded * fan_in_scale(shape)


def strided(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose elements lie in the opposite order in memory, with gaps."""
    return torch.zeros(*reversed(shape), 2, dtype=dtype)[..., 0].permute(*reversed(range(len(shape))))


KINDS = [
    *((DecodeKind.TENSOR, shape) for shape in TENSORS),
    *((DecodeKind.HEAD_WEIGHT, shape) for shape in [(10, 6), (3, 4), (25, 13), (12, 7, 1, 1), (10, 5, 1)]),
    *((kind, shape) for kind in (DecodeKind.WEIGHT_1D, DecodeKind.BIAS_1D) for shape in VECTORS),
    *((DecodeKind.HEAD_BIAS, shape) for shape in [(10,), (4,), (25,)]),
]


@pytest.mark.parametrize(('kind', 'shape'), KINDS, ids=lambda value: getattr(value, 'value', str(value)))
def test_a_parameter_repeats_what_was_decoded(kind, shape):
    decoded, fit = decoded_for(kind, shape)
    expected = literal(activated(decoded, kind, shape), shape)
    torch.testing.assert_close(fitted(decoded, fit, shape), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(('kind', 'shape'), KINDS, ids=lambda value: getattr(value, 'value', str(value)))
def test_a_parameter_is_written_without_a_temporary_of_its_size(kind, shape):
    decoded, fit = decoded_for(kind, shape)
    values = scaled(decoded, fit)
    before, expected = values.clone(), repeated(values, fit, shape)
    memory = torch.full((*shape, 2), torch.nan)
    for target in (torch.full(shape, torch.nan), strided(shape), torch.zeros(shape).double(), memory[..., 0]):
        write_repeated(target, values, fit)
        assert torch.equal(target, expected.to(target))
    assert bool(memory[..., 1].isnan().all())
    assert torch.equal(values, before)


def test_a_fitted_parameter_is_differentiable():
    decoded, fit = decoded_for(DecodeKind.TENSOR, (17, 13))
    decoded = decoded.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: fitted(values, fit, (17, 13)), decoded)


@pytest.mark.parametrize(
    ('shape', 'beta'),
    [
        ((8, 6), 2),
        ((8, 6, 3, 3), 2),
        ((8, 1), 2),  # a linear layer with one input is not depthwise
        ((8, 1, 3, 3), 1),  # depthwise
        ((8, 1, 5), 1),
        ((8, 6, 1, 7), 1),  # 1 x k
        ((8, 6, 7, 1), 2),  # but not k x 1
        ((1, 6, 10, 10), 2),
        ((2, 6, 14, 14), 2),
        ((8, 6, 2, 3, 3), 1),  # the published comparison of the third axis with the fourth
        *((shape, None) for shape in [(1, 6, 11, 11), (1, 197, 64), (1, 64, 11)]),  # like a positional embedding
    ],
)
def test_the_scale_keeps_the_variance_by_fan_in(shape, beta):
    expected = beta and pytest.approx(math.sqrt(beta / math.prod(shape[1:])))
    assert fan_in_scale(shape) == expected
    assert fit_of(DecodeKind.TENSOR, shape, CONFIG)[1].scale == fan_in_scale(shape)
    assert fit_of(DecodeKind.TENSOR, shape, PLAIN)[1].scale is None


@pytest.mark.parametrize('kind', [DecodeKind.WEIGHT_1D, DecodeKind.BIAS_1D, DecodeKind.HEAD_BIAS])
def test_vectors_are_bounded_or_left_alone_without_normalisation(kind):
    decoded = torch.linspace(-40, 40, 8)
    _, fit = fit_of(kind, (8,), CONFIG)
    values = fitted(decoded, fit, (8,))
    low, high = (0, 2) if kind is DecodeKind.WEIGHT_1D else (-1, 1)
    assert low <= values.min() <= values.max() <= high
    assert fitted(torch.zeros(8), fit, (8,))[0] == (low + high) / 2
    _, fit = fit_of(kind, (8,), PLAIN)
    assert torch.equal(fitted(decoded, fit, (8,)), decoded)


# -- positional embeddings


def position(tokens: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor, Fit]:
    """A positional embedding and what it was decoded from."""
    shape = (1, tokens, features)
    size, fit = fit_of(DecodeKind.TENSOR, shape, CONFIG, position=True)
    side = math.isqrt(tokens)
    assert size == (1, features, side, side)
    decoded = torch.randn(1, min(features, 6), side, side, generator=torch.Generator().manual_seed(1))
    return fitted(decoded, fit, shape, torch.Generator().manual_seed(seed)), decoded, fit


@pytest.mark.parametrize('features', [4, 13])
@pytest.mark.parametrize(('tokens', 'extra'), [(197, 1), (196, 0), (201, 5), (2, 1)])
def test_tokens_read_the_map_in_order_and_those_without_a_place_come_first(tokens, extra, features):
    target, decoded, _ = position(tokens, features)
    side = math.isqrt(tokens)
    scale = fan_in_scale((1, tokens, features)) or 1.0
    for token in range(side * side):
        expected = literal(decoded[0, :, token // side, token % side], (features,)) * scale
        torch.testing.assert_close(target[0, extra + token], expected, rtol=1e-6, atol=0)
    other = position(tokens, features, seed=1)[0]
    assert torch.equal(target[:, extra:], other[:, extra:])
    assert not torch.eq(target[:, :extra], other[:, :extra]).any(), 'only tokens without a place depend on the seed'
    assert torch.equal(target[:, :extra, 6:12], target[:, :extra, : min(6, max(0, features - 6))])


@pytest.mark.parametrize(('tokens', 'random'), [(196, 0), (197, 1), (204, 8), (205, 0), (224, 0), (225, 0), (1, 0)])
def test_many_tokens_beyond_a_square_are_no_class_tokens(tokens, random):
    assert random_tokens(tokens) == random


@pytest.mark.parametrize('blocks', [(3, 3, 2, 2), (1, 2, 6, 3)])
def test_positions_that_are_stored_by_blocks_are_those_of_one_map(blocks):
    rows, columns, height, width = blocks
    shape = (1, rows * columns, height * width, 13)
    _, fit = fit_of(DecodeKind.TENSOR, shape, CONFIG, position=True, blocks=blocks)
    decoded = torch.randn(1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    target = fitted(decoded, fit, shape)
    for y in range(6):
        for x in range(6):
            block, place = y // height * columns + x // width, y % height * width + x % width
            scale = fit.scale or 1.0
            torch.testing.assert_close(target[0, block, place, :6], decoded[0, :, y, x] * scale)
    assert fit.describe(shape).endswith('in {}x{} blocks of {}x{}'.format(*blocks))


def test_the_scale_is_that_of_the_kernels_that_a_parameter_holds():
    shape, kernel = (4, 8 * 6 * 9), (8, 6, 3, 3)
    _, fit = fit_of(DecodeKind.TENSOR, shape, CONFIG, kernel=kernel)
    assert fit.scale == fan_in_scale(kernel) != fan_in_scale(shape)
    assert fit.describe(shape) == '4x6 channels repeated to 4x432, times 0.192 for kernels of 8x6x3x3'


# -- words


@pytest.mark.parametrize(
    ('kind', 'shape', 'words'),
    [
        (DecodeKind.TENSOR, (8, 6, 3, 3), '8x6 channels, times 0.192'),
        (DecodeKind.TENSOR, (20, 6), '8x6 channels repeated to 20x6, times 0.577'),
        (DecodeKind.WEIGHT_1D, (8,), '2 sigmoid(p/2) of 8 values'),
        (DecodeKind.BIAS_1D, (20,), 'tanh(p/5) of 8 values repeated to 20'),
    ],
)
def test_a_fit_can_be_read(kind, shape, words):
    assert fit_of(kind, shape, CONFIG)[1].describe(shape) == words
    position = fit_of(DecodeKind.TENSOR, (1, 17, 13), CONFIG, position=True)[1]
    assert position.describe((1, 17, 13)) == '6 features at each position, 1 random tokens in front'
