"""The authors' files become GHNs with the same weights; what is damaged or something else is an error of ours."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from hub_fixtures import expect_same
from official import WRITERS, official_state, options

from timm_ghn.errors import CheckpointError, UnsafeCheckpointError
from timm_ghn.hub import load_ghn
from timm_ghn.hub.converted import convert_official
from timm_ghn.hub.official import CIFAR10_MEAN, open_checkpoint, read_official
from timm_ghn.hub.pickles import TensorRecord
from timm_ghn.nn import GHN, GHNConfig

SMALL = GHNConfig(hid=8, max_shape=(8, 12, 3, 3), num_classes=5, layers=2, heads=4, name='ghn')
OLD = dataclasses.replace(SMALL, gnn='gated', layers=1, heads=8, window='corner')
GHN1 = dataclasses.replace(OLD, virtual_edges=1, layernorm=False, weight_norm=False)
MLP = dataclasses.replace(OLD, gnn='mlp', max_shape=(6, 6, 3, 3))
VARIANTS = {
    'ghn3': SMALL,
    'ghn3_cifar10': dataclasses.replace(
        SMALL, num_classes=10, mean=CIFAR10_MEAN, std=(0.24703233, 0.24348505, 0.26158768)
    ),
    'ghn2': OLD,
    'ghn1': GHN1,
    'mlp': MLP,
    'mlp_decoder': dataclasses.replace(MLP, decoder='mlp'),
}
BARE = {name: config for name, config in VARIANTS.items() if config.gnn != 'mlp'}


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize('config', VARIANTS.values(), ids=VARIANTS.keys())
def test_a_file_with_its_configuration_gives_the_same_ghn(tmp_path, writer, config):
    ghn = GHN(config)
    saved = {'state_dict': official_state(ghn), 'config': options(ghn), 'epoch': 3}
    found = load_ghn(writer(saved, tmp_path / 'ghn.pt'))
    assert found.config == config
    assert not found.training
    expect_same(found, ghn)


@pytest.mark.parametrize('config', BARE.values(), ids=BARE.keys())
def test_a_bare_state_dictionary_gives_the_same_ghn(tmp_path, config):
    ghn = GHN(config)
    found = load_ghn(WRITERS['joblib'](official_state(ghn), tmp_path / 'ghn.pt'))
    assert found.config == config
    expect_same(found, ghn)


def test_large_weights_whose_sum_overflows_are_finite(tmp_path, small_ghn):
    state = official_state(small_ghn)
    state['decoder.fc.0.bias'].fill_(3e38)
    expect = load_ghn(WRITERS['joblib'](state, tmp_path / 'ghn.pt')).state_dict()['decoder.fc.0.bias']
    assert torch.equal(expect, state['decoder.fc.0.bias'])


def test_other_checkpoints_are_not_mistaken_for_a_ghn(tmp_path, small_ghn):
    other = {'embed.weight': torch.zeros(15, 8), 'bias_class.1.weight': torch.zeros(5, 8), 'head': torch.zeros(2)}
    for content in ({'a': torch.zeros(2)}, {'state_dict': 3}, {'state_dict': {}}, [1], {1: other}, {'a': 'x'}, other):
        with pytest.raises(CheckpointError, match=r'ghn\.pt (is no GHN|does not hold the weights of a GHN)'):
            load_ghn(WRITERS['torch'](content, tmp_path / 'ghn.pt'))
    for wrong in ((10**12,) * 4, 'x', (2**60, 8, 3, 3), None):
        saved = {'state_dict': official_state(small_ghn), 'config': options(small_ghn) | {'max_shape': wrong}}
        with pytest.raises(CheckpointError, match=r'ghn\.pt'):
            load_ghn(WRITERS['torch'](saved, tmp_path / 'ghn.pt'))


def test_the_catalogue_must_agree_and_tells_what_the_weights_do_not(tmp_path, small_ghn):
    path = WRITERS['joblib'](official_state(small_ghn), tmp_path / 'ghn.pt')
    known = dataclasses.replace(small_ghn.config, virtual_edges=7, mean=(0.1, 0.2, 0.3), name='known')
    assert read_official(path, config=known).config == known
    other = dataclasses.replace(small_ghn.config, heads=4, window='corner')
    with pytest.raises(CheckpointError, match=r'not the GHN that the catalogue describes: it has heads 2 where 4'):
        read_official(path, config=other)


# Containers


def read(path: Path) -> Any:
    """What a checkpoint holds, with tensors for their records."""

    def tensors(value: Any) -> Any:
        if isinstance(value, TensorRecord):
            return value.read()
        return {key: tensors(item) for key, item in value.items()} if isinstance(value, dict) else value

    with open_checkpoint(path) as loaded:
        return tensors(loaded)


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_tensors_of_every_kind_come_back_exactly(tmp_path, writer):
    x = torch.randn(4, 6)
    tensors = collections.OrderedDict(
        plain=x, scalar=torch.tensor(3.5), empty=torch.zeros(0, 3), transposed=x.t(), slice=x[1:, 2:5], same=x,
        parameter=torch.nn.Parameter(torch.randn(3)), double=x.double(), half=x.half(), bfloat=x.bfloat16(),
        long=torch.arange(5), flags=torch.tensor([True, False]),
    )  # fmt: skip
    found = read(writer(tensors, tmp_path / 'file.pt'))
    assert list(found) == list(tensors)
    for key, value in tensors.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key], value), key


def test_what_no_ghn_file_has_is_refused(tmp_path):
    file = tmp_path / 'file.pt'
    for method in ('zlib', 'gzip', 'bz2', 'lzma', 'xz'):
        joblib.dump({'a': torch.zeros(3)}, file, compress=(method, 3))
        with pytest.raises(CheckpointError, match=r'file\.pt'):
            read(file)
    for array in (np.zeros(2, np.float32), np.array([{}])):
        joblib.dump({'a': array}, file)
        with pytest.raises(UnsafeCheckpointError, match='NumpyArrayWrapper'):
            read(file)
    for writer in WRITERS.values():
        for dtype in (torch.float8_e4m3fn, torch.complex64):
            with pytest.raises(CheckpointError):
                read(writer({'a': torch.zeros(3, dtype=dtype)}, file))
    for content in (b'', b'\x00', b'<!DOCTYPE html><html>', b'PK\x03\x04', b'\x80\x04', b'\x1f\x8b\x08', b'.'):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r'file\.pt'):
            load_ghn(file)


def test_files_of_big_endian_machines_are_refused_in_both_forms_of_torch(tmp_path):
    legacy = WRITERS['legacy']({'a': torch.ones(3)}, tmp_path / 'legacy.pt')
    data = legacy.read_bytes()
    true = data.index(b'\x88', data.index(b'little_endian'))
    legacy.write_bytes(data[:true] + b'\x89' + data[true + 1 :])
    with zipfile.ZipFile(WRITERS['torch']({'a': torch.ones(3)}, tmp_path / 'torch.pt')) as written:
        members = {name: written.read(name) for name in written.namelist()}
    with zipfile.ZipFile(tmp_path / 'big.pt', 'w') as archive:
        for name, content in members.items():
            archive.writestr(name, b'big' if name.endswith('byteorder') else content)
    for path in (legacy, tmp_path / 'big.pt'):
        with pytest.raises(CheckpointError, match='big-endian'):
            read(path)


class Part:
    """A tensor at the beginning of a storage that others have as well."""

    def __init__(self, typed: Any, like: torch.Tensor) -> None:
        self.arguments = typed, 0, tuple(like.shape), like.stride(), False, collections.OrderedDict()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_tensors_that_share_their_memory_are_not_more_than_the_file(tmp_path, small_ghn, writer):
    state = official_state(small_ghn)
    memory = torch.zeros(max(value.numel() for value in state.values())).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.float32, _internal=True)
    path = writer({key: Part(typed, value) for key, value in state.items()}, tmp_path / 'ghn.pt')
    total = sum(4 * value.numel() for value in state.values())
    assert path.stat().st_size < total
    with pytest.raises(CheckpointError, match=f'tensors of {total:,} bytes in .* they share their memory'):
        load_ghn(path)
    with pytest.raises(CheckpointError, match='they share their memory'):
        convert_official(path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes with a name')
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'file.pt')
    # A writer that stays open: whoever opens the pipe finds it empty.
    writer = os.open(tmp_path / 'file.pt', os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(writer, b'not read')
        with pytest.raises(CheckpointError, match='pipes and devices are not read'):
            load_ghn(tmp_path / 'file.pt')
        assert os.read(writer, 100) == b'not read'
    finally:
        os.close(writer)


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_the_default_device_of_the_caller_does_not_matter(tmp_path, small_ghn, writer):
    path = writer(official_state(small_ghn), tmp_path / 'file.pt')
    with torch.device('meta'):
        ghn = load_ghn(path)
    expect_same(ghn, small_ghn)


def test_what_a_trainer_adds_does_not_get_in_the_way(tmp_path, small_ghn):
    optimizer = torch.optim.AdamW(small_ghn.parameters())
    small_ghn.embed.weight.sum().backward()
    optimizer.step()
    saved = {
        'state_dict': official_state(small_ghn), 'optimizer': optimizer.state_dict(), 'epoch': 7,
        'args': argparse.Namespace(lr=4e-4, device='cuda', hid=8, betas=(0.9, 0.99), device_object=torch.device('cpu')),
        'config': options(small_ghn) | {'layers': 2, 'heads': 2, 'is_ghn2': False},
    }  # fmt: skip
    torch.save(saved, tmp_path / 'checkpoint.pt')
    ghn = load_ghn(tmp_path / 'checkpoint.pt')
    expect_same(ghn, small_ghn)


def test_other_archives_are_refused(tmp_path, monkeypatch):
    torch.save({'a': torch.zeros(1000)}, tmp_path / 'plain.pt')
    with zipfile.ZipFile(tmp_path / 'plain.pt') as source, zipfile.ZipFile(tmp_path / 'bomb.pt', 'w') as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / 'text.pt', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with zipfile.ZipFile(tmp_path / 'many.pt', 'w') as archive:
        for number in range(500):
            archive.writestr(f'a/data/{number}', b'')
    monkeypatch.setattr('timm_ghn.hub.pickles.MAX_PICKLED', 10_000)
    for name, match in (('bomb', 'compressed member'), ('text', r'no data\.pkl'), ('many', 'more than 10,000 bytes')):
        with pytest.raises(CheckpointError, match=match):
            load_ghn(tmp_path / f'{name}.pt')


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_every_truncation_is_an_error(tmp_path, small_ghn, writer):
    path = writer(official_state(small_ghn), tmp_path / 'ghn.pt')
    data = path.read_bytes()
    for length in (1, 2, 7, 8, 100, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_ghn(path)
