"""A user's own GHNs have names like those of the package, and cannot reach what the user did not name."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fake_hub import COMMIT, FakeHub
from official import WRITERS, official_state

import timm_ghn
from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.hub import catalogue, known_ghns, list_ghns, load_ghn, register_ghn
from timm_ghn.hub.default import EMBEDDED
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def folder(tmp_path: Path, small_ghn: GHN) -> Path:
    save_ghn(small_ghn, tmp_path / 'ours')
    return tmp_path / 'ours'


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of entries."""
    place = tmp_path / 'configs'
    place.mkdir()
    monkeypatch.setenv('TIMM_GHN_CONFIGS', str(place))
    return place


def entry_for(ghn: GHN, name: str, **changes: Any) -> dict[str, Any]:
    config = {key: value for key, value in ghn.config.to_dict().items() if key != 'name'}
    record = {'name': name, 'description': 'mine', 'format': 'timm_ghn', 'path': 'weights', 'config': config, **changes}
    return {key: value for key, value in record.items() if value is not None}


def write(place: Path, record: dict[str, Any]) -> Path:
    path = place / f'{record["name"]}.json'
    path.write_text(json.dumps(record))
    return path


def expect_same(found: GHN, expected: GHN) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


# register_ghn


def test_a_folder_gets_a_name(folder, small_ghn):
    entry = register_ghn('mine', folder, description='my own')
    assert (entry.num_parameters, entry.config) == (sum(p.numel() for p in small_ghn.parameters()), small_ghn.config)
    assert list_ghns() == sorted([*list_ghns()])
    assert 'mine' in list_ghns()
    ghn = load_ghn('mine')
    expect_same(ghn, small_ghn)
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.embedded) == ('mine', None, False)
    assert json.loads(json.dumps(entry.to_dict()))['file'] == str(folder)


def test_the_names_are_public():
    assert timm_ghn.list_ghns() == list(known_ghns())
    assert timm_ghn.register_ghn is register_ghn


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_an_official_file_gets_a_name(tmp_path, small_ghn, writer):
    register_ghn('mine', writer(official_state(small_ghn), tmp_path / 'ghn.pt'))
    expect_same(load_ghn('mine'), small_ghn)
    assert known_ghns()['mine'].format == 'joblib'


def test_a_relative_path_still_means_the_same_place_later(folder, small_ghn, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    register_ghn('mine', 'ours')
    monkeypatch.chdir(ROOT)
    expect_same(load_ghn('mine'), small_ghn)


@pytest.mark.parametrize('how', ['tag', 'pretrained_cfg'])
def test_a_registered_name_is_a_tag_of_timm(how, monkeypatch):
    register_ghn('my-own_2', known_ghns()[EMBEDDED].folder)
    classes = load_ghn(EMBEDDED).config.num_classes
    expected = timm.create_model(f'test_resnet.{EMBEDDED}', num_classes=classes).state_dict()
    if how == 'tag':
        model = timm.create_model('test_resnet.my-own_2', num_classes=classes)
    else:
        model = timm.create_model('test_resnet', pretrained_cfg='my-own_2', num_classes=classes)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg['tag'] == 'my-own_2'
    assert 'ghn: my-own_2' in model.pretrained_cfg['notes']


def test_a_repository_in_our_form_gets_a_name(fake_hub: FakeHub, use_endpoint, folder, small_ghn):
    fake_hub.put('user/repo', folder)
    entry = register_ghn('mine', repo_id='user/repo')
    assert entry.config == small_ghn.config
    assert not any('safetensors' in request for request in fake_hub.requests)
    ghn = load_ghn('mine')
    expect_same(ghn, small_ghn)
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.revision) == ('mine', 'user/repo', COMMIT)
    use_endpoint('http://127.0.0.1:9')
    expect_same(load_ghn('mine'), small_ghn)


def test_an_official_file_on_the_hub_gets_a_name(fake_hub: FakeHub, tmp_path, small_ghn):
    data = WRITERS['torch'](official_state(small_ghn), tmp_path / 'ghn.pt').read_bytes()
    fake_hub.files['user/repo/sub/ghn.pt'] = data
    with pytest.raises(ConfigError, match=r'expected config=GHNConfig\(\.\.\.\)'):
        register_ghn('mine', repo_id='user/repo', filename='sub/ghn.pt')
    assert not fake_hub.requests
    register_ghn('mine', repo_id='user/repo', filename='sub/ghn.pt', config=small_ghn.config)
    expect_same(load_ghn('mine'), small_ghn)
    wrong = dataclasses.replace(small_ghn.config, heads=4)
    register_ghn('other', repo_id='user/repo', filename='sub/ghn.pt', config=wrong)
    with pytest.raises(CheckpointError, match='heads 2 where 4'):
        load_ghn('other')


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(folder, small_ghn):
    for name in (EMBEDDED, 'ghn2'):
        with pytest.raises(ConfigError, match=f"'{name}' is known already"):
            register_ghn(name, folder)
    register_ghn('ghn2', folder, overwrite=True)
    expect_same(load_ghn('ghn2'), small_ghn)
    with pytest.raises(ConfigError, match='overwrite=True'):
        register_ghn('ghn2', folder)


