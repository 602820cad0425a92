"""Runs that begin with a relative's weights, or with the winner of a race."""

import dataclasses

import pytest
import torch
from pictures import make_dataset, save_dataset
from safetensors.torch import load_file

from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.runs.results import read_results
from timm_ghn.transfer import race


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Options of a run that learnt the colours."""
    folder = tmp_path_factory.mktemp('colours')
    save_dataset(folder / 'data', make_dataset(50), make_dataset(21, seed=1))
    options = FinetuneOptions(
        model='test_resnet', init='random', dataset=str(folder / 'data'), val_split='test', image_size=32, epochs=4,
        batch_size=12, lr=3e-3, train_crop_mode='pad', small_stem='off', output=folder / 'donor',
    )  # fmt: skip
    finetune(options)
    return options


def test_a_run_begins_with_the_weights_of_a_relative(trained, tmp_path):
    file = trained.output / 'model.safetensors'
    options = dataclasses.replace(
        trained, init=f'donor:{file}', output=tmp_path / 'out', max_steps=1, lr=1e-30, weight_decay=0.0
    )
    result = finetune(options)
    assert result.epochs[0]['val_top1'] > 80
    found = load_file(options.output / 'model.safetensors')
    given = load_file(file)
    assert all(torch.equal(found[key], given[key]) for key in found if key.endswith('weight'))


def test_the_winner_of_a_race_goes_on_and_is_not_raced_for_again(trained, tmp_path, monkeypatch):
    file = trained.output / 'model.safetensors'
    options = dataclasses.replace(
        trained, init='race', race_inits=(f'donor:{file}',), race_steps=2, output=tmp_path / 'out', max_steps=2
    )
    result = finetune(options)
    found = read_results(options.output / 'results.jsonl')[0]['race']
    assert found['winner']['start'] == f'donor:{file}'
    assert {one['start'] for one in found['runners']} == {race.OWN, f'donor:{file}'}
    assert result.epochs[0]['val_top1'] >= found['winner']['rounds'][-1][1] - 20  # it goes on from where the race ended
    assert len(list((options.output / 'race').glob('*.safetensors'))) == 1
    assert (options.output / 'race.png').stat().st_size > 1000

    def refuse(*arguments):
        raise AssertionError('a race that is decided is not run again')

    monkeypatch.setattr(race._Field, '_run', refuse)
    resumed = finetune(dataclasses.replace(options, resume=True, max_steps=3))
    assert resumed.steps == 3
