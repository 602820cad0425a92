"""Which runs there are, that they can be made again, and that a killed measurement goes on with the same lines."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from pictures import make_dataset, save_dataset

from benchmarks.initperf import __main__ as command, schedule
from benchmarks.initperf.arms import shuffle_weights_
from benchmarks.initperf.cells import NETWORKS, TIERS, Cell, DataSet, Tier, load_part
from benchmarks.initperf.donors import Donors
from benchmarks.initperf.protocol import BATCH, RATES, Run, Setting, execute, rate_at
from benchmarks.initperf.report import equivalent_of, ignorant_arm, results_of, write_report

CELL = Cell('test_vit', 'colours', 4)
OF_PROCESS = ('cpu_seconds', 'init_seconds', 'time')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('data') / 'colours', make_dataset(96), make_dataset(30, seed=1))


@pytest.fixture
def setting(folder, tmp_path):
    donors = Donors(tmp_path / 'donors', str(folder), (0.01, 0.02))
    return Setting(
        {'colours': DataSet('colours', str(folder), 4)}, {'': 'ghn_tiny'}, {'': 'abc'}, donors, {'timm': '1'}
    )


def lasting(line):
    return {key: value for key, value in line.items() if key not in OF_PROCESS}


def test_rates_are_chosen_on_other_images_and_every_seed_has_images_of_its_own(setting):
    data = setting.data['colours']
    parts = {part: load_part(data, 32, part) for part in ('select', 'report')}
    images = {
        part: {bytes(image.numpy().tobytes()) for image in torch.cat([found.pool.images_nchw, found.test.images_nchw])}
        for part, found in parts.items()
    }
    assert not images['select'] & images['report']
    first, again, other = (parts['report'].train(seed) for seed in (0, 0, 1))
    assert torch.equal(first.images_nchw, again.images_nchw)
    assert not torch.equal(first.images_nchw, other.images_nchw)
    assert first.labels_n.bincount().tolist() == [4, 4, 4]


def test_the_rate_rises_by_steps_and_falls_to_zero():
    rates = [rate_at(step, 60) for step in range(60)]
    assert rates[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert rates[5] == max(rates) == rates[6]
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[-1] < 0.01


def test_a_line_has_everything_to_make_its_run_again(setting):
    run = Run(CELL, 'ghn_orth', 'report', 1e-3, 0, 4)
    line = json.loads(json.dumps(execute(run, setting)))
    assert Run.of(line) == run
    assert lasting(json.loads(json.dumps(execute(Run.of(line), setting)))) == lasting(line)
    assert line['network_spec'] == NETWORKS['test_vit'].facts()
    assert (line['ghn'], line['ghn_sha256'], line['batch'], line['shots']) == ('ghn_tiny', 'abc', BATCH, 4)
    assert [step for step, _ in line['curve']] == [1, 2, 3, 4]
    assert line['curve'][-1][1] == line['accuracy']


def test_the_rate_is_chosen_by_halving_and_reported_with_paired_seeds():
    lines = {}
    for run in schedule.first_rung(CELL, 'timm'):
        lines[run] = {'accuracy': {2e-3: 50.0, 8e-3: 60.0, 1e-3: 50.0}.get(run.rate, 10), 'loss': run.rate}
    assert {run.rate for run in lines} == set(RATES)
    second = schedule.second_rung(CELL, 'timm', lines)
    assert [run.rate for run in second] == [8e-3, 1e-3], 'among equals the lower loss'
    assert {run.steps for run in lines} == {2}
    assert {run.steps for run in second} == {4}
    assert schedule.chosen(CELL, 'timm', lines) is None
    lines |= {second[0]: {'accuracy': 40.0, 'loss': None}, second[1]: {'accuracy': 41.0, 'loss': 1.0}}
    best = schedule.chosen(CELL, 'timm', lines)
    assert best == lines[second[1]]
    runs = schedule.reported(CELL, 'timm', 1e-3, 5)
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in lines)
    assert {(run.part, run.rate, run.steps) for run in runs} == {('report', 1e-3, 4)}


def test_what_was_killed_goes_on_with_the_same_lines(setting, tmp_path, monkeypatch):
    whole, cut = tmp_path / 'whole.jsonl', tmp_path / 'cut.jsonl'
    schedule.measure_arm(CELL, 'kaiming', 1, {}, whole, setting)
    calls = []

    def killed(run, where):
        calls.append(run)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return execute(run, where)

    with monkeypatch.context() as patched:
        patched.setattr(schedule, 'execute', killed)
        with pytest.raises(KeyboardInterrupt):
            schedule.measure_arm(CELL, 'kaiming', 1, {}, cut, setting)
    with cut.open('a') as file:
        file.write('{"kind": "run", "netw')  # the line that was being written
    done = schedule.runs_by(schedule.read_lines(cut))
    assert len(done) == 3
    assert schedule.measure_arm(CELL, 'kaiming', 1, done, cut, setting) == 5
    lines = schedule.read_lines(whole)
    assert len(lines) == 8
    assert list(map(lasting, schedule.read_lines(cut))) == list(map(lasting, lines))
    done = schedule.runs_by(lines)
    assert schedule.measure_arm(CELL, 'kaiming', 1, done, whole, setting) == 0


def test_an_arm_that_does_not_apply_is_said_once(setting, tmp_path):
    out = tmp_path / 'out.jsonl'
    assert schedule.measure_arm(CELL, 'timm_open', 1, {}, out, setting) == 0
    (line,) = schedule.read_lines(out)
    assert (line['kind'], line['arm']) == ('skip', 'timm_open')
    tier = Tier((CELL,), {4: ('timm', 'timm_open', 'pretrain:0.01')}, 1)
    names = [name for name, _, _ in schedule.jobs_of(tier, [line], out, setting)]
    assert names == ['pretrain test_vit', 'test_vit colours 4 timm', 'test_vit colours 4 pretrain:0.01']


def test_donors_are_pretrained_once_for_as_many_cpu_minutes_as_asked(setting):
    network, donors = NETWORKS['test_vit'], setting.donors
    donors.prepare(network)
    files = {minutes: donors.path(network, minutes) for minutes in (0.01, 0.02)}
    times = {minutes: path.stat().st_mtime_ns for minutes, path in files.items()}
    model = network.start(3, 0).model
    head = model.head.weight.detach().clone()
    donors.load_into_(model, network, 0.02)
    assert times == {minutes: path.stat().st_mtime_ns for minutes, path in files.items()}
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, donors.weights(network, 0.02)['blocks.0.mlp.fc1.weight'])
    assert donors.images(network, 0.02) >= donors.images(network, 0.01) > 0


def line_of(arm, seed, accuracy, *, cell=CELL, part='report', rate=1e-3, steps=None):
    run = Run(cell, arm, part, rate, seed, steps or cell.steps)
    curve = [[round(cell.steps * share), accuracy * share] for share in (0.25, 0.5, 0.75, 1)]
    images = {'pretraining_images': round(1000 * float(arm.partition(':')[2]))} if arm.startswith('pretrain') else {}
    facts = {'accuracy': accuracy, 'curve': curve, 'loss': 1.0, 'cpu_seconds': 3.0}
    return {'kind': 'run', **run.record(), **facts, **images}


def lines_of(cell, accuracies):
    """Lines of arms: the accuracy where the rate is chosen, then of each seed."""
    found = []
    for arm, (chosen, *reported) in accuracies.items():
        found += [
            line_of(arm, run.seed, chosen, cell=cell, part='select', rate=run.rate, steps=run.steps)
            for run in schedule.first_rung(cell, arm)
        ]
        found += [line_of(arm, 1001, chosen, cell=cell, part='select', rate=rate) for rate in RATES[:2]]
        found += [line_of(arm, seed, each, cell=cell, rate=RATES[0]) for seed, each in enumerate(reported)]
    return found


ACCURACIES = {
    'timm': (12.0, 10, 10),
    'lsuv': (11.0, 14, 14),  # better, but not where it was to be chosen
    'ghn_orth': (20.0, 20, 22),
    'pretrain:0.5': (20.0, 11, 11),
    'pretrain:2': (20.0, 21, 21),
    'shuffled': (20.0, 9),  # a seed is missing
}


def test_the_report_is_written_from_the_lines_alone(tmp_path):
    cells = Cell('test_vit', 'cifar10', 60), Cell('resnet18@64', 'clothing_128', 60)
    path = tmp_path / 'lines.jsonl'
    lines = [line for cell in cells for line in lines_of(cell, ACCURACIES)]
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    results = results_of(lines, 2)
    assert ignorant_arm(results[cells[0]]) == 'timm'
    assert equivalent_of(results[cells[0]], 'ghn_orth') == pytest.approx(2)
    tier = Tier(cells, {60: (*ACCURACIES, 'ghn_raw')}, 2)
    text = write_report(path, tier, tmp_path / 'report', command='the command').read_text()
    (row,) = [line for line in text.splitlines() if line.startswith('| 60 | ghn_orth |')]
    assert '| 21.0 | +11.0 (+10.0 to +12.0) |' in row
    assert '| 2 of 2 |' in row
    assert f'| {10 / 21:.0%} | 2 |' in row
    assert 'Ignorant arms: timm in 2 cells.' in text
    assert '2 of 2 cells are not complete: test_vit on cifar10, 60 steps (2 arms)' in text
    assert '| shuffled |' not in text
    for name in ('gains.png', 'profile.png', 'cells.csv'):
        assert (tmp_path / 'report' / name).stat().st_size > 400


def test_another_ghn_enters_as_an_arm_of_its_name(tmp_path):
    args = command.parse(['--ghn', 'ghn_tiny', 'runs/mine', '--arms', 'timm', 'ghn_orth', '--networks', 'test_vit'])
    tier = command.tier_of(args, ['', 'mine'])
    assert set(tier.arms.values()) == {('timm', 'ghn_orth', 'ghn_orth@mine')}
    assert {cell.network for cell in tier.cells} == {'test_vit'}


def test_the_tiers_are_what_they_promise():
    core, full = TIERS['core'], TIERS['full']
    assert len({cell.network for cell in core.cells if cell.steps == 60}) == 12
    assert len({cell.network for cell in core.cells if cell.steps == 300}) == 4
    assert len({cell.data for cell in core.cells}) == 2
    assert core.seeds >= 5
    assert {cell.network for cell in full.cells} == set(NETWORKS)
    plain = [n for n in NETWORKS.values() if not n.model_args and n.image_size < 128]
    assert len(plain) == 24
    assert min(len({n.family for n in plain if n.seen is seen}) for seen in (True, False)) >= 8
    assert sum(n.image_size == 128 for n in NETWORKS.values()) == 3


@pytest.mark.slow
def test_smoke(folder, tmp_path):
    """The whole command; a network of random weights is as good a start shuffled as not."""
    out = tmp_path / 'out.jsonl'
    arguments = ['--out', str(out), '--data', f'cifar10={folder}', f'tiny_imagenet_32={folder}', '--tier', 'smoke']
    assert command.main(arguments) == 0
    lines = schedule.read_lines(out)
    assert len({line['arm'] for line in lines}) == 5
    assert command.main(arguments) == 0
    assert schedule.read_lines(out) == lines
    assert 'All 1 cells are complete.' in (tmp_path / 'out.report' / 'report.md').read_text()


@pytest.mark.slow
def test_a_shuffled_random_network_ends_where_it_would_have(setting, monkeypatch):
    from benchmarks.initperf.arms import ARMS, kaiming, registered

    def shuffled(model, data):
        kaiming(model, data)
        shuffle_weights_(model, data.seed)

    cell = dataclasses.replace(CELL, network='test_resnet@64', steps=12)
    with registered('shuffled_kaiming', shuffled):
        assert 'shuffled_kaiming' in ARMS
        found = {
            arm: torch.tensor(
                [execute(Run(cell, arm, 'report', 1e-3, seed, 12), setting)['accuracy'] for seed in range(12)]
            )
            for arm in ('kaiming', 'shuffled_kaiming')
        }
    gains = found['kaiming'] - found['shuffled_kaiming']
    assert abs(float(gains.mean())) < 3 * float(gains.std()) / len(gains) ** 0.5 + 1e-9
