"""Variants of pretrained networks: what each start takes over, and the smallest run of the whole comparison."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pictures import make_dataset, save_dataset

from benchmarks import properties, relatives
from benchmarks.initperf import arms
from benchmarks.initperf.arms import ArmData, write_start
from benchmarks.initperf.cells import NETWORKS
from benchmarks.initperf.donors import Donors
from benchmarks.initperf.schedule import read_lines

NAME = 'test_vit x1, third stage deeper'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    for name in ('clothing_128', 'tiny_imagenet_32'):
        save_dataset(root / name, make_dataset(150), make_dataset(30, seed=1))
    return root


@pytest.fixture
def network(monkeypatch):
    found = next(one for one in relatives.variants() if one.label == NAME)
    monkeypatch.setitem(NETWORKS, NAME, found)
    return found


def test_there_are_a_hundred_variants_and_each_has_a_donor():
    found = list(relatives.variants())
    assert len({one.label for one in found}) == len(found) == 100
    assert {one.donor for one in found} == set(relatives.DONORS)


@pytest.mark.parametrize('arm', ['relative', 'position'])
def test_a_deeper_variant_takes_the_weights_of_its_donor(folder, network, tmp_path, arm):
    donors = Donors(tmp_path, str(folder / 'tiny_imagenet_32'), (0.01,))
    donors.prepare(NETWORKS[network.donor])
    model = network.start(10, 0).model
    write_start(arm, model, ArmData(network, (), (3, 32, 32), 10, 0, donors=donors))
    given = donors.weights(NETWORKS[network.donor], 0.01)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, given['blocks.0.mlp.fc1.weight'])
    taken = [torch.equal(model.blocks[-1].mlp.fc1.weight, given[f'blocks.{k}.mlp.fc1.weight']) for k in range(6)]
    assert sum(taken) == 1


def test_the_smallest_run_goes_on_where_it_was_cut_and_ends_in_a_table(folder, network, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arms, 'RACE_STEPS', 1)
    line = ['--data-root', str(folder), '--networks', NAME, '--minutes', '0.01', '--steps', '1']
    out = tmp_path / 'relatives.jsonl'
    relatives.main([*line, '--out', str(out)])
    table = capsys.readouterr().out
    assert table.splitlines()[2].startswith('| all | 1 |')
    text = out.read_text()
    out.write_text(''.join(text.splitlines(keepends=True)[:3]))
    relatives.main([*line, '--out', str(out)])
    assert capsys.readouterr().out == table
    kinds = Counter(line['kind'] for line in read_lines(out))
    assert kinds == {'run': len(relatives.ARMS) * len(relatives.RATES), 'race': 1}


@pytest.mark.slow
def test_the_smallest_run_of_the_properties(folder, tmp_path, capsys):
    options = ['--dataset', str(folder / 'clothing_128'), '--out', str(tmp_path / 'properties.jsonl')]
    properties.main([*options, '--families', 'resnet_basic', 'vit', '--each', '5', '--steps', '20', '--images', '64'])
    table = capsys.readouterr().out
    assert table.startswith('10 networks.')
    assert all(f'| {name} |' in table for name in ('after 30', 'macs', 'accuracy', 'seconds', *properties.GRAPHS))
    properties.main([*options, '--families', 'resnet_basic', 'vit', '--each', '5', '--report'])
    assert capsys.readouterr().out == table