@pytest.mark.parametrize(
    'name',
    ['', 'ghn', '..', '.', 'a/b', 'a\\b', '../x', 'a b', 'a.b', '-x', '_x', 'é', 'x' * 65, 'x\n', 'x\0', None, 3],
)
def test_impossible_names_are_refused(folder, name):
    with pytest.raises(ConfigError, match='name'):
        register_ghn(name, folder)
    assert name not in list_ghns()


def test_what_is_not_there_or_no_ghn_is_refused_and_changes_nothing(tmp_path, folder):
    before = list_ghns()
    with pytest.raises(GHNNotFoundError, match='no such file'):
        register_ghn('mine', tmp_path / 'missing')
    with pytest.raises(GHNNotFoundError, match=r'no file config\.json'):
        register_ghn('mine', tmp_path)
    (tmp_path / 'bad.pt').write_bytes(b'nonsense')
    with pytest.raises(CheckpointError):
        register_ghn('mine', tmp_path / 'bad.pt')
    os.truncate(folder / 'model.safetensors', 100)
    with pytest.raises(CheckpointError, match='truncated'):
        register_ghn('mine', folder)
    with pytest.raises(GHNNotFoundError):
        register_ghn('mine', repo_id='user/repo')
    assert list_ghns() == before


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({}, 'either a path'),
        ({'path': '.', 'repo_id': 'user/repo'}, 'either a path'),
        ({'path': '.', 'filename': 'x.pt'}, 'either a path'),
        ({'repo_id': 'nonsense'}, 'user/name'),
        ({'repo_id': '../..'}, 'user/name'),
        ({'repo_id': 'user/repo', 'revision': '../../secret'}, 'revision'),
        ({'repo_id': 'user/repo', 'filename': '../../secret'}, 'inside the repository'),
        ({'repo_id': 'user/repo', 'filename': '/etc/passwd'}, 'inside the repository'),
        ({'repo_id': 'user/repo', 'filename': 'C:\\x'}, 'inside the repository'),
        ({'repo_id': 'user/repo', 'filename': 'x.pt', 'description': 'two\nlines'}, 'a line of'),
        ({'repo_id': 'user/repo', 'filename': 'x.pt', 'norms': {'resnet18': float('nan')}}, 'norm of'),
    ],
)
def test_contradictions_are_refused(small, options, match):
    options = {'config': small, **options} if options.get('revision') is None else {**options, 'config': small}
    with pytest.raises(ConfigError, match=match):
        register_ghn('mine', **options)


def test_a_registered_folder_that_vanished_is_told(folder):
    register_ghn('mine', folder)
    folder.rename(folder.with_name('elsewhere'))
    with pytest.raises(GHNNotFoundError, match=r"'mine' cannot be loaded: .*ours does not exist"):
        load_ghn('mine')


def test_the_default_can_be_a_registered_name(folder, small_ghn):
    register_ghn('mine', folder)
    timm_ghn.set_default_ghn('mine')
    expect_same(load_ghn('ghn'), small_ghn)


# TIMM_GHN_CONFIGS


def test_a_folder_of_entries_is_read(configs, small_ghn):
    save_ghn(small_ghn, configs / 'weights')
    write(configs, entry_for(small_ghn, 'mine'))
    write(configs, entry_for(small_ghn, 'far', path=None, repo_id='user/repo'))
    assert {'mine', 'far', EMBEDDED} <= set(list_ghns())
    expect_same(load_ghn('mine'), small_ghn)
    assert known_ghns()['far'].source == 'user/repo'


def test_the_files_of_the_package_are_entries_that_a_user_can_copy(configs):
    for path in (ROOT / 'hub_configs').glob('ghn3_*.json'):
        record = json.loads(path.read_text())
        write(configs, record | {'name': f'my_{record["name"]}'})
    assert {f'my_{name}' for name in known_ghns() if name.startswith('ghn3')} <= set(list_ghns())
    assert known_ghns()['my_ghn3_tm8'].norms == known_ghns()['ghn3_tm8'].norms


def test_a_change_is_seen(configs, small_ghn):
    write(configs, entry_for(small_ghn, 'mine'))
    assert known_ghns()['mine'].description == 'mine'
    path = write(configs, entry_for(small_ghn, 'mine', description='changed now'))
    assert known_ghns()['mine'].description == 'changed now'
    path.unlink()
    assert 'mine' not in list_ghns()


