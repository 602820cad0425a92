import collections
import dataclasses
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from timm_ghn import trace
from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.families import HELD_OUT
from timm_ghn.architectures.samplers import (
    MixSampler,
    NamesSampler,
    TimmSampler,
    build_sampler,
    evaluation_set,
    parts_of,
)
from timm_ghn.errors import ConfigError

FAST = TimmSampler(('vgg', 'resnet_basic'), macs=5_000_000, parameters=(5_000, 200_000))
MIX = MixSampler(({'share': 3, 'families': ['vgg'], 'macs': 5_000_000}, {'sampler': 'names', 'names': ['resnet18']}))


def take(sampler, count, seed=0):
    rng = np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


def test_a_process_that_only_unpickles_draws_and_builds_the_same():
    code = """
import pickle, sys, numpy
drawn, sampler = pickle.loads(sys.stdin.buffer.read())
drawn.build()
rng = numpy.random.default_rng(0)
print(*(sampler.sample(rng).key for _ in range(4)))
"""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    drawn = take(FAST, 4)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    data = pickle.dumps((drawn[0], FAST))
    made = subprocess.run([sys.executable, '-c', code], input=data, capture_output=True, check=True)
    assert made.stdout.decode().split() == [architecture.key for architecture in drawn]
    assert take(FAST, 4, seed=1) != drawn


def test_samples_have_the_size_and_the_classes_that_were_asked_for():
    sampler = dataclasses.replace(FAST, image_size=64, num_classes=200, in_chans=1)
    (architecture,) = take(sampler, 1)
    assert architecture.input_size == (1, 64, 64)
    assert architecture.build('cpu')(torch.zeros(2, 1, 64, 64)).shape == (2, 200)


def test_training_never_draws_what_evaluation_draws():
    assert {architecture.split for architecture in take(FAST, 30)} == {'train'}
    assert {architecture.split for architecture in evaluation_set(FAST, seed=0, count=3, split='val')} == {'val'}
    held = evaluation_set(FAST, seed=7, count=3)
    assert {architecture.split for architecture in held} == {'test'}
    assert held == evaluation_set(dataclasses.replace(FAST, split=None), seed=7, count=3)
    assert [architecture.family for architecture in held] == ['vgg'] * 3 + ['resnet_basic'] * 3
    assert len({architecture.key for architecture in held}) == 6
    fewer = dataclasses.replace(FAST, families=('resnet_basic',))
    assert evaluation_set(fewer, seed=7, count=3) == held[3:], 'a new family changes nothing in the others'
    unseen = evaluation_set(TimmSampler(HELD_OUT, macs=10_000_000), seed=0, count=1)
    assert {architecture.family for architecture in unseen} == set(HELD_OUT)


def test_limits_that_nothing_meets_are_an_error_that_says_so():
    sampler = TimmSampler(('vit',), parameters=(50_000_000, 50_000_001), macs=1000, attempts=3)
    with pytest.raises(ConfigError, match='found no vit of 50,000,000 .*3 attempts'):
        take(sampler, 1)


def test_names_and_patterns_stand_for_models_each_once():
    sampler = NamesSampler(('test_resnet', 'test_r*', 'test_vit'))
    assert sampler.models == tuple(dict.fromkeys(('test_resnet', *timm.list_models('test_r*'), 'test_vit')))
    assert {a.options['name'] for a in take(sampler, 40)} == set(sampler.models)


@pytest.mark.parametrize('small_stem', [False, True])
@pytest.mark.parametrize('name', ['test_resnet', 'vit_tiny_patch16_224'])
def test_named_models_are_built_for_small_images(name, small_stem):
    architecture = NamesSampler((name,), num_classes=7, small_stem=small_stem).architecture(name)
    assert Architecture.from_dict(architecture.to_dict()) == architecture
    graph = trace(architecture.build(), input_size=architecture.input_size, rules='operators')
    assert graph.num_classes == 7
    assert architecture.build('cpu')(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_mixture_draws_from_each_part_by_its_share():
    drawn = collections.Counter(architecture.family for architecture in take(MIX, 60))
    assert set(drawn) == {'vgg', 'timm'}
    assert 35 <= drawn['vgg'] <= 54  # 45 in the mean; beyond three standard deviations in 3 of 1,000 seeds
    assert parts_of(MIX) == (TimmSampler(('vgg',), macs=5_000_000), NamesSampler(('resnet18',)))
    mixed = dataclasses.replace(MIX, image_size=64, num_classes=7)
    assert {(part.image_size, part.num_classes) for part in parts_of(mixed)} == {(64, 7)}


@pytest.mark.parametrize(
    ('name', 'options', 'said'),
    [
        ('deepnet', {}, 'deepnet'),
        ('timm', {'mac': 1}, 'mac'),
        ('timm', {'families': ['resnext']}, 'resnext'),
        ('timm', {'families': ()}, 'families'),
        ('timm', {'families': ('vgg', 'vgg')}, 'distinct'),
        ('timm', {'split': 'dev'}, 'dev'),
        ('timm', {'macs': 0}, 'macs'),
        ('names', {}, 'names'),
        ('names', {'names': []}, 'got none'),
        ('names', {'names': ['resnet18000']}, 'resnet18000'),
        ('names', {'names': ['nothing*']}, 'nothing'),
        ('mix', {'parts': []}, 'got none'),
        ('mix', {'parts': 'vgg'}, 'to be a mapping'),
        ('mix', {'parts': ['vgg']}, 'to be a mapping'),
        ('mix', {'parts': [{'share': 0}]}, 'positive number'),
        ('mix', {'parts': [{'share': 'half'}]}, 'positive number'),
        ('mix', {'parts': [{'sampler': 'mux'}]}, 'expected a sampler among'),
        ('mix', {'parts': [{'famlies': ['vgg']}]}, "no option 'famlies'"),
        ('deepnets', {'split': 'bnfre'}, 'split'),
    ],
)
def test_wrong_options_are_refused_where_the_sampler_is_made(name, options, said):
    with pytest.raises(ConfigError, match=said):
        build_sampler(name, options)
