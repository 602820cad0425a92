"""Laws of every family: it can be traced, predicted for and run, within its budget and without noise."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from timm_ghn import GHNConfig, plan_parameters, trace
from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.cost import Limits, cost_of
from timm_ghn.architectures.draws import Draws
from timm_ghn.architectures.families import FAMILIES, HELD_OUT, TRAIN_FAMILIES
from timm_ghn.architectures.samplers import TimmSampler

CONFIG = GHNConfig(hid=16, max_shape=(16, 16, 7, 7), num_classes=10, layers=2, heads=4)

#: What may keep its own initialisation; a GHN has no word for any of it.
KEPT = {'class or register token', 'layer scale or gain', 'relative position table'}

#: What the first draw of each family is, whatever the platform. A change here changes what a seed means.
FIRST = {
    'resnet_basic': ['878f95', '4d4e98', '86357c'],
    'resnet_bottleneck': ['b05bd8', '820537', 'ef09fc'],
    'resnetv2': ['a82fd4', 'c3abdf', '0ee4fc'],
    'regnet': ['d2d057', '9037d5', 'f85284'],
    'nfnet': ['2a5af1', '05b5ad', 'a4e837'],
    'vgg': ['00734e', '54637a', '2d0609'],
    'densenet': ['a7894c', 'cd8fbb', '636e49'],
    'mobilenet': ['df2a2a', 'f914a0', 'c144ae'],
    'efficientnet': ['6da36b', 'd29cb2', '937038'],
    'convnext': ['fa4391', '196768', '7b87c8'],
    'vit': ['515826', 'c2ed2a', '60db4e'],
    'vit_pooled': ['42c91c', '5b5943', '1f1116'],
    'swin': ['01424b', '9db04b', 'ea7b18'],
    'mixer': ['079f67', '886c2b', '48c0d4'],
    'poolformer': ['7cefbc', 'e9646f', '94948d'],
    'caformer': ['f0e5e6', '9238ed', 'd55cdf'],
}


def members(family: str, count: int, *, seed: int = 0, image_size: int = 32) -> Iterator[Architecture]:
    sampler = TimmSampler(families=(family,), image_size=image_size)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield sampler.sample(rng)


def check(architecture: Architecture, limits: Limits) -> None:
    """All laws for one architecture."""
    empty = architecture.build()
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert limits.admit(cost_of(empty, architecture.input_size))

    graph = trace(empty, input_size=architecture.input_size, rules='operators')
    plan = plan_parameters(graph, CONFIG)
    assert {row.reason for row in plan.kept} <= KEPT
    assert graph.num_classes == architecture.num_classes
    assert graph.class_weights

    model = architecture.build('cpu')
    assert {name: p.shape for name, p in model.named_parameters()} == {row.name: row.shape for row in plan}
    model.requires_grad_(True)
    images = torch.randn(2, *architecture.input_size, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, architecture.num_classes)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, model(images)), 'training mode is noisy'
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('family', FAMILIES)
def test_members_are_traced_planned_and_run(family):
    for architecture in members(family, 2):
        check(architecture, TimmSampler())


@pytest.mark.slow
@pytest.mark.parametrize('image_size', [32, 64])
@pytest.mark.parametrize('family', FAMILIES)
def test_many_members_are_traced_planned_and_run(family, image_size):
    for architecture in members(family, 50, seed=1, image_size=image_size):
        check(architecture, TimmSampler())


@pytest.mark.parametrize('family', FAMILIES)
def test_a_seed_means_the_same_options_on_every_platform(family):
    draws = Draws(np.random.default_rng(0), Limits())
    drawn = [Architecture(family, FAMILIES[family](draws)) for _ in range(3)]
    assert [architecture.design[:6] for architecture in drawn] == FIRST[family]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('image_size', [8, 28, 224])
def test_other_image_sizes_can_be_read(family, image_size):
    limits = Limits(image_size=image_size, parameters=(0, 2_000_000), macs=500_000_000, activations=None)
    architecture = Architecture(
        family, FAMILIES[family](Draws(np.random.default_rng(3), limits)), image_size=image_size
    )
    trace(architecture.build(), input_size=architecture.input_size, rules='operators')


def test_a_family_covers_stems_depths_and_widths():
    drawn = [a.options for a in members('resnet_basic', 40)]
    assert {(o['stem_stride'], o['stem_pool']) for o in drawn} >= {(1, 'none'), (2, 'none'), (2, 'max')}
    assert {o['stem'] for o in drawn} == {'plain', 'deep', 'tiered'}
    assert len({sum(o['depths']) for o in drawn}) > 5
    assert min(min(o['widths']) for o in drawn) <= 16
    assert max(max(o['widths']) for o in drawn) >= 128


def test_training_leaves_out_the_held_out_families():
    assert set(HELD_OUT) | set(TRAIN_FAMILIES) == set(FAMILIES)
    assert not set(HELD_OUT) & set(TRAIN_FAMILIES)
    assert TimmSampler().families == TRAIN_FAMILIES
