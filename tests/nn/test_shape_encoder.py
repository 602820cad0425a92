"""Sizes are looked up in the vocabularies of the published GHNs."""

from __future__ import annotations

import literal
import pytest
import torch

from timm_ghn.graph.graph import NO_SHAPE
from timm_ghn.nn import GHNConfig
from timm_ghn.nn.shape_encoder import ShapeEncoder, _channel_rows, _spatial_rows


@pytest.mark.parametrize('num_classes', [5, 10, 1000, 10450])
def test_every_channel_count_takes_the_row_of_the_literal_rule(num_classes: int):
    rows = _channel_rows(num_classes)
    sizes = [*range(0, 200), *range(200, len(rows), 7), *range(len(rows) - 20, len(rows))]
    assert [int(rows[size]) for size in sizes] == [literal.channel_row(size, num_classes) for size in sizes]


@pytest.mark.parametrize('max_size', [7, 16])
def test_every_kernel_size_takes_the_row_of_the_literal_rule(max_size: int):
    rows = _spatial_rows(max_size)
    assert rows.tolist() == [literal.spatial_row(size, max_size) for size in range(len(rows))]


def test_sizes_above_the_vocabulary_take_its_last_row_and_no_shape_takes_the_dummy():
    encoder = ShapeEncoder(GHNConfig(hid=8, max_shape=(8, 8, 16, 16), num_classes=10))
    largest, larger, absent = encoder(torch.tensor([(8192, 8192, 16, 16), (10**6, 8193, 99, 17), NO_SHAPE]))
    assert torch.equal(largest, larger)
    dummies = (encoder.embed_channel.weight[-1], encoder.embed_spatial.weight[-1])
    assert torch.equal(absent, torch.cat((dummies[0], dummies[0], dummies[1], dummies[1])))


@pytest.mark.parametrize(('old', 'new'), [(10, 200), (64, 10), (1000, 3)])
def test_an_encoder_takes_over_the_embeddings_of_one_for_other_classes(old, new):
    first, second = (
        ShapeEncoder(GHNConfig(hid=16, max_shape=(16, 16, 7, 7), num_classes=classes)) for classes in (old, new)
    )
    second.take_(first)
    others = torch.tensor([[32, 16, 3, 3], [256, 1, 7, 7], [2048, 512, 1, 1], [-1, -1, -1, -1]])
    assert torch.equal(first(others), second(others))
    assert torch.equal(first(torch.tensor([[old, 512, 1, 1]])), second(torch.tensor([[new, 512, 1, 1]])))
