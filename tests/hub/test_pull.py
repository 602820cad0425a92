"""Pulling GHNs with the real client from a server: revisions, caches, tokens, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_fixtures import contents, expect_same
from hub_server import HubServer

from timm_ghn import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.hub import fetch, load_ghn
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/ghn'
TOKEN = 'hf_writer'
LARGE = '^/lfs/'


@pytest.fixture
def files(folder: Path) -> dict[str, bytes]:
    return contents(folder)


@pytest.fixture
def other(small: object, tmp_path) -> tuple[GHN, dict[str, bytes]]:
    """Another GHN of the same configuration."""
    torch.manual_seed(1)
    ghn = GHN(small)
    save_ghn(ghn, tmp_path / 'other')
    return ghn, contents(tmp_path / 'other')


@pytest.fixture
def cache() -> Path:
    """The folder of the cache, which is empty when a test begins."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def left(cache: Path) -> list[Path]:
    """Weights, whole or in part, that are in the cache."""
    return [path for path in cache.rglob('*') if path.is_file() and path.stat().st_size > 10_000]


def test_a_revision_is_pinned(hub: HubServer, small_ghn, files, other, tmp_path):
    first = hub.put(REPO, files)
    hub.put(REPO, other[1], revision='v2')
    hub.put(REPO, other[1])
    ghn = load_ghn(REPO, revision=first)
    expect_same(ghn, small_ghn)
    assert (ghn.origin.repo_id, ghn.origin.revision, ghn.origin.name) == (REPO, first, 'small')
    expect_same(load_ghn(REPO), other[0])
    expect_same(load_ghn(REPO, revision='v2', cache_dir=tmp_path / 'mine'), other[0])
    assert (tmp_path / 'mine/models--user--ghn').is_dir()
    with pytest.raises(GHNNotFoundError, match=r'at v3.*RevisionNotFoundError'):
        load_ghn(REPO, revision='v3')


def test_both_files_are_of_one_commit(hub: HubServer, small_ghn, files, other, monkeypatch):
    first = hub.put(REPO, files)
    blob = hub.blob

    def move_on(oid: str) -> bytes:
        # The branch moves as soon as the configuration is given.
        if hub.requests[-1].method == 'GET':
            monkeypatch.setattr(hub, 'blob', blob)
            hub.put(REPO, other[1])
        return blob(oid)

    monkeypatch.setattr(hub, 'blob', move_on)
    ghn = load_ghn(REPO)
    assert hub.repo(REPO)['refs']['main'] != first == ghn.origin.revision
    expect_same(ghn, small_ghn)


def test_what_is_in_the_cache_needs_no_hub(hub: HubServer, small_ghn, files, monkeypatch):
    hub.put(REPO, files)
    with pytest.raises(GHNNotFoundError, match='local_files_only'):
        load_ghn(REPO, local_files_only=True)
    assert not hub.requests
    load_ghn(REPO)
    for status in (401, 403, 429, 500):
        hub.faults.clear()
        hub.fail('HEAD', 'resolve', times=99, status=status)
        expect_same(load_ghn(REPO), small_ghn)
    hub.requests.clear()
    expect_same(load_ghn(REPO, local_files_only=True), small_ghn)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    expect_same(load_ghn(REPO), small_ghn)
    assert not hub.requests


# Who may read


@pytest.mark.parametrize(('settings', 'message'), [({'private': True}, 'private'), ({'gated': True}, 'restricted')])
def test_a_token_opens_what_is_closed(hub: HubServer, small_ghn, files, settings, message, cache, monkeypatch):
    hub.put(REPO, files, **settings)
    for token in (None, False, 'hf_other'):
        with pytest.raises(GHNNotFoundError, match=message + '.*hf auth login'):
            load_ghn(REPO, token=token)
    assert not left(cache)
    expect_same(load_ghn(REPO, token='hf_reader'), small_ghn)
    monkeypatch.setenv('HF_TOKEN', 'hf_reader')
    expect_same(load_ghn(REPO, cache_dir=cache / 'another'), small_ghn)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, files, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    hub.put(REPO, files, private=True)
    load_ghn(REPO, token=TOKEN)
    assert hub.asked('^storage GET')
    assert all(request.headers['authorization'] == f'Bearer {TOKEN}' for request in hub.asked('^hub .*resolve'))
    for method in ('HEAD', 'GET'):
        hub.fail(method, 'resolve/main/config', times=99, location=f'{hub.storage}/lfs/{"0" * 64}')
    with pytest.raises(GHNNotFoundError):
        load_ghn(REPO, token=TOKEN, cache_dir=tmp_path / 'cache')
    for request in hub.asked('^storage'):
        assert TOKEN not in str(request.headers)
    assert TOKEN not in caplog.text
    assert TOKEN not in ''.join(capfd.readouterr())


