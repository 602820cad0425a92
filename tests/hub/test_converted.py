"""Official checkpoints from the Hub are read once: what they were converted to is the same GHN, or is made anew."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_fixtures import expect_same
from hub_server import HubServer
from official import WRITERS, official_state
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_ghn.errors import CheckpointError, GHNNotFoundError, UnsafeCheckpointError
from timm_ghn.hub import catalogue, converted, load, load_ghn
from timm_ghn.hub.catalogue import GHNEntry
from timm_ghn.hub.converted import cache_folder, convert_official, converted_ghns, read_converted, remove_converted
from timm_ghn.hub.load import shared_ghn
from timm_ghn.hub.storage import read_ghn

REPO = 'user/repo'
FILES = ['config.json', 'model.safetensors']


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The official files that are opened."""
    found: list[Path] = []
    for name in ('convert_official', 'read_official'):
        original = getattr(converted, name)
        monkeypatch.setattr(converted, name, lambda path, *a, of=original, **k: found.append(path) or of(path, *a, **k))
    return found


def only() -> Path:
    (found,) = converted_ghns(cache_folder())
    return found


# What is kept


def test_the_second_time_the_official_file_is_not_opened(hub: HubServer, mine, opened, small_ghn, official):
    first = load_ghn('mine')
    assert len(opened) == 1
    second = load_ghn('mine')
    assert shared_ghn('mine') is shared_ghn('mine')
    assert len(opened) == 1
    for ghn in (first, second, shared_ghn('mine')):
        expect_same(ghn, small_ghn)
        assert ghn.config == dataclasses.replace(small_ghn.config, name=ghn.config.name)
        assert not ghn.training
    assert first.origin == second.origin
    assert first.origin.sha256 == hashlib.sha256(official).hexdigest()
    assert (first.origin.repo_id, first.origin.name) == (REPO, 'mine')
    assert first.origin.revision == hub.repo(REPO)['refs']['main']
    assert first.origin.file.endswith('ghn.pt')
    assert sorted(os.listdir(only())) == FILES
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    expect_same(load_ghn('mine'), small_ghn)  # a change in memory does not reach the file


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_weights_keep_the_type_of_the_file(tmp_path, small_ghn, dtype):
    state = {key: value.to(dtype) for key, value in official_state(small_ghn).items()}
    path = WRITERS['legacy'](state, tmp_path / 'ghn.pt')
    convert_official(path, tmp_path / 'out')
    found = load_file(tmp_path / 'out/model.safetensors')
    assert {value.dtype for value in found.values()} == {dtype}
    assert all(torch.equal(found[key], value.to(dtype)) for key, value in small_ghn.state_dict().items())
    expect_same(read_ghn(tmp_path / 'out', dtype=torch.bfloat16), load_ghn(path, dtype=torch.bfloat16))
    assert sorted(os.listdir(tmp_path / 'out')) == FILES


def test_another_content_or_configuration_is_converted_anew(hub: HubServer, mine, opened, small_ghn, tmp_path):
    load_ghn('mine')
    with torch.no_grad():
        small_ghn.ln.weight.add_(1)
    hub.put(REPO, {'ghn.pt': WRITERS['torch'](official_state(small_ghn), tmp_path / 'new.pt').read_bytes()})
    shutil.rmtree(Path(huggingface_hub.constants.HF_HUB_CACHE))  # as a new revision: the name means another content
    expect_same(load_ghn('mine'), small_ghn)
    assert (len(opened), len(converted_ghns(cache_folder()))) == (2, 2)
    config = dataclasses.replace(mine.config, virtual_edges=7)
    catalogue._registered['mine'] = dataclasses.replace(mine, config=config)
    assert load_ghn('mine').config.virtual_edges == 7
    assert len(converted_ghns(cache_folder())) == 3


def test_a_cache_of_the_hub_without_links_works_too(tmp_path, mine, official, opened, small_ghn):
    path = tmp_path / 'snapshots' / 'abc' / 'ghn.pt'
    path.parent.mkdir(parents=True)
    path.write_bytes(official)
    for _ in range(2):
        expect_same(read_converted(path, mine, tmp_path / 'cache'), small_ghn)
    assert len(opened) == 1
    os.utime(path, (1, 1))
    read_converted(path, mine, tmp_path / 'cache')
    assert len(opened) == 2


