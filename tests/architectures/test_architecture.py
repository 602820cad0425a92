import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import nn

from timm_ghn.architectures import architecture as architectures
from timm_ghn.architectures.architecture import SPLITS, Architecture, register_family
from timm_ghn.architectures.families import FAMILIES
from timm_ghn.architectures.samplers import TimmSampler
from timm_ghn.errors import ConfigError

VGG = Architecture(
    'vgg',
    {
        'depths': (1, 1),
        'widths': (8, 16),
        'last_pooling': False,
        'classifier': 'linear',
        'classifier_kernel': 1,
        'classifier_width': 64,
        'norm': 'batch',
        'act': 'relu',
    },
)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_record_survives_pickling_and_json(family):
    architecture = TimmSampler((family,)).sample(np.random.default_rng(5))
    copies = (
        pickle.loads(pickle.dumps(architecture)),
        Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))),
    )
    for copy in copies:
        assert copy == architecture
        assert hash(copy) == hash(architecture)
        assert (copy.key, copy.design, copy.split) == (architecture.key, architecture.design, architecture.split)


def test_the_key_tells_everything_apart_and_the_design_what_is_drawn():
    variants = [
        VGG,
        dataclasses.replace(VGG, num_classes=100),
        dataclasses.replace(VGG, image_size=64),
        dataclasses.replace(VGG, in_chans=1),
    ]
    assert len({architecture.key for architecture in variants}) == 4
    assert len({architecture.design for architecture in variants}) == 1
    other = dataclasses.replace(VGG, options={**VGG.options, 'act': 'gelu'})
    assert other.design != VGG.design
    assert VGG.key.startswith('vgg-')


def test_the_order_of_options_and_the_kind_of_sequence_do_not_matter():
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in reversed(VGG.options.items())}
    assert Architecture('vgg', options) == VGG
    assert Architecture('vgg', options).key == VGG.key


def test_one_design_in_twenty_belongs_to_each_held_out_split():
    splits = [Architecture('vgg', {'number': number}).split for number in range(4000)]
    counts = {split: splits.count(split) / 4000 for split in SPLITS}
    assert counts['val'] == pytest.approx(0.05, abs=0.015)
    assert counts['test'] == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize('value', [np.int64(3), {'a': 1}, (1, np.float64(2)), torch.tensor(1), {1}])
def test_options_are_plain(value):
    with pytest.raises(ConfigError, match='option width'):
        Architecture('vgg', {'width': value})


@pytest.mark.parametrize('field', ['image_size', 'num_classes', 'in_chans'])
def test_numbers_below_one_are_refused(field):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(VGG, **{field: 0})


def test_an_unknown_family_is_named():
    with pytest.raises(ConfigError, match="vgg.*got 'resnext'"):
        Architecture('resnext', {}).build()


def test_an_unknown_field_is_named():
    with pytest.raises(ConfigError, match='colour'):
        Architecture.from_dict({**VGG.to_dict(), 'colour': 1})


def test_a_family_has_one_builder():
    with pytest.raises(ConfigError, match="'vgg'"):
        register_family('vgg')(lambda architecture, device: nn.Identity())


def test_a_network_is_built_without_dropout_and_in_training_mode(monkeypatch):
    noisy = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5), nn.MultiheadAttention(4, 1, dropout=0.5))
    monkeypatch.setitem(architectures._BUILDERS, 'noisy', lambda architecture, device: noisy.eval())
    model = Architecture('noisy', {}).build('cpu')
    assert model.training
    assert torch.equal(model[:3](torch.ones(2, 3, 4, 4)), torch.ones(2, 3, 4, 4))
    assert model[3].dropout == 0


def test_nothing_is_drawn_on_the_meta_device_and_something_elsewhere():
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        VGG.build()
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(VGG.build('cpu').head.fc.weight, VGG.build('cpu').head.fc.weight)
