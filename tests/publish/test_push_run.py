"""``timm-ghn finetune --push-to-hub``: refused before training or pushed after it, never lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
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

from timm_ghn import ConfigError, HubError, UnsupportedModelError, load_ghn, predict, push_to_hub
from timm_ghn.cli import main as cli
from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.hub.storage import save_ghn
from timm_ghn.publish.card import _training_code
from timm_ghn.publish.training import Training
from timm_ghn.runs.results import read_results

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/colours'
TOKEN = 'hf_writer'
FILES = {'model.safetensors', 'config.json', 'README.md'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return save_dataset(tmp_path_factory.mktemp('colours'), make_dataset(50), make_dataset(21, seed=1))


@pytest.fixture
def options(folder, tmp_path, monkeypatch, hub: HubServer) -> FinetuneOptions:
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    return FinetuneOptions(
        model='test_vit', init=EMBEDDED, dataset=str(folder), image_size=32, epochs=1, batch_size=12, lr=3e-3,
        output=tmp_path / 'out', push_to_hub=REPO,
    )  # fmt: skip


def arguments(options: FinetuneOptions, *more: str) -> list[str]:
    names = ('model', 'init', 'dataset', 'image_size', 'epochs', 'batch_size', 'lr', 'output', 'push_to_hub')
    given = [(f'--{name.replace("_", "-")}', str(getattr(options, name))) for name in names]
    return [*(word for pair in given for word in pair), *more]


def nothing_was_trained(options: FinetuneOptions) -> bool:
    return not (options.output / 'results.jsonl').exists() and not (options.output / 'checkpoints').exists()


def sent(hub: HubServer, revision: str = 'main') -> dict[str, torch.Tensor]:
    return load(hub.files(REPO, revision)['model.safetensors'])


def is_best(hub: HubServer, options: FinetuneOptions) -> bool:
    found, best = sent(hub), load_file(options.output / 'model_best.safetensors')
    return found.keys() == best.keys() and all(torch.equal(found[name], best[name]) for name in best)


# A run that is pushed


ALONE = """
import sys, timm
from safetensors.torch import save_file
model = timm.create_model('hf-hub:' + sys.argv[1], pretrained=True)
save_file(model.state_dict(), sys.argv[2])
print(tuple(model.pretrained_cfg['input_size']), model.num_classes)
assert not [name for name in sys.modules if name.startswith('timm_ghn')]
"""


def started(command: list[str], hub: HubServer, home: Path) -> subprocess.CompletedProcess[str]:
    more = {'HF_TOKEN': TOKEN, 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run(
        command, env=environment(hub, home, **more), capture_output=True, text=True, timeout=300, cwd=home
    )


def test_a_run_is_pushed_and_timm_alone_loads_it(hub: HubServer, options, tmp_path):
    resnet = dataclasses.replace(options, model='test_resnet', image_size=64, hub_license='mit')
    words = arguments(resnet, '--hub-private', '--hub-license', 'mit', '--small-stem', 'off')
    done = started([sys.executable, '-m', 'timm_ghn.finetune', *words], hub, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    commit = f'{hub.endpoint}/{REPO}/commit/{hub.repo(REPO)["refs"]["main"]}'
    assert done.stdout.splitlines() == [str(options.output), commit]
    assert f'pushed to {REPO}' in done.stderr
    assert hub.files(REPO).keys() == FILES
    assert hub.repo(REPO)['private']
    assert is_best(hub, resnet)
    loaded = started([sys.executable, '-c', ALONE, REPO, str(tmp_path / 'loaded')], hub, tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout == '(3, 64, 64) 3\n'
    found = load_file(tmp_path / 'loaded')
    assert all(torch.equal(value, found[name]) for name, value in sent(hub).items())
    card = ModelCard(hub.files(REPO)['README.md'].decode())
    (result,) = card.data.eval_results
    tested = read_results(options.output / 'results.jsonl')[-1]['test_top1']
    assert (card.data.license, result.metric_value) == ('mit', round(tested, 4))
    assert str(tmp_path) not in str(card)
    assert 'push_to_hub' not in card.text
    # No word of the token in what the run wrote, said or sent.
    written = [path.read_bytes() for path in options.output.rglob('*') if path.is_file()]
    assert not any(TOKEN.encode() in content for content in (*written, *hub.files(REPO).values()))
    assert TOKEN not in done.stdout + done.stderr


def test_only_the_main_process_pushes(hub: HubServer, options, tmp_path):
    port = str(20_000 + os.getpid() % 20_000)
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--multi_gpu', '--num_processes', '2', '--main_process_port', port,
              '-m', 'timm_ghn.finetune']  # fmt: skip
    done = started([*launch, *arguments(options)], hub, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_best(hub, options)
    assert [len(hub.asked(path)) for path in ('whoami', '/repos/create', '/commit/')] == [1, 1, 1]


def test_the_ghn_is_known_by_revision_and_digest(hub: HubServer, options, tmp_path):
    ghn = load_ghn(EMBEDDED)
    push_to_hub(ghn, 'user/ghn', license='cc-by-4.0', revision='v1')
    hub.put('user/ghn', hub.files('user/ghn', 'v1'))
    result = finetune(dataclasses.replace(options, init='user/ghn'))
    assert result.pushed == f'{hub.endpoint}/{REPO}/commit/{hub.repo(REPO)["refs"]["main"]}'
    origin = load_ghn('user/ghn').origin
    told = read_results(options.output / 'results.jsonl')[0]['provenance']
    assert told['origin']['repo_id'] == 'user/ghn'
    assert told['origin']['revision'] == origin.revision == hub.repo('user/ghn')['refs']['main']
    assert told['origin']['sha256'] == origin.sha256
    plan = predict(timm.create_model('test_vit', num_classes=3, img_size=32, patch_size=4), ghn).plan
    assert told['predicted_elements'] == plan.summary()['predicted_elements']
    card = hub.files(REPO)['README.md'].decode()
    assert f'| its revision | `{origin.revision}` |' in card
    assert f'| SHA-256 of that file | `{origin.sha256}` |' in card
    assert 'https://huggingface.co/user/ghn' in card
    assert "init='user/ghn'" in card
    assert str(tmp_path) not in card


def test_the_default_ghn_is_called_by_its_own_name(hub: HubServer, options, monkeypatch):
    monkeypatch.setenv('TIMM_GHN_DEFAULT', EMBEDDED)
    finetune(dataclasses.replace(options, init='ghn'))
    card = hub.files(REPO)['README.md'].decode()
    assert f'| GHN | {EMBEDDED} |' in card
    assert f"init='{EMBEDDED}'" in card


@pytest.mark.parametrize('init', ['random', 'file'])
def test_another_start_is_told_as_it_is(options, tmp_path, init):
    if init == 'file':
        save_ghn(load_ghn(EMBEDDED), tmp_path / 'mine')
    place = str(tmp_path / 'mine') if init == 'file' else init
    finetune(dataclasses.replace(options, init=place, push_to_hub=None))
    told = read_results(options.output / 'results.jsonl')[0]['provenance']
    if init == 'random':
        assert told is None
        return
    assert told['origin']['sha256'] == load_ghn(place).origin.sha256
    assert told['origin']['repo_id'] is None


def test_a_folder_of_where_the_run_was_is_named_to_nobody_elsewhere_either(options, tmp_path):
    finetune(dataclasses.replace(options, push_to_hub=None))
    lines = (options.output / 'results.jsonl').read_text().splitlines()
    run = json.loads(lines[0])
    assert run['local'] == ['dataset']
    # As if it had been named in a way that, without that record, reads as the name of a data set on the Hub.
    run['arguments'] |= {'dataset': 'data/clothes-private', 'init': 'secret-project/ghn'}
    run |= {'local': ['dataset', 'init'], 'provenance': None}
    (options.output / 'results.jsonl').write_text('\n'.join([json.dumps(run), *lines[1:]]) + '\n')
    training = Training.read(options.output)
    assert training.is_local('dataset')
    assert training.dataset == 'clothes-private'
    assert 'secret-project' not in _training_code(training)
    assert "init='ghn'" in _training_code(training)


def test_a_finished_run_that_is_resumed_is_pushed_once(hub: HubServer, options, capsys):
    first = finetune(dataclasses.replace(options, push_to_hub=None))
    assert first.pushed is None
    assert not hub.requests
    resumed = dataclasses.replace(options, resume=True)
    assert finetune(resumed).pushed is not None
    assert is_best(hub, options)
    assert finetune(resumed).pushed is not None
    assert cli.main(['push', str(options.output), REPO]) == 0
    assert len(hub.commits(REPO)) == 2


def test_a_run_that_is_not_done_is_not_pushed(hub: HubServer, options, caplog):
    caplog.set_level('INFO')
    result = finetune(dataclasses.replace(options, max_steps=1))
    assert (result.finished, result.pushed) == (False, None)
    assert f'not pushed to {REPO}' in caplog.text
    assert not hub.exists(REPO)
    assert finetune(dataclasses.replace(options, resume=True)).pushed is not None


def test_a_branch_or_a_pull_request_gets_it(hub: HubServer, options):
    finetune(dataclasses.replace(options, hub_revision='v1'))
    assert hub.files(REPO) == {}
    assert hub.files(REPO, 'v1').keys() == FILES
    request = finetune(dataclasses.replace(options, resume=True, hub_create_pr=True)).pushed
    assert request == f'{hub.endpoint}/{REPO}/discussions/1'
    assert hub.files(REPO, 'refs/pr/1').keys() == FILES


# What is refused before training


@pytest.mark.parametrize(
    ('token', 'changes', 'message'),
    [
        (None, {}, 'nobody is logged in.*hf auth login.*HF_TOKEN'),
        ('hf_unknown', {}, '401.*hf auth login'),
        ('hf_reader', {}, 'may only read.*write access'),
        ('hf_other', {}, "other is neither 'user' nor.*write access"),
        (TOKEN, {'hub_private': True}, 'is public'),
        (TOKEN, {}, r'ghn\.pkl.*delete'),
        (TOKEN, {'hub_revision': 'v9'}, r'ghn\.pkl.*delete'),
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
    assert not hub.asked(' (POST|PUT) ')


def test_a_hub_out_of_reach_is_noticed_first(hub: HubServer, options, use_endpoint, monkeypatch, waits):
    use_endpoint('http://127.0.0.1:9')
    with pytest.raises(HubError, match='cannot be pushed to http://127.0.0.1:9'):
        finetune(options)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(HubError, match='HF_HUB_OFFLINE is set'):
        finetune(options)
    assert nothing_was_trained(options)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model': 'test_resnet'}, 'stem of test_resnet is changed.*--small-stem off'),
        ({'model': 'test_resnet', 'small_stem': 'off'}, None),
    ],
)
def test_what_timm_does_not_build_again_is_refused_first(hub: HubServer, options, changes, message):
    changed = dataclasses.replace(options, **changes)
    if message is None:
        assert finetune(changed).pushed is not None
        return
    with pytest.raises((UnsupportedModelError, ConfigError), match=message):
        finetune(changed)
    assert nothing_was_trained(options)
    assert not hub.exists(REPO)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'push_to_hub': 'colours'}, "'user/name'"),
        ({'push_to_hub': 'a/b/c'}, 'name on the Hub'),
        ({'push_to_hub': ''}, 'repo_id'),
        ({'push_to_hub': None, 'hub_private': True}, 'hub_private.*push_to_hub'),
        ({'push_to_hub': None, 'hub_license': 'mit'}, 'hub_license.*push_to_hub'),
        ({'hub_create_pr': True, 'hub_revision': 'v1'}, 'main branch'),
    ],
)
def test_a_wrong_option_is_refused(options, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(options, **changes)


SECRET = 'hf_' + 'aBcD1234' * 4


@pytest.mark.parametrize('command', ['finetune --hub-token', 'push out user/name --token', 'finetune --model m'])
def test_a_token_is_no_option_and_is_not_repeated(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), SECRET])
    err = capsys.readouterr().err
    assert SECRET not in err
    assert 'HF_TOKEN' in err


def test_a_token_in_a_recipe_is_not_repeated(options, tmp_path, capsys):
    (tmp_path / 'recipe.yaml').write_text(f'model: test_vit\ndataset: colours\nhub_token: {SECRET}\n')
    assert cli.main(['finetune', '--config', str(tmp_path / 'recipe.yaml')]) == 2
    err = capsys.readouterr().err
    assert "no option 'hub_token'" in err
    assert SECRET not in err


# A push that fails after training


@pytest.mark.parametrize(
    'fault',
    [
        {'method': 'PUT', 'path': r'^/lfs/', 'cut': 1000},
        {'method': 'POST', 'path': '/repos/create', 'status': 401},
        {'method': 'POST', 'path': '/commit/', 'status': 500},
    ],
    ids=['cut', '401', '500'],
)
def test_a_push_that_fails_says_which_command_goes_on(hub: HubServer, options, waits, capsys, fault):
    hub.fail(**fault, times=99)
    with pytest.raises(HubError, match='trained model is in.*timm-ghn push ') as caught:
        finetune(dataclasses.replace(options, hub_private=True, hub_license='mit'))
    assert TOKEN not in str(caught.value)
    assert 'signature' not in str(caught.value)
    lines = read_results(options.output / 'results.jsonl')
    assert lines[-1]['kind'] == 'end'
    assert json.loads(json.dumps(lines[0]['arguments']))['push_to_hub'] == REPO
    hub.faults.clear()
    command = str(caught.value).partition('timm-ghn ')[2]
    assert command.endswith(f'{REPO} --private --license mit')
    assert cli.main(shlex.split(command)) == 0
    assert hub.repo(REPO)['private']
    assert is_best(hub, options)


def test_the_command_ends_with_an_error_of_one_line(hub: HubServer, options, waits, capsys):
    hub.fail('POST', '/commit/', status=500, times=99)
    assert cli.main(['finetune', *arguments(options)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('timm-ghn: error: ')
    assert f'timm-ghn push {options.output} {REPO}' in last
    assert (options.output / 'model_best.safetensors').is_file()
