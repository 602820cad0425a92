import dataclasses
import math

import pytest
import torch

from timm_ghn import GHN, GHNConfig
from timm_ghn.graph.channels import ROLES, ChannelLayout
from timm_ghn.nn.requests import DecodeKind, DecodeRequest

CONFIG = GHNConfig(
    hid=16, max_shape=(96, 96, 7, 7), num_classes=10, layers=1, heads=4, decoder='templates', smooth=True, templates=4,
    codes=8, rules='operators',
)  # fmt: skip


@pytest.fixture
def ghn():
    torch.manual_seed(0)
    return GHN(CONFIG)


def decode(ghn, embeddings, requests):
    return dict(ghn.decode(embeddings, requests))


@pytest.mark.parametrize(
    ('kind', 'size', 'shape'),
    [
        (DecodeKind.TENSOR, (8, 4, 3, 3), (8, 4, 3, 3)),
        (DecodeKind.TENSOR, (96, 1, 7, 7), (96, 1, 7, 7)),
        (DecodeKind.TENSOR, (5, 3, 16, 16), (5, 3, 16, 16)),
        (DecodeKind.TENSOR, (200, 100, 1, 1), (96, 96, 1, 1)),
        (DecodeKind.HEAD_WEIGHT, (10, 64, 1, 1), (10, 64)),
        (DecodeKind.WEIGHT_1D, (50, 1, 1, 1), (50,)),
        (DecodeKind.BIAS_1D, (50, 1, 1, 1), (50,)),
        (DecodeKind.HEAD_BIAS, (10, 1, 1, 1), (10,)),
    ],
)
def test_shapes_are_those_that_are_asked_for(ghn, kind, size, shape):
    decoded = decode(ghn, torch.randn(3, 16), [DecodeRequest(kind, 1, size)])
    assert decoded[0].shape == shape
    assert decoded[0].isfinite().all()


def test_a_weight_has_the_predicted_scale_and_no_copies(ghn):
    with torch.no_grad():
        ghn.decoder.gain.bias[0] = 10 * math.log(2)
    weight = decode(ghn, torch.zeros(1, 16), [DecodeRequest(DecodeKind.TENSOR, 0, (96, 96, 3, 3))])[0].detach()
    # tanh bends the gain on its way to its limit of 10
    assert 1.6 < float(weight.square().mean().sqrt()) < 2
    rows = torch.nn.functional.normalize(weight.flatten(1), dim=1)
    assert float((rows @ rows.t() - torch.eye(96)).abs().max()) < 0.999


def test_what_is_decoded_together_is_what_is_decoded_alone(ghn):
    embeddings = torch.randn(4, 16)
    requests = [DecodeRequest(DecodeKind.TENSOR, node, (12 + node, 9, 3, 3)) for node in range(4)] + [
        DecodeRequest(DecodeKind.WEIGHT_1D, 2, (20, 1, 1, 1)),
        DecodeRequest(DecodeKind.TENSOR, 3, (24, 8, 1, 1), ChannelLayout(rows=3)),
    ]
    together = decode(ghn, embeddings, requests)
    for index, request in enumerate(requests):
        alone = dataclasses.replace(request, node=0)
        torch.testing.assert_close(
            decode(ghn, embeddings[request.node : request.node + 1], [alone])[0], together[index]
        )


SIZES = {'depthwise': (10, 1, 5, 5), 'stem': (10, 3, 7, 7), 'conv': (10, 10, 3, 3), 'position': (1, 10, 8, 8)}


def test_every_parameter_of_the_decoder_learns(ghn):
    embeddings = torch.randn(2, 16)
    requests = [
        DecodeRequest(
            DecodeKind.HEAD_WEIGHT if role == 'head' else DecodeKind.TENSOR, 0, SIZES.get(role, (10, 10, 1, 1)),
            ChannelLayout(role),
        )
        for role in ROLES
    ]  # fmt: skip
    requests += [DecodeRequest(kind, 1, (10, 1, 1, 1)) for kind in list(DecodeKind)[2:]]
    loss = sum((tensor * torch.randn_like(tensor)).sum() for tensor in decode(ghn, embeddings, requests).values())
    loss.backward()
    for name, parameter in ghn.named_parameters():
        if name.startswith('decoder'):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def same_up_to_scale(one, other):
    torch.testing.assert_close(one / one.norm(), other / other.norm())


def weight(ghn, size, **layout):
    request = DecodeRequest(DecodeKind.TENSOR, 0, size, ChannelLayout(**layout))
    return decode(ghn, torch.ones(1, 16), [request])[0].detach()


def test_a_channel_has_the_same_code_in_every_width(ghn):
    narrow, wide = weight(ghn, (8, 10, 3, 3)), weight(ghn, (40, 30, 3, 3))
    same_up_to_scale(wide[:8, :10], narrow)


def test_queries_keys_and_values_have_the_same_codes_and_weights_of_their_own(ghn):
    fused, alone = weight(ghn, (72, 24, 1, 1), rows=3), weight(ghn, (24, 24, 1, 1))
    query, key, value = fused.chunk(3)
    same_up_to_scale(query, alone)
    for part in (key, value):
        assert abs(float(torch.cosine_similarity(part.flatten(), query.flatten(), dim=0))) < 0.9
        # All parts have the channel space of the codes: the rank is that of a layer of this width.
        assert torch.linalg.matrix_rank(torch.cat((part, query)).flatten(1)) == CONFIG.codes


def test_merged_positions_are_columns_of_one_code_each(ghn):
    merged, alone = weight(ghn, (20, 32, 1, 1), columns=4), weight(ghn, (20, 8, 1, 1))
    same_up_to_scale(merged[:, :8], alone)
    assert merged.shape == (20, 32, 1, 1)


def test_a_grouped_convolution_reads_the_channels_of_its_group(ghn):
    grouped, dense = weight(ghn, (12, 4, 3, 3), role='conv', groups=3), weight(ghn, (12, 12, 3, 3), role='conv')
    same_up_to_scale(grouped, torch.cat([dense[4 * g : 4 * g + 4, 4 * g : 4 * g + 4] for g in range(3)]))


@pytest.mark.parametrize('size', [(6, 3, 3, 3), (3, 20, 1, 1), (4, 2, 5, 7)])
def test_the_gradient_of_a_weight_is_that_of_its_formula(size):
    torch.manual_seed(0)
    ghn = GHN(CONFIG).double()
    embedding = torch.randn(1, 16, dtype=torch.float64)
    names = ('banks.conv.templates', 'channels.weight', 'gain.bias', 'banks.conv.positions.weight')
    names = tuple(f'decoder.{name}' for name in names)
    parameters = dict(ghn.named_parameters())

    layout = ChannelLayout('conv', groups=3 if size[0] == 6 else 1)

    def loss():
        decoded = decode(ghn, embedding, [DecodeRequest(DecodeKind.TENSOR, 0, size, layout)])[0]
        return (decoded * torch.linspace(-1, 2, decoded.numel(), dtype=torch.float64).view_as(decoded)).sum()

    gradients = torch.autograd.grad(loss(), [parameters[name] for name in names])
    generator = torch.Generator().manual_seed(1)
    for name, gradient in zip(names, gradients, strict=True):
        parameter = parameters[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(loss()))
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
