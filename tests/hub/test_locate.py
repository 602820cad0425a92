"""A name means one thing: an entry of the catalogue, else an existing path, else a repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from timm_ghn.errors import GHNNotFoundError
from timm_ghn.hub import known_ghns, load_ghn, set_default_ghn
from timm_ghn.hub.default import EMBEDDED, VARIABLE
from timm_ghn.hub.locate import locate


def test_a_name_of_the_catalogue_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'ghn3_tm8').mkdir()
    assert locate('ghn3_tm8').entry == known_ghns()['ghn3_tm8']
    for path in ('./ghn3_tm8', Path('ghn3_tm8'), str(tmp_path / 'ghn3_tm8')):
        assert locate(path).path == Path(path)


def test_a_folder_in_the_working_directory_takes_no_tag_and_no_default_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / EMBEDDED).mkdir()  # an empty one, of which nothing could be loaded
    model = timm.create_model(f'test_resnet.{EMBEDDED}')
    assert 'embedded: True' in model.pretrained_cfg['notes']
    monkeypatch.setenv(VARIABLE, EMBEDDED)
    assert load_ghn('ghn').origin.embedded
    set_default_ghn(EMBEDDED)
    assert load_ghn('ghn').origin.embedded


def test_a_name_whose_entry_is_wrong_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'mine.json').write_text('{')
    (tmp_path / 'mine').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TIMM_GHN_CONFIGS', str(tmp_path / 'configs'))
    with pytest.warns(UserWarning, match=r'mine\.json'), pytest.raises(GHNNotFoundError, match='its file is wrong'):
        locate('mine')
    assert locate('./mine').path == Path('mine')


def test_an_existing_path_wins_over_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate('user/repository').repo_id == 'user/repository'
    (tmp_path / 'user').mkdir()
    (tmp_path / 'user/repository').touch()
    assert locate('user/repository').path == Path('user/repository')
    (tmp_path / 'folder').mkdir()
    assert locate('folder').path == Path('folder')


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    (tmp_path / 'my.pt').touch()
    assert locate('~/my.pt').path == tmp_path / 'my.pt'


@pytest.mark.parametrize('name', ['/no/such/place', 'no/such.pt', 'such.safetensors', './such', '~/such', 'a/b/c'])
def test_what_looks_like_a_path_is_said_to_be_missing(name):
    with pytest.raises(GHNNotFoundError, match='no such file or folder'):
        locate(name)


def test_a_path_object_is_never_a_name():
    with pytest.raises(GHNNotFoundError, match='no such file or folder'):
        locate(Path('ghn3_tm8'))


@pytest.mark.parametrize(('name', 'meant'), [('ghn3tm8', 'ghn3_tm8'), ('ghn3-xlm16', 'ghn3_xlm16'), ('gnh2', 'ghn2')])
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(name, meant):
    with pytest.raises(
        GHNNotFoundError, match=rf"Did you mean '{meant}'\? Known are ghn2, ghn3_lm8, .*user/repository"
    ):
        locate(name)


@pytest.mark.parametrize('name', ['', '\x00', 'x' * 5000, 'völlig anders', 'resnet50'])
def test_names_that_are_like_none_are_not_found_either(name):
    with pytest.raises(GHNNotFoundError, match='Known are'):
        locate(name)
