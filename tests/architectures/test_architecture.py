import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import nn

from timm_ghn.architectures import architecture as architectures
from timm_ghn.architectures.architecture import SPLITS, Architecture
from timm_ghn.architectures.draws import Draws
from timm_ghn.architectures.families import FAMILIES
from timm_ghn.architectures.samplers import TimmSampler
from timm_ghn.errors import ConfigError

VGG = TimmSampler(('vgg',)).sample(np.random.default_rng(5))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_record_survives_pickling_and_json(family):
    architecture = Architecture(family, FAMILIES[family](Draws(np.random.default_rng(5), TimmSampler())))
    copies = (
        pickle.loads(pickle.dumps(architecture)),
        Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))),
        Architecture(family, dict(reversed(architecture.options.items()))),
    )
    for copy in copies:
        assert copy == architecture
        assert hash(copy) == hash(architecture)
        assert (copy.key, copy.design, copy.split) == (architecture.key, architecture.design, architecture.split)


def test_the_key_tells_everything_apart_and_the_design_what_is_drawn():
    changes = [{}, {'num_classes': 100}, {'image_size': 64}, {'in_chans': 1}]
    variants = [dataclasses.replace(VGG, **change) for change in changes]
    assert len({architecture.key for architecture in variants}) == 4
    assert len({architecture.design for architecture in variants}) == 1
    assert dataclasses.replace(VGG, options={**VGG.options, 'act': 'tanh'}).design != VGG.design
    assert VGG.key.startswith('vgg-')


def test_one_design_in_twenty_belongs_to_each_held_out_split():
    splits = [Architecture('vgg', {'number': number}).split for number in range(4000)]
    assert [splits.count(split) / 4000 for split in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.015)


@pytest.mark.parametrize(
    ('call', 'said'),
    [
        (lambda: dataclasses.replace(VGG, num_classes=0), 'num_classes'),
        (lambda: Architecture('resnext', {}).build(), "vgg.*got 'resnext'"),
        (lambda: Architecture.from_dict({**VGG.to_dict(), 'colour': 1}), 'colour'),
    ],
)
def test_wrong_records_are_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_a_network_is_built_without_dropout_and_in_training_mode(monkeypatch):
    noisy = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5))
    monkeypatch.setitem(architectures._BUILDERS, 'noisy', lambda architecture, common: noisy.eval())
    model = Architecture('noisy', {}).build('cpu')
    assert model.training
    assert torch.equal(model(torch.ones(2, 3, 4, 4)), torch.ones(2, 3, 4, 4))


def test_nothing_is_drawn_on_the_meta_device_and_something_elsewhere():
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        VGG.build()
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(next(VGG.build('cpu').parameters()), next(VGG.build('cpu').parameters()))
