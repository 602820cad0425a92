"""Official checkpoints from the Hub are read once: what they were converted to is the same GHN, or is made anew."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fake_hub import COMMIT, FakeHub
from official import WRITERS, official_state
from safetensors.torch import load_file

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError, UnsafeCheckpointError
from timm_ghn.hub import converted, load, load_ghn, register_ghn
from timm_ghn.hub.convert import convert_official
from timm_ghn.hub.converted import (
    cache_folder,
    converted_ghns,
    place_of,
    read_through,
    remove_converted,
)
from timm_ghn.hub.entry import GHNEntry
from timm_ghn.hub.load import shared_ghn
from timm_ghn.hub.storage import read_ghn
from timm_ghn.nn import GHN

ROOT = Path(__file__).resolve().parents[2]
FILE = 'user/repo/ghn.pt'


@pytest.fixture
def official(tmp_path: Path, small_ghn: GHN) -> bytes:
    return WRITERS['joblib'](official_state(small_ghn), tmp_path / 'official.pt').read_bytes()


@pytest.fixture
def mine(fake_hub: FakeHub, official, small):
    """A name for an official file on the Hub."""
    fake_hub.files[FILE] = official
    return register_ghn('mine', repo_id='user/repo', filename='ghn.pt', config=small)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The official files that are opened."""
    found: list[Path] = []
    original = converted.convert_official
    read = converted.read_official
    monkeypatch.setattr(
        converted, 'convert_official', lambda path, *a, **k: found.append(path) or original(path, *a, **k)
    )
    monkeypatch.setattr(converted, 'read_official', lambda path, **k: found.append(path) or read(path, **k))
    return found


def only(cache: Path | None = None) -> Path:
    (found,) = converted_ghns(cache or cache_folder())
    return found.path


def expect_same(found: GHN, expected: GHN) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


# What is kept


def test_the_second_time_the_official_file_is_not_opened(mine, opened, small_ghn, official):
    first = load_ghn('mine')
    assert len(opened) == 1
    second = load_ghn('mine')
    assert len(opened) == 1
    for ghn in (first, second):
        expect_same(ghn, small_ghn)
        assert ghn.config == dataclasses.replace(small_ghn.config, name=ghn.config.name)
        assert not ghn.training
    assert first.origin == second.origin
    assert first.origin.sha256 == hashlib.sha256(official).hexdigest()
    assert (first.origin.repo_id, first.origin.revision, first.origin.name) == ('user/repo', COMMIT, 'mine')
    assert first.origin.file.endswith('ghn.pt')


def test_the_facts_are_those_of_reading_without_the_cache(mine, monkeypatch):
    kept = load_ghn('mine')
    monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    read = load_ghn('mine')
    assert kept.origin == read.origin
    assert kept.config == read.config


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_weights_keep_the_type_of_the_file(tmp_path, small_ghn, dtype):
    state = {key: value.to(dtype) for key, value in official_state(small_ghn).items()}
    path = WRITERS['torch'](state, tmp_path / 'ghn.pt')
    convert_official(path, tmp_path / 'out')
    assert {value.dtype for value in load_file(tmp_path / 'out/model.safetensors').values()} == {dtype}
    for wanted in (None, torch.bfloat16):
        expect_same(read_ghn(tmp_path / 'out', dtype=wanted), load_ghn(path, dtype=wanted))
    assert sorted(os.listdir(tmp_path / 'out')) == ['config.json', 'model.safetensors']


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_safetensors_reads_what_is_written(tmp_path, small_ghn, writer):
    convert_official(writer(official_state(small_ghn), tmp_path / 'ghn.pt'), tmp_path / 'out')
    found = load_file(tmp_path / 'out/model.safetensors')
    expected = small_ghn.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_change_in_memory_does_not_reach_the_file(mine, small_ghn):
    load_ghn('mine')
    ghn = load_ghn('mine')
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.add_(1)
    expect_same(load_ghn('mine'), small_ghn)


def test_a_shared_ghn_comes_from_the_cache_as_well(mine, opened, small_ghn):
    load_ghn('mine')
    expect_same(shared_ghn('mine'), small_ghn)
    assert shared_ghn('mine') is shared_ghn('mine')
    assert len(opened) == 1


