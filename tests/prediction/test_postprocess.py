"""Noise and orthogonalisation are those of the paper, and leave all but the chosen layers alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import timm
import torch
import torchvision
from networks import NETWORKS, SIZE, Case, plain
from tiny import TINY, make_ghn, snapshot
from torch import Tensor, nn

import timm_ghn
from timm_ghn import ConfigError, PostProcess, PredictionError, UnsupportedModelError, ghn_init, plan_parameters, trace
from timm_ghn.prediction.postprocess import (
    NAMED,
    RECIPES,
    correlation_spread,
    layers,
    orthogonalised,
    postprocess_,
    processed,
    processed_layers,
)

SHAPES = (
    (8, 8), (16, 4), (4, 16), (8, 4, 3), (6, 5, 3, 3), (32, 1, 3, 3), (5, 1, 7, 7), (2, 3, 2, 2, 2), (2, 3, 1, 2, 1, 2),
    (1, 9), (100, 30), (160, 140),
)  # fmt: skip
EVERYTHING = PostProcess(layer=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def published(weight: Tensor, beta: float, max_size: int, orth: bool, noise: Tensor) -> Tensor:
    """Section 8 of the specification, literally: the correlation matrix is formed."""
    weight = weight.clone()
    matrix = weight.reshape(len(weight), -1)
    wide = matrix.shape[0] < matrix.shape[1]
    if beta > 0:
        spread = torch.corrcoef(matrix.t() if wide else matrix).std()
        weight[max_size:, max_size:] += beta * spread * noise
    if orth:
        matrix = weight.reshape(len(weight), -1)
        q, r = torch.linalg.qr(matrix.t() if wide else matrix)
        q = q * r.diagonal().sign()
        weight = (q.t() if wide else q).reshape(weight.shape)
    return weight


# -- one weight


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('orth', 'beta', 'max_size'), [(True, 0, 0), (False, 0.3, 0), (True, 0.3, 0), (True, 0.3, 2)])
def test_a_weight_is_processed_as_the_paper_does(shape, dtype, orth, beta, max_size):
    weight = torch.randn(shape, generator=seeded(), dtype=dtype)
    noise = torch.randn(weight[max_size:, max_size:].shape, generator=seeded(1), dtype=dtype)
    options = PostProcess(orth=orth, beta=beta, max_size=max_size)
    found = processed(weight, options, seeded(1))
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    single_column = math.prod(shape) == max(shape)  # the paper divides by 0: no noise
    expected = published(weight, 0 if single_column else beta, max_size, orth, noise)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('shape', SHAPES)
def test_singular_values_become_1_and_keep_keeps_the_norm(shape):
    weight = 7 * torch.randn(shape, generator=seeded(), dtype=torch.float64)
    unit = processed(weight, PostProcess(), seeded()).flatten(1)
    kept = processed(weight, PostProcess(scale='keep'), seeded()).flatten(1)
    torch.testing.assert_close(torch.linalg.svdvals(unit), torch.ones(min(unit.shape), dtype=torch.float64))
    torch.testing.assert_close(kept.norm(), weight.norm())
    torch.testing.assert_close(kept / kept.norm(), unit / unit.norm())


@pytest.mark.parametrize('shape', [shape for shape in SHAPES if math.prod(shape) != max(shape)])
@pytest.mark.parametrize('offset', [0.0, 1.0, 30.0])
def test_the_spread_is_that_of_all_correlations(shape, offset):
    weight = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    weight += offset * torch.randn(shape[1:], generator=seeded(1), dtype=torch.float64)
    matrix = weight.flatten(1)
    matrix = matrix.t() if matrix.shape[0] < matrix.shape[1] else matrix
    expected = torch.corrcoef(matrix).std().item()
    assert correlation_spread(weight) == pytest.approx(expected, rel=1e-9)
    assert correlation_spread(weight.float()) == pytest.approx(expected, rel=2e-3)


def test_rows_without_variance_count_as_uncorrelated_with_everything():
    weight = torch.randn(12, 5, generator=seeded())
    weight[3], weight[7] = 0.1, 0.0
    correlations = torch.corrcoef(weight.double()).nan_to_num(0)
    correlations[[3, 7]] = correlations[:, [3, 7]] = 0
    assert correlation_spread(weight) == pytest.approx(correlations.std().item(), rel=1e-5)
    assert correlation_spread(torch.full((4, 3), 0.1)) == 0
    assert correlation_spread(torch.randn(9, 1, 1, 1)) == 0, 'a single column'
    assert correlation_spread(torch.randn(1, 1)) == 0


def test_a_dependent_column_is_finite_and_a_zero_weight_stays_zero():
    repeated = torch.randn(4, 3, 3, 3, generator=seeded()).repeat(8, 1, 1, 1)
    found = orthogonalised(repeated).flatten(1)
    assert bool(found.isfinite().all())
    assert torch.equal(orthogonalised(torch.zeros(6, 4)), torch.zeros(6, 4))
    weight = torch.randn(6, 4, generator=seeded())
    weight[:, 2] = 0
    found = orthogonalised(weight)
    torch.testing.assert_close(found.t() @ found, torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])))


def test_a_result_that_is_not_finite_is_refused_and_the_model_stays():
    model = plain()
    model.body[0].half()
    before = snapshot(model)
    with pytest.raises(PredictionError, match=r"post-processed values of 'body\.0\.weight' are not finite"):
        postprocess_(model, PostProcess(orth=False, beta=1e8), input_size=SIZE)
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize('shape', SHAPES)
def test_the_device_does_not_matter(shape):
    weight = torch.randn(shape, generator=seeded())
    for options in (PostProcess(orth=False, beta=0.3), PostProcess(beta=0.3), PostProcess(beta=0, scale='keep')):
        found = processed(weight.cuda(), options, seeded(1))
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), processed(weight, options, seeded(1)), rtol=1e-4, atol=1e-4)


# -- which layers


def plan_of(model: nn.Module) -> timm_ghn.ParameterPlan:
    size = SIZE if isinstance(model, nn.Sequential) else None
    return plan_parameters(trace(model, input_size=size), TINY['gated'])


@pytest.mark.parametrize('source', ['timm', 'torchvision'])
@pytest.mark.parametrize(
    ('name', 'count', 'first'),
    [('resnet50', 54, {'timm': 'layer3.3.conv3.weight', 'torchvision': 'layer3.3.conv3.weight'}),
     ('convnext_base', 113, {'timm': 'stages.2.blocks.24.conv_dw.weight',
                             'torchvision': 'features.5.24.block.0.weight'})],
)  # fmt: skip
def test_the_numbers_of_the_paper_mean_its_layers(source, name, count, first):
    with torch.device('meta'):
        model = timm.create_model(name) if source == 'timm' else torchvision.models.get_model(name, weights=None)
    plan = plan_of(model)
    found = processed_layers(plan, RECIPES[name])
    assert len(layers(plan)) == count
    assert found[0].name == first[source]
    assert len(found) == count - RECIPES[name].layer, 'the classifier is left out'
    assert RECIPES[name].beta == 3e-5


@pytest.mark.parametrize(
    ('layer', 'first'),
    [(0, 1), (1, 1), (2, 2), (37, 37), (54, 54), (999, 999), (0.0, 1), (0.5, 28), (0.68, 37), (0.7, 38)],
)
def test_a_share_of_the_depth_stays(layer, first):
    assert PostProcess(layer=layer).first(54) == first
    assert PostProcess(layer=0.29).first(100) == 30, 'though 0.29 * 100 is less than 29'


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
def test_layers_do_not_depend_on_the_ghn(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    graph = trace(model)
    plans = [plan_parameters(graph, config, head=head) for config in TINY.values() for head in ('keep', 'predict')]
    found = [[row.name for row in layers(plan)] for plan in plans]
    assert all(names == found[0] for names in found)
    assert found[0] == [row.name for row in layers(plan_of(model))]
    assert not [name for name in found[0] if not name.endswith('weight')], 'no tokens, no tables of positions'


# -- a model


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'tied', 'reparametrised', 'direct', 'mixed dtypes'])
def test_all_but_the_chosen_layers_stays_bit_for_bit(name):
    case = NETWORKS[name]() if name in NETWORKS else Case(timm.create_model(name), {})
    before = snapshot(case.model)
    state = [(id(p), p.requires_grad, p.dtype, p.stride()) for p in case.model.parameters()]
    modes = [module.training for module in case.model.modules()]
    assert postprocess_(case.model, EVERYTHING, **case.options) is case.model
    after = snapshot(case.model)
    plan = plan_parameters(trace(case.model, **case.options), TINY['gated'])
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    expected = {row.name for row in processed_layers(plan, EVERYTHING)}
    assert changed == expected if name not in NETWORKS else changed <= expected
    assert not [name for name in changed if name in plan.graph.classifier or len(after[name].shape) < 2]
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert state == [(id(p), p.requires_grad, p.dtype, p.stride()) for p in case.model.parameters()]
    assert modes == [module.training for module in case.model.modules()]


def test_a_weight_that_is_not_finite_is_named_before_any_is_written():
    model = plain()
    with torch.no_grad():
        model.body[3].weight[0, 0, 0, 0] = math.inf
    before = snapshot(model)
    with pytest.raises(PredictionError, match=r"'body\.3\.weight' are not finite"):
        postprocess_(model, EVERYTHING, input_size=SIZE)
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0, equal_nan=True)


def test_a_weight_that_cannot_be_written_is_refused_before_any_is():
    model = plain()
    model.body[3].weight = nn.Parameter(torch.zeros(1, 4, 3, 3).expand(8, 4, 3, 3))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"'body\.3\.weight' share their memory"):
        postprocess_(model, EVERYTHING, input_size=SIZE)
    assert torch.equal(model.body[0].weight, before['body.0.weight'])
    with pytest.raises(UnsupportedModelError, match='meta device'):
        postprocess_(plain().to('meta'), EVERYTHING, input_size=SIZE)


def test_the_plan_of_another_model_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'conv1\.0\.weight'.*\(got none.*that of another model"):
        postprocess_(plain(), EVERYTHING, plan=plan_of(timm.create_model('test_resnet')))


# -- initialising


@pytest.mark.parametrize('options', ['orth', 'noise', PostProcess(layer=2, scale='keep', seed=3)])
def test_initialising_is_predicting_and_post_processing_whatever_the_global_generators(options):
    ghn = make_ghn(TINY['graphormer'])
    model, other = timm.create_model('test_vit'), timm.create_model('test_vit')
    other.load_state_dict(model.state_dict())
    ghn_init(model, ghn, postprocess=options)
    other.load_state_dict(timm_ghn.predict(other, ghn).state_dict, strict=False)
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    torch.rand(1)
    state = torch.get_rng_state()
    postprocess_(other, options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize('recommended', ['orth', 'noise', 'none'])
def test_the_ghn_recommends_what_is_done_by_default(recommended):
    ghn = make_ghn(dataclasses.replace(TINY['graphormer'], postprocess=recommended))
    model, other = timm.create_model('test_resnet'), timm.create_model('test_resnet')
    ghn_init(model, ghn)
    ghn_init(other, ghn, postprocess=recommended)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    ghn_init(other, ghn, postprocess=None)
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert same is (recommended == 'none')


@pytest.mark.parametrize(
    'options',
    [
        {'orth': 1}, {'beta': -1e-5}, {'beta': math.nan}, {'beta': math.inf}, {'beta': '3e-5'}, {'beta': True},
        {'layer': -1}, {'layer': 1.0}, {'layer': 1.5}, {'layer': -0.1}, {'layer': math.nan}, {'layer': True},
        {'layer': '0.7'},
        {'max_size': -1}, {'max_size': 0.5}, {'seed': 0.5}, {'seed': 2**64}, {'scale': 'none'},
    ],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(ConfigError, match=rf'expected {next(iter(options))} .*\(got '):
        PostProcess(**options)


def test_options_by_name_take_the_seed_of_the_call():
    assert PostProcess.of('noise', seed=3) == dataclasses.replace(NAMED['noise'], seed=3)
    assert PostProcess.of(PostProcess(seed=1), seed=3).seed == 1
    with pytest.raises(ConfigError, match=r"'noise', 'none', None or a PostProcess \(got 'orthogonal'\)"):
        PostProcess.of('orthogonal')
