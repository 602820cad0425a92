"""The name 'ghn' means what the program chose, else what the environment chose, else the published GHN."""

from __future__ import annotations

from pathlib import Path

import pytest

from timm_ghn.errors import GHNNotFoundError
from timm_ghn.hub import resolve_default, set_default_ghn
from timm_ghn.hub.default import Default


def test_the_order_of_choices(monkeypatch):
    assert resolve_default() == Default('ghn3_xlm16', None)
    monkeypatch.setenv('TIMM_GHN_DEFAULT', 'ghn2')
    assert resolve_default() == Default('ghn2', 'TIMM_GHN_DEFAULT')
    set_default_ghn('ghn3_tm8')
    assert resolve_default() == Default('ghn3_tm8', 'set_default_ghn')
    set_default_ghn(None)
    assert resolve_default() == Default('ghn2', 'TIMM_GHN_DEFAULT')
    monkeypatch.delenv('TIMM_GHN_DEFAULT')
    assert resolve_default() == Default('ghn3_xlm16', None)


@pytest.mark.parametrize('nothing', ['', '  ', 'ghn'])
def test_an_empty_environment_is_no_choice(monkeypatch, nothing):
    monkeypatch.setenv('TIMM_GHN_DEFAULT', nothing)
    assert resolve_default().chosen_by is None


def test_the_name_of_the_default_undoes_the_choice():
    set_default_ghn('ghn2')
    set_default_ghn('ghn')
    assert resolve_default().chosen_by is None


def test_a_relative_path_still_means_the_same_place_later(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    set_default_ghn('mine')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert resolve_default() == Default(str((tmp_path / 'mine').resolve()), 'set_default_ghn')


def test_repositories_can_be_chosen():
    set_default_ghn('user/repository')
    assert resolve_default().name == 'user/repository'


@pytest.mark.parametrize('name', ['ghn3tm8', Path('/no/such/place'), '/no/such/place'])
def test_a_choice_that_does_not_exist_is_refused_and_changes_nothing(name):
    set_default_ghn('ghn2')
    with pytest.raises(GHNNotFoundError):
        set_default_ghn(name)
    assert resolve_default().name == 'ghn2'


def test_an_environment_that_names_no_ghn_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setenv('TIMM_GHN_DEFAULT', 'ghn3tm8')
    with pytest.raises(GHNNotFoundError, match=r"TIMM_GHN_DEFAULT=ghn3tm8 in the environment: .*'ghn3_tm8'"):
        resolve_default()
