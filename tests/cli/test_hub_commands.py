"""``timm-ghn convert``, ``timm-ghn cache``, and what the other commands make of a user's names."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from official import WRITERS, official_state

from timm_ghn.analysis import norms
from timm_ghn.hub import known_ghns, list_ghns, load_ghn, register_ghn
from timm_ghn.hub.converted import cache_folder, converted_ghns
from timm_ghn.hub.default import EMBEDDED
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN

README = (Path(__file__).resolve().parents[2] / 'README.md').read_text(encoding='utf-8')


@pytest.fixture
def run(call_cli, monkeypatch, tmp_path):
    """Run a command in a folder of its own: exit code, standard output, standard error."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    return call_cli


@pytest.fixture
def mine(fake_hub: FakeHub, small_ghn: GHN, tmp_path: Path) -> str:
    """The name of an official file on the Hub."""
    data = WRITERS['joblib'](official_state(small_ghn), tmp_path / 'official.pt').read_bytes()
    fake_hub.files['user/repo/ghn.pt'] = data
    return register_ghn('mine', repo_id='user/repo', filename='ghn.pt', config=small_ghn.config).name


def expect_same(found: GHN, expected: GHN) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def expect_error(ran: tuple[int, str, str], text: str) -> None:
    code, out, err = ran
    assert (code, out) == (2, '')
    assert err.startswith('timm-ghn: error: ')
    assert err.count('\n') == 1
    assert text in err


def test_convert_writes_a_folder_of_ours(run, mine, small_ghn):
    code, out, err = run(f'convert {mine} -o out')
    assert (code, err) == (0, '')
    assert f'{size_of(Path("out")):,} bytes' in out
    assert "timm_ghn.load_ghn('out')" in out
    assert sorted(os.listdir('out')) == ['config.json', 'model.safetensors']
    expect_same(load_ghn('./out'), small_ghn)
    assert os.listdir('.') == ['out']
    assert converted_ghns(cache_folder()) == []


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_convert_takes_the_path_of_an_official_file(run, tmp_path, small_ghn, writer):
    path = writer(official_state(small_ghn), tmp_path / 'ghn.pt')
    code, out, _ = run(f'convert {path} -o out --json')
    assert code == 0
    assert json.loads(out) == {'source': str(path), 'folder': 'out', 'size': size_of(Path('out'))}
    expect_same(load_ghn('./out'), small_ghn)
    assert load_ghn('./out').config == dataclasses.replace(small_ghn.config, name='ghn')


@pytest.mark.parametrize('source', ['folder', 'weights', 'name', 'repository'])
def test_convert_takes_what_is_in_our_form_already(run, tmp_path, fake_hub, small_ghn, source):
    save_ghn(small_ghn, tmp_path / 'ours')
    fake_hub.put('user/ours', tmp_path / 'ours')
    register_ghn('named', tmp_path / 'ours')
    names = {'folder': tmp_path / 'ours', 'weights': tmp_path / 'ours/model.safetensors', 'name': 'named'}
    assert run(f'convert {names.get(source, "user/ours")} -o out')[0] == 0
    expect_same(load_ghn('./out'), small_ghn)
    assert sorted(os.listdir('out')) == ['config.json', 'model.safetensors']


def test_convert_without_a_folder_fills_the_cache(run, mine, small_ghn, monkeypatch):
    for _ in range(2):
        code, out, _ = run(f'convert {mine}')
        assert code == 0
        (found,) = converted_ghns(cache_folder())
        assert out == f'{found.path}/model.safetensors, {found.size:,} bytes with its configuration\n'
    os.truncate(found.path / 'model.safetensors', 10)
    assert run(f'convert {mine}')[0] == 0
    assert converted_ghns(cache_folder()) == [found]
    monkeypatch.setattr('timm_ghn.hub.converted.convert_official', lambda *_, **__: pytest.fail('converted again'))
    expect_same(load_ghn(mine), small_ghn)


def test_convert_says_what_is_wrong_and_leaves_nothing(run, mine, tmp_path, small_ghn, monkeypatch):
    expect_error(run('convert nonsense -o out'), "no GHN has the name 'nonsense'")
    expect_error(run(f'convert {EMBEDDED}'), 'expected -o FOLDER')
    (tmp_path / 'bad.pt').write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    expect_error(run(f'convert {tmp_path}/bad.pt -o out'), 'os.system')
    state = official_state(small_ghn)
    state['ln.bias'][0] = float('inf')
    WRITERS['torch'](state, tmp_path / 'inf.pt')
    expect_error(run(f'convert {tmp_path}/inf.pt -o out'), 'not finite')
    expect_error(run(f'convert {mine} -o no/such/place'), 'does not exist')
    expect_error(run('convert'), '--help')
    assert os.listdir('.') == []
    monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    expect_error(run(f'convert {mine}'), 'turns the cache off')


def test_convert_never_replaces_anything(run, mine):
    Path('out').mkdir()
    Path('out/precious').touch()
    Path('file').touch()
    for place in ('out', 'file'):
        expect_error(run(f'convert {mine} -o {place}'), 'is not an empty folder')
    assert os.listdir('out') == ['precious']
    Path('empty').mkdir()
    assert run(f'convert {mine} -o empty')[0] == 0


