"""The grid of initialisations runs, goes on where it stopped, and reports what it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pictures import make_dataset, save_dataset

SCRIPT = Path(__file__).resolve().parents[2] / 'benchmarks' / 'init_grid.py'


def run(out: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(SCRIPT),
        '--ghn',
        'ghn_tiny',
        '--dataset',
        f'colours={folder}',
        '--models',
        'test_vit',
        '--arms',
        'random',
        'orth',
        '--seeds',
        '2',
        '--epochs',
        '2',
        '--workers',
        '1',
        '--out',
        str(out),
        '--name',
        'trial',
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, env=environment)


def test_every_cell_runs_once_and_is_in_the_table(tmp_path):
    folder = save_dataset(tmp_path / 'colours', make_dataset(48), make_dataset(12, seed=1))
    out = tmp_path / 'out'
    done = run(out, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [json.loads(line) for line in (out / 'init_grid-trial.jsonl').read_text().splitlines()]
    assert {(cell['arm'], cell['seed']) for cell in cells} == {(a, s) for a in ('random', 'orth') for s in (0, 1)}
    assert all([epoch['epoch'] for epoch in cell['epochs']] == [0, 1, 2] for cell in cells)
    text = (out / 'init_grid-trial.md').read_text()
    assert '4 of 4 runs are finished; 0 failed' in text
    assert str(tmp_path) not in text.replace(str(out), '')
    assert '| colours | test_vit | ' in text
    assert (out / 'init_grid-trial.png').stat().st_size > 10_000
    runs = {path: path.stat().st_mtime_ns for path in (out / 'runs').rglob('results.jsonl')}
    assert run(out, folder).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (out / 'runs').rglob('results.jsonl')} == runs
    assert not list((out / 'runs').rglob('*.safetensors')), 'only the curves are kept'


def test_later_seeds_take_the_best_learning_rate_of_their_arm(tmp_path):
    folder = save_dataset(tmp_path / 'colours', make_dataset(48), make_dataset(12, seed=1))
    out = tmp_path / 'out'
    done = run(out, folder, '--lr', '1e-3', '1e-5', '--sweep-seeds', '1')
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [json.loads(line) for line in (out / 'init_grid-trial.jsonl').read_text().splitlines()]
    final = {(cell['arm'], cell['lr']): cell['epochs'][-1]['val_top1'] for cell in cells if cell['seed'] == 0}
    for arm in ('random', 'orth'):
        (chosen,) = [cell['lr'] for cell in cells if (cell['arm'], cell['seed']) == (arm, 1)]
        assert final[arm, chosen] == max(final[arm, lr] for lr in (1e-3, 1e-5))
    text = (out / 'init_grid-trial.md').read_text()
    assert '6 of 6 runs are finished; 0 failed' in text
    assert '- orth: ' in text
    assert '| data | model | arm | 1e-05 | 0.001 |' in text
    for arm in ('random', 'orth'):
        assert f'| colours | test_vit | {arm} | {final[arm, 1e-5]:.1f} | {final[arm, 1e-3]:.1f} |' in text


def test_another_grid_chooses_the_learning_rates(tmp_path):
    folder = save_dataset(tmp_path / 'colours', make_dataset(48), make_dataset(12, seed=1))
    epochs = {1e-3: 40.0, 2e-3: 60.0, 4e-3: 50.0}
    cells = [
        {'dataset': 'colours', 'model': 'test_vit', 'arm': arm, 'lr': lr, 'seed': 0}
        | {'epochs': [{'epoch': 1, 'val_top1': top1 if arm == 'random' else 100 - top1}]}
        for arm in ('random', 'orth')
        for lr, top1 in epochs.items()
    ]
    rates = tmp_path / 'rates.jsonl'
    rates.write_text(''.join(json.dumps(cell) + '\n' for cell in cells))
    out = tmp_path / 'out'
    done = run(out, folder, '--rates', str(rates))
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [json.loads(line) for line in (out / 'init_grid-trial.jsonl').read_text().splitlines()]
    assert {(cell['arm'], cell['lr'], cell['seed']) for cell in cells} == {
        (arm, lr, seed) for arm, lr in (('random', 2e-3), ('orth', 1e-3)) for seed in (0, 1)
    }
    text = (out / 'init_grid-trial.md').read_text()
    assert '4 of 4 runs are finished; 0 failed' in text
    assert 'Learning rates: colours test_vit: orth 0.001, random 0.002.' in text
    assert '--rates rates.jsonl' in text
    assert 'By learning rate' not in text
    lacking = run(out, folder, '--rates', str(rates), '--arms', 'random', 'raw')
    assert lacking.returncode == 1
    assert "no learning rate for 'colours test_vit raw'" in lacking.stderr


def test_a_run_that_fails_is_named(tmp_path):
    folder = save_dataset(tmp_path / 'colours', make_dataset(48), make_dataset(12, seed=1))
    done = run(tmp_path / 'out', folder, '--shots', '1000', '--seeds', '1')
    assert done.returncode == 1
    assert 'expected 1000 images of each class' in done.stderr
    assert 'nothing is finished yet' in done.stderr
