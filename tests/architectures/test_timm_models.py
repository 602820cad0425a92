"""One builder of timm models serves the command line, fine-tuning and the Hub."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_ghn.architectures import timm_models
from timm_ghn.architectures.timm_models import MAX_SIDE, build_timm_model, check_model_name
from timm_ghn.errors import UnsupportedModelError
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.setup import build
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.publish.files import read_source


def test_a_model_is_timms_with_its_own_initialisation_drawn_from_the_seed():
    state = torch.get_rng_state()
    built = build_timm_model('test_resnet.r160_in1k', {'num_classes': 3, 'in_chans': 1}, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    expected = timm.create_model('test_resnet', num_classes=3, in_chans=1)
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnet_50', r"timm has no model 'resnet_50'; did you mean resnet50"),
        ('qqqqqqqq', r"timm has no model 'qqqqqqqq'; timm.list_models\(\) lists them"),
        ('hf-hub:somebody/model', 'timm has no model'),
        ('resnet50.nobody', r"timm has no model 'resnet50.nobody'; timm.list_pretrained\('resnet50'\) lists its tags"),
        ('resnet50.ghn', r"'resnet50.ghn' names a GHN: write resnet50 --ghn ghn"),
        (f'resnet50.{EMBEDDED}', rf"'resnet50.{EMBEDDED}' names a GHN: write resnet50 --ghn {EMBEDDED}"),
    ],
)
def test_names_that_are_no_timm_models_are_refused(name, message):
    for call in (lambda: check_model_name(name), lambda: build_timm_model(name, {}, seed=0)):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'depths': 3}, r"timm cannot build 'test_vit' with {'depths': 3}: "),
        ({'img_size': MAX_SIDE + 1}, 'sides of at most 16,384 pixels'),
        ({'img_size': [32, 10**30]}, 'sides of at most 16,384 pixels'),
        ({'num_classes': 10**30}, r'timm cannot build .*: [^\n]*$'),
        ({'num_classes': 'many'}, 'timm cannot build'),
        *(({key: 'ghn'}, f'bring no weights .got {key}.') for key in timm_models._OF_WEIGHTS),
    ],
)
def test_arguments_that_timm_refuses_are_an_error_of_ours(arguments, message):
    with pytest.raises(UnsupportedModelError, match=message):
        build_timm_model('test_vit', arguments, seed=0)


@pytest.mark.parametrize('init', ['random', 'pretrained', EMBEDDED])
@pytest.mark.parametrize('tag', ['ghn', EMBEDDED])
def test_fine_tuning_begins_with_the_start_that_it_records(init, tag):
    options = FinetuneOptions(dataset='x', model=f'test_resnet.{tag}', init=init, image_size=32)
    with pytest.raises(UnsupportedModelError, match=f'names a GHN: write test_resnet --init {tag}$'):
        build(options, 3)
    options = FinetuneOptions(dataset='x', model='test_resnet', init='random', model_args={'pretrained_cfg': tag})
    with pytest.raises(UnsupportedModelError, match='bring no weights'):
        build(options, 3)


def test_a_file_that_says_that_its_model_is_predicted_is_no_source(tmp_path):
    for architecture, more in ((f'test_resnet.{EMBEDDED}', {}), ('test_resnet', {'pretrained': 'true'})):
        header = {'architecture': architecture, 'provenance': json.dumps({'ghn': None}), **more}
        save_file(timm.create_model('test_resnet').state_dict(), tmp_path / 'x.safetensors', header)
        with pytest.raises(UnsupportedModelError, match='names a GHN|bring no weights'):
            read_source(tmp_path / 'x.safetensors')
