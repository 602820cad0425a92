from __future__ import annotations

import dataclasses
import json

import pytest
from pictures import make_dataset, save_dataset
from tiny import TINY, make_ghn

from timm_ghn.analysis.search import SearchOptions, search
from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.cost import count_parameters
from timm_ghn.errors import ConfigError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(30, size=16), make_dataset(12, size=16))


@pytest.fixture(autouse=True)
def tiny_ghn(monkeypatch):
    ghn = make_ghn(dataclasses.replace(TINY['gated'], num_classes=3))
    monkeypatch.setattr('timm_ghn.train.evaluate.load_ghn', lambda *_, **__: ghn)


@pytest.fixture
def options(folder):
    return SearchOptions(ghn='tiny', dataset=str(folder), image_size=16, batch_size=6, families='vgg', num=3)


def test_a_search_keeps_to_the_limits_ranks_by_accuracy_and_is_repeatable(options):
    options = dataclasses.replace(options, max_params=200_000, max_macs=5_000_000)
    rows = search(options)
    assert len({row.architecture.key for row in rows}) == 3
    assert all(row.parameters <= 200_000 and row.macs <= 5_000_000 for row in rows)
    assert [row.top1 for row in rows] == sorted((row.top1 for row in rows), reverse=True)
    assert search(options) == rows


def test_steps_train_each_network_and_are_repeatable(options):
    options = dataclasses.replace(options, num=1)
    trained = dataclasses.replace(options, steps=5)
    rows = search(trained)
    assert rows[0].loss < search(options)[0].loss
    assert search(trained) == rows


def test_the_command_ranks_networks_of_deepnets_and_writes_what_builds_them(folder, tmp_path, call_cli):
    file = tmp_path / 'out.json'
    line = f'search --ghn tiny --dataset {folder} --image-size 16 --split bnfree --num 2 --images 6 --json {file}'
    code, out, _ = call_cli(f'{line} --plot {tmp_path / "out.svg"}')
    assert code == 0
    rows = json.loads(file.read_text())['rows']
    assert all(row['name'] in (tmp_path / 'out.svg').read_text() for row in rows)
    assert [text.split()[:2] for text in out.splitlines()[2:]] == [['1', rows[0]['name']], ['2', rows[1]['name']]]
    for row in rows:
        assert count_parameters(Architecture.from_dict(row['architecture']).build()) == row['parameters']


def test_limits_that_nothing_meets_are_named(options):
    with pytest.raises(ConfigError, match='max-params'):
        search(dataclasses.replace(options, archs='test_resnet', max_params=10))
