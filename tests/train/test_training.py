import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from pictures import make_dataset, save_dataset
from safetensors.torch import load_file

from timm_ghn import load_ghn
from timm_ghn.architectures import architecture as architectures
from timm_ghn.architectures.samplers import NamesSampler
from timm_ghn.errors import CheckpointError, ConfigError, DataError, TrainingError, UnsupportedModelError
from timm_ghn.runs.results import read_results
from timm_ghn.train import loop
from timm_ghn.train.evaluate import EvaluateOptions, evaluate
from timm_ghn.train.loop import train
from timm_ghn.train.options import TrainOptions
from timm_ghn.train.step import Outcome

CHEAP = {
    'families': ['resnet_basic', 'vgg'], 'macs': 600_000, 'parameters': [1_000, 60_000], 'activations': 30_000,
    'attempts': 2000,
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(120), make_dataset(60, seed=1))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('architectures')


@pytest.fixture
def base(folder, cache, tmp_path):
    return TrainOptions(
        dataset=str(folder), hid=16, layers=1, templates=4, codes=8, max_channels=256, sampler_args=CHEAP, held_out=(),
        pool=6, steps=6, meta_batch=2, batch_size=16, lr=3e-3, warmup_steps=2, eval_steps=6, eval_count=1,
        eval_images=60, log_steps=2, checkpoint_steps=2, cache=cache, output=tmp_path / 'out',
    )  # fmt: skip


def weights(options):
    return load_file(options.output / 'ghn' / 'model.safetensors')


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(options):
    lines = read_results(options.output / 'results.jsonl')
    return [(line['step'], line['loss']) for line in lines if line['kind'] == 'train']