def test_cache_lists_and_removes(run, mine):
    code, out, err = run('cache')
    assert (code, err) == (0, '')
    assert out == f'nothing is converted in {cache_folder()}\n'
    load_ghn(mine)
    (found,) = converted_ghns(cache_folder())
    _, out, _ = run('cache')
    row = out.splitlines()[2].split()
    assert row == ['mine', 'user/repo', found.revision[:12], f'{found.size:,}', str(found.path)]
    assert f'{found.size:,} bytes in all' in out
    _, out, _ = run('cache --json')
    record = json.loads(out)
    assert (record['size'], record['folder']) == (found.size, str(cache_folder()))
    assert record['converted'][0] == {
        'name': 'mine', 'path': str(found.path), 'size': found.size, 'repo_id': 'user/repo',
        'revision': found.revision, 'flaw': None,
    }  # fmt: skip
    expect_error(run('cache --remove other'), "no conversion of 'other'")
    _, out, _ = run('cache --remove mine --json')
    assert [removed['name'] for removed in json.loads(out)['removed']] == ['mine']
    assert not found.path.exists()
    assert run('cache --remove all')[1] == f'nothing was removed from {cache_folder()}\n'


def test_cache_marks_what_is_damaged(run, mine):
    load_ghn(mine)
    (found,) = converted_ghns(cache_folder())
    (found.path / 'config.json').write_text('{')
    assert 'DAMAGED' in run('cache')[1]
    _, out, _ = run('cache --remove all')
    assert 'bytes were removed; what was downloaded stays' in out
    assert converted_ghns(cache_folder()) == []


def test_cache_that_is_off_is_told(run, monkeypatch):
    monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    expect_error(run('cache'), 'TIMM_GHN_CACHE turns it off')


@pytest.mark.parametrize('command', ['convert', 'cache'])
def test_help_has_an_example(run, command):
    code, out, _ = run(f'{command} --help')
    assert code == 0
    assert f'example: timm-ghn {command}' in out


def test_list_shows_the_names_of_a_user(run, mine):
    _, out, _ = run('list')
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert rows['mine'][1:4] == ['-', '5', 'user/repo/ghn.pt']
    assert list(rows) == list(known_ghns())
    assert json.loads(run('list --json')[1])['mine']['num_parameters'] is None


@pytest.mark.filterwarnings('default')
def test_a_bad_file_of_a_user_is_told_beside_the_list(run, tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'bad.json').write_text('{')
    monkeypatch.setenv('TIMM_GHN_CONFIGS', str(tmp_path / 'configs'))
    code, out, err = run('list')
    assert code == 0
    assert EMBEDDED in out
    assert err.startswith('timm-ghn: warning: TIMM_GHN_CONFIGS')
    assert 'bad.json' in err
    assert err.count('\n') == 1


def test_verify_knows_the_names_of_a_user(run):
    folder = known_ghns()[EMBEDDED].folder
    register_ghn('mine', folder)
    norm = norms.predicted_norm('squeezenet1_1', load_ghn('mine'))
    expect_error(run('verify mine'), "no norms were published for 'mine'")
    register_ghn('mine', folder, norms={'squeezenet1_1': norm}, overwrite=True)
    code, out, _ = run('verify mine')
    assert code == 0
    assert '1 of 1 norms agree' in out
    register_ghn('mine', folder, norms={'squeezenet1_1': norm + 1}, overwrite=True)
    assert run('verify mine')[0] == 1
    register_ghn('mine', folder, norms={'no_such_network': 1.0}, overwrite=True)
    expect_error(run('verify mine'), "torchvision has no network 'no_such_network'")


def test_inspect_knows_the_names_of_a_user(run):
    register_ghn('mine', known_ghns()[EMBEDDED].folder)
    code, out, _ = run('inspect test_resnet --ghn mine --json')
    assert code == 0
    assert json.loads(out)['architecture'] == 'test_resnet'
    expect_error(run('inspect test_resnet.mine'), 'names a GHN')


def test_the_readme_about_conversions_and_names_runs(run, monkeypatch, fake_hub, small_ghn, tmp_path):
    section = README.partition('\n## Conversions, and names of your own\n')[2].partition('\n## ')[0]
    commands = [line.partition(' ')[2].split('#')[0] for line in section.splitlines() if line.startswith('timm-ghn ')]
    (code,) = re.findall(r'^```py\n(.*?)^```', section, flags=re.MULTILINE | re.DOTALL)
    fake_hub.files['user/repo/ghn.pt'] = WRITERS['joblib'](official_state(small_ghn), tmp_path / 'x.pt').read_bytes()
    options = {'config': small_ghn.config, 'overwrite': True}
    register_ghn('ghn3_tm8', repo_id='user/repo', filename='ghn.pt', **options)
    assert [command.split()[0] for command in commands] == ['cache', 'convert']
    for command in commands:
        assert run(command)[0] == 0, command
    shutil.copytree(known_ghns()[EMBEDDED].folder, 'train-out/ghn')
    code = code.replace("'resnet18'", "'test_resnet'")
    names: dict[str, object] = {}
    exec(code, names)
    assert names['model'].pretrained_cfg['tag'] == 'mine'
    assert 'mine' in list_ghns()
