"""Tensors in other shapes."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv

from timm_ghn.transfer.layers import Space
from timm_ghn.transfer.resize import _with_input_channels, _with_kernel, channel_map, resize_positions, spread


@pytest.mark.parametrize(('wanted', 'given'), [(4, 8), (3, 8), (8, 8), (12, 8), (16, 8)])
def test_channels_are_evenly_spaced_and_copied_equally_often(wanted, given):
    index = spread(wanted, given)
    assert (index.diff() >= 0).all()
    counts = torch.bincount(index, minlength=given)
    assert counts.max() - counts.min() <= 1


def test_heads_are_selected_whole():
    index = spread(8, 16, blocks=(2, 4))  # 2 of 4 heads of 4 channels
    assert index.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert spread(8, 4, blocks=(2, 1)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_parts_and_concatenated_spaces_are_selected_one_by_one():
    assert channel_map((Space(2),), (Space(4),), 6, 12).tolist() == [0, 2, 4, 6, 8, 10]
    joined = channel_map((Space(2), Space(1)), (Space(4), Space(2)), 3, 6)
    assert joined.tolist() == [0, 2, 4]
    flat = channel_map((Space(2),), (Space(4),), 4, 8, flattened=True)
    assert flat.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_stems_for_other_channels_are_those_of_timm(channels):
    weight = torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(_with_input_channels(weight, channels), adapt_input_conv(channels, weight))
    back = _with_input_channels(_with_input_channels(weight, 1), 3)
    torch.testing.assert_close(back.sum(1), weight.sum(1))


def test_kernels_keep_their_response_to_a_constant():
    weight = torch.rand(4, 3, 5, 5)
    for patches, preserve, size in ((False, False, 3), (False, False, 7), (False, True, 7)):
        resized = _with_kernel(weight, (size, size), patches=patches, preserve=preserve)
        # Interpolation is not exact at the borders.
        torch.testing.assert_close(resized.sum((2, 3)), weight.sum((2, 3)), rtol=0.15, atol=0)


def test_positions_are_interpolated_and_tokens_in_front_taken_over():
    table = torch.randn(1, 1 + 16, 8)
    wider = resize_positions(table, (1, 1 + 36, 8))
    torch.testing.assert_close(wider, resample_abs_pos_embed(table, [6, 6], [4, 4], 1))
    without = resize_positions(table, (1, 36, 4))
    torch.testing.assert_close(without, wider[:, 1:, ::2])
    square = torch.randn(1, 8, 4, 4)
    assert resize_positions(square, (1, 8, 6, 6)).shape == (1, 8, 6, 6)
    assert resize_positions(square, (1, 3, 5, 8)).shape == (1, 3, 5, 8)
    assert resize_positions(table, (1, 25 + 9, 8)) is None  # no map, and too many for tokens
    assert resize_positions(torch.randn(3), (4,)) is None
