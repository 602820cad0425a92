"""Pulling GHNs with the real client from a server: revisions, caches, tokens, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import HubServer

from timm_ghn import CheckpointError, ConfigError, GHNNotFoundError, push_to_hub
from timm_ghn.hub import fetch, load_ghn
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/ghn'
TOKEN = 'hf_writer'
LARGE = '^/lfs/'


def files_of(ghn: GHN, folder: Path) -> dict[str, bytes]:
    save_ghn(ghn, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def files(small_ghn: GHN, tmp_path) -> dict[str, bytes]:
    return files_of(small_ghn, tmp_path / 'ours')


@pytest.fixture
def other(small: object, tmp_path) -> tuple[GHN, dict[str, bytes]]:
    """Another GHN of the same configuration."""
    torch.manual_seed(1)
    ghn = GHN(small)
    return ghn, files_of(ghn, tmp_path / 'other')


@pytest.fixture
def cache() -> Path:
    """The folder of the cache, which is empty when a test begins."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def same(found: GHN, expected: GHN) -> bool:
    state = expected.state_dict()
    return all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


def left(cache: Path) -> list[Path]:
    """Weights, whole or in part, that are in the cache."""
    return [path for path in cache.rglob('*') if path.is_file() and path.stat().st_size > 10_000]


# Repositories


def test_a_ghn_goes_to_the_hub_and_comes_back(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN, private=True)
    commit = hub.repo(REPO)['refs']['main']
    ghn = load_ghn(REPO, token=TOKEN)
    assert same(ghn, small_ghn)
    assert ghn.config == small_ghn.config
    weights = hub.files(REPO)['model.safetensors']
    assert ghn.origin.sha256 == hashlib.sha256(weights).hexdigest()
    assert (ghn.origin.repo_id, ghn.origin.revision) == (REPO, commit)
    assert not [path for path in hub.files(REPO) if path.endswith(('.bin', '.pt', '.pth', '.pkl'))]


def test_a_revision_is_pinned(hub: HubServer, small_ghn, files, other):
    first = hub.put(REPO, files)
    hub.put(REPO, other[1], revision='v2')
    hub.put(REPO, other[1])
    assert same(load_ghn(REPO, revision=first), small_ghn)
    assert same(load_ghn(REPO), other[0])
    assert same(load_ghn(REPO, revision='v2'), other[0])
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
    assert same(ghn, small_ghn)


def test_what_is_in_the_cache_needs_no_hub(hub: HubServer, small_ghn, files, monkeypatch):
    hub.put(REPO, files)
    with pytest.raises(GHNNotFoundError, match='local_files_only'):
        load_ghn(REPO, local_files_only=True)
    assert not hub.requests
    load_ghn(REPO)
    hub.requests.clear()
    assert same(load_ghn(REPO, local_files_only=True), small_ghn)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert same(load_ghn(REPO), small_ghn)
    assert not hub.requests


def test_offline_mode_is_named(hub: HubServer, files, monkeypatch):
    hub.put(REPO, files)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(GHNNotFoundError, match=r'OfflineModeIsEnabled.*HF_HUB_OFFLINE'):
        load_ghn(REPO)
    assert not hub.requests


def test_a_new_commit_is_seen_and_only_what_changed_is_downloaded(hub: HubServer, files, other):
    hub.put(REPO, files)
    load_ghn(REPO)
    hub.put(REPO, other[1])
    assert same(load_ghn(REPO), other[0])
    load_ghn(REPO)
    assert len(hub.asked('^storage GET')) == 2


# Who may read


@pytest.mark.parametrize('settings', [{'private': True}, {'gated': True}], ids=['private', 'gated'])
def test_a_token_opens_what_is_closed(hub: HubServer, small_ghn, files, settings, cache, monkeypatch):
    hub.put(REPO, files, **settings)
    asking = 'Ask for access' if 'gated' in settings else 'private'
    for token in (None, False, 'hf_other'):
        with pytest.raises(GHNNotFoundError, match=asking + '.*hf auth login.*token='):
            load_ghn(REPO, token=token)
    assert not left(cache)
    assert same(load_ghn(REPO, token='hf_reader'), small_ghn)
    monkeypatch.setenv('HF_TOKEN', 'hf_reader')
    assert same(load_ghn(REPO, cache_dir=cache / 'another'), small_ghn)


