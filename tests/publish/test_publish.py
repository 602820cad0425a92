"""Pushing models: whole commits or none, that timm alone can load, through the real client to a server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import traceback

import pytest
import timm
import torch
from hub_handler import Refusal
from hub_server import HubServer, environment
from safetensors.torch import load, load_file
from timm_versions import TIMM_RECORDS
from torch import nn

import timm_ghn
from timm_ghn import ConfigError, HubError, PredictionError, UnsupportedModelError, push_to_hub
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.publish.files import check_loads, write_model

# huggingface_hub hands files to its HTTP client in a way that the client discourages.
pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/test.ghn'
FILES = {'model.safetensors', 'config.json', 'README.md'}
TOKEN = 'hf_writer'


@pytest.fixture
def model() -> nn.Module:
    built: nn.Module = timm.create_model(f'test_resnet.{EMBEDDED}', num_classes=10)
    return built


# What arrives


ALONE = """
import json, sys, timm
from safetensors.torch import save_file
for repo_id, file in json.loads(sys.argv[1]).items():
    save_file(timm.create_model('hf-hub:' + repo_id, pretrained=True).state_dict(), file)
assert not [name for name in sys.modules if name.startswith('timm_ghn')]
"""


def test_timm_alone_loads_every_tensor(hub: HubServer, tmp_path):
    arguments = {
        f'test_vit.{EMBEDDED}': {'num_classes': 3, 'img_size': 96, 'class_token': False, 'global_pool': 'avg'},
        f'test_convnext.{EMBEDDED}': {'num_classes': 0, 'in_chans': 1},
        'test_byobnet': {'num_classes': 4},
    }
    built = {f'user/{name}': timm.create_model(name, **given) for name, given in arguments.items()}
    built['user/test_byobnet'].bfloat16()
    files = {repo_id: str(tmp_path / repo_id.replace('/', '-')) for repo_id in built}
    for (repo_id, model), given in zip(built.items(), arguments.values(), strict=True):
        push_to_hub(model, repo_id, model_args=None if TIMM_RECORDS else given, token=TOKEN)
        assert hub.files(repo_id).keys() == FILES
    command = [sys.executable, '-c', ALONE, json.dumps(files)]
    subprocess.run(command, env=environment(hub, tmp_path / 'home'), check=True, cwd=tmp_path)
    for repo_id, model in built.items():
        found, expected = load_file(files[repo_id]), model.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value.to(found[name].dtype)), (repo_id, name)


def test_timm_builds_a_model_again_from_its_configuration(tmp_path):
    model = timm.create_model('test_nfnet', num_classes=5)
    write_model(model, tmp_path, model_args=None)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(UnsupportedModelError, match='1 tensors differ'):
        check_loads(model.state_dict(), tmp_path)


def test_what_is_sent_is_the_model_and_not_what_timm_has(hub: HubServer):
    model = timm.create_model('test_resnet')
    theirs = dict(model.pretrained_cfg)
    prediction = timm_ghn.predict(model, EMBEDDED)
    push_to_hub(timm_ghn.ghn_init(model, EMBEDDED), REPO, prediction=prediction, token=TOKEN)
    files = hub.files(REPO)
    assert files.keys() == FILES
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load(files['model.safetensors']).items())
    config = json.loads(files['config.json'])
    cfg = config['pretrained_cfg']
    assert (config['architecture'], config['num_classes'], cfg['tag']) == ('test_resnet', 1000, 'ghn')
    assert theirs.keys() >= {'license', 'hf_hub_id'}
    assert not {'url', 'file', 'hf_hub_id', 'license', 'paper_ids', 'custom_load'} & cfg.keys()
    assert tuple(cfg['mean']) == timm_ghn.load_ghn(EMBEDDED).config.mean != theirs['mean']


def test_the_same_twice_makes_no_new_commit_and_the_model_stays(hub: HubServer, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg, generator = dict(model.pretrained_cfg), torch.get_rng_state()
    first = push_to_hub(model, REPO, token=TOKEN)
    second = push_to_hub(model, REPO, token=TOKEN)
    assert first.oid == second.oid == hub.repo(REPO)['refs']['main']
    assert len(hub.commits(REPO)) == 2
    assert len(hub.asked('^storage PUT')) == 1
    assert model.pretrained_cfg == cfg
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.fc.bias.add_(1)
    push_to_hub(model, REPO, token=TOKEN, commit_message='another bias')
    assert hub.commits(REPO)[2:] == ['another bias']


# Where it goes


def test_a_public_repository_does_not_get_what_was_to_be_private(hub: HubServer, model):
    hub.put(REPO, {'notes.txt': b'mine'})
    with pytest.raises(ConfigError, match='is public.*settings'):
        push_to_hub(model, REPO, token=TOKEN, private=True)
    assert not hub.asked('^storage PUT')
    push_to_hub(model, REPO, token=TOKEN)
    assert hub.files(REPO).keys() == FILES | {'notes.txt'}
    push_to_hub(model, 'user/other', token=TOKEN, private=True)
    assert hub.repo('user/other')['private'] is True


def test_a_branch_is_made_where_it_does_not_exist(hub: HubServer, model):
    for _ in range(2):
        push_to_hub(model, REPO, token=TOKEN, revision='v1')
    assert hub.files(REPO) == {}
    assert hub.files(REPO, 'v1').keys() == FILES
    assert len(hub.commits(REPO, 'v1')) == 2
    loaded = timm.create_model(f'hf-hub:{REPO}@v1', pretrained=True)
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert f'hf-hub:{REPO}@v1'.encode() in hub.files(REPO, 'v1')['README.md']


def test_a_pull_request_leaves_the_main_branch_alone(hub: HubServer, model):
    hub.put(REPO, {'README.md': b'mine'})
    info = push_to_hub(model, REPO, token='hf_other', create_pr=True)
    assert info.pr_url == f'{hub.endpoint}/{REPO}/discussions/1'
    assert hub.files(REPO) == {'README.md': b'mine'}
    assert hub.files(REPO, 'refs/pr/1').keys() == FILES


def test_pickled_files_do_not_stay_beside_it(hub: HubServer, model):
    hub.put(REPO, {'pytorch_model.bin': b'cos\nsystem\n'})
    with pytest.raises(ConfigError, match=r'pytorch_model\.bin.*delete'):
        push_to_hub(model, REPO, token=TOKEN)
    assert hub.files(REPO).keys() == {'pytorch_model.bin'}


# What is refused before anything is sent


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'repo_id': 'test.ghn'}, r"'user/name'"),
        ({'repo_id': 'user/../../etc'}, 'name on the Hub'),
        ({'create_pr': True, 'revision': 'v1'}, 'main branch'),
        ({'token': 'hf_secret\nX-Evil: 1'}, 'one word'),
        ({'results': '/no/such/folder'}, 'a fine-tuning run'),
        ({'model_args': {'act_layer': nn.GELU}}, 'configuration'),
    ],
)
def test_a_wrong_argument_is_refused(hub: HubServer, model, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        push_to_hub(model, **{'repo_id': REPO, 'token': TOKEN, **arguments})
    assert 'hf_secret' not in str(caught.value)
    assert not hub.requests


def damaged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.fc.bias[3] = float('nan')
    return model


def changed(model: nn.Module) -> nn.Module:
    model.fc = nn.Sequential(model.fc, nn.Linear(10, 2))
    return model


@pytest.mark.parametrize(
    ('spoil', 'error', 'message'),
    [
        (damaged, PredictionError, "'fc.bias'.*not finite"),
        (changed, UnsupportedModelError, r'timm .* this model again|another model.*model_args'),
        (lambda model: model.to('meta'), UnsupportedModelError, 'meta device'),
        (lambda _: nn.Linear(2, 2), UnsupportedModelError, r'expected a model of timm.create_model.*Linear'),
    ],
    ids=['not finite', 'changed', 'meta', 'not of timm'],
)
def test_a_model_that_nobody_could_load_is_refused(hub: HubServer, model, spoil, error, message):
    with pytest.raises(error, match=message):
        push_to_hub(spoil(model), REPO, token=TOKEN)
    assert not hub.requests


# What goes wrong on the way


PUT, COMMIT = r'^/lfs/', r'/commit/'


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ({'method': 'PUT', 'path': PUT, 'cut': 1000}, 'push again'),
        ({'method': 'PUT', 'path': PUT, 'status': 403}, '403.*write access'),
        ({'method': 'POST', 'path': '/repos/create', 'status': 401}, '401.*hf auth login.*HF_TOKEN'),
        ({'method': 'POST', 'path': COMMIT, 'status': 429}, '429.*push again'),
        ({'method': 'POST', 'path': COMMIT, 'cut': 100}, 'push again'),
    ],
    ids=lambda value: '-'.join(str(v) for v in value.values()) if isinstance(value, dict) else '',
)
def test_a_push_that_fails_leaves_nothing_and_the_next_one_all(
    hub: HubServer, model, waits, tmp_path, monkeypatch, fault, message
):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    hub.fail(**fault, times=99)
    with pytest.raises(HubError, match=message) as caught:
        push_to_hub(model, REPO, token=TOKEN)
    assert TOKEN not in str(caught.value)
    assert 'signature' not in str(caught.value)
    assert not hub.exists(REPO) or hub.files(REPO) == {}
    assert not list(tmp_path.glob('timm_ghn-push-*'))
    hub.faults.clear()
    push_to_hub(model, REPO, token=TOKEN)
    assert hub.files(REPO).keys() == FILES
    assert len(hub.commits(REPO)) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: HubServer, model):
    hub.fail('POST', COMMIT, lost=True)
    with pytest.raises(HubError, match='neither sent nor committed twice'):
        push_to_hub(model, REPO, token=TOKEN)
    push_to_hub(model, REPO, token=TOKEN)
    assert len(hub.commits(REPO)) == 2
    assert len(hub.asked('^storage PUT')) == 1


def test_who_may_not_write_is_told_what_to_do(hub: HubServer, model):
    hub.put(REPO, {'README.md': b'mine'})
    for token, message in ((None, '401'), ('hf_reader', '403'), ('hf_other', '403')):
        for repo_id in (REPO, 'user/new'):
            with pytest.raises(HubError, match=f'{message}.*hf auth login.*write access'):
                push_to_hub(model, repo_id, token=token)
    assert not hub.asked('^storage PUT')
    assert hub.files(REPO) == {'README.md': b'mine'}


# The token


def test_a_server_that_repeats_the_token_does_not_show_it(hub: HubServer, model, monkeypatch):
    def refuse(*_):
        raise Refusal(403, f'no rights: Bearer {TOKEN}\x1b[2J')

    monkeypatch.setattr(hub, 'create_repo', refuse)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    for token in (TOKEN, None):
        with pytest.raises(HubError, match=r'403 .*no rights: Bearer \(token\).*write access') as caught:
            push_to_hub(model, REPO, token=token)
        assert TOKEN not in ''.join(traceback.format_exception(caught.value))
        assert str(caught.value).isprintable()