def test_networks_that_were_never_trained_tell_colours_apart(base):
    # Only what many architectures share serves those that were never seen.
    options = dataclasses.replace(
        base, hid=32, codes=16, pool=20, steps=100, lr=2e-3, log_steps=50, eval_steps=100, ema_decay=0.9
    )
    result = train(options)
    assert result.finished
    assert result.evaluations[-1]['known'] > 50, 'chance is a third'
    ghn = load_ghn(options.output / 'ghn')
    assert (ghn.config.decoder, ghn.config.rules, ghn.config.num_classes) == ('templates', 'operators', 3)
    assert (options.output / 'curves.png').read_bytes().startswith(b'\x89PNG')
    recipe = options.output / 'recipe.yaml'
    recipe.write_text(json.dumps({'sampler_args': CHEAP}))
    chosen = {'ghn': str(options.output / 'ghn'), 'dataset': options.dataset, 'families': 'vgg,resnet_basic'}
    rows = evaluate(EvaluateOptions(**chosen, count=1, recipe=recipe, images=60))
    assert {row.family for row in rows} == {'vgg', 'resnet_basic'}
    assert all(0 <= row.top1 <= 100 and 0 < row.parameters <= 60_000 for row in rows)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(base, tmp_path, monkeypatch):
    options = dataclasses.replace(base, opt='muon', decay_steps=3, augment='flip', own_images=True)
    train(options)
    stopped = dataclasses.replace(options, output=tmp_path / 'stopped')
    step = loop._TrainRun._step

    def stop(self, number):
        if number == 5 and not self.options.resume:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(loop._TrainRun, '_step', stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    resumed = train(dataclasses.replace(stopped, resume=True))
    assert resumed.finished
    assert same(weights(options), weights(stopped))
    assert losses(options) == losses(stopped)
    assert len(losses(options)) == 3
    # With a constant rate, it can be made longer.
    longer = dataclasses.replace(stopped, steps=8, resume=True)
    with pytest.raises(CheckpointError):
        train(dataclasses.replace(longer, decay_steps=0))
    result = train(longer)
    assert (result.finished, result.steps) == (True, 8)


def test_a_run_goes_on_from_a_ghn_also_of_other_classes(base, tmp_path):
    train(base)
    more = dataclasses.replace(base, init=str(base.output / 'ghn'), steps=2, lr=1e-30, output=tmp_path / 'more')
    with pytest.raises(ConfigError, match='another GHN than the options describe: hid is 16 there and 32 here'):
        train(dataclasses.replace(more, hid=32))
    train(more)
    assert all(torch.allclose(value, weights(more)[name]) for name, value in weights(base).items())
    classes = ('red', 'green')
    folder = save_dataset(tmp_path / 'other', make_dataset(80, classes), make_dataset(40, classes, seed=1))
    other = dataclasses.replace(more, dataset=str(folder), output=tmp_path / 'other')
    train(other)
    before, after = weights(base), weights(other)
    assert after['decoder.classes.weight'].shape == (2, 8)
    for name in ('decoder.classes.weight', 'shape_enc.embed_channel.weight'):
        del before[name]
    assert all(torch.allclose(value, after[name]) for name, value in before.items())


def test_a_constant_rate_decays_at_the_end(base):
    options = dataclasses.replace(base, lr=1.0, steps=10, warmup_steps=2, decay_steps=4)
    assert [loop.rate(options, step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_muon_changes_templates_in_all_directions(base):
    """The singular values of an update are alike, as they are not for a gradient; everything else is AdamW's."""
    ghn = loop._ghn(base, 3)
    optimizer = loop._optimizer(dataclasses.replace(base, opt='muon'), ghn)
    before = {name: parameter.detach().clone() for name, parameter in ghn.named_parameters()}
    for parameter in ghn.parameters():
        parameter.grad = torch.randn_like(parameter)
    templates = ghn.decoder.banks['conv'].templates
    templates.grad = templates.grad * torch.logspace(0, -2, len(templates))[:, None]
    optimizer.step()
    values = torch.linalg.svdvals(templates.detach() - before['decoder.banks.conv.templates'])
    assert values.max() < 2 * values.min()
    hidden = ghn.decoder.hidden.weight.detach() - before['decoder.hidden.weight']
    assert torch.allclose(hidden.abs(), hidden.abs().mean().expand_as(hidden), rtol=0.1)


@pytest.mark.parametrize(
    ('name', 'broken'), [('train_step', lambda *_, **__: Outcome((), (), 1)), ('clip_grad_norm_', lambda *_: math.inf)]
)
def test_steps_without_a_finite_loss_and_gradient_end_the_run(base, monkeypatch, name, broken):
    monkeypatch.setattr(loop, name, broken)
    with pytest.raises(TrainingError, match=r'a finite loss and gradient in 3 steps \(now 3\)'):
        train(dataclasses.replace(base, max_skipped=3))


def test_an_architecture_that_cannot_be_traced_ends_the_run_and_loses_nothing(base, tmp_path, monkeypatch):
    base = dataclasses.replace(base, sampler='names', sampler_args={'names': ['test_resnet']})
    assert not train(dataclasses.replace(base, time_limit=1e-9)).finished
    assert load_ghn(base.output / 'ghn').config.num_classes == 3
    done = sorted((base.output / 'checkpoints').iterdir())
    family = NamesSampler(('test_resnet',)).architecture('test_resnet').family
    build = architectures._BUILDERS[family]

    def branching(architecture, device):
        model = build(architecture, device)
        forward = model.forward
        model.forward = lambda images: forward(images) if images.sum() > 0 else forward(-images)
        return model

    again = dataclasses.replace(base, resume=True)
    with monkeypatch.context() as patch:
        patch.setitem(architectures._BUILDERS, family, branching)
        with pytest.raises(UnsupportedModelError):
            train(dataclasses.replace(again, cache=tmp_path / 'other'))
    assert sorted((base.output / 'checkpoints').iterdir()) == done
    assert train(again).finished


def test_networks_can_compute_in_bfloat16(base, tmp_path):
    base = dataclasses.replace(base, gnn='gated', decoder='conv', max_channels=16, max_kernel=7)
    base = dataclasses.replace(base, lr=1e-4)  # as below: steps of Adam make much of rounding
    train(base)
    half = dataclasses.replace(base, mixed_precision='bf16', output=tmp_path / 'half')
    train(half)
    assert losses(half) != losses(base)
    assert [loss for _, loss in losses(half)] == pytest.approx([loss for _, loss in losses(base)], rel=0.05)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'dataset': 'nowhere/at-all'}, DataError, 'cannot be loaded'),
        ({'batch_size': 500}, ConfigError, 'expected at least 500 training images'),
        ({'batch_size': 100, 'meta_batch': 4, 'own_images': True}, ConfigError, 'at least 400 training images'),
        ({'init': 'no-such-ghn'}, LookupError, 'no-such-ghn'),
    ],
)
def test_wrong_input_is_named(base, changes, error, message, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    with pytest.raises(error, match=message):
        train(dataclasses.replace(base, **changes))
    assert not (base.output / 'results.jsonl').exists()


@pytest.mark.parametrize(
    'changes',
    [
        {'steps': 0}, {'hid': 15}, {'decoder': 'fc'}, {'sampler': 'nothing'}, {'sampler_args': 'resnet'},
        {'sampler_args': '{families: [vgg'}, {'sampler_args': {'families': ['alexnet']}},
        {'sampler_args': {'macs': 'lots'}}, {'sampler_args': {'parameters': 5}}, {'sampler_args': {5: 5}},
        {'sampler': 'mix', 'sampler_args': '{parts: [{sampler: [timm]}]}'}, {'held_out': 'regnet,alexnet'},
        {'mixed_precision': 'fp16'}, {'opt': 'sgd'}, {'opt': 'muon', 'decoder': 'conv'}, {'augment': 'mirror'},
        {'steps': 100, 'warmup_steps': 50, 'decay_steps': 51},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(changes):
    with pytest.raises(ConfigError):
        TrainOptions(dataset='x', **changes)


def test_a_ghn_of_other_classes_cannot_be_evaluated(folder):
    with pytest.raises(ConfigError, match='classifiers of 200 classes, but .* has 3'):
        evaluate(EvaluateOptions(ghn='ghn_tiny', dataset=str(folder)))


@pytest.mark.slow
@pytest.mark.parametrize(('gnn', 'decoder'), [('graphormer', 'conv'), ('gated', 'conv'), ('mlp', 'mlp')])
def test_the_published_ghns_learn_too(base, gnn, decoder):
    options = dataclasses.replace(
        base, gnn=gnn, decoder=decoder, smooth=False, hid=32, max_channels=32, max_kernel=7, pool=50, steps=300,
        lr=1e-3, log_steps=50, eval_steps=300, ema_decay=0.9,
    )  # fmt: skip
    result = train(options)
    assert result.finished
    first, *_, last = (loss for _, loss in losses(options))
    assert last < 0.9 * first
    assert last < 0.95 * math.log(3), 'chance'
    assert result.evaluations[-1]['known'] > 40, 'chance is a third'


def test_two_processes_that_were_killed_end_as_one_does(base, tmp_path):
    base = dataclasses.replace(base, lr=1e-4, own_images=True)
    train(base)
    two = dataclasses.replace(base, output=tmp_path / 'two')
    values = {key: value for key, value in two.to_dict().items() if value is not None and key != 'resume'}
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(values))
    port = 20_000 + (os.getpid() + 77) % 20_000
    launch = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port)]  # fmt: skip
    command = [sys.executable, *launch, '-m', 'timm_ghn.train', '--config', str(recipe)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None and not list((two.output / 'checkpoints').glob('step_*[0-9]')):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run([*command, '--resume'], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, loss), (_, other) in zip(losses(base), losses(two), strict=True):
        assert loss == pytest.approx(other, rel=1e-3)
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ('decoder', 'hid', 'channels'), [('templates', 64, 2048), ('conv', 32, 64), ('conv', 128, 128), ('mlp', 64, 64)]
)
def test_published_decoders_are_as_wide_as_published_unless_asked_otherwise(decoder, hid, channels):
    options = TrainOptions(dataset='x', decoder=decoder, hid=hid)
    assert options.config_for(10).max_shape[:2] == (channels, channels)
    assert dataclasses.replace(options, max_channels=48).config_for(10).max_shape[:2] == (48, 48)