def test_a_token_that_the_hub_does_not_know(hub: HubServer, files):
    hub.put(REPO, files)
    with pytest.raises(GHNNotFoundError, match='401.*HF_TOKEN') as caught:
        load_ghn(REPO, token='hf_unknown')
    assert 'hf_unknown' not in str(caught.value)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, files, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.put(REPO, files, private=True)
    load_ghn(REPO, token=TOKEN)
    assert hub.asked('^storage GET')
    assert all(request.headers['authorization'] == f'Bearer {TOKEN}' for request in hub.asked('^hub .*resolve'))
    hub.put(REPO, {'config.json': files['config.json'] + b'\n'})
    for method in ('HEAD', 'GET'):
        hub.fail(method, 'resolve/main/config', times=99, location=f'{hub.storage}/lfs/{"0" * 64}')
    with pytest.raises(GHNNotFoundError):
        load_ghn(REPO, token=TOKEN, cache_dir=hub.folder / 'cache')
    for request in hub.asked('^storage'):
        assert TOKEN not in str(request.headers)
    assert TOKEN not in caplog.text
    assert TOKEN not in ''.join(capfd.readouterr())


#: What the HTTP client cannot send, and would show.
BAD_TOKENS = [
    'hf_secret\n',
    'hf_secret\r\nX-Evil: 1',
    'hf_sec ret',
    'hf_secretä',
    'hf_secret\0',
    ' ',
    '',
    b'hf_secret',
    7,
]


@pytest.mark.parametrize('token', BAD_TOKENS, ids=repr)
@pytest.mark.parametrize('how', ['name', 'default'])
def test_what_can_be_no_token_is_refused_and_never_shown(hub: HubServer, files, caplog, capfd, how, token):
    caplog.set_level(logging.DEBUG)
    hub.put(REPO, files)
    act = {
        'name': lambda: load_ghn(REPO, token=token),
        'default': lambda: load_ghn('ghn', token=token),
    }[how]
    with pytest.raises(ConfigError, match='expected token to be one word') as caught:  # and no warning
        act()
    assert caught.value.__cause__ is None is caught.value.__context__
    assert not hub.requests
    assert 'secret' not in str(caught.value) + caplog.text + ''.join(capfd.readouterr())


@pytest.mark.parametrize('token', ['hf_sec ret', 'hf_secretä', 'hf_secret\x01'], ids=repr)
def test_a_token_of_the_environment_is_checked_when_the_hub_is_asked(
    hub: HubServer, small_ghn, files, token, monkeypatch
):
    hub.put(REPO, files)
    load_ghn(REPO)
    hub.requests.clear()
    monkeypatch.setenv('HF_TOKEN', token)
    for act in (lambda: load_ghn(REPO), lambda: load_ghn('ghn')):
        with pytest.raises(ConfigError, match='of HF_TOKEN or .*one word') as caught:
            act()
        assert 'sec' not in str(caught.value)
    assert not hub.requests
    assert same(load_ghn(REPO, local_files_only=True), small_ghn)
    assert same(load_ghn(REPO, token=False), small_ghn)


def test_a_token_is_no_part_of_how_access_is_shown():
    assert TOKEN not in repr(fetch.Access(token=TOKEN))


# What goes wrong on the way


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: HubServer, small_ghn, files, waits, monkeypatch):
    # The client keeps whole chunks, 10 MB each.
    monkeypatch.setattr('huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE', 1000)
    hub.put(REPO, files)
    hub.fail('GET', LARGE, cut=20_500)
    hub.fail('GET', LARGE, cut=10_500)
    assert same(load_ghn(REPO), small_ghn)
    ranges = [request.headers.get('range') for request in hub.asked('^storage GET')]
    assert ranges == [None, 'bytes=20000-', 'bytes=30000-']


