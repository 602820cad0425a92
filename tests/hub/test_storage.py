"""The native format on disk: what is saved is loaded exactly, and what cannot be right is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import hub_fixtures
import pytest
import torch
from safetensors.torch import load_file, save_file

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.files import read_json
from timm_ghn.hub import storage as storage_module
from timm_ghn.hub.storage import read_ghn, save_ghn
from timm_ghn.nn import GHN, GHNConfig
from timm_ghn.nn.config import Origin

GHN3 = GHNConfig(hid=16, max_shape=(24, 20, 11, 11), num_classes=30, layers=2, heads=2)


@pytest.fixture
def small() -> GHNConfig:
    return GHN3


def expect_same(found: GHN, expected: GHN) -> None:
    assert found.config == expected.config
    hub_fixtures.expect_same(found, expected)


def edit(folder: Path, **changes: object) -> None:
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / 'model.safetensors'
    state = {key: value.clone() for key, value in load_file(path).items()} | {
        key.replace('__', '.'): value for key, value in changes.items()
    }
    save_file({key: value for key, value in state.items() if value is not None}, path)


@pytest.mark.parametrize(
    'changes',
    [{}, {'virtual_edges': 1, 'layers': 1}, {'gnn': 'gated', 'layers': 1, 'window': 'corner'},
     {'gnn': 'mlp', 'layers': 1, 'decoder': 'mlp', 'window': 'corner', 'max_shape': (6, 6, 11, 11)}],
    ids=['ghn3', 'no virtual edges', 'ghn2', 'mlp'],
)  # fmt: skip
def test_saving_and_loading_is_exact(changes, tmp_path):
    ghn = GHN(dataclasses.replace(GHN3, **changes))
    save_ghn(ghn, tmp_path)
    found = read_ghn(tmp_path)
    expect_same(found, ghn)
    assert not found.training
    expect_same(read_ghn(tmp_path / 'model.safetensors'), ghn)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in found.parameters())
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, 'who may read one may read the other'


def test_the_type_of_the_file_is_chosen_and_that_of_the_ghn_too(small_ghn, folder, tmp_path):
    save_ghn(small_ghn, tmp_path / 'small', dtype=torch.bfloat16)
    sizes = [(path / 'model.safetensors').stat().st_size for path in (tmp_path / 'small', folder)]
    assert sizes[0] < 0.55 * sizes[1]
    for key, value in read_ghn(tmp_path / 'small').state_dict().items():
        assert torch.equal(value, small_ghn.state_dict()[key].bfloat16().float())
    save_ghn(small_ghn.double(), tmp_path)
    expect_same(read_ghn(tmp_path, dtype=torch.float64), small_ghn)
    expect_same(read_ghn(tmp_path), small_ghn.float())


def test_the_origin_names_the_file_and_its_digest(folder):
    file = folder / 'model.safetensors'
    assert read_ghn(folder).origin == Origin(file=str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def test_a_ghn_can_be_saved_over_the_files_it_was_loaded_from(folder, small_ghn):
    found = read_ghn(folder)
    with torch.no_grad():
        found.ln.weight.add_(1)
    save_ghn(found, folder)
    assert torch.equal(read_ghn(folder).ln.weight, small_ghn.ln.weight + 1)
    assert torch.equal(found.ln.weight, small_ghn.ln.weight + 1)


def test_a_file_that_another_process_removes_while_it_is_opened_is_no_raw_error(folder, monkeypatch):
    def removed(*_: object, **__: object) -> None:
        raise RuntimeError('unable to open file in read-only mode: No such file or directory (2)')

    monkeypatch.setattr(storage_module, 'safe_open', removed)
    with pytest.raises(CheckpointError, match='truncated or damaged: unable to open file'):
        read_ghn(folder)


def test_a_save_that_fails_leaves_the_old_files_alone(folder, small_ghn, monkeypatch):
    def fail(state: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b'half')
        raise OSError('the disk is full')

    monkeypatch.setattr(storage_module, 'save_file', fail)
    with pytest.raises(OSError, match='full'):
        save_ghn(GHN(GHN3), folder)
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    expect_same(read_ghn(folder), small_ghn)


def test_weights_that_are_not_finite_are_not_saved(small_ghn, tmp_path):
    with torch.no_grad():
        small_ghn.embed.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r'1 of 240 in embed\.weight'):
        save_ghn(small_ghn, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_a_configuration_of_a_newer_version_says_to_upgrade(folder):
    edit(folder, format_version=GHNConfig.format_version + 1, a_key_of_the_future=1)
    with pytest.raises(ConfigError, match=r'newer timm_ghn.*upgrade'):
        read_ghn(folder)


def test_a_damaged_configuration_is_an_error(folder):
    for text in ('', '{', '[1]', '"x"', 'null', '[' * 100_000, '{"hid": 1e400}', '\x00'):
        (folder / 'config.json').write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match='config'):
            read_ghn(folder)


def test_a_configuration_that_the_weights_contradict_is_refused(folder):
    sound = (folder / 'config.json').read_text()
    for change in ({'num_classes': 31}, {'layers': 1}, {'gnn': 'gated'}, {'layernorm': False}):
        edit(folder, **change)
        with pytest.raises(CheckpointError, match='does not match its configuration'):
            read_ghn(folder)
        (folder / 'config.json').write_text(sound)
    edit_weights(folder, ln__weight=torch.zeros(3), ln__bias=None, more=torch.zeros(1))
    match = r'Missing.*"ln\.bias".*Unexpected.*"more".*size mismatch for ln\.weight'
    with pytest.raises(CheckpointError, match=match):
        read_ghn(folder)


@pytest.mark.parametrize('value', [float('nan'), -float('inf')])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    weight = torch.zeros(GHN3.hid)
    weight[5] = value
    edit_weights(folder, ln__bias=weight)
    with pytest.raises(CheckpointError, match=r'not finite: 1 of 16 in ln\.bias'):
        read_ghn(folder)


@pytest.mark.parametrize(('dtype', 'bits'), [('F4', 4), ('F8_E4M3', 8), ('U16', 16), ('I64', 64), ('C64', 64)])
def test_types_of_which_torch_makes_no_weights_are_refused(folder, dtype, bits):
    path = folder / 'model.safetensors'
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header, begin = json.loads(data[8 : 8 + length]), 0
    for key, entry in header.items():
        if key != '__metadata__':
            count = (entry['data_offsets'][1] - entry['data_offsets'][0]) // 4
            if key == 'ln.bias':
                entry['dtype'] = dtype
            end = begin + count * (bits if key == 'ln.bias' else 32) // 8
            entry['data_offsets'] = [begin, end]
            begin = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(begin))
    with pytest.raises(CheckpointError, match=r'model\.safetensors .*(expected a floating type|Dtype not understood)'):
        read_ghn(folder)


@pytest.mark.parametrize(
    'arguments',
    [{'dtype': dtype} for dtype in (torch.float8_e4m3fn, torch.int64, 'float32')]
    + [{'device': device} for device in (torch.device('meta'), 'nowhere', 'cuda:999', 3.5)],
    ids=str,
)
def test_a_type_or_a_device_that_weights_do_not_have_is_refused(folder, arguments):
    with pytest.raises(ConfigError, match=r'expected (dtype to be|a device that) .* \(got '):
        read_ghn(folder, **arguments)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes with a name')
def test_a_pipe_for_a_configuration_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / 'config.json')
    monkeypatch.setattr(Path, 'read_text', lambda *_, **__: pytest.fail('was opened'))
    with pytest.raises(CheckpointError, match='pipes and devices are not read'):
        read_json(tmp_path / 'config.json')


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(GHNNotFoundError, match=f'has no file {name}'):
        read_ghn(folder)


def test_a_file_of_another_configuration_than_expected_is_refused(folder):
    with pytest.raises(CheckpointError, match='it has hid 16 where 32 is expected'):
        read_ghn(folder, config=GHNConfig(hid=32, max_shape=(24, 20, 11, 11), num_classes=30, layers=2, heads=2))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads the peak of memory as Linux counts it')
@pytest.mark.parametrize('form', ['native', 'joblib', 'converted'])
def test_the_peak_of_memory_is_about_the_size_of_the_file(tmp_path, form):
    config = GHNConfig(hid=128, max_shape=(128, 128, 16, 16), num_classes=1000, layers=24, heads=8)
    path = tmp_path / 'ghn'
    ghn = GHN(config)
    size = 4 * sum(parameter.numel() for parameter in ghn.parameters())
    if form == 'native':
        save_ghn(ghn, path)
    else:
        import joblib

        joblib.dump(ghn.state_dict(), path)
    act = 'hub.load_ghn(path)' if form != 'converted' else 'hub.converted.convert_official(path, path.with_name("out"))'
    code = (
        'import resource, sys, pathlib, timm_ghn.hub as hub, torch; path = pathlib.Path(sys.argv[1]); '
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; torch.ones(8).sum(); '
        f'before = peak(); kept = {act}; print(peak() - before)'
    )
    run = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.25 * size
