import contextlib
import dataclasses
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import timm
import torch
from pictures import make_dataset, save_dataset
from safetensors.torch import load_file

from timm_ghn import load_ghn, predict
from timm_ghn.architectures.small_images import adapt_to_small_images_
from timm_ghn.data.splits import load_splits
from timm_ghn.errors import CheckpointError, ConfigError, DataError, TrainingError, UnsupportedModelError
from timm_ghn.finetune import loop
from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.setup import build, loaders
from timm_ghn.runs import checkpoints
from timm_ghn.runs.results import read_results


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(50), make_dataset(21, seed=1))


def options_for(folder, output):
    return FinetuneOptions(
        model='test_vit', init='random', dataset=str(folder), val_split='test', image_size=32, epochs=2, batch_size=12,
        lr=3e-3, train_crop_mode='pad', output=output,
    )  # fmt: skip


@pytest.fixture
def base(folder, tmp_path):
    return options_for(folder, tmp_path / 'out')


def weights(options, name='model.safetensors'):
    return load_file(options.output / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps(options):
    """Of the checkpoints that there are."""
    names = sorted(place.name.removeprefix('step_') for place in (options.output / 'checkpoints').iterdir())
    return [int(name) for name in names if name.isdecimal()]


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """Weights of a run with the options ``base`` that nothing stopped."""
    options = options_for(folder, tmp_path_factory.mktemp('whole'))
    assert finetune(options).steps == 8
    return weights(options)


def test_colours_are_learnt_and_everything_is_written_down(base):
    pytest.importorskip('tensorboard')
    options = dataclasses.replace(base, epochs=5, model_ema=True, model_ema_decay=0.8, log_with='tensorboard')
    result = finetune(options)
    assert (result.finished, result.steps) == (True, 5 * 4)
    assert result.test_top1 is None, 'the split is validated on'
    assert result.epochs[-1]['val_top1'] > 90 > 60 > result.epochs[0]['val_top1']
    lines = read_results(options.output / 'results.jsonl')
    assert [line['kind'] for line in lines] == ['run', *['epoch'] * 6, 'end']
    assert lines[0]['arguments'] == json.loads(json.dumps(options.to_dict()))
    assert lines[0]['versions']['timm'] == timm.__version__
    assert all(line['val_images'] == 21 for line in result.epochs)
    assert [line['epoch'] for line in result.epochs] == [0, 1, 2, 3, 4, 5]
    assert result.epochs[-1]['lr'] < result.epochs[1]['lr'] == options.lr
    for name in ('model.safetensors', 'model_best.safetensors', 'model_ema.safetensors', 'curves.png'):
        assert (options.output / name).stat().st_size > 1000
    assert not same(weights(options), weights(options, 'model_ema.safetensors'))
    events = (options.output / 'timm_ghn').rglob('events.out.tfevents.*')
    assert any(b'val_top1' in file.read_bytes() for file in events)
    # Plain timm, and others, can read the weights.
    file, plain = options.output / 'model.safetensors', options.output / 'plain'
    model = timm.create_model('test_vit', checkpoint_path=file, num_classes=3, img_size=32, patch_size=4)
    assert same(model.state_dict(), weights(options))
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_run_depends_on_its_options_alone_and_leaves_the_process_as_it_was(base, tmp_path):
    def seed(number):
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(number)

    options = dataclasses.replace(
        base, epochs=1, aa='rand-m9', reprob=0.2, mixup=0.2, cutmix=0.5, model_args='drop_path_rate=0.3'
    )
    seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    seed(5)
    finetune(dataclasses.replace(options, mixed_precision='bf16'))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert all(value.dtype == torch.float32 for value in weights(options).values())
    plain = dataclasses.replace(options, output=tmp_path / 'plain')
    finetune(plain)
    again = dataclasses.replace(plain, mixed_precision='no', output=tmp_path / 'again')
    finetune(again)
    assert same(weights(plain), weights(again)), 'a run does not take over the precision of the one before'
    other = dataclasses.replace(again, seed=1, output=tmp_path / 'other')
    finetune(other)
    assert not same(weights(plain), weights(other))


def test_a_run_that_stopped_ends_as_if_it_had_not(base, tmp_path):
    options = dataclasses.replace(
        base, epochs=3, mixup=0.2, model_ema=True, clip_grad=1.0, model_args='drop_path_rate=0.3',
        sched_on_updates=True, warmup_epochs=1, grad_accum_steps=2,
    )  # fmt: skip
    finetune(options)
    stopped = dataclasses.replace(options, output=tmp_path / 'stopped', max_steps=3)
    first = finetune(stopped)
    assert (first.finished, first.steps) == (False, 3), 'in the middle of an epoch'
    assert finetune(dataclasses.replace(stopped, max_steps=None, resume=True)).finished
    for name in ('model.safetensors', 'model_ema.safetensors', 'model_best.safetensors'):
        assert same(weights(stopped, name), weights(options, name))
    lines, parts = (read_results(run.output / 'results.jsonl') for run in (options, stopped))
    assert [line['kind'] for line in parts] == [line['kind'] for line in lines]
    for line, other in zip(lines[1:-1], parts[1:-1], strict=True):
        timed = ('seconds', 'train_seconds')
        assert {k: v for k, v in line.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_the_best_weights_are_tested_once_at_the_end(base, monkeypatch):
    evaluate, seen = loop._FinetuneRun._evaluate, []

    def watched(run, model, batches, split):
        seen.append((split, len(batches.dataset)))
        metrics = evaluate(run, model, batches, split)
        if split == 'validation':
            # The second epoch is the best one, whatever it is.
            metrics['top1'] = 90.0 if run.progress.epoch == 2 else 10.0
        return metrics

    monkeypatch.setattr(loop._FinetuneRun, '_evaluate', watched)
    options = dataclasses.replace(base, val_split='auto', epochs=3, lr=1e-2, model_ema=True)
    assert not finetune(dataclasses.replace(options, max_steps=7)).finished
    assert {split for split, _ in seen} == {'validation'}
    result = finetune(dataclasses.replace(options, resume=True))
    assert [number for split, number in seen if split == 'test'] == [21]
    assert {number for split, number in seen if split == 'validation'} == {5}
    lines = read_results(options.output / 'results.jsonl')
    assert lines[0]['splits'] == ['train', '0.1 of train']
    assert lines[0]['images'] == {'train': 45, 'val': 5, 'test': 21}
    assert all('test_top1' not in line for line in lines[:-1])
    best = weights(options, 'model_best.safetensors')
    assert not same(best, weights(options))
    # The same weights on the same images, by hand.
    start = build(options, 3)
    start.model.load_state_dict(best)
    test = loaders(options, load_splits(options), start.data_config, 1)[2]
    with torch.no_grad():
        right = sum(int((start.model.eval()(images).argmax(1) == labels).sum()) for images, labels, _ in test)
    assert lines[-1]['test_top1'] == result.test_top1 == pytest.approx(100 * right / 21)


def test_a_run_that_is_out_of_time_goes_on_and_is_not_written_over(base, whole):
    result = finetune(dataclasses.replace(base, time_limit=1e-6))
    assert (result.finished, result.steps <= 1) == (False, True)
    before = (base.output / 'results.jsonl').read_bytes()
    with pytest.raises(ConfigError, match='holds a run: go on with --resume'):
        finetune(base)
    with pytest.raises(CheckpointError, match=r'is of another run \(lr was 0.003 and is 0.1'):
        finetune(dataclasses.replace(base, resume=True, lr=0.1))
    assert (base.output / 'results.jsonl').read_bytes() == before
    for _ in range(2):  # the second finds nothing left to do
        result = finetune(dataclasses.replace(base, resume=True))
        assert result.finished
        assert same(weights(base), whole)
        assert [line['epoch'] for line in result.epochs] == [0, 1, 2]


@pytest.fixture
def heard():
    """The SIGTERMs that reach this process."""
    numbers = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, previous)


def test_sigterm_stops_a_run_with_a_checkpoint_and_then_the_process(base, whole, monkeypatch, heard):
    """Launchers pass on what schedulers send to all processes: two are as one."""
    after_step = loop._FinetuneRun._after_step

    def terminated(run, loss):
        after_step(run, loss)
        if run.progress.step == 3 and not run.options.resume:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert not heard, 'it waits for the checkpoint'

    monkeypatch.setattr(loop._FinetuneRun, '_after_step', terminated)
    result = finetune(base)
    assert (result.finished, result.steps) == (False, 3)
    assert len(heard) == 1
    assert finetune(dataclasses.replace(base, resume=True)).finished
    assert same(weights(base), whole)


def test_a_run_in_a_thread_leaves_signals_alone(base, heard):
    results = []
    thread = threading.Thread(target=lambda: results.append(finetune(dataclasses.replace(base, max_steps=1))))
    thread.start()
    thread.join()
    assert results[0].steps == 1
    signal.raise_signal(signal.SIGTERM)
    assert len(heard) == 1


@contextlib.contextmanager
def full_disk():
    """No file grows beyond a megabyte: the weights fit, the optimiser's state does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_is_damaged_or_cannot_be_written_gives_way_to_the_one_before(base, whole):
    options = dataclasses.replace(base, checkpoint_steps=2)
    finetune(dataclasses.replace(options, max_steps=5))
    assert steps(base) == [4, 5]
    before, last = checkpoints.checkpoints_in(base.output / 'checkpoints')
    copied = shutil.copytree(last, last.with_name(f'{last.name}_mine'))
    data = (last / 'model.safetensors').read_bytes()
    (last / 'model.safetensors').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = dataclasses.replace(options, resume=True)
    with (
        full_disk(),
        pytest.warns(UserWarning, match=r'step_00000005.* is passed over: model.safetensors'),
        pytest.raises(TrainingError, match=r'step_00000006.* cannot be written: .*; those before it are still there'),
    ):
        finetune(again)
    assert steps(base) == [4, 5]
    (before / 'model.safetensors').unlink()
    with pytest.warns(UserWarning, match='passed over'):
        assert finetune(dataclasses.replace(again, max_steps=3)).steps == 3
    assert steps(base) == [2, 3], 'what lies ahead is removed, and never kept in the place of a good one'
    assert copied.is_dir(), 'what is no checkpoint of the run is left alone'
    assert finetune(again).finished
    assert same(weights(base), whole)


@pytest.mark.filterwarnings('ignore:overflow', 'ignore:invalid value')
def test_a_loss_that_is_not_finite_ends_the_run_clearly(base):
    with pytest.raises(TrainingError, match=r'the loss is (nan|inf) by step \d+; begin again with a smaller --lr'):
        finetune(dataclasses.replace(base, opt='sgd', lr=1e20, epochs=20))


@pytest.mark.parametrize('what', ['epoch', 'stop'])
def test_weights_that_the_last_step_lost_are_not_written(base, monkeypatch, what):
    # The losses are finite: they are computed before the step.
    step = loop._FinetuneRun._after_step
    options = dataclasses.replace(base, epochs=1, model_ema=True, max_steps=2 if what == 'stop' else None)

    def lost(run, loss):
        if run.progress.step == 3:
            torch.nn.init.constant_(run.trained.head.weight, torch.nan)
        step(run, loss)
        if what == 'stop' and run.progress.step == 2:
            torch.nn.init.constant_(run.average.module.head.weight, torch.inf)

    monkeypatch.setattr(loop._FinetuneRun, '_after_step', lost)
    with pytest.raises(
        TrainingError,
        match=f'weights are not finite after step {"2" if what == "stop" else "4"}; begin again with a smaller --lr',
    ):
        finetune(options)
    assert not list((base.output / 'checkpoints').glob('step_*'))
    written = sorted(base.output.glob('*.safetensors'))
    assert [path.name for path in written] == ['model_best.safetensors'], 'that of before the training'
    assert all(tensor.isfinite().all() for tensor in load_file(written[0]).values())


def test_masks_of_minus_infinity_are_no_lost_weights(base, monkeypatch):
    start = loop.build

    def masked(*args):
        found = start(*args)
        found.model.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
        return found

    monkeypatch.setattr(loop, 'build', masked)
    assert finetune(dataclasses.replace(base, epochs=1)).finished


HOLDER = """
import fcntl, sys
file = open(sys.argv[1] + '/.lock', 'w')
fcntl.lockf(file, fcntl.LOCK_EX)
print('locked', flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='no such locks')
def test_a_folder_has_one_run_at_a_time(base):
    base.output.mkdir()
    options = dataclasses.replace(base, max_steps=1, resume=True)
    command = [sys.executable, '-c', HOLDER, str(base.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'locked\n'
        with pytest.raises(ConfigError, match=r"another run is at work in '.*out': wait for its end, or choose"):
            finetune(options)
        assert [path.name for path in base.output.iterdir()] == ['.lock']
        other.kill()
    assert finetune(options).steps == 1


def test_a_start_is_that_of_ghn_init_with_calibrated_statistics(base):
    options = dataclasses.replace(base, model='test_resnet', init='ghn_tiny', max_steps=1, lr=1e-30, weight_decay=0.0)
    loss = finetune(options).epochs[0]['val_loss']
    torch.manual_seed(options.seed)
    start = timm.create_model('test_resnet', num_classes=3)
    adapt_to_small_images_(start, 32)
    name = 'layer2.0.conv1.weight'
    expected = predict(start, load_ghn('ghn_tiny'), input_size=32).state_dict[name]
    torch.testing.assert_close(weights(options)[name], expected, rtol=1e-5, atol=1e-6)
    raw = dataclasses.replace(options, calibrate_batches=0, output=base.output.with_name('raw'))
    assert finetune(raw).epochs[0]['val_loss'] != loss


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'model': 'test_vitt'}, UnsupportedModelError, "no model 'test_vitt'; did you mean"),
        ({'model_args': 'depths=3'}, UnsupportedModelError, 'timm cannot build'),
        ({'dataset': 'nowhere/at-all'}, DataError, 'cannot be loaded'),
        ({'opt': 'adamm'}, ConfigError, 'no optimiser'),
        ({'sched': 'cosinus'}, ConfigError, "no schedule 'cosinus'"),
        ({'warmup_epochs': 2}, ConfigError, 'warmup_epochs below epochs'),
        ({'mixup': 0.1, 'batch_size': 9}, ConfigError, 'whole batches of an even size'),
        ({'mixup': 0.1, 'batch_size': 64}, ConfigError, 'whole batches of an even size'),
        ({'log_with': 'nothing'}, ConfigError, 'nothing'),
        ({'mean': (0.1, 0.2)}, ConfigError, 'expected mean to have 3 values'),
        ({'image_size': 30}, UnsupportedModelError, '30'),
        ({'model': 'test_vit.nothing'}, UnsupportedModelError, 'nothing'),
        ({'model': 'test_resnet', 'model_args': 'features_only=true'}, ConfigError, 'has no classifier'),
        ({'sched': 'plateau'}, ConfigError, 'waits for a metric'),
        ({'model_args': 'in_chans=1', 'mean': (0.1, 0.2)}, ConfigError, 'expected mean to have 1 values'),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(base, changes, error, message, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    with pytest.raises(error, match=message):
        finetune(dataclasses.replace(base, **changes))
    assert not (base.output / 'checkpoints').exists()
    assert not (base.output / 'results.jsonl').exists()


def test_a_model_of_one_channel_is_trained_on_grey_and_damaged_images_are_passed_over(base, tmp_path):
    folder = save_dataset(tmp_path / 'bad', make_dataset(50, damaged=(3, 7)), make_dataset(21, damaged=(0, 20)))
    options = dataclasses.replace(
        base, model='test_efficientnet', model_args='in_chans=1', mean=(0.25,), epochs=1, batch_size=10,
        dataset=str(folder),
    )  # fmt: skip
    last = finetune(options).epochs[-1]
    assert (last['train_damaged'], last['val_damaged'], last['val_images']) == (2, 2, 19)
    assert weights(base)['conv_stem.weight'].shape[1] == 1
    config = read_results(base.output / 'results.jsonl')[0]['data_config']
    own = timm.get_pretrained_cfg('test_efficientnet').std
    assert len(set(own)) > 1
    assert (config['mean'], config['std']) == ([0.25], pytest.approx([sum(own) / 3]))


def test_accumulated_gradients_are_those_of_the_whole_batch(base, tmp_path):
    """48 images: the last step of an epoch, too, averages the batches that it has."""
    found = {}
    for size, parts, count in ((48, 1, 2), (6, 8, 2), (6, 16, 2), (6, 5, 4)):
        changes = {'batch_size': size, 'grad_accum_steps': parts, 'output': tmp_path / f'{size}-{parts}'}
        options = dataclasses.replace(base, opt='sgd', lr=0.05, **changes)
        assert finetune(options).steps == count
        found[parts] = weights(options)
    for name, value in found[1].items():
        torch.testing.assert_close(found[8][name], value, rtol=1e-4, atol=1e-5)
    assert same(found[16], found[8])
    assert not same(found[5], found[8])


def test_a_few_images_more_than_a_batch_can_be_calibrated_with(base, tmp_path):
    folder = save_dataset(tmp_path / 'few', make_dataset(13), make_dataset(12, seed=1))
    options = dataclasses.replace(base, model='test_resnet', dataset=str(folder), small_stem='off', epochs=1)
    assert finetune(options).finished


def test_channels_last_changes_the_layout_and_not_the_result(base, tmp_path):
    options = dataclasses.replace(base, model='test_nfnet', opt='sgd', lr=0.01, max_steps=2)
    finetune(options)
    last = dataclasses.replace(options, channels_last=True, output=tmp_path / 'last')
    convolution = build(last, 3).model.stem.conv2
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    finetune(last)
    whole = weights(options)
    for name, value in weights(last).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=3e-4)