@pytest.mark.parametrize(
    'fault',
    [{'cut': 500}, {'longer': 10}, {'longer': -10}, {'status': 500}, {'status': 403}, {'status': 429}],
    ids=lambda fault: '-'.join(f'{key} {value}' for key, value in fault.items()),
)
def test_a_download_that_fails_leaves_nothing_in_the_cache(hub: HubServer, small_ghn, files, waits, cache, fault):
    hub.put(REPO, files)
    hub.fail('GET', LARGE, times=99, **fault)
    with pytest.raises(GHNNotFoundError, match=r'model\.safetensors of user/ghn .*cannot be had') as caught:
        load_ghn(REPO)
    assert caught.value.__cause__ is not None
    assert not left(cache)
    hub.faults.clear()
    assert same(load_ghn(REPO), small_ghn)


@pytest.mark.parametrize(
    ('method', 'path', 'status', 'wait'),
    [('HEAD', 'resolve/main/config', 429, 8), ('HEAD', 'resolve/main/config', 503, 1), ('GET', LARGE, 429, 8)],
)
def test_a_busy_hub_is_asked_again(hub: HubServer, small_ghn, files, waits, method, path, status, wait):
    hub.put(REPO, files)
    # Not repeated are our first question whether the file is there, and the client's own.
    times = 3 if method == 'HEAD' else 1
    hub.fail(method, path, times=times, status=status, headers={'Retry-After': '7'} if status == 429 else {})
    assert same(load_ghn(REPO), small_ghn)
    assert waits == [wait]


def test_a_file_whose_hash_is_wrong_is_refused_and_not_kept(hub: HubServer, small_ghn, files, cache):
    hub.put(REPO, files)
    hub.fail('GET', LARGE, flip=True)
    with pytest.raises(CheckpointError, match='arrived damaged.*load it again'):
        load_ghn(REPO)
    assert not left(cache)
    assert same(load_ghn(REPO), small_ghn)


@pytest.mark.parametrize('damaged', [False, True])
def test_a_file_that_the_cache_shares_is_known_by_its_hash_too(tmp_path, damaged):
    # As huggingface_hub keeps files from Xet: the file has Xet's hash for its name, a link to it the SHA-256.
    content = b'weights'
    shared = tmp_path / 'blobs' / 'ab' / ('ab' * 32)
    blob = tmp_path / 'models--user--ghn' / 'blobs' / hashlib.sha256(content).hexdigest()
    pointer = tmp_path / 'models--user--ghn' / 'snapshots' / 'c0ffee' / 'model.safetensors'
    for path in (shared, blob, pointer):
        path.parent.mkdir(parents=True, exist_ok=True)
    shared.write_bytes(content[:-1] + b'S' if damaged else content)
    blob.symlink_to(Path('../../blobs/ab') / shared.name)
    pointer.symlink_to(Path('../../blobs') / blob.name)
    if not damaged:
        fetch._check_digest(pointer, fetch.HubFile(REPO, 'model.safetensors'))
        assert pointer.read_bytes() == content
        return
    with pytest.raises(CheckpointError, match='arrived damaged'):
        fetch._check_digest(pointer, fetch.HubFile(REPO, 'model.safetensors'))
    assert not any(path.exists() or path.is_symlink() for path in (shared, blob, pointer))


def test_a_file_that_does_not_fit_its_configuration_is_refused(hub: HubServer, files):
    hub.put(REPO, {**files, 'config.json': files['config.json'].replace(b'"layers": 2', b'"layers": 3')})
    with pytest.raises(CheckpointError, match='does not match its configuration'):
        load_ghn(REPO)


def test_a_cached_ghn_serves_when_the_hub_fails(hub: HubServer, small_ghn, files):
    hub.put(REPO, files)
    load_ghn(REPO)
    for status in (401, 403, 429, 500):
        hub.faults.clear()
        hub.fail('HEAD', 'resolve', times=99, status=status)
        assert same(load_ghn(REPO), small_ghn)
