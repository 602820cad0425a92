from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from pictures import make_dataset, save_dataset
from tiny import TINY, make_ghn

from timm_ghn.architectures.deepnets.generate import generate
from timm_ghn.architectures.deepnets.sampler import networks_of
from timm_ghn.errors import ConfigError
from timm_ghn.train.evaluate import EvaluateOptions, Evaluation, summaries


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(30, size=16), make_dataset(12, size=16))


def test_the_table_of_a_split_is_that_of_its_rows(folder, tmp_path, monkeypatch, call_cli):
    ghn = make_ghn(dataclasses.replace(TINY['gated'], num_classes=3))
    monkeypatch.setattr('timm_ghn.train.evaluate.load_ghn', lambda *_, **__: ghn)
    file = tmp_path / 'out.json'
    code, out, _ = call_cli(
        f'evaluate --ghn tiny --dataset {folder} --split test,bnfree --count 2 --image-size 16 --images 6 --json {file}'
    )
    assert code == 0
    written = json.loads(file.read_text())
    assert [row['family'] for row in written['rows']] == ['test', 'test', 'bnfree', 'bnfree']
    assert summaries([Evaluation(**row) for row in written['rows']])[0].mean == written['summary'][0]['mean']
    lines = [line.split() for line in out.splitlines()[2:]]
    assert [(line[0], line[1]) for line in lines] == [('test', '2'), ('bnfree', '2')]
    assert [float(line[2]) for line in lines] == [round(row['mean'], 2) for row in written['summary']]


def test_mean_standard_error_and_maximum():
    (row,) = summaries(Evaluation('test', str(top1), 1, top1, 0.0) for top1 in (10.0, 20.0, 30.0, 40.0))
    assert (row.split, row.networks, row.mean, row.maximum) == ('test', 4, 25, 40)
    assert row.standard_error == pytest.approx(125**0.5 / 2)


def test_networks_drawn_by_seed_are_those_of_the_generated_file(tmp_path):
    file = tmp_path / 'nets.arrow'
    generate(file, 'wide', 3, seed=5)
    drawn = list(itertools.islice(networks_of('wide', 32, 10, seed=5), 3))
    assert drawn == list(networks_of('wide', 32, 10, file=file))
    assert all(network.options['C'] == 128 for network in drawn)


@pytest.mark.parametrize('changes', [{'split': 'bnfre'}, {'file': 'nets.arrow'}])
def test_a_split_that_is_wrong_or_missing_is_named(changes):
    with pytest.raises(ConfigError, match='split'):
        EvaluateOptions(ghn='tiny', dataset='-', **changes)
