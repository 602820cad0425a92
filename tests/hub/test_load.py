"""Loading by name: from the Hub, from its cache, or, for the default only, from inside the package."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import pytest
import torch
from hub_fixtures import expect_same
from hub_server import HubServer
from official import official_state, write_joblib

from timm_ghn.errors import CheckpointError, GHNFallbackWarning, GHNNotFoundError
from timm_ghn.hub import known_ghns, load_ghn, set_default_ghn, shared_ghn
from timm_ghn.hub.catalogue import EMBEDDED, PUBLISHED
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHNConfig

FALLBACK = r'ghn_tiny, serves in its place\. It is small and was trained.*set_default_ghn.*TIMM_GHN_DEFAULT'


REPO = 'SamsungSAILMontreal/ghn3'


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, small: GHNConfig) -> str:
    """The file of the catalogue's default, which is made small enough for a test."""
    known = known_ghns()
    known[PUBLISHED] = dataclasses.replace(known[PUBLISHED], config=dataclasses.replace(small, name=PUBLISHED))
    monkeypatch.setattr('timm_ghn.hub.catalogue._entries', lambda: known)
    return str(known[PUBLISHED].filename)


# From the Hub


def test_the_default_comes_from_the_hub_and_then_from_the_cache(
    hub: HubServer, use_endpoint, published, official, small_ghn
):
    commit = hub.put(REPO, {published: official})
    ghn = load_ghn('ghn')
    expect_same(ghn, small_ghn)
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.revision) == (PUBLISHED, REPO, commit)
    assert ghn.origin.sha256 == hashlib.sha256(official).hexdigest()
    assert not ghn.origin.embedded
    hub.requests.clear()
    expect_same(load_ghn('ghn'), small_ghn)
    assert not hub.requests
    use_endpoint('http://127.0.0.1:9')
    for act in (lambda: load_ghn('ghn'), lambda: load_ghn('ghn', local_files_only=True), lambda: load_ghn(PUBLISHED)):
        expect_same(act(), small_ghn)


def test_a_file_that_is_not_the_one_of_the_catalogue_is_refused(hub: HubServer, official):
    hub.put(REPO, {'ghn3tm8.pt': official})
    with pytest.raises(CheckpointError, match='not the GHN that the catalogue describes'):
        load_ghn('ghn3_tm8')


# The default and its stand-in


def test_without_a_network_the_default_is_the_ghn_inside_the_package():
    with pytest.warns(GHNFallbackWarning, match=FALLBACK) as caught:
        ghn = load_ghn('ghn')
    assert len(caught) == 1
    assert ghn.config.name == EMBEDDED
    assert ghn.origin is not None
    assert ghn.origin.embedded
    assert issubclass(GHNFallbackWarning, UserWarning)


def test_a_damaged_default_is_an_error_not_a_reason_to_take_another(hub, published, official, tmp_path):
    for number, content in enumerate((official[: len(official) // 2], b'cos\nsystem\n(S"true"\ntR.', b'')):
        hub.put(REPO, {published: content})
        with pytest.raises(CheckpointError):
            load_ghn('ghn', cache_dir=tmp_path / str(number))


@pytest.mark.parametrize('name', ['ghn2', 'user/repo', '/no/such/file.pt'])
@pytest.mark.parametrize('how', ['argument', 'environment', 'set_default_ghn'])
def test_a_ghn_that_is_named_never_falls_back(monkeypatch, name, how):
    def ask() -> None:
        if how == 'environment':
            monkeypatch.setenv('TIMM_GHN_DEFAULT', name)
        elif how == 'set_default_ghn':
            set_default_ghn(name)
        load_ghn(name if how == 'argument' else 'ghn')

    with pytest.raises(GHNNotFoundError, match=re.escape(name)):  # and no warning: warnings are errors
        ask()


def test_what_was_asked_why_it_failed_and_the_way_out_are_told():
    with pytest.raises(GHNNotFoundError, match=r'ghn3tm8\.pt of .*ghn3 at main.*refused.*HF_ENDPOINT.*path') as e:
        load_ghn('ghn3_tm8')
    assert e.value.__cause__ is not None


# Files


def test_a_folder_its_weights_and_an_official_file_load_alike(folder, small_ghn, tmp_path):
    path = write_joblib(official_state(small_ghn), tmp_path / 'small.pt')
    for name in (folder, str(folder), folder / 'model.safetensors', path, str(path)):
        ghn = load_ghn(name)
        expect_same(ghn, small_ghn)
        assert ghn.config == small_ghn.config
        assert not ghn.training


def test_a_shared_ghn_is_read_again_only_when_its_file_changes(folder, small_ghn):
    first = shared_ghn(folder)
    assert shared_ghn(str(folder), device='cpu') is first
    with torch.no_grad():
        small_ghn.ln.weight.add_(1)
    save_ghn(small_ghn, folder)
    second = shared_ghn(folder)
    assert second is not first
    expect_same(second, small_ghn)