def test_where_it_is_kept(monkeypatch, tmp_path):
    assert cache_folder() == Path(huggingface_hub.constants.HF_HUB_CACHE).parent / 'timm_ghn' / 'converted'
    monkeypatch.setenv('TIMM_GHN_CACHE', str(tmp_path / 'mine'))
    assert cache_folder() == tmp_path / 'mine' / 'converted'
    monkeypatch.setenv('TIMM_GHN_CACHE', ' Off ')
    assert cache_folder() is None


# Refused files


CHANGES = {
    r'not finite: 1 of 8 in ln\.bias': lambda state: state['ln.bias'].__setitem__(0, float('nan')),
    'expected a floating type': lambda state: {key: value.long() for key, value in state.items()},
    'not the GHN that the catalogue describes: it has layers 1': lambda state: {
        key: value for key, value in state.items() if 'gnn.1' not in key
    },
}


def test_a_file_that_cannot_be_read_is_never_kept(hub: HubServer, mine, small_ghn, tmp_path):
    contents = {}
    for match, change in CHANGES.items():
        state = official_state(small_ghn)
        contents[match] = WRITERS['joblib'](change(state) or state, tmp_path / 'bad.pt').read_bytes()
    contents |= {r'ghn\.pt': b'\x80\x04half', r'os\.system': b'cos\nsystem\n(S"true"\ntR.'}
    for number, (match, content) in enumerate(contents.items()):
        hub.put(REPO, {'ghn.pt': content})
        with pytest.raises(UnsafeCheckpointError if 'system' in match else CheckpointError, match=match):
            load_ghn('mine', cache_dir=tmp_path / str(number))
        assert not cache_folder().exists() or os.listdir(cache_folder()) == []


@pytest.mark.parametrize('how', ['at first', 'anew', 'without a cache'])
def test_a_file_that_was_damaged_in_the_hubs_cache_is_refused_before_it_is_unpickled(mine, monkeypatch, how):
    load_ghn('mine')
    blob = load.find_files('mine', load.Access()).path.resolve()
    overwrite(blob, blob.stat().st_size // 2, b'#')  # in a weight, which stays finite
    if how == 'without a cache':
        monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    elif how == 'anew':
        os.truncate(only() / 'model.safetensors', 100)
    else:
        remove_converted(cache_folder(), 'all')
    monkeypatch.setattr('timm_ghn.hub.official.read_pickle', lambda *_, **__: pytest.fail('was unpickled'))
    with pytest.raises(
        CheckpointError, match=f'its SHA-256 is .* where {blob.name} is expected. Nothing in it was read'
    ):
        load_ghn('mine')


# Damage to what is kept


def overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(data)] = data
    path.write_bytes(content)


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