@pytest.mark.parametrize('token', ['hf_secret\r\nX-Evil: 1', 'hf_sec ret', 'hf_secretä', '', b'hf_secret'], ids=repr)
def test_what_can_be_no_token_is_refused_and_never_shown(hub: HubServer, files, caplog, capfd, token, monkeypatch):
    # The HTTP client cannot send it, and would show it.
    caplog.set_level(logging.DEBUG)
    hub.put(REPO, files)
    for name in (REPO, 'ghn'):
        with pytest.raises(ConfigError, match='to be one word') as caught:  # and no warning
            load_ghn(name, token=token)
        assert caught.value.__cause__ is None is caught.value.__context__
    assert not hub.requests
    assert 'secret' not in str(caught.value) + caplog.text + ''.join(capfd.readouterr())
    load_ghn(REPO)
    monkeypatch.setenv('HF_TOKEN', 'hf_sec ret')
    with pytest.raises(ConfigError, match='to be one word'):
        load_ghn(REPO)
    load_ghn(REPO, local_files_only=True)
    load_ghn(REPO, token=False)


# What goes wrong on the way


@pytest.mark.parametrize('fault', [{'cut': 500}, {'status': 403}, {'status': 429}], ids=str)
def test_a_download_that_fails_leaves_nothing_in_the_cache(hub: HubServer, small_ghn, files, waits, cache, fault):
    hub.put(REPO, files)
    hub.fail('GET', LARGE, times=99, **fault)
    with pytest.raises(GHNNotFoundError, match=r'model\.safetensors of user/ghn .*cannot be had') as caught:
        load_ghn(REPO)
    assert caught.value.__cause__ is not None
    assert 'signature' not in str(caught.value)
    assert not left(cache)
    hub.faults.clear()
    expect_same(load_ghn(REPO), small_ghn)


def test_a_file_whose_hash_is_wrong_is_refused_and_not_kept(hub: HubServer, small_ghn, files, cache):
    hub.put(REPO, files)
    hub.fail('GET', LARGE, flip=True)
    with pytest.raises(CheckpointError, match='arrived damaged.*load it again'):
        load_ghn(REPO)
    assert not left(cache)
    expect_same(load_ghn(REPO), small_ghn)


def test_a_file_that_the_cache_shares_is_known_by_its_hash_too(tmp_path):
    # As huggingface_hub keeps files from Xet: the file has Xet's hash for its name, a link to it the SHA-256.
    content = b'weights'
    shared = tmp_path / 'blobs' / 'ab' / ('ab' * 32)
    blob = tmp_path / 'models--user--ghn' / 'blobs' / hashlib.sha256(content).hexdigest()
    pointer = tmp_path / 'models--user--ghn' / 'snapshots' / 'c0ffee' / 'model.safetensors'
    for path in (shared, blob, pointer):
        path.parent.mkdir(parents=True, exist_ok=True)
    shared.write_bytes(content)
    blob.symlink_to(Path('../../blobs/ab') / shared.name)
    pointer.symlink_to(Path('../../blobs') / blob.name)
    fetch._check_digest(pointer, 'model.safetensors')
    assert pointer.read_bytes() == content
    shared.write_bytes(b'weightS')
    with pytest.raises(CheckpointError, match='arrived damaged'):
        fetch._check_digest(pointer, 'model.safetensors')
    assert not any(path.exists() or path.is_symlink() for path in (shared, blob, pointer))
