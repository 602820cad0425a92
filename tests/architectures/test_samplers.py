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
    families_of,
    parts_of,
    register_sampler,
)
from timm_ghn.errors import ConfigError

FAST = TimmSampler(('vgg', 'resnet_basic'), macs=5_000_000, parameters=(5_000, 200_000))


MIX = MixSampler(({'share': 3, 'families': ['vgg'], 'macs': 5_000_000}, {'sampler': 'names', 'names': ['resnet18']}))


def take(sampler, count, seed=0):
    rng = np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


def test_one_seed_gives_one_sequence():
    assert take(FAST, 4) == take(FAST, 4)
    assert take(FAST, 4) != take(FAST, 4, seed=1)


def test_a_process_that_only_unpickles_builds_and_draws_the_same():
    code = """
import pickle, sys, numpy
drawn, sampler = pickle.loads(sys.stdin.buffer.read())
drawn.build()
rng = numpy.random.default_rng(0)
print(*(sampler.sample(rng).key for _ in range(4)))
"""
    data = pickle.dumps((take(FAST, 1)[0], FAST))
    made = subprocess.run([sys.executable, '-c', code], input=data, capture_output=True, check=True)
    assert made.stdout.decode().split() == [architecture.key for architecture in take(FAST, 4)]


def test_global_generators_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    take(FAST, 2)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_samplers_survive_pickling():
    for sampler in (FAST, NamesSampler(('resnet18',)), MIX):
        assert pickle.loads(pickle.dumps(sampler)) == sampler


def test_samples_have_the_size_and_the_classes_that_were_asked_for():
    sampler = dataclasses.replace(FAST, image_size=64, num_classes=200, in_chans=1)
    (architecture,) = take(sampler, 1)
    assert architecture.input_size == (1, 64, 64)
    assert architecture.build('cpu')(torch.zeros(2, 1, 64, 64)).shape == (2, 200)


def test_training_never_draws_what_evaluation_draws():
    assert {architecture.split for architecture in take(FAST, 30)} == {'train'}
    held = evaluation_set(FAST, seed=0, count=3)
    assert {architecture.split for architecture in held} == {'test'}
    validation = evaluation_set(FAST, seed=0, count=3, split='val')
    assert {architecture.split for architecture in validation} == {'val'}


def test_an_evaluation_set_is_fixed_and_has_as_many_of_each_family():
    held = evaluation_set(FAST, seed=7, count=3)
    assert held == evaluation_set(dataclasses.replace(FAST, split=None), seed=7, count=3)
    assert [architecture.family for architecture in held] == ['vgg'] * 3 + ['resnet_basic'] * 3
    assert len({architecture.key for architecture in held}) == 6


def test_a_new_family_changes_nothing_in_the_others():
    fewer = dataclasses.replace(FAST, families=('resnet_basic',))
    assert evaluation_set(fewer, seed=7, count=2) == evaluation_set(FAST, seed=7, count=2)[2:]


def test_held_out_families_can_be_evaluated():
    sampler = TimmSampler(HELD_OUT, macs=10_000_000)
    assert {architecture.family for architecture in evaluation_set(sampler, seed=0, count=1)} == set(HELD_OUT)


def test_an_evaluation_set_is_not_for_training():
    with pytest.raises(ConfigError, match="got 'train'"):
        evaluation_set(FAST, seed=0, count=1, split='train')


def test_limits_that_nothing_meets_are_an_error_that_says_so():
    sampler = TimmSampler(('vit',), parameters=(50_000_000, 50_000_001), macs=1000, attempts=3)
    with pytest.raises(ConfigError, match='found no vit within .*3 attempts'):
        sampler.sample(np.random.default_rng(0))


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'families': ('resnext',)}, 'resnext'),
        ({'families': ()}, 'families'),
        ({'families': ('vgg', 'vgg')}, 'distinct'),
        ({'split': 'dev'}, 'dev'),
        ({'attempts': 0}, 'attempts'),
        ({'macs': 0}, 'macs'),
    ],
)
def test_wrong_options_are_refused_where_the_sampler_is_made(wrong, said):
    with pytest.raises(ConfigError, match=said):
        TimmSampler(**wrong)


def test_samplers_are_known_by_name():
    assert build_sampler('names', {'names': ['resnet18']}) == NamesSampler(('resnet18',))
    assert build_sampler('timm', {'macs': 10}) == TimmSampler(macs=10)


@pytest.mark.parametrize(
    ('name', 'options', 'said'),
    [('deepnet', {}, 'deepnet'), ('timm', {'mac': 1}, 'mac'), ('names', {}, 'names')],
)
def test_what_a_sampler_does_not_know_is_named(name, options, said):
    with pytest.raises(ConfigError, match=said):
        build_sampler(name, options)


def test_a_sampler_has_one_class():
    with pytest.raises(ConfigError, match='TimmSampler'):
        register_sampler('timm')(NamesSampler)


def test_names_and_patterns_stand_for_models_each_once():
    sampler = NamesSampler(('test_resnet', 'test_r*', 'test_vit'))
    assert sampler.models[0] == 'test_resnet'
    assert sampler.models == tuple(dict.fromkeys(('test_resnet', *timm.list_models('test_r*'), 'test_vit')))
    assert {a.options['name'] for a in take(sampler, 40)} == set(sampler.models)


@pytest.mark.parametrize('names', [(), ('resnet18000',), ('nothing*',)])
def test_names_that_timm_does_not_know_are_refused(names):
    with pytest.raises(ConfigError):
        NamesSampler(names)


@pytest.mark.parametrize('small_stem', [False, True])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet'])
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
    assert families_of(MIX) == ('vgg',)


def test_the_parts_of_a_mixture_have_its_images_and_classes():
    mixed = dataclasses.replace(MIX, image_size=64, num_classes=7)
    assert {(part.image_size, part.num_classes) for part in parts_of(mixed)} == {(64, 7)}


@pytest.mark.parametrize(
    ('parts', 'said'),
    [
        ([], 'a list of mappings'),
        ('vgg', 'to be a mapping'),
        (['vgg'], 'to be a mapping'),
        ([{'share': 0}], 'positive number'),
        ([{'share': 'half'}], 'positive number'),
        ([{'sampler': 'mux'}], 'expected a sampler among'),
        ([{'famlies': ['vgg']}], "no option 'famlies'"),
    ],
)
def test_wrong_parts_of_a_mixture_are_refused(parts, said):
    with pytest.raises(ConfigError, match=said):
        build_sampler('mix', {'parts': parts})
