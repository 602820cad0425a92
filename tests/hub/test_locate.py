"""A name means one thing: an existing path, else an entry of the catalogue, else a repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from timm_ghn.errors import GHNNotFoundError
from timm_ghn.hub.locate import locate


def test_an_existing_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate('ghn3_tm8').entry is not None
    (tmp_path / 'ghn3_tm8').mkdir()
    assert locate('ghn3_tm8').path == Path('ghn3_tm8')
    assert locate('user/repository').repo_id == 'user/repository'
    (tmp_path / 'user').mkdir()
    (tmp_path / 'user/repository').touch()
    assert locate('user/repository').path == Path('user/repository')


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
