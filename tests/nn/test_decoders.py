"""Slicing the weights first gives what decoding the whole map and cropping it gives."""

from __future__ import annotations

import literal
import pytest
import torch
from variants import GHN3, VARIANTS

from timm_ghn.nn import DecodeKind, DecodeRequest

KERNELS = [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (11, 11), (14, 14), (16, 16), (1, 7), (7, 1), (3, 1)]
ABOVE_THE_MAP = [(12, 12), (20, 20), (31, 17), (1, 31), (18, 5)]
CHANNELS = [(1, 1), (5, 3), (6, 17), (24, 20), (70, 90), (90, 2)]
SIZES = [(*channels, *kernel) for kernel in KERNELS + ABOVE_THE_MAP for channels in CHANNELS[:4:3]]
SIZES += [(*channels, *kernel) for kernel in KERNELS[:3] for channels in CHANNELS]


def all_requests(nodes: int) -> list[DecodeRequest]:
    """Every kind, on all nodes by turns, in an order that no group shares."""
    requests = [DecodeRequest(DecodeKind.TENSOR, index % nodes, size) for index, size in enumerate(SIZES)]
    for index, n in enumerate((1, 5, 7, 24, 30, 1000)):
        node = index % nodes
        requests += [DecodeRequest(DecodeKind.HEAD_WEIGHT, node, (n, width, 1, 1)) for width in (3, 18, 24, 512)]
        kinds = (DecodeKind.BIAS_1D, DecodeKind.HEAD_BIAS, DecodeKind.WEIGHT_1D)
        requests += [DecodeRequest(kind, node, (n, 1, 1, 1)) for kind in kinds]
    return requests[::2] + requests[1::2]


@pytest.fixture
def embeddings(config) -> torch.Tensor:
    return torch.randn(5, config.hid, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_sliced_decoding_equals_the_cropped_full_map(config, make_ghn, embeddings):
    ghn, requests = make_ghn(config), all_requests(5)
    weights = dict(ghn.named_parameters())
    with torch.no_grad():
        decoded = dict(ghn.decode(embeddings, requests))
        assert sorted(decoded) == list(range(len(requests)))
        for index, request in enumerate(requests):
            expected = literal.decode(weights, config, embeddings[request.node], request)
            assert decoded[index].shape == expected.shape, request
            assert torch.allclose(decoded[index], expected, rtol=0, atol=1e-9), request


@pytest.mark.parametrize('chunk_elements', [1, 20_000])
def test_the_chunk_size_changes_no_value_and_bounds_the_work(config, chunk_elements, make_ghn, embeddings):
    ghn, requests = make_ghn(config), all_requests(5)
    with torch.no_grad():
        whole = dict(ghn.decode(embeddings, requests))
        order = []
        for index, tensor in ghn.decode(embeddings, requests, chunk_elements=chunk_elements):
            order.append(index)
            assert torch.allclose(tensor, whole[index], rtol=0, atol=1e-12)
            if chunk_elements == 1:  # one node at a time
                storage = tensor.untyped_storage().nbytes() // 8
                # Sliced after a class predictor or the widest request of a group.
                assert storage <= max(2 * max(config.max_shape[:2]), config.num_classes, tensor.numel())
    assert sorted(order) == list(range(len(requests)))


def test_a_request_that_makes_no_sense_is_refused(make_ghn):
    with pytest.raises(ValueError, match='four positive'):
        DecodeRequest(DecodeKind.TENSOR, 0, (3, 0, 1, 1))
    with pytest.raises(ValueError, match='row of an embedding'):
        DecodeRequest(DecodeKind.TENSOR, -1, (3, 1, 1, 1))
    request = DecodeRequest(DecodeKind.BIAS_1D, 4, (3, 1, 1, 1))
    with pytest.raises(ValueError, match=r'rows 0\.\.3 .*got row 4'):
        list(make_ghn(VARIANTS['ghn1']).decode(torch.randn(4, GHN3.hid), [request]))
