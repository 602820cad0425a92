"""Real processes: accelerate launch, several at once, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import make_dataset, save_dataset
from safetensors.torch import load_file

from timm_ghn.data.splits import load_splits
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.setup import build, loaders
from timm_ghn.runs.results import read_results

#: accelerate launch starts several processes on a CPU only under this name.
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no']  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    # Sizes that no batch divides: the last one of the validation is partial, and uneven over the processes.
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(50), make_dataset(21, seed=1))


def arguments(folder, output, more: str = '') -> list[str]:
    given = (
        f'--model test_vit --init random --dataset {folder} --image-size 32 --epochs 2 --val-split test --opt sgd '
        f'--lr 0.05 --train-crop-mode pad --output {output} {more}'
    )
    return given.split()


ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}


def launched(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def processes(number: int) -> list[str]:
    port = 20_000 + os.getpid() % 20_000
    more = f'--multi_gpu --num_processes {number} --main_process_port {port} -m timm_ghn.finetune'
    return [*LAUNCH, *more.split()]


def test_two_processes_equal_one_at_the_same_total_batch(folder, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    command = [*LAUNCH, '--cpu', '-m', 'timm_ghn.finetune']
    launched([*command, *arguments(folder, one, '--batch-size 12 --val-split auto')])
    done = launched([*processes(2), *arguments(folder, two, '--batch-size 6 --val-split auto')])
    assert done.stderr.count('epoch 2:') == 1, 'only the main process speaks'
    first, second = (load_file(output / 'model.safetensors') for output in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5)
    for line, other in zip(*(read_results(output / 'results.jsonl') for output in (one, two)), strict=True):
        for name in ('val_images', 'val_top1', 'test_images', 'test_top1'):
            assert line.get(name) == other.get(name)
        for name in ('val_loss', 'train_loss', 'test_loss'):
            assert (name in line) == (name in other)
            assert line.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-4)


def test_two_processes_evaluate_the_averaged_weights_that_are_written(folder, tmp_path):
    output = tmp_path / 'two'
    more = '--batch-size 6 --model test_resnet --small-stem off --model-ema --model-ema-decay 0.5'
    launched([*processes(2), *arguments(folder, output, more)])
    options = FinetuneOptions(
        dataset=str(folder), val_split='test', model='test_resnet', init='random', small_stem='off', image_size=32,
        batch_size=21,
    )  # fmt: skip
    start = build(options, 3)
    start.model.load_state_dict(load_file(output / 'model_ema.safetensors'))
    _, batches, _ = loaders(options, load_splits(options), start.data_config, 1)
    (batch,) = batches
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(start.model.eval()(batch[0]), batch[1])
    told = [line for line in read_results(output / 'results.jsonl') if line['kind'] == 'epoch'][-1]
    assert told['ema_loss'] == pytest.approx(float(loss), rel=1e-5)


def test_a_killed_run_ends_as_if_it_had_not_been(folder, tmp_path):
    more = '--batch-size 4 --checkpoint-steps 3 --opt adamw --lr 0.002 --mixup 0.2 --model-args drop_path_rate=0.2'
    command = [sys.executable, '-m', 'timm_ghn.finetune']
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    launched([*command, *arguments(folder, whole, more)])
    for kill in range(4):
        words = arguments(folder, killed, f'{more} {"--resume" if kill else ""}')
        process = subprocess.Popen([*command, *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        before = newest(killed)
        while process.poll() is None and newest(killed) == before:
            time.sleep(0.002)
        if kill == 3:
            assert process.wait() == 0
        # Anywhere between one checkpoint and the next, in the middle of writing one too.
        time.sleep(0.013 * kill)
        process.kill()
        process.wait()
    first, second = (load_file(output / 'model.safetensors') for output in (whole, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(whole) == losses(killed)


def test_terminated_processes_stop_at_one_step(folder, tmp_path):
    output = tmp_path / 'two'
    more = '--batch-size 6 --epochs 5000 --lr 0.001'
    command = [*processes(2), *arguments(folder, output, more)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not newest(output):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'go on with --resume' in said
    end = read_results(output / 'results.jsonl')[-1]
    assert (end['kind'], end['finished']) == ('end', False)
    launched([*processes(2), *arguments(folder, output, f'{more} --resume --max-steps {end["steps"] + 2}')])
    assert read_results(output / 'results.jsonl')[-1]['steps'] == end['steps'] + 2


def losses(output: Path) -> list[tuple[float, float]]:
    lines = read_results(output / 'results.jsonl')
    return [(line['epoch'], line['val_loss']) for line in lines if line['kind'] == 'epoch']


def newest(output: Path) -> str:
    return max((place.name for place in (output / 'checkpoints').glob('step_*')), default='')