def test_the_first_of_several_folders_wins_and_the_other_is_told(configs, tmp_path, monkeypatch, small_ghn):
    second = tmp_path / 'second'
    second.mkdir()
    monkeypatch.setenv('TIMM_GHN_CONFIGS', os.pathsep.join([str(configs), '', str(second)]))
    write(configs, entry_for(small_ghn, 'mine', description='first'))
    path = write(second, entry_for(small_ghn, 'mine', description='second'))
    write(second, entry_for(small_ghn, 'more'))
    with pytest.warns(UserWarning, match=f'{path} has the name of a GHN of'):
        known = known_ghns()
    assert known['mine'].description == 'first'
    assert 'more' in known
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        known_ghns()  # told once


BAD = {
    'no json': '{',
    'a list': '[1]',
    'another name': '{"name": "other"}',
    'no config': '{"name": "bad", "description": "", "format": "timm_ghn", "path": "weights"}',
    'deep': '[' * 100_000,
    'digits': '{"name": "bad", "num_parameters": ' + '9' * 10_000 + '}',
}


@pytest.mark.parametrize('text', BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_told_by_name_and_does_not_break_the_others(configs, small_ghn, text):
    (configs / 'bad.json').write_text(text)
    write(configs, entry_for(small_ghn, 'good'))
    with pytest.warns(UserWarning, match=r'TIMM_GHN_CONFIGS in the environment: .*bad\.json'):
        names = list_ghns()
    assert 'good' in names
    assert 'bad' not in names
    with pytest.raises(GHNNotFoundError, match=r"'bad' is not known, because its file is wrong: .*bad\.json"):
        load_ghn('bad')


@pytest.mark.parametrize(
    'change',
    [
        {'path': '../outside'},
        {'path': '/etc'},
        {'path': 'C:\\x'},
        {'path': '..\\outside'},
        {'path': ''},
        {'path': 'a\0b'},
        {'path': 3},
        {'path': None, 'file': '/etc'},
        {'path': None, 'file': 'weights', 'within': '/'},
        {'path': None, 'repo_id': 'user/repo', 'filename': '../x', 'format': 'joblib'},
        {'path': None, 'repo_id': '../..', 'filename': 'x', 'format': 'joblib'},
        {'license': 3},
        {'num_parameters': 'many'},
        {'norms': [1]},
        {'norms': {'resnet18': 'x'}},
        {'config': []},
        {'config': {'hid': 10**30}},
    ],
    ids=str,
)
def test_an_entry_cannot_reach_outside_or_hold_nonsense(configs, small_ghn, change):
    write(configs, entry_for(small_ghn, 'bad', **change))
    with pytest.warns(UserWarning, match=r'bad\.json'):
        assert 'bad' not in list_ghns()


def test_an_entry_with_a_name_of_the_package_is_told(configs, small_ghn):
    write(configs, entry_for(small_ghn, 'ghn2'))
    with pytest.warns(UserWarning, match=r'ghn2\.json has the name of a GHN of the package'):
        assert known_ghns()['ghn2'].repo_id is not None


@pytest.mark.parametrize('what', ['weights', 'weights/model.safetensors', 'weights/config.json'])
def test_a_link_cannot_reach_outside(configs, folder, small_ghn, what):
    (configs / 'weights').mkdir(exist_ok=True)
    link, target = configs / what, folder / Path(what).name if '/' in what else folder
    if what == 'weights':
        link.rmdir()
    link.symlink_to(target)
    write(configs, entry_for(small_ghn, 'bad'))
    with pytest.warns(UserWarning, match='expected the GHN .* inside'):
        assert 'bad' not in list_ghns()


def test_a_link_that_is_made_later_cannot_either(configs, folder, small_ghn):
    write(configs, entry_for(small_ghn, 'mine'))
    assert 'mine' in list_ghns()
    (configs / 'weights').symlink_to(folder)
    with pytest.raises(ConfigError, match='inside'):
        load_ghn('mine')


def test_a_folder_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_GHN_CONFIGS', str(tmp_path / 'none'))
    with pytest.warns(UserWarning, match='none.* cannot be read'):
        assert EMBEDDED in list_ghns()


def test_too_many_entries_are_not_read(configs, monkeypatch, small_ghn):
    monkeypatch.setattr(catalogue, 'MAX_ENTRIES', 2)
    for name in ('a1', 'a2', 'a3'):
        write(configs, entry_for(small_ghn, name))
    with pytest.warns(UserWarning, match='more than 2 entries'):
        assert {'a1', 'a2', 'a3'} & set(list_ghns()) == {'a1', 'a2'}


def test_an_entry_of_a_folder_is_a_tag_of_timm(configs):
    source = known_ghns()[EMBEDDED]
    (configs / 'weights').mkdir()
    for path in source.folder.iterdir():
        (configs / 'weights' / path.name).write_bytes(path.read_bytes())
    config = {key: value for key, value in source.config.to_dict().items() if key != 'name'}
    record = {'name': 'shared', 'description': '', 'format': 'timm_ghn', 'path': 'weights', 'config': config}
    write(configs, record)
    model = timm.create_model('test_resnet', pretrained_cfg='shared')
    assert model.pretrained_cfg['tag'] == 'shared'
