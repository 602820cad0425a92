"""The grid of initialisations: each cell is run once, goes into the report, and chooses the learning rates."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from pictures import make_dataset, save_dataset

ARMS = ('random', 'orth')


class Pool:
    """Stands for a pool of processes, and runs everything in this one."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def apply_async(self, function, arguments):
        result = function(*arguments)
        return SimpleNamespace(get=lambda: result)

    def close(self) -> None:
        pass

    join = close


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('data') / 'colours', make_dataset(24), make_dataset(12, seed=1))


@pytest.fixture
def grid(script, monkeypatch, folder):
    """The script, whose runs stay in this process, and the arguments of a small grid."""
    module = script('init_grid')
    monkeypatch.setattr(module.multiprocessing, 'get_context', lambda _: SimpleNamespace(Pool=Pool))
    arguments = ['--ghn', 'ghn_tiny', '--dataset', f'colours={folder}', '--models', 'test_vit', '--arms', *ARMS]
    yield module, [*arguments, '--seeds', '2', '--epochs', '1', '--name', 'trial']
    logging.disable(logging.NOTSET)


def read_cells(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cells_run_once_and_later_seeds_take_the_best_learning_rate_of_their_arm(grid, tmp_path):
    module, arguments = grid
    arguments += ['--lr', '1e-3', '1e-5', '--sweep-seeds', '1', '--out', str(tmp_path)]
    assert module.main(arguments) == 0
    cells = read_cells(tmp_path / 'init_grid-trial.jsonl')
    assert all([epoch['epoch'] for epoch in cell['epochs']] == [0, 1] for cell in cells)
    final = {(cell['arm'], cell['lr']): cell['epochs'][-1]['val_top1'] for cell in cells if cell['seed'] == 0}
    assert final.keys() == {(arm, lr) for arm in ARMS for lr in (1e-3, 1e-5)}
    text = (tmp_path / 'init_grid-trial.md').read_text()
    for arm in ARMS:
        (chosen,) = [cell['lr'] for cell in cells if (cell['arm'], cell['seed']) == (arm, 1)]
        assert final[arm, chosen] == max(final[arm, lr] for lr in (1e-3, 1e-5))
        assert f'| colours | test_vit | {arm} | {final[arm, 1e-5]:.1f} | {final[arm, 1e-3]:.1f} |' in text
    assert '6 of 6 runs are finished; 0 failed' in text
    assert '- orth: ' in text
    assert '| colours | test_vit | ' in text
    assert '| data | model | arm | 1e-05 | 0.001 |' in text
    assert str(tmp_path) not in text
    assert (tmp_path / 'init_grid-trial.png').stat().st_size > 10_000
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / 'runs').rglob('*') if path.is_file()}
    assert {path.name for path in runs} == {'results.jsonl'}, 'only the curves are kept'
    assert module.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs


def test_another_grid_chooses_the_learning_rates(grid, tmp_path):
    module, arguments = grid
    top1 = {1e-3: 40.0, 2e-3: 60.0, 4e-3: 50.0}
    rates = tmp_path / 'rates.jsonl'
    with rates.open('w') as file:
        for arm in ARMS:
            for lr, accuracy in top1.items():
                epochs = [{'epoch': 1, 'val_top1': accuracy if arm == 'random' else 100 - accuracy}]
                cell = {'dataset': 'colours', 'model': 'test_vit', 'arm': arm, 'lr': lr, 'seed': 0, 'epochs': epochs}
                file.write(json.dumps(cell) + '\n')
    arguments += ['--rates', str(rates), '--out', str(tmp_path)]
    args = module.parse(arguments)
    assert '--rates rates.jsonl' in args.command
    assert {(cell.arm, cell.lr, cell.seed) for cell in module.cells_of(args)} == {
        (arm, lr, seed) for arm, lr in (('random', 2e-3), ('orth', 1e-3)) for seed in (0, 1)
    }
    with pytest.raises(SystemExit, match="no learning rate for 'colours test_vit raw'"):
        module.main([*arguments, '--arms', 'random', 'raw'])


def test_a_run_that_fails_is_named(grid, tmp_path, capsys):
    module, arguments = grid
    assert module.main([*arguments, '--shots', '1000', '--seeds', '1', '--out', str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert 'expected 1000 images of each class' in errors
    assert 'nothing is finished yet' in errors
