"""``timm-ghn convert``, ``timm-ghn cache``, and what the other commands make of a user's names."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hub_fixtures import contents, expect_same
from hub_server import HubServer
from official import WRITERS, official_state

from timm_ghn.hub import catalogue, known_ghns, list_ghns, load_ghn, register_ghn
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.hub.converted import cache_folder, converted_ghns

PAGE = (Path(__file__).resolve().parents[2] / 'docs' / 'hub.md').read_text(encoding='utf-8')


@pytest.fixture
def run(call_cli, monkeypatch, tmp_path):
    """Run a command in a folder of its own: exit code, standard output, standard error."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    return call_cli


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def expect_error(ran: tuple[int, str, str], text: str) -> None:
    code, out, err = ran
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('timm-ghn: error: ')
    assert text in err


def test_convert_writes_a_folder_in_the_native_format(run, mine, small_ghn):
    code, out, err = run('convert mine -o out')
    assert (code, err) == (0, '')
    assert f'{size_of(Path("out")):,} bytes' in out
    assert "timm_ghn.load_ghn('out')" in out
    assert sorted(os.listdir('out')) == ['config.json', 'model.safetensors']
    expect_same(load_ghn('./out'), small_ghn)
    assert os.listdir('.') == ['out']


def test_convert_takes_the_path_of_an_official_file(run, tmp_path, small_ghn):
    path = WRITERS['torch'](official_state(small_ghn), tmp_path / 'ghn.pt')
    code, out, _ = run(f'convert {path} -o out --json')
    assert code == 0
    assert json.loads(out) == {'source': str(path), 'folder': 'out', 'size': size_of(Path('out'))}
    expect_same(load_ghn('./out'), small_ghn)
    assert load_ghn('./out').config == dataclasses.replace(small_ghn.config, name='ghn')


def test_convert_takes_what_is_in_the_native_format_already(run, hub: HubServer, folder, small_ghn):
    hub.put('user/native', contents(folder))
    register_ghn('named', folder)
    for number, source in enumerate((folder, folder / 'model.safetensors', 'named', 'user/native')):
        assert run(f'convert {source} -o out{number}')[0] == 0
        expect_same(load_ghn(f'./out{number}'), small_ghn)
        assert sorted(os.listdir(f'out{number}')) == ['config.json', 'model.safetensors']


def test_convert_says_what_is_wrong_and_leaves_nothing(run, mine, tmp_path, small_ghn):
    expect_error(run('convert nonsense -o out'), "no GHN has the name 'nonsense'")
    expect_error(run(f'convert {EMBEDDED}'), '-o/--output')
    (tmp_path / 'bad.pt').write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    expect_error(run(f'convert {tmp_path}/bad.pt -o out'), 'os.system')
    state = official_state(small_ghn)
    state['ln.bias'][0] = float('inf')
    WRITERS['torch'](state, tmp_path / 'inf.pt')
    expect_error(run(f'convert {tmp_path}/inf.pt -o out'), 'not finite')
    assert os.listdir('.') == []


def test_convert_never_replaces_anything(run, mine):
    Path('out').mkdir()
    Path('out/precious').touch()
    Path('file').touch()
    for place in ('out', 'file'):
        expect_error(run(f'convert mine -o {place}'), 'is not an empty folder')
    assert os.listdir('out') == ['precious']
    Path('empty').mkdir()
    assert run('convert mine -o empty')[0] == 0


def test_cache_lists_and_removes(run, mine):
    code, out, err = run('cache')
    assert (code, err) == (0, '')
    assert out == f'nothing is converted in {cache_folder()}\n'
    load_ghn('mine')
    ((path, (_, size)),) = converted_ghns(cache_folder()).items()
    _, out, _ = run('cache')
    assert out.splitlines()[2].split() == ['mine', f'{size:,}', str(path)]
    assert f'{size:,} bytes in all' in out
    _, out, _ = run('cache --json')
    record = {'name': 'mine', 'folder': str(path), 'size': size}
    assert json.loads(out) == {'folder': str(cache_folder()), 'converted': [record], 'size': size}
    expect_error(run('cache --remove other'), "no conversion of 'other'")
    _, out, _ = run('cache --remove mine --json')
    assert json.loads(out)['removed'] == [record]
    assert not path.exists()
    load_ghn('mine')
    assert 'bytes were removed; what was downloaded stays' in run('cache --remove all')[1]
    assert run('cache --remove all')[1] == f'nothing was removed from {cache_folder()}\n'


def test_cache_that_is_off_is_told(run, monkeypatch):
    monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    expect_error(run('cache'), 'TIMM_GHN_CACHE turns it off')


def test_the_commands_know_registered_names(run, mine):
    register_ghn('own', known_ghns()[EMBEDDED].place)
    _, out, _ = run('list')
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert rows['mine'][1:4] == ['-', '5', 'user/repo/ghn.pt']
    assert list(rows) == list(known_ghns())
    expected = {name: entry.to_dict() for name, entry in known_ghns().items()}
    assert json.loads(run('list --json')[1]) == json.loads(json.dumps(expected))
    code, out, _ = run('inspect test_resnet --ghn own --json')
    assert code == 0
    assert json.loads(out)['architecture'] == 'test_resnet'
    expect_error(run('inspect test_resnet.own'), 'names a GHN')


def test_the_page_about_conversions_and_names_runs(run, mine):
    section = PAGE.partition('\n## Conversions, and names of your own\n')[2].partition('\n## ')[0]
    commands = [line.partition(' ')[2].split('#')[0] for line in section.splitlines() if line.startswith('timm-ghn ')]
    (code,) = re.findall(r'^```py\n(.*?)^```', section, flags=re.MULTILINE | re.DOTALL)
    catalogue._registered['ghn3_tm8'] = dataclasses.replace(mine, name='ghn3_tm8')
    assert [command.split()[0] for command in commands] == ['cache', 'convert']
    for command in commands:
        assert run(command)[0] == 0, command
    shutil.copytree(known_ghns()[EMBEDDED].place, 'train-out/ghn')
    del catalogue._registered['mine']
    code = code.replace("'resnet18'", "'test_resnet'")
    names: dict[str, object] = {}
    exec(code, names)
    assert names['model'].pretrained_cfg['tag'] == 'mine'
    assert 'mine' in list_ghns()
