"""``timm-ghn finetune --push-to-hub``: refused before training or pushed after it, never lost."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import HubServer, environment
from huggingface_hub import ModelCard
from pictures import make_dataset, save_dataset
from safetensors.torch import load, load_file

from timm_ghn import ConfigError, HubError, UnsupportedModelError, load_ghn, push_to_hub
from timm_ghn.cli import main as cli
from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.runs.results import read_results

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/colours'
TOKEN = 'hf_writer'
FILES = {'model.safetensors', 'config.json', 'README.md'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(50), make_dataset(21, seed=1))


OPTIONS = FinetuneOptions(
    model='test_vit', init=EMBEDDED, dataset='colours', image_size=32, epochs=1, batch_size=12, lr=3e-3,
    push_to_hub=REPO,
)  # fmt: skip


@pytest.fixture
def options(folder, tmp_path, monkeypatch, hub: HubServer) -> FinetuneOptions:
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    return dataclasses.replace(OPTIONS, dataset=str(folder), output=tmp_path / 'out')


def arguments(options: FinetuneOptions, *more: str) -> list[str]:
    names = ('model', 'init', 'dataset', 'image_size', 'epochs', 'batch_size', 'lr', 'output', 'push_to_hub')
    given = [(f'--{name.replace("_", "-")}', str(getattr(options, name))) for name in names]
    return [*(word for pair in given for word in pair), *more]


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory) -> Path:
    """The output folder of a run that is done and was not pushed."""
    output = tmp_path_factory.mktemp('finished') / 'out'
    finetune(dataclasses.replace(OPTIONS, dataset=str(folder), output=output, push_to_hub=None))
    return output


@pytest.fixture
def done(finished, options) -> FinetuneOptions:
    """The options that go on with it: nothing is left but to push."""
    shutil.copytree(finished, options.output)
    return dataclasses.replace(options, resume=True)


def nothing_was_trained(options: FinetuneOptions) -> bool:
    return not (options.output / 'results.jsonl').exists() and not (options.output / 'checkpoints').exists()


def is_best(hub: HubServer, options: FinetuneOptions) -> bool:
    found, best = load(hub.files(REPO)['model.safetensors']), load_file(options.output / 'model_best.safetensors')
    return found.keys() == best.keys() and all(torch.equal(found[name], best[name]) for name in best)


# A run that is pushed


def test_the_command_pushes_what_it_trained(hub: HubServer, options, tmp_path, capfd):
    resnet = dataclasses.replace(options, model='test_resnet', image_size=64)
    words = arguments(resnet, '--hub-private', '--hub-license', 'mit', '--small-stem', 'off')
    assert cli.main(['finetune', *words]) == 0
    out, err = capfd.readouterr()
    commit = f'{hub.endpoint}/{REPO}/commit/{hub.repo(REPO)["refs"]["main"]}'
    assert out.splitlines()[-2:] == [str(options.output), commit]
    assert f'pushed to {REPO}' in err
    assert hub.files(REPO).keys() == FILES
    assert hub.repo(REPO)['private']
    assert is_best(hub, resnet)
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert (loaded.pretrained_cfg['input_size'], loaded.num_classes) == ((3, 64, 64), 3)
    best = load_file(options.output / 'model_best.safetensors')
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in best.items())
    card = ModelCard(hub.files(REPO)['README.md'].decode())
    (result,) = card.data.eval_results
    tested = read_results(options.output / 'results.jsonl')[-1]['test_top1']
    assert (card.data.license, result.metric_value) == ('mit', round(tested, 4))
    assert str(tmp_path) not in str(card)
    assert 'push_to_hub' not in card.text
    # No word of the token in what the run wrote, said or sent.
    written = [path.read_bytes() for path in options.output.rglob('*') if path.is_file()]
    assert not any(TOKEN.encode() in content for content in (*written, *hub.files(REPO).values()))
    assert TOKEN not in out + err


@pytest.mark.slow
def test_only_the_main_process_pushes(hub: HubServer, options, tmp_path):
    port = str(20_000 + os.getpid() % 20_000)
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--multi_gpu', '--num_processes', '2', '--main_process_port', port,
              '-m', 'timm_ghn.finetune']  # fmt: skip
    variables = environment(hub, tmp_path, HF_TOKEN=TOKEN, CUDA_VISIBLE_DEVICES='')
    run = subprocess.run([*launch, *arguments(options)], env=variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert is_best(hub, options)
    assert [len(hub.asked(path)) for path in ('whoami', '/repos/create', '/commit/')] == [1, 2, 1]


def test_the_ghn_is_known_by_revision_and_digest(hub: HubServer, options):
    push_to_hub(load_ghn(EMBEDDED), 'user/ghn')
    finetune(dataclasses.replace(options, init='user/ghn'))
    origin = load_ghn('user/ghn').origin
    told = read_results(options.output / 'results.jsonl')[0]['provenance']
    assert told['origin'] == dataclasses.asdict(origin)
    card = hub.files(REPO)['README.md'].decode()
    for fact in (f'| its revision | {origin.revision} |', f'| SHA-256 of that file | {origin.sha256} |',
                 'https://huggingface.co/user/ghn', "init='user/ghn'"):  # fmt: skip
        assert fact in card


def test_a_finished_run_that_is_resumed_is_pushed_once(hub: HubServer, done):
    assert not hub.requests
    assert finetune(dataclasses.replace(done, hub_create_pr=True)).pushed == f'{hub.endpoint}/{REPO}/discussions/1'
    assert finetune(done).pushed is not None
    assert is_best(hub, done)
    assert finetune(done).pushed is not None
    assert cli.main(['push', str(done.output), REPO]) == 0
    assert len(hub.commits(REPO)) == 2


def test_a_run_that_is_not_done_is_not_pushed(hub: HubServer, options, caplog):
    caplog.set_level('INFO')
    result = finetune(dataclasses.replace(options, max_steps=1))
    assert (result.finished, result.pushed) == (False, None)
    assert f'not pushed to {REPO}' in caplog.text
    assert hub.files(REPO) == {}


# What is refused before training


@pytest.mark.parametrize(
    ('token', 'changes', 'message'),
    [
        (None, {}, 'no token found.*hf auth login.*HF_TOKEN'),
        ('hf_reader', {}, 'may only read'),
        ('hf_other', {'push_to_hub': 'user/new'}, '403.*write access'),
        (TOKEN, {'hub_private': True}, 'is public'),
        (TOKEN, {}, r'ghn\.pkl.*delete'),
    ],
)
def test_who_may_not_push_learns_it_first(hub: HubServer, options, monkeypatch, token, changes, message):
    monkeypatch.delenv('HF_TOKEN')
    if token is not None:
        monkeypatch.setenv('HF_TOKEN', token)
    hub.put(REPO, {'ghn.pkl': b'cos\nsystem\n'})
    with pytest.raises((HubError, ConfigError), match=message) as caught:
        finetune(dataclasses.replace(options, **changes))
    assert token is None or token not in str(caught.value)
    assert nothing_was_trained(options)
    assert hub.files(REPO).keys() == {'ghn.pkl'}


def test_what_timm_does_not_build_again_is_refused_first(hub: HubServer, options):
    with pytest.raises(UnsupportedModelError, match='stem of test_resnet is changed.*--small-stem off'):
        finetune(dataclasses.replace(options, model='test_resnet'))
    assert nothing_was_trained(options)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'push_to_hub': 'colours'}, "'user/name'"),
        ({'push_to_hub': None, 'hub_private': True}, 'hub_private.*push_to_hub'),
        ({'push_to_hub': None, 'hub_license': 'mit'}, 'hub_license.*push_to_hub'),
        ({'hub_create_pr': True, 'hub_revision': 'v1'}, 'main branch'),
    ],
)
def test_a_wrong_option_is_refused(options, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(options, **changes)


SECRET = 'hf_' + 'aBcD1234' * 4


def test_a_token_is_no_option_and_is_not_repeated(tmp_path, capsys):
    (tmp_path / 'recipe.yaml').write_text(f'model: test_vit\ndataset: colours\nhub_token: {SECRET}\n')
    assert cli.main(['finetune', '--config', str(tmp_path / 'recipe.yaml')]) == 2
    for command in ('finetune --hub-token', 'push out user/name --token', 'finetune --model m'):
        with pytest.raises(SystemExit):
            cli.main([*command.split(), SECRET])
    err = capsys.readouterr().err
    assert SECRET not in err
    assert "no option 'hub_token'" in err
    assert err.count('HF_TOKEN') >= 3


# A push that fails after training


def test_a_push_that_fails_says_which_command_goes_on(hub: HubServer, done, waits, capsys):
    hub.fail('PUT', '^/lfs/', cut=1000, times=99)
    with pytest.raises(HubError, match='trained model is in.*timm-ghn push ') as caught:
        finetune(dataclasses.replace(done, hub_private=True, hub_license='mit'))
    assert TOKEN not in str(caught.value)
    assert 'signature' not in str(caught.value)
    assert read_results(done.output / 'results.jsonl')[-1]['kind'] == 'end'
    assert cli.main(['finetune', *arguments(done, '--resume')]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'timm-ghn: error: ' in last  # perhaps behind a progress bar
    assert f'timm-ghn push {done.output} {REPO}' in last
    hub.faults.clear()
    command = str(caught.value).partition('timm-ghn ')[2]
    assert command.endswith(f'{REPO} --private --license mit')
    assert cli.main(shlex.split(command)) == 0
    assert hub.repo(REPO)['private']
    assert is_best(hub, done)