def test_another_content_is_converted_anew(fake_hub, mine, opened, small_ghn, tmp_path):
    load_ghn('mine')
    with torch.no_grad():
        small_ghn.ln.weight.add_(1)
    fake_hub.files[FILE] = WRITERS['torch'](official_state(small_ghn), tmp_path / 'new.pt').read_bytes()
    shutil.rmtree(Path(huggingface_hub.constants.HF_HUB_CACHE))  # as a new revision: both names mean another content
    expect_same(load_ghn('mine'), small_ghn)
    assert len(opened) == 2
    assert len(converted_ghns(cache_folder())) == 2


def test_another_configuration_of_the_same_file_is_kept_apart(fake_hub, mine, small):
    load_ghn('mine')
    other = dataclasses.replace(small, virtual_edges=7)
    register_ghn('mine', repo_id='user/repo', filename='ghn.pt', config=other, overwrite=True)
    assert load_ghn('mine').config.virtual_edges == 7
    assert len(converted_ghns(cache_folder())) == 2


def test_a_path_of_the_user_is_not_kept(tmp_path, official, small_ghn):
    (tmp_path / 'ghn.pt').write_bytes(official)
    expect_same(load_ghn(tmp_path / 'ghn.pt'), small_ghn)
    register_ghn('local', tmp_path / 'ghn.pt')
    expect_same(load_ghn('local'), small_ghn)
    assert converted_ghns(cache_folder()) == []


def test_a_cache_of_the_hub_without_links_works_too(tmp_path, mine, official, opened, small_ghn):
    path = tmp_path / 'snapshots' / 'abc' / 'ghn.pt'
    path.parent.mkdir(parents=True)
    path.write_bytes(official)
    for _ in range(2):
        expect_same(read_through(path, mine, tmp_path / 'cache', revision='abc'), small_ghn)
    assert len(opened) == 1
    os.utime(path, (1, 1))
    read_through(path, mine, tmp_path / 'cache', revision='abc')
    assert len(opened) == 2


# Where


def test_where_it_is_kept(monkeypatch, tmp_path):
    assert cache_folder() == Path(huggingface_hub.constants.HF_HUB_CACHE).parent / 'timm_ghn' / 'converted'
    assert cache_folder(tmp_path) == tmp_path / '.timm_ghn' / 'converted'
    monkeypatch.setenv('TIMM_GHN_CACHE', str(tmp_path / 'mine'))
    assert cache_folder() == cache_folder(tmp_path) == tmp_path / 'mine' / 'converted'
    monkeypatch.setenv('TIMM_GHN_CACHE', ' Off ')
    assert cache_folder() is None


def test_the_folder_of_the_caller_is_honoured(mine, tmp_path):
    load_ghn('mine', cache_dir=tmp_path / 'given')
    assert only(cache_folder(tmp_path / 'given')).is_relative_to(tmp_path / 'given')
    assert converted_ghns(cache_folder()) == []


# Refused files


def test_a_file_that_is_not_the_one_of_the_entry_is_never_kept(mine, small):
    register_ghn('wrong', repo_id='user/repo', filename='ghn.pt', config=dataclasses.replace(small, heads=4))
    with pytest.raises(CheckpointError, match='not the GHN that the catalogue describes'):
        load_ghn('wrong')
    assert os.listdir(cache_folder()) == []


