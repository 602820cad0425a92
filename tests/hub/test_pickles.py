"""The restricted reader of pickles: it runs nothing, names what it refuses, and believes no size that it is told."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import lzma
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from official import WRITERS, official_state

from timm_ghn.errors import CheckpointError, UnsafeCheckpointError
from timm_ghn.hub import load_ghn
from timm_ghn.hub.checkpoints import open_checkpoint
from timm_ghn.hub.pickles import MAX_STEPS, Unpickler
from timm_ghn.hub.records import MAX_INLINE, Source, Span


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def touch(marker: Path) -> Payload:
    return Payload(os.system, f'touch {marker}')


def read(data: bytes, **arguments: Any) -> Any:
    return Unpickler(Source(io.BytesIO(data), Span(0, len(data)), 'the pickle'), **arguments).load()


def test_the_payload_of_these_tests_does_run_elsewhere(marker):
    pickle.loads(pickle.dumps(touch(marker)))
    assert marker.exists()


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize('shape', ['alone', 'beside', 'args'])
def test_a_payload_is_refused_by_name_and_not_run(tmp_path, marker, writer, shape):
    wrap = {
        'alone': lambda it: it,
        'beside': lambda it: {'state_dict': collections.OrderedDict(a=torch.zeros(3)), 'extra': it},
        'args': lambda it: {'state_dict': {'a': torch.zeros(3)}, 'args': argparse.Namespace(lr=it)},
    }
    path = writer(wrap[shape](touch(marker)), tmp_path / 'ghn.pt')
    with pytest.raises(UnsafeCheckpointError, match=rf'{os.system.__module__}\.system.*nothing of it was executed'):
        load_ghn(path)
    assert not marker.exists()


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_refused_by_name(marker, protocol):
    data = pickle.dumps({'a': [1, (2.5, 'text', None, True, -(2**70))], 'b': touch(marker)}, protocol)
    with pytest.raises(UnsafeCheckpointError, match='system'):
        read(data)
    assert not marker.exists()


def test_a_payload_inside_the_bytes_of_a_tensor_is_refused(tmp_path, marker):
    inner = io.BytesIO()
    torch.save(touch(marker), inner, _use_new_zipfile_serialization=False)
    path = WRITERS['joblib']({'a': Payload(torch.storage._load_from_bytes, inner.getvalue())}, tmp_path / 'ghn.pt')
    with pytest.raises(UnsafeCheckpointError, match='system'):
        load_ghn(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    'function',
    [builtins.eval, builtins.getattr, builtins.__import__, torch.load, torch.hub.load, io.open, pickle.loads],
    ids=lambda function: function.__name__,
)
def test_other_globals_are_refused_even_those_of_torch(function):
    with pytest.raises(UnsafeCheckpointError, match=function.__name__):
        read(pickle.dumps(Payload(function, 'x')))


@pytest.mark.parametrize(
    ('data', 'named'),
    [
        (b'(S"touch x"\nios\nsystem\n.', 'os.system'),
        (b'cos\nsystem\n(S"touch x"\ntR.', 'os.system'),
        (b'\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.', 'torch._utils.os.system'),
        (b'\x80\x02ccollections\nOrderedDict\n.'.replace(b'OrderedDict', b'OrderedDict.__init__'), '__init__'),
    ],
    ids=['instance', 'text', 'dotted', 'attribute'],
)
def test_no_spelling_of_a_global_gets_round_the_list(data, named):
    with pytest.raises(UnsafeCheckpointError, match=named):
        read(data)


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x02ctorch\nFloatStorage\n)R.',  # a name that cannot be called
        b'\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00xK\x01sb.',  # the state of a name
        b'\x80\x02}}R.',  # a call of a dictionary
        b'\x80\x02\x82\x01.',  # a global by number, from a registry of this process
        b'\x80\x02(ccollections\nOrderedDict\no.',
        b'\x80\x02}]}s.',  # a list as a key
        b'\x80\x02.',
        b'\x80\x02a.',
        b'\x80\x02h\x05.',
        b'\x80\x02U\x01xQ.',
        b'',
        b'\x80',
        b'\xff',
        b'I' + b'9' * 5000 + b'\n.',
        b'X\x04\x00\x00\x00\xff\xff\xff\xff.',
    ],
)
def test_nonsense_is_a_checkpoint_error(data):
    with pytest.raises(CheckpointError):
        read(data)


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x04\x8e' + struct.pack('<Q', 2**62) + b'x.',
        b'\x80\x04\x8d' + struct.pack('<Q', 2**62) + b'x.',
        b'\x80\x04B' + struct.pack('<I', 2**32 - 1) + b'x.',
        b'\x80\x04X' + struct.pack('<I', 2**31) + b'x.',
        b'\x80\x04\x8b' + struct.pack('<i', 2**31 - 1) + b'x.',
        b'X' + struct.pack('<I', MAX_INLINE + 1) + b'a' * (MAX_INLINE + 1) + b'.',
    ],
    ids=['BINBYTES8', 'BINUNICODE8', 'BINBYTES', 'BINUNICODE', 'LONG4', 'too long'],
)
def test_a_length_beyond_the_file_costs_nothing(data):
    with pytest.raises(CheckpointError, match='declares|ends too early'):
        read(data)


def test_a_pickle_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr('timm_ghn.hub.pickles.MAX_STEPS', 1000)
    with pytest.raises(CheckpointError, match=r'more than 1,000 instructions'):
        read(b'N0' * 1000 + b'N.')
    assert read(b'N0' * 400 + b'N.') is None
    assert MAX_STEPS > 100_000


def test_plain_values_come_back():
    value = {'a': [1, -5, 2**80, 1.5, 'text', None, True], 'b': ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 'c': {}}
    value['d'] = value['a']
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read(pickle.dumps(value, protocol)) == value


class Claim:
    """A tensor of a shape, an offset and strides that its storage need not have."""

    def __init__(self, shape: tuple[Any, ...], stride: tuple[Any, ...], start: int = 0, numel: int = 4) -> None:
        self.arguments = torch.zeros(numel).untyped_storage(), start, shape, stride

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        storage, start, shape, stride = self.arguments
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, start, shape, stride, False, collections.OrderedDict())


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize(
    ('shape', 'stride', 'start'),
    [
        ((2**40,), (0,), 0),
        ((2**40, 2**40), (0, 0), 0),
        ((5,), (1,), 0),
        ((2,), (1,), 3),
        ((2,), (-1,), 2),
        ((-2,), (1,), 0),
        ((2, 2), (1,), 0),
        ((2,), (2**62,), 0),
        ((2.0,), (1,), 0),
        (('2',), (1,), 0),
    ],
)
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, writer, shape, stride, start):
    path = writer({'a': Claim(shape, stride, start)}, tmp_path / 'ghn.pt')
    with pytest.raises(CheckpointError, match='shape'):
        load_ghn(path)


def test_no_read_is_made_before_it_is_asked_for(tmp_path):
    path = WRITERS['joblib']({'a': torch.arange(1e5)}, tmp_path / 'ghn.pt')
    with open_checkpoint(path) as loaded:
        record = loaded['a']
        assert record.shape == (100_000,)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match='ends too early'):
            record.read()


# Short files that ask for endless work. Each level of LAUGHS is a tuple of the one before, twice.

LAUGHS = b'\x80\x02)q\x00' + b'h\x00h\x00\x86q\x00' * 60
DEEP = b'\x80\x02)' + b'\x85' * 500_000
TENSOR = b'ctorch._utils\n_rebuild_tensor_v2\n'
DTYPE = b'cnumpy\ndtype\n'
ARRAY = b'cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81'


@pytest.mark.parametrize(
    'data',
    [
        LAUGHS + b'}h\x00K\x01s.',
        LAUGHS + b'}(h\x00K\x01u.',
        LAUGHS + b'(h\x00K\x01d.',
        LAUGHS + b'ccollections\nOrderedDict\n]h\x00a\x85R.',
        LAUGHS + b')R.',
        LAUGHS + b'h\x00}b.',
        LAUGHS + b'h\x00h\x00\x93.',
        LAUGHS + b'h\x00Q.',
        LAUGHS + TENSOR + b'(K\x01K\x00h\x00h\x00tR.',
        LAUGHS + ARRAY + b'}(X\x05\x00\x00\x00dtypeh\x00u' + b'b.',
        LAUGHS + ARRAY + b'}(X\x05\x00\x00\x00dtype' + DTYPE + b'h\x00\x85Ru' + b'b.',
        DEEP + b'q\x01}h\x01K\x01s.',
        DEEP + b')R.',
        b'\x80\x02' + TENSOR + b'(K\x01K\x00(\x8a\x08' + b'\xff' * 7 + b'\x7f' + b'2' * 200_000 + b'tq\x01h\x01tR.',
    ],
    ids=['key', 'keys', 'dict', 'ordered', 'called', 'state', 'global', 'outside', 'shape', 'dtype', 'code', 'deep key',
         'deep call', 'rank'],
)  # fmt: skip
def test_a_short_file_cannot_ask_for_endless_work(data):
    with pytest.raises(CheckpointError):
        read(data)


def test_containers_that_repeat_others_are_harmless_as_values():
    assert read(LAUGHS + b'X\x01\x00\x00\x00ah\x00\x86.')[0] == 'a'


@pytest.mark.parametrize(
    'copy',
    [b'ccollections\nOrderedDict\nh\x01\x85R0', b'ctorch\nSize\nh\x01\x85R0'],
    ids=['dictionary', 'size'],
)
def test_copies_count_as_instructions(copy, monkeypatch):
    monkeypatch.setattr('timm_ghn.hub.pickles.MAX_STEPS', 50_000)
    items = b']q\x01(' + b'K\x01K\x02\x86' * 1000 + b'e'
    assert read(b'\x80\x02' + items + copy * 10 + b'N.') is None
    with pytest.raises(CheckpointError, match='instructions'):
        read(b'\x80\x02' + items + copy * 100 + b'N.')


def test_nested_pickles_share_their_instructions_with_the_others(tmp_path, monkeypatch):
    inner = io.BytesIO()
    torch.save([0] * 2000, inner, _use_new_zipfile_serialization=False)
    data = inner.getvalue()
    load = b'ctorch.storage\n_load_from_bytes\nh\x01\x85R0'
    path = tmp_path / 'ghn.pt'
    path.write_bytes(b'\x80\x03B' + struct.pack('<I', len(data)) + data + b'q\x01' + load * 200 + b'}.')
    with open_checkpoint(path) as loaded:
        assert loaded == {}
    monkeypatch.setattr('timm_ghn.hub.pickles.MAX_STEPS', 20_000)
    with pytest.raises(CheckpointError, match='instructions'), open_checkpoint(path):
        pass


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_a_configuration_that_repeats_itself_is_refused(tmp_path, small_ghn, writer):
    shape: tuple[Any, ...] = ()
    for _ in range(60):
        shape = (shape, shape)
    saved = {'state_dict': official_state(small_ghn), 'config': {'max_shape': shape}}
    with pytest.raises(CheckpointError, match='impossible max_shape'):
        load_ghn(writer(saved, tmp_path / 'ghn.pt'))


def test_compressed_data_cannot_ask_for_much_memory(tmp_path):
    filters = [{'id': lzma.FILTER_LZMA2, 'dict_size': 1 << 30}]
    (tmp_path / 'ghn.pt').write_bytes(lzma.compress(b'\x80\x02}.', format=lzma.FORMAT_XZ, filters=filters))
    with pytest.raises(CheckpointError, match='truncated or damaged: Memory'):
        load_ghn(tmp_path / 'ghn.pt')
