"""``timm-ghn push``, and the page about the Hub, run against a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from pictures import make_dataset, save_dataset
from safetensors.torch import load, load_file, save_file
from timm_versions import TIMM_RECORDS

from timm_ghn import load_ghn
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.hub.storage import save_ghn

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

PAGE = (Path(__file__).resolve().parents[2] / 'docs' / 'hub.md').read_text(encoding='utf-8')
REPO = 'user/test.ghn'


@pytest.fixture
def run(hub: HubServer, monkeypatch, tmp_path, call_cli):
    """Run a command as the user whose token is in the environment; gives code, output and errors."""
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    monkeypatch.chdir(tmp_path)
    return call_cli


def test_what_was_predicted_is_pushed(run, hub: HubServer):
    assert run(f'predict test_vit --ghn {EMBEDDED} --num-classes 4 --img-size 96 --seed 2 -o out.safetensors')[0] == 0
    code, out, _ = run(f'push out.safetensors {REPO} --private --message hello')
    assert code == 0
    assert out == f'{hub.endpoint}/{REPO}/commit/{hub.repo(REPO)["refs"]["main"]}\n'
    assert hub.commits(REPO)[1:] == ['hello']
    assert hub.repo(REPO)['private']
    sent, written = load(hub.files(REPO)['model.safetensors']), load_file('out.safetensors')
    assert sent.keys() == written.keys()
    assert all(torch.equal(sent[name], written[name]) for name in sent)
    card = hub.files(REPO)['README.md'].decode()
    assert '**predicted, no training**' in card
    assert '| seed | 2 |' in card
    size = [96, 96] if TIMM_RECORDS else 96
    assert json.loads(hub.files(REPO)['config.json'])['model_args']['img_size'] == size
    assert run(f'push out.safetensors {REPO}')[0] == 0
    assert len(hub.commits(REPO)) == 2


def test_a_branch_and_a_pull_request(run, hub: HubServer):
    run(f'predict test_vit --ghn {EMBEDDED} -o out.safetensors')
    assert run(f'push out.safetensors {REPO} --revision v1 --license mit')[0] == 0
    code, out, _ = run(f'push out.safetensors {REPO} --create-pr')
    assert code == 0
    assert out == f'{hub.endpoint}/{REPO}/discussions/1\n'
    assert hub.files(REPO) == {}
    assert hub.files(REPO, 'v1').keys() == hub.files(REPO, 'refs/pr/1').keys() != set()


VIT = {'architecture': 'test_vit', 'provenance': '{}'}


def write(path: Path, header: dict[str, str] | None = None) -> None:
    save_file({'a': torch.zeros(1)}, path, header)


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (lambda path: None, 'there is no regular file'),
        (lambda path: path.write_bytes(b'\x80\x02cos\nsystem\n'), 'expected a safetensors file'),
        (write, 'does not say what it holds'),
        (lambda path: write(path, VIT), 'does not hold the weights of test_vit'),
        (lambda path: write(path, VIT | {'architecture': 'test_nothing'}), 'timm has no model'),
        (lambda path: write(path, VIT | {'img_size': '1000000000'}), 'at most 16,384 pixels'),
        (lambda path: write(path, {'architecture': 'test_vit', 'timm_ghn': '{}'}),
         'expected the weights of a fine-tuning run'),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_told_in_one_line(run, hub: HubServer, write, message):
    write(Path('out.safetensors'))
    code, out, err = run(f'push out.safetensors {REPO}')
    assert (code, out) == (2, '')
    assert message in err
    assert err.count('\n') == 1
    assert not hub.requests


def test_the_page_about_the_hub_runs(run, hub: HubServer, monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_GHN_DEFAULT', EMBEDDED)
    section = PAGE.partition('\n## Use it from the Hub\n')[2].partition('\n## ')[0]
    commands = [
        line.partition(' ')[2].partition('  #')[0] for line in section.splitlines() if re.match('timm-ghn ', line)
    ]
    (code,) = re.findall(r'^```py\n(.*?)^```', section, flags=re.MULTILINE | re.DOTALL)
    assert [command.split()[0] for command in commands] == ['predict', 'push', 'finetune', 'push']
    # What the reader has: a data set, and a GHN that was trained. One epoch of a small model will do here.
    data = save_dataset(tmp_path / 'images', make_dataset(30), make_dataset(9, seed=1))
    save_ghn(load_ghn(EMBEDDED), tmp_path / 'train-out' / 'ghn')
    for command in commands:
        if command.startswith('finetune '):
            command = command.replace('--model resnet18', '--model test_resnet').replace('uoft-cs/cifar10', str(data))
            command = command.replace('--shots 100', '--shots 9') + ' --epochs 1 --batch-size 10'
        code_of_exit, _, err = run(command)
        assert code_of_exit == 0, (command, err)
    names: dict[str, object] = {}
    exec(code, names)
    for name in ('resnet18.ghn', 'resnet18.cifar10', 'my-ghn', 'ghn'):
        assert hub.files(f'user/{name}').keys() == {'config.json', 'model.safetensors', 'README.md'}
    assert names['model'].num_classes == 10
