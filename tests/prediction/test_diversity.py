"""What the measures say of weights whose diversity is known."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from tiny import TINY, make_ghn
from torch import Tensor

from timm_ghn import PostProcess, ghn_init, predict
from timm_ghn.prediction.diversity import KINDS, compare, measure
from timm_ghn.prediction.postprocess import layers


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('shape', [(12, 30), (30, 12), (8, 2, 3, 3)])
def test_the_measures_are_those_of_their_definitions(shape):
    weight = randn(*shape)
    matrix = weight.flatten(1).double()
    found = measure(weight)
    singular = torch.linalg.svdvals(matrix)
    spectrum = torch.linalg.eigvalsh(torch.corrcoef(matrix)).flip(0)[: min(matrix.shape)]
    assert found.channels == shape[0]
    assert found.stable_rank == pytest.approx((singular.square().sum() / singular[0] ** 2).item(), rel=1e-4)
    assert found.relative_rank == pytest.approx(found.stable_rank / min(matrix.shape))
    torch.testing.assert_close(torch.tensor(found.spectrum, dtype=torch.float64), spectrum, rtol=1e-4, atol=1e-5)
    assert sum(found.spectrum) == pytest.approx(shape[0], rel=1e-4)
    assert found.effective_rank == pytest.approx((spectrum.sum() ** 2 / spectrum.square().sum()).item(), rel=1e-4)


def test_duplicates_are_channels_of_one_direction():
    repeated = torch.cat([(1 + i) * randn(10, 40) for i in range(5)])
    assert measure(repeated).duplicates == pytest.approx(1 - 1 / 5)
    opposite = torch.cat((randn(4, 9), -randn(4, 9), torch.zeros(3, 9)))
    assert measure(opposite).duplicates == pytest.approx(2 / 11), 'zeros have one direction'
    weight = randn(1500, 60)
    weight[1400] = weight[900]
    weight[1401] = weight[1400]
    assert measure(weight).duplicates == pytest.approx(2 / 1500)


@pytest.mark.parametrize(('dtype', 'scale'), [(torch.bfloat16, 1.0), (torch.float32, 1e-30), (torch.float32, 1e30)])
def test_the_scale_and_the_dtype_do_not_matter(dtype, scale):
    weight = (randn(7, 11).double() * scale).to(dtype)
    expected = measure(weight.double() / scale)
    found = measure(weight)
    for key, value in expected.to_dict().items():
        assert found.to_dict()[key] == pytest.approx(value, rel=1e-3)


def test_weights_without_diversity_have_a_measure_too():
    zeros, constant, single = measure(torch.zeros(4, 3)), measure(torch.ones(4, 3)), measure(randn(5, 1))
    assert zeros.to_dict() == {'duplicates': 0.75, 'stable_rank': 0, 'relative_rank': 0, 'effective_rank': 0}
    assert constant.to_dict() == pytest.approx(
        {'duplicates': 0.75, 'stable_rank': 1, 'relative_rank': 1 / 3, 'effective_rank': 0}
    )
    assert single.effective_rank == 0


@pytest.mark.parametrize('options', [PostProcess(layer=3), None])
def test_a_comparison_measures_what_initialising_gives(options):
    ghn = make_ghn(TINY['graphormer'])
    model = timm.create_model('test_vit')
    prediction = predict(model, ghn)
    found = list(compare(prediction.state_dict, dict(model.named_parameters()), prediction.plan, options))
    random = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    processed = dict(ghn_init(model, ghn, postprocess=options).named_parameters())
    assert [comparison.number for comparison in found] == list(range(1, len(layers(prediction.plan)) + 1))
    for kind, weights in zip(KINDS, (prediction.state_dict, processed, random), strict=True):
        assert [c.weights[kind] for c in found] == [measure(weights[c.name]) for c in found]
    for comparison in found:
        assert json.loads(json.dumps(comparison.to_dict())) == comparison.to_dict()
        assert set(KINDS) <= comparison.to_dict().keys()


def test_a_classifier_that_is_kept_is_left_out():
    model = timm.create_model('test_vit', num_classes=7)
    prediction = predict(model, make_ghn(TINY['gated']))
    found = list(compare(prediction.state_dict, dict(model.named_parameters()), prediction.plan, None))
    assert len(found) == len(layers(prediction.plan)) - 1