DAMAGE = {
    'truncated weights': lambda place: os.truncate(place / 'model.safetensors', 5000),
    'missing weights': lambda place: (place / 'model.safetensors').unlink(),
    'other header': lambda place: replace(place / 'model.safetensors', b'"ln.bias"', b'"ln.bia#"'),
    'not finite': lambda place: overwrite(place / 'model.safetensors', -40, b'\xff' * 40),
    'other configuration': lambda place: replace(place / 'config.json', b'"heads": 2', b'"heads": 4'),
    'nothing': lambda place: [file.unlink() for file in place.iterdir()],
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_conversion_is_made_again(mine, opened, small_ghn, damage):
    load_ghn('mine')
    damage(only())
    for _ in range(2):
        expect_same(load_ghn('mine'), small_ghn)
        assert len(opened) == 2
    assert [path.name for path in cache_folder().iterdir()] == [only().name]


def test_what_a_killed_process_left_is_removed_after_a_day(mine):
    cache = cache_folder()
    old, new = cache / '.mine-x.1.partial', cache / '.mine-x.2.partial'
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    load_ghn('mine')
    assert not old.exists()
    assert new.exists()
    remove_converted(cache, 'all')
    assert os.listdir(cache) == []


# A cache that cannot be used


def room_that_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')

    monkeypatch.setattr('timm_ghn.hub.storage.save_file', fail)


def no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TIMM_GHN_CACHE', str(tmp_path / 'file'))


@pytest.mark.parametrize('spoil', [room_that_ends, no_folder])
def test_a_cache_that_cannot_be_used_costs_one_warning(mine, small_ghn, monkeypatch, tmp_path, spoil):
    load.find_files('mine', load.Access())  # downloads it
    spoil(monkeypatch, tmp_path)
    with pytest.warns(UserWarning, match='cannot be kept in .*TIMM_GHN_CACHE') as caught:
        expect_same(load_ghn('mine'), small_ghn)
    assert len(caught) == 1
    assert not cache_folder().is_dir() or os.listdir(cache_folder()) == []


# Two processes


def convert_and_discard(path: Path, cache: Path, entry: GHNEntry, start, sums) -> None:
    start.wait()
    for _ in range(6):
        ghn = read_converted(path, entry, cache)
        sums.put(sum(float(p.detach().double().sum()) for p in ghn.parameters()))
        for place in cache.glob('mine-*'):
            converted._discard(place)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs processes that begin with what is imported already')
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_two_processes_that_convert_at_once_do_not_harm_each_other(tmp_path, official, small, small_ghn):
    fork, cache = multiprocessing.get_context('fork'), tmp_path / 'cache'
    entry = GHNEntry('mine', '', small, repo_id=REPO, filename='ghn.pt')
    start, sums = fork.Barrier(2), fork.SimpleQueue()
    arguments = tmp_path / 'official.pt', cache, entry, start, sums
    runs = [fork.Process(target=convert_and_discard, args=arguments) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        assert run.exitcode == 0
    expected = sum(float(p.detach().double().sum()) for p in small_ghn.parameters())
    assert [sums.get() for _ in range(12)] == [expected] * 12
    assert all(not path.name.endswith('.partial') for path in cache.iterdir())


def test_a_folder_that_another_process_made_and_removed_again_is_made_anew(mine, small_ghn, monkeypatch):
    convert, calls = converted.convert_official, []

    def convert_late(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:  # the rename found a folder, which is gone when it is looked for
            cache_folder().mkdir(parents=True)
            raise OSError(errno.ENOTEMPTY, 'Directory not empty')
        convert(*args, **kwargs)

    monkeypatch.setattr(converted, 'convert_official', convert_late)
    expect_same(load_ghn('mine'), small_ghn)  # no warning: warnings are errors
    assert len(calls) == 2
    assert len(converted_ghns(cache_folder())) == 1


# Listing and removing


def test_what_is_kept_is_listed_and_removed_and_nothing_else(mine, tmp_path):
    cache = cache_folder()
    assert converted_ghns(cache) == {}
    load_ghn('mine')
    catalogue._registered['other'] = dataclasses.replace(mine, name='other')
    load_ghn('other')
    (cache / 'precious').mkdir()
    (cache / 'file-0123456789abcdef0123456789abcdef').touch()
    (tmp_path / 'elsewhere').mkdir()
    (cache / 'link-0123456789abcdef0123456789abcdef').symlink_to(tmp_path / 'elsewhere')
    first, second = converted_ghns(cache).items()
    assert first[1] == ('mine', sum(file.stat().st_size for file in first[0].iterdir()))
    for name in ('..', '../..', 'precious', '*', 'ghn2'):
        with pytest.raises(GHNNotFoundError, match='no conversion of .* holds mine, other'):
            remove_converted(cache, name)
    assert remove_converted(cache, 'mine') == dict([first])
    assert converted_ghns(cache) == dict([second])
    os.truncate(second[0] / 'model.safetensors', 100)  # a damaged one too
    assert list(remove_converted(cache, 'all')) == [second[0]]
    assert remove_converted(cache, 'all') == {}
    assert len(os.listdir(cache)) == 3
    assert (tmp_path / 'elsewhere').exists()
