"""The published forms become GHNs of ours: right hyper-parameters, right names, the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from official import WRITERS, official_state, options

from timm_ghn.errors import CheckpointError
from timm_ghn.hub import load_ghn
from timm_ghn.hub.formats import CIFAR10_MEAN, infer_config, read_official
from timm_ghn.nn import GHN, GHNConfig

SMALL = GHNConfig(hid=8, max_shape=(8, 12, 3, 3), num_classes=5, layers=2, heads=4, name='ghn')
OLD = dataclasses.replace(SMALL, gnn='gated', layers=1, heads=8, window='corner')
GHN1 = dataclasses.replace(OLD, virtual_edges=1, layernorm=False, weight_norm=False)
MLP = dataclasses.replace(OLD, gnn='mlp', max_shape=(6, 6, 3, 3))
VARIANTS = {
    'ghn3': SMALL,
    'ghn3_cifar10': dataclasses.replace(
        SMALL, num_classes=10, mean=CIFAR10_MEAN, std=(0.24703233, 0.24348505, 0.26158768)
    ),
    'ghn2': OLD,
    'ghn1': GHN1,
    'mlp': MLP,
    'mlp_decoder': dataclasses.replace(MLP, decoder='mlp'),
}
BARE = {name: config for name, config in VARIANTS.items() if config.gnn != 'mlp'}


def expect_same(found: GHN, expected: GHN) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize('config', VARIANTS.values(), ids=VARIANTS.keys())
def test_a_file_with_its_configuration_gives_the_same_ghn(tmp_path, writer, config):
    ghn = GHN(config)
    saved = {'state_dict': official_state(ghn), 'config': options(ghn), 'epoch': 3}
    found = load_ghn(writer(saved, tmp_path / 'ghn.pt'))
    assert found.config == config
    assert not found.training
    expect_same(found, ghn)


@pytest.mark.parametrize('config', BARE.values(), ids=BARE.keys())
def test_a_bare_state_dictionary_gives_the_same_ghn(tmp_path, config):
    ghn = GHN(config)
    found = load_ghn(WRITERS['joblib'](official_state(ghn), tmp_path / 'ghn.pt'))
    assert found.config == config
    expect_same(found, ghn)


def test_the_layout_of_our_own_training_is_accepted_as_well(tmp_path, small_ghn):
    found = load_ghn(WRITERS['torch']({'state_dict': small_ghn.state_dict()}, tmp_path / 'small.pt'))
    expect_same(found, small_ghn)


@pytest.mark.parametrize(
    ('file', 'expected'),
    [
        ('ghn3tm8.pt', GHNConfig(hid=64, max_shape=(64, 64, 16, 16), num_classes=1000, layers=3, heads=8)),
        ('ghn3tm8-c10.pt', GHNConfig(hid=64, max_shape=(64, 64, 11, 11), num_classes=10, layers=3, heads=8)),
        (
            'ghn2hub_imagenet_s16.pt',
            GHNConfig(hid=32, max_shape=(64, 64, 16, 16), num_classes=1000, gnn='gated', window='corner'),
        ),
        (
            'ghn2_cifar10.pt',
            GHNConfig(hid=32, max_shape=(64, 64, 11, 11), num_classes=10, gnn='gated', window='corner'),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_golden_checkpoints(golden: Path, file, expected):
    import joblib

    path = golden / 'checkpoints' / file
    ghn = load_ghn(path)
    config = dataclasses.replace(expected, name=path.stem, mean=ghn.config.mean, std=ghn.config.std)
    assert ghn.config == config
    assert (ghn.config.mean == CIFAR10_MEAN) == (expected.num_classes == 10)
    reference = torch.load(path, weights_only=True)['state_dict'] if file == 'ghn2_cifar10.pt' else joblib.load(path)
    state = ghn.state_dict()
    assert len(state) == len(reference)
    for key, value in reference.items():
        ours = state[key if key in state else f'gnn.0.{key}']
        assert torch.equal(ours, value.view(ours.shape)), key


def test_weights_that_are_missing_left_over_or_of_a_wrong_shape_are_all_named(tmp_path, small_ghn):
    state = official_state(small_ghn)
    del state['gnn.1.ln1.bias']
    state['surplus'] = torch.zeros(1)
    state['ln.bias'] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r'lacks gnn\.1\.ln1\.bias; it has unexpected surplus; .*ln\.bias \(3,\)'):
        load_ghn(WRITERS['joblib'](state, tmp_path / 'ghn.pt'))


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, small_ghn, writer, value):
    state = official_state(small_ghn)
    state['decoder.fc.0.bias'][3] = value
    with pytest.raises(CheckpointError, match=r'not finite: 1 of 288 in decoder\.fc\.0\.bias'):
        load_ghn(writer(state, tmp_path / 'ghn.pt'))


def test_large_weights_whose_sum_overflows_are_finite(tmp_path, small_ghn):
    state = official_state(small_ghn)
    state['decoder.fc.0.bias'].fill_(3e38)
    expect = load_ghn(WRITERS['joblib'](state, tmp_path / 'ghn.pt')).state_dict()['decoder.fc.0.bias']
    assert torch.equal(expect, state['decoder.fc.0.bias'])


@pytest.mark.parametrize(
    'content',
    [{'a': torch.zeros(2)}, {'state_dict': 3}, {'state_dict': {}}, [1, 2], {1: torch.zeros(1)}, {'a': 'text'}],
)
def test_other_checkpoints_are_not_mistaken_for_a_ghn(tmp_path, content):
    with pytest.raises(CheckpointError, match=r'ghn\.pt (is no GHN|does not hold the weights of a GHN)'):
        load_ghn(WRITERS['torch'](content, tmp_path / 'ghn.pt'))


def test_a_vision_model_is_not_mistaken_for_a_ghn(tmp_path):
    state = {
        'embed.weight': torch.zeros(15, 8),
        'bias_class.1.weight': torch.zeros(5, 8),
        'head.weight': torch.zeros(2),
    }
    with pytest.raises(CheckpointError, match='GHN'):
        load_ghn(WRITERS['torch'](state, tmp_path / 'ghn.pt'))


@pytest.mark.parametrize(
    'wrong', [{'max_shape': (10**12,) * 4}, {'max_shape': 'x'}, {'max_shape': (2**60, 8, 3, 3)}, {'max_shape': None}]
)
def test_a_configuration_that_the_weights_contradict_is_refused(tmp_path, small_ghn, wrong):
    saved = {'state_dict': official_state(small_ghn), 'config': options(small_ghn) | wrong}
    with pytest.raises(CheckpointError, match=r'ghn\.pt'):
        load_ghn(WRITERS['torch'](saved, tmp_path / 'ghn.pt'))


def test_a_file_that_is_not_the_one_of_the_catalogue_is_refused(tmp_path, small_ghn):
    path = WRITERS['joblib'](official_state(small_ghn), tmp_path / 'ghn.pt')
    read_official(path, config=small_ghn.config)
    other = dataclasses.replace(small_ghn.config, heads=4, window='corner')
    with pytest.raises(CheckpointError, match=r'not the GHN that the catalogue describes: it has heads 2 where 4'):
        read_official(path, config=other)


def test_what_the_weights_do_not_tell_is_taken_from_the_catalogue(tmp_path, small_ghn):
    path = WRITERS['joblib'](official_state(small_ghn), tmp_path / 'ghn.pt')
    known = dataclasses.replace(small_ghn.config, virtual_edges=7, mean=(0.1, 0.2, 0.3), name='known')
    assert read_official(path, config=known).config == known


def test_half_precision_files_load_as_float32(tmp_path, small_ghn):
    state = {key: value.half() for key, value in official_state(small_ghn).items()}
    path = WRITERS['joblib'](state, tmp_path / 'ghn.pt')
    assert {value.dtype for value in load_ghn(path).state_dict().values()} == {torch.float32}
    assert {value.dtype for value in load_ghn(path, dtype=torch.float16).state_dict().values()} == {torch.float16}


def test_the_layers_decide_what_kind_of_ghn_it_is(small):
    shapes = {key: tuple(value.shape) for key, value in GHN(small).state_dict().items()}
    assert infer_config(shapes).gnn == 'graphormer'
    with pytest.raises(CheckpointError, match='KeyError'):
        infer_config({key: value for key, value in shapes.items() if 'proj_e' not in key})