@pytest.mark.parametrize(
    ('damage', 'error'),
    [
        (lambda data: data[: len(data) // 2], CheckpointError),
        (lambda data: b'cos\nsystem\n(S"true"\ntR.', UnsafeCheckpointError),
    ],
    ids=['truncated', 'payload'],
)
def test_a_damaged_file_is_never_kept(fake_hub, mine, official, damage, error):
    fake_hub.files[FILE] = damage(official)
    with pytest.raises(error):
        load_ghn('mine')
    assert not cache_folder().exists() or os.listdir(cache_folder()) == []


def test_weights_that_are_not_finite_are_never_kept(fake_hub, mine, small_ghn, tmp_path):
    state = official_state(small_ghn)
    state['ln.bias'][0] = float('nan')
    fake_hub.files[FILE] = WRITERS['joblib'](state, tmp_path / 'nan.pt').read_bytes()
    with pytest.raises(CheckpointError, match=r'not finite: 1 of 8 in ln\.bias'):
        load_ghn('mine')
    assert os.listdir(cache_folder()) == []


def test_integers_are_never_kept(fake_hub, mine, small_ghn, tmp_path):
    state = {key: value.long() for key, value in official_state(small_ghn).items()}
    fake_hub.files[FILE] = WRITERS['joblib'](state, tmp_path / 'int.pt').read_bytes()
    with pytest.raises(CheckpointError, match='expected a floating type'):
        load_ghn('mine')
    assert os.listdir(cache_folder()) == []


# Digests


@pytest.mark.parametrize('how', ['at first', 'anew', 'without a cache'])
def test_a_file_that_was_damaged_in_the_hubs_cache_is_refused_before_it_is_unpickled(mine, monkeypatch, how):
    load_ghn('mine')
    blob = load.find_files('mine', None, load.Access()).path.resolve()
    _overwrite(blob, blob.stat().st_size // 2, b'#')  # in a weight, which stays finite
    if how == 'without a cache':
        monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    elif how == 'anew':
        os.truncate(only() / 'model.safetensors', 100)
    else:
        remove_converted(cache_folder(), 'all')
    monkeypatch.setattr('timm_ghn.hub.checkpoints.read_pickle', lambda *_, **__: pytest.fail('was unpickled'))
    with pytest.raises(
        CheckpointError, match=f'its SHA-256 is .* where {blob.name} is expected. Nothing in it was read'
    ):
        load_ghn('mine')


def test_the_digest_of_the_entry_counts_more_than_that_of_the_hub(mine, official, small_ghn, monkeypatch):
    digest = hashlib.sha256(official).hexdigest()
    known = dataclasses.replace(mine, sha256=digest)
    path = load.find_files('mine', None, load.Access()).path
    expect_same(read_through(path, known, cache_folder()), small_ghn)
    monkeypatch.setattr('timm_ghn.hub.checkpoints.read_pickle', lambda *_, **__: pytest.fail('was unpickled'))
    other = dataclasses.replace(mine, sha256='0' * 64)
    with pytest.raises(CheckpointError, match=f'its SHA-256 is {digest} where {"0" * 64} is expected'):
        read_through(path, other, cache_folder())


@pytest.mark.parametrize('wrong', ['', 'x' * 64, 'A' * 64, '0' * 63, 5])
def test_a_digest_is_64_digits_of_an_official_file(mine, small, wrong):
    with pytest.raises(ConfigError, match='expected sha256 of mine'):
        dataclasses.replace(mine, sha256=wrong)
    with pytest.raises(ConfigError, match='of an official file'):
        GHNEntry('ours', '', 'timm_ghn', small, repo_id='user/repo', sha256='0' * 64)


# Damage to what is kept

DAMAGE = {
    'truncated weights': lambda place: os.truncate(place / 'model.safetensors', 5000),
    'empty weights': lambda place: os.truncate(place / 'model.safetensors', 0),
    'longer weights': lambda place: (place / 'model.safetensors').write_bytes(
        (place / 'model.safetensors').read_bytes() + b'x'
    ),
    'missing weights': lambda place: (place / 'model.safetensors').unlink(),
    'missing configuration': lambda place: (place / 'config.json').unlink(),
    'other header': lambda place: _replace(place / 'model.safetensors', b'"ln.bias"', b'"ln.bia#"'),
    'not finite': lambda place: _overwrite(place / 'model.safetensors', -40, b'\xff' * 40),
    'other configuration': lambda place: _replace(place / 'config.json', b'"heads": 2', b'"heads": 4'),
    'nothing': lambda place: [file.unlink() for file in place.iterdir()],
}


def _overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(data)] = data
    path.write_bytes(content)


def _replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_conversion_is_made_again(mine, opened, small_ghn, damage):
    load_ghn('mine')
    damage(only())
    expect_same(load_ghn('mine'), small_ghn)
    assert len(opened) == 2
    expect_same(load_ghn('mine'), small_ghn)
    assert len(opened) == 2
    assert [path.name for path in cache_folder().iterdir()] == [only().name]


def test_a_device_that_does_not_exist_is_no_reason_to_convert_again(mine, opened):
    load_ghn('mine')
    with pytest.raises(ConfigError, match='expected a device'):
        load_ghn('mine', device='nowhere')
    assert len(opened) == 1
    load_ghn('mine')
    assert len(opened) == 1


def test_a_conversion_that_is_removed_while_it_is_in_use_stays_readable(mine, small_ghn):
    load_ghn('mine')
    ghn = load_ghn('mine')
    remove_converted(cache_folder(), 'all')
    expect_same(ghn, small_ghn)
    expect_same(load_ghn('mine'), small_ghn)


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


def expect_one_warning(small_ghn: GHN) -> None:
    with pytest.warns(UserWarning, match='cannot be kept in .*TIMM_GHN_CACHE') as caught:
        expect_same(load_ghn('mine'), small_ghn)
    assert len(caught) == 1
    expect_same(load_ghn('mine'), small_ghn)  # and no second warning: warnings are errors


def test_a_full_disk_is_no_failure(mine, small_ghn, monkeypatch):
    monkeypatch.setenv('TIMM_GHN_CACHE', 'off')
    load_ghn('mine')  # downloads it
    monkeypatch.delenv('TIMM_GHN_CACHE')
    usage = shutil.disk_usage('/')._replace(free=1000)
    monkeypatch.setattr('timm_ghn.hub.convert.shutil.disk_usage', lambda _: usage)
    expect_one_warning(small_ghn)
    assert os.listdir(cache_folder()) == []


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_disk_that_fills_up_on_the_way_is_no_failure(mine, small_ghn, monkeypatch):
    original = Path.open

    def full(self: Path, mode: str = 'r', *args, **kwargs):
        return original(
            Path('/dev/full') if mode == 'wb' and self.suffix == '.safetensors' else self, mode, *args, **kwargs
        )

    monkeypatch.setattr(Path, 'open', full)
    expect_one_warning(small_ghn)
    assert os.listdir(cache_folder()) == []


def test_a_cache_that_is_a_file_is_no_failure(mine, small_ghn, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TIMM_GHN_CACHE', str(tmp_path / 'file'))
    expect_one_warning(small_ghn)


READ_ONLY = """
import os, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from timm_ghn import GHNConfig
from timm_ghn.hub import converted
from timm_ghn.hub.entry import GHNEntry
path, root, config = Path(sys.argv[1]), Path(sys.argv[2]), GHNConfig.from_dict(eval(sys.argv[3]))
entry = GHNEntry('mine', '', 'joblib', config, repo_id='user/repo', filename='ghn.pt')
converted.read_through(path, entry, root / 'writable')
if os.geteuid() == 0:  # whom no permission stops
    os.seteuid(65534)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for _ in range(3):
        converted.read_through(path, entry, root / 'locked')
    converted.read_through(path, entry, root / 'writable')  # it cannot write there either, and need not
print(len(caught), caught[0].message if caught else '')
"""


def test_a_folder_that_cannot_be_written_is_no_failure(official, small):
    with tempfile.TemporaryDirectory() as name:  # other users cannot reach pytest's folders
        root = Path(name)
        root.chmod(0o755)
        (root / 'ghn.pt').write_bytes(official)
        (root / 'locked').mkdir(mode=0o555)
        ran = in_a_process(READ_ONLY, str(root / 'ghn.pt'), name, repr(small.to_dict()))
        count, _, message = ran.stdout.partition(' ')
        assert int(count) == 1, ran.stdout
        assert 'cannot be kept' in message
        assert os.listdir(root / 'locked') == []


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(
        [sys.executable, '-c', code, *arguments], capture_output=True, text=True, check=True, env=environment
    )


# Two processes

TWICE = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from timm_ghn import GHNConfig
from timm_ghn.hub import converted
from timm_ghn.hub.entry import GHNEntry
path, cache, go = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
config = GHNConfig.from_dict(eval(sys.argv[4]))
entry = GHNEntry('mine', '', 'joblib', config, repo_id='user/repo', filename='ghn.pt')
print('ready', flush=True)
while not go.exists():
    time.sleep(0.001)
for turn in range(12):
    ghn = converted.read_through(path, entry, cache)
    print(sum(float(p.detach().double().sum()) for p in ghn.parameters()))
    if turn % 3 == int(sys.argv[5]):
        for place in cache.glob('mine-*'):
            if turn % 2:
                converted.discard(place)
            else:
                try:
                    (place / 'config.json').write_text('{')
                except OSError:
                    pass
"""


def test_two_processes_that_convert_at_once_do_not_harm_each_other(tmp_path, official, small, small_ghn):
    path, cache, go = tmp_path / 'ghn.pt', tmp_path / 'cache', tmp_path / 'go'
    path.write_bytes(official)
    arguments = [str(path), str(cache), str(go), repr(small.to_dict())]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-W', 'error', '-c', TWICE, *arguments]
    pipe = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': environment}
    with subprocess.Popen([*command, '0'], **pipe) as first, subprocess.Popen([*command, '1'], **pipe) as second:
        for run in (first, second):
            assert run.stdout.readline() == 'ready\n', run.stderr.read()
        go.touch()
        expected = sum(float(p.detach().double().sum()) for p in small_ghn.parameters())
        for run in (first, second):
            out, err = run.communicate(timeout=120)
            assert run.returncode == 0, err
            assert [float(line) for line in out.split()] == [expected] * 12
    assert all(not path.name.endswith('.partial') for path in cache.iterdir())


# Listing and removing


def test_what_is_kept_is_listed_and_removed(mine, fake_hub, small):
    cache = cache_folder()
    assert converted_ghns(cache) == []
    load_ghn('mine')
    register_ghn('other', repo_id='user/repo', filename='ghn.pt', config=small)
    load_ghn('other')
    first, second = converted_ghns(cache)
    assert (first.name, first.repo_id, first.revision, first.flaw) == ('mine', 'user/repo', COMMIT, None)
    assert first.size == sum(file.stat().st_size for file in first.path.iterdir())
    assert sorted(os.listdir(first.path)) == ['config.json', 'model.safetensors']
    assert remove_converted(cache, 'mine') == [first]
    assert converted_ghns(cache) == [second]
    with pytest.raises(GHNNotFoundError, match="no conversion of 'mine' .* holds other"):
        remove_converted(cache, 'mine')
    assert remove_converted(cache, 'all') == [second]
    assert remove_converted(cache, 'all') == []


def test_nothing_but_conversions_is_ever_removed(mine, tmp_path):
    load_ghn('mine')
    cache = cache_folder()
    (cache / 'precious').mkdir()
    (cache / 'file-0123456789abcdef0123456789abcdef').touch()
    (tmp_path / 'elsewhere').mkdir()
    (cache / 'link-0123456789abcdef0123456789abcdef').symlink_to(tmp_path / 'elsewhere')
    for name in ('..', '../..', 'precious', '*'):
        with pytest.raises(GHNNotFoundError):
            remove_converted(cache, name)
    remove_converted(cache, 'all')
    assert len(os.listdir(cache)) == 3
    assert (tmp_path / 'elsewhere').exists()


def test_a_damaged_conversion_is_listed_as_such(mine):
    load_ghn('mine')
    os.truncate(only() / 'model.safetensors', 100)
    (found,) = converted_ghns(cache_folder())
    assert 'truncated' in found.flaw
    remove_converted(cache_folder(), 'mine')


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path, official):
    (tmp_path / 'ghn.pt').write_bytes(official)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'precious').touch()
    with pytest.raises(FileExistsError):
        convert_official(tmp_path / 'ghn.pt', tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == ['precious']
    assert sorted(os.listdir(tmp_path)) == ['ghn.pt', 'official.pt', 'out']


def test_the_place_depends_on_the_content(mine, tmp_path):
    load_ghn('mine')
    found = load.find_files('mine', None, load.Access())
    assert place_of(found.path, mine, cache_folder(), None) == only()
