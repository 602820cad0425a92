"""The catalogue: every shipped entry describes a GHN that can be built, and a name or a path means one thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from hub_fixtures import contents, expect_same
from hub_server import HubServer
from official import WRITERS, official_state

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.hub.catalogue import (
    EMBEDDED,
    PUBLISHED,
    GHNEntry,
    chosen_default,
    known_ghns,
    list_ghns,
    locate,
    register_ghn,
    set_default_ghn,
)
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = known_ghns()
#: Width, layers, heads and number of parameters, from the papers and the released files.
PUBLISHED_SIZES = {
    'ghn3_tm8': (64, 3, 8, 6_906_632),
    'ghn3_sm8': (128, 5, 16, 35_810_368),
    'ghn3_lm8': (256, 12, 16, 214_668_960),
    'ghn3_xlm16': (384, 24, 16, 654_365_184),
}
REPOSITORY = 'SamsungSAILMontreal/ghn3'


@pytest.mark.parametrize('entry', ENTRIES.values(), ids=ENTRIES.keys())
def test_each_entry_builds_and_has_the_stated_number_of_parameters(entry: GHNEntry):
    with torch.device('meta'):
        ghn = GHN(entry.config)
    assert sum(parameter.numel() for parameter in ghn.parameters()) == entry.num_parameters
    assert entry.config.name == entry.name
    assert entry.license == 'mit'


def test_the_published_ghn3s_have_their_published_sizes():
    assert set(ENTRIES) == {*PUBLISHED_SIZES, 'ghn2', EMBEDDED}
    for name, sizes in PUBLISHED_SIZES.items():
        entry, config = ENTRIES[name], ENTRIES[name].config
        assert (config.hid, config.layers, config.heads, entry.num_parameters) == sizes
        assert config.max_shape == (config.hid, config.hid, 16, 16)
        assert (config.gnn, config.window, config.num_classes, config.trained) == ('graphormer', 'center', 1000, True)
        assert (entry.repo_id, entry.filename) == (REPOSITORY, f'{name.replace("_", "")}.pt')


def test_norms_are_the_published_ones(golden: Path):
    published = json.loads((golden / 'reference_norms.json').read_text())
    for name, entry in ENTRIES.items():
        assert dict(entry.norms) == {arch: norms[name] for arch, norms in published.items() if name in norms}
    assert [name for name, entry in ENTRIES.items() if len(entry.norms) == 74] == ['ghn2', 'ghn3_tm8', PUBLISHED]


def test_the_embedded_ghn_is_small_and_trained():
    entry = ENTRIES[EMBEDDED]
    assert entry.config.trained
    assert 'Tiny-ImageNet' in entry.description
    assert sum(path.stat().st_size for path in entry.place.iterdir()) < 25e6
    ghn = load_ghn(EMBEDDED)
    assert ghn.config == entry.config
    assert ghn.origin is not None
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.embedded) == (EMBEDDED, None, True)


# register_ghn


@pytest.mark.parametrize('kind', ['weights', 'relative', 'joblib'])
def test_a_path_gets_a_name(folder, small_ghn, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {'weights': folder / 'model.safetensors', 'relative': 'native'}
    path = paths[kind] if kind in paths else WRITERS[kind](official_state(small_ghn), tmp_path / 'small.pt')
    register_ghn('mine', path)
    monkeypatch.chdir('/')
    assert list_ghns() == sorted([*ENTRIES, 'mine'])
    entry = known_ghns()['mine']
    assert entry.config == small_ghn.config
    assert Path(json.loads(json.dumps(entry.to_dict()))['path']).is_absolute()
    ghn = load_ghn('mine')
    expect_same(ghn, small_ghn)
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.embedded) == ('mine', None, False)
    set_default_ghn('mine')
    expect_same(load_ghn('ghn'), small_ghn)


def test_a_repository_gets_a_name(hub: HubServer, use_endpoint, folder, small_ghn):
    commit = hub.put('user/repo', contents(folder))
    register_ghn('mine', 'user/repo')
    assert known_ghns()['mine'].config == small_ghn.config
    assert not hub.asked('safetensors')
    ghn = load_ghn('mine')
    expect_same(ghn, small_ghn)
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.revision) == ('mine', 'user/repo', commit)
    use_endpoint('http://127.0.0.1:9')
    expect_same(load_ghn('mine'), small_ghn)


def test_a_registered_name_is_a_tag_of_timm():
    register_ghn('my-own_2', ENTRIES[EMBEDDED].place)
    expected = timm.create_model(f'test_resnet.{EMBEDDED}', num_classes=9).state_dict()
    model = timm.create_model('test_resnet.my-own_2', num_classes=9)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items() if 'fc' not in key)
    assert model.pretrained_cfg['tag'] == 'my-own_2'
    assert 'ghn: my-own_2' in model.pretrained_cfg['notes']


def test_a_name_has_one_meaning(folder, small_ghn, tmp_path):
    for name in (EMBEDDED, 'ghn2'):
        with pytest.raises(ConfigError, match=f"'{name}' is known already"):
            register_ghn(name, folder)
    register_ghn('mine', folder)
    save_ghn(small_ghn, tmp_path / 'other')
    with pytest.raises(ConfigError, match=r"'mine' is known already \(.*native\)"):
        register_ghn('mine', tmp_path / 'other')
    register_ghn('mine', folder)  # the same place again, as when a cell of a notebook runs twice
    with pytest.raises(ConfigError, match='has a name already'):
        register_ghn('another', 'mine')


def test_impossible_names_are_refused(folder):
    for name in ('', 'ghn', '..', 'a/b', 'a b', 'a.b', '-x', 'é', 'x' * 65, 'x\n', None):
        with pytest.raises(ConfigError, match='name'):
            register_ghn(name, folder)
    assert list_ghns() == list(ENTRIES)


def test_what_is_not_there_or_no_ghn_is_refused_and_changes_nothing(tmp_path):
    with pytest.raises(GHNNotFoundError, match='no such file'):
        register_ghn('mine', tmp_path / 'missing')
    with pytest.raises(CheckpointError, match=r'config\.json'):
        register_ghn('mine', tmp_path)
    (tmp_path / 'bad.pt').write_bytes(b'nonsense')
    with pytest.raises(CheckpointError):
        register_ghn('mine', tmp_path / 'bad.pt')
    with pytest.raises(GHNNotFoundError):
        register_ghn('mine', 'user/repo')
    assert list_ghns() == list(ENTRIES)


# What 'ghn' means


def test_the_order_of_choices(monkeypatch):
    assert chosen_default() is None
    monkeypatch.setenv('TIMM_GHN_DEFAULT', 'ghn2')
    assert chosen_default() == 'ghn2'
    set_default_ghn('ghn3_tm8')
    assert chosen_default() == 'ghn3_tm8'
    for undo in (None, 'ghn'):
        set_default_ghn('user/repository')
        set_default_ghn(undo)
        assert chosen_default() == 'ghn2'
    for nothing in ('', '  ', 'ghn'):
        monkeypatch.setenv('TIMM_GHN_DEFAULT', nothing)
        assert chosen_default() is None


def test_a_relative_default_still_means_the_same_place_later(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    monkeypatch.chdir(tmp_path)
    set_default_ghn('mine')
    monkeypatch.chdir('/')
    assert chosen_default() == str((tmp_path / 'mine').resolve())


@pytest.mark.parametrize('name', ['ghn3tm8', Path('/no/such/place'), '/no/such/place'])
def test_a_default_that_does_not_exist_is_refused_and_changes_nothing(name, monkeypatch):
    set_default_ghn('ghn2')
    with pytest.raises(GHNNotFoundError):
        set_default_ghn(name)
    assert chosen_default() == 'ghn2'
    set_default_ghn(None)
    monkeypatch.setenv('TIMM_GHN_DEFAULT', str(name))
    with pytest.raises(GHNNotFoundError, match=f'TIMM_GHN_DEFAULT={name} in the environment: '):
        chosen_default()


# What a name means


def test_a_name_of_the_catalogue_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'ghn3_tm8').mkdir()
    assert locate('ghn3_tm8') == known_ghns()['ghn3_tm8']
    for path in ('./ghn3_tm8', Path('ghn3_tm8'), str(tmp_path / 'ghn3_tm8')):
        assert locate(path) == Path(path)


def test_a_folder_in_the_working_directory_takes_no_tag_and_no_default_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / EMBEDDED).mkdir()  # an empty one, of which nothing could be loaded
    model = timm.create_model(f'test_resnet.{EMBEDDED}')
    assert '"embedded": true' in str(model.pretrained_cfg['notes'])
    monkeypatch.setenv('TIMM_GHN_DEFAULT', EMBEDDED)
    assert load_ghn('ghn').origin.embedded
    set_default_ghn(EMBEDDED)
    assert load_ghn('ghn').origin.embedded


def test_an_existing_path_wins_over_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate('user/repository') == 'user/repository'
    (tmp_path / 'user').mkdir()
    (tmp_path / 'user/repository').touch()
    assert locate('user/repository') == Path('user/repository')
    (tmp_path / 'folder').mkdir()
    assert locate('folder') == Path('folder')


def test_what_is_no_name_and_no_path_lists_the_known_names():
    for name in ('/no/such/place', './such', '~/such', 'a/b/c', Path('ghn3_tm8'), 'ghn3tm8', '', '\x00', 'x' * 5000):
        with pytest.raises(GHNNotFoundError, match='no such file or folder. Known are ghn2, .*user/repository'):
            locate(name)
