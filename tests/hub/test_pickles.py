"""The restricted reader of pickles: it runs nothing, names what it refuses, and believes no size that it is told."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
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
from timm_ghn.hub.official import open_checkpoint
from timm_ghn.hub.pickles import MAX_PICKLED, CheckpointFile, read_pickle


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def touch(marker: Path) -> Payload:
    return Payload(os.system, f'touch {marker}')


def read(data: bytes) -> Any:
    return read_pickle(CheckpointFile(io.BytesIO(data), 'the pickle'))


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
def test_every_protocol_is_refused(marker, protocol):
    data = pickle.dumps({'a': [1, (2.5, 'text', None, True, -(2**40))], 'b': touch(marker)}, protocol)
    # The oldest two have opcodes that no checkpoint needs.
    error, match = (UnsafeCheckpointError, 'system') if protocol > 1 else (CheckpointError, 'the pickle')
    with pytest.raises(error, match=match):
        read(data)
    assert not marker.exists()


def test_a_payload_inside_the_bytes_of_a_tensor_is_refused(tmp_path, marker):
    inner = io.BytesIO()
    torch.save(touch(marker), inner, _use_new_zipfile_serialization=False)
    path = WRITERS['joblib']({'a': Payload(torch.storage._load_from_bytes, inner.getvalue())}, tmp_path / 'ghn.pt')
    with pytest.raises(UnsafeCheckpointError, match='system'):
        load_ghn(path)
    assert not marker.exists()


def test_other_globals_are_refused_even_those_of_torch():
    for function in (builtins.eval, builtins.getattr, bytearray, torch.load, torch.hub.load, io.open, pickle.loads):
        with pytest.raises(UnsafeCheckpointError, match=function.__name__):
            read(pickle.dumps(Payload(function, 'x')))


@pytest.mark.parametrize(
    ('data', 'named'),
    [
        (b'cos\nsystem\n(S"touch x"\ntR.', 'os.system'),
        (b'\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.', 'torch._utils.os.system'),
        (b'\x80\x02ccollections\nOrderedDict\n.'.replace(b'OrderedDict', b'OrderedDict.__init__'), '__init__'),
        (b'\x80\x02ctorch.storage\n_load_from_bytes\n.', '_load_from_bytes'),
        (b'\x80\x04\x8c\x02os\x8c\x08\x1b[2J\x07\n\n\x00\x93.', r"'os\.\\x1b\[2J\\x07\\n\\n\\x00'"),
    ],
    ids=['text', 'dotted', 'attribute', 'nested', 'control'],
)
def test_no_spelling_of_a_global_gets_round_the_list(data, named):
    with pytest.raises(UnsafeCheckpointError, match=named):
        read(data)


NONSENSE = [
    b'(S"touch x"\nios\nsystem\n.',  # an instance, in the oldest way
    b'\x80\x02ctorch\nFloatStorage\n)R.',  # a name that cannot be called
    b'\x80\x02}}R.',  # a call of a dictionary
    b'\x80\x02\x82\x01.',  # a global by number, from a registry of this process
    b'\x80\x02(ccollections\nOrderedDict\no.',
    b'\x80\x02}]}s.',  # a list as a key
    b'\x80\x02}K\x01\x85Ns.',  # a tuple as a key
    b'\x80\x02}ctorch\nFloatStorage\nNs.',  # a name as a key
    b'\x80\x02.', b'\x80\x02a.', b'\x80\x02h\x05.', b'\x80\x02U\x01xQ.', b'\x80\x02N}b', b'', b'\x80', b'\xff',
    b'I' + b'9' * 5000 + b'\n.',
    b'X\x04\x00\x00\x00\xff\xff\xff\xff.',
    b'\x80\x02]\x940',  # an instruction that no pickle of a checkpoint has
]  # fmt: skip
LENGTHS = [
    b'\x80\x04\x8e' + struct.pack('<Q', 2**62) + b'x.',
    b'\x80\x04\x8d' + struct.pack('<Q', 2**62) + b'x.',
    b'\x80\x04B' + struct.pack('<I', 2**32 - 1) + b'x.',
    b'\x80\x04X' + struct.pack('<I', 2**31) + b'x.',
    b'\x80\x04X' + struct.pack('<I', MAX_PICKLED - 100) + b'x.',
    b'\x80\x04\x8b' + struct.pack('<i', 2**31 - 1) + b'x.',
    b'\x80\x04\x95' + struct.pack('<Q', 2**62) + b'N',
    b'X' + struct.pack('<I', MAX_PICKLED + 1) + b'a' * (MAX_PICKLED + 1) + b'.',
]
# Short files that ask for endless work: each level of LAUGHS is a tuple of the one before, twice.
LAUGHS = b'\x80\x02)q\x00' + b'h\x00h\x00\x86q\x00' * 60
DEEP = b'\x80\x02)' + b'\x85' * 100_000
TENSOR = b'ctorch._utils\n_rebuild_tensor_v2\n'
ENDLESS = [
    *(LAUGHS + end for end in (b'}h\x00K\x01s.', b'}(h\x00K\x01u.', b'(h\x00K\x01d.', b'\x8f(h\x00\x90.', b')R.',
                               b'ccollections\nOrderedDict\n]h\x00a\x85R.', b'h\x00h\x00\x93.', b'h\x00Q.',
                               TENSOR + b'(K\x01K\x00h\x00h\x00tR.')),
    DEEP + b'q\x01}h\x01K\x01s.',
    DEEP + b')R.',
    b'\x80\x02' + TENSOR + b'(K\x01K\x00(\x8a\x08' + b'\xff' * 7 + b'\x7f' + b'K\x02' * 200_000 + b'tq\x01h\x01tR.',
    # Integers of any length: the hash of a long one takes long each time, and many of them can have the same.
    *(b'\x80\x02}' + integer + b'Ns.' for integer in (
        b'\x8a\x09' + b'\x01' * 9, b'\x8b\x09\x00\x00\x00' + b'\x01' * 9, b'I' + b'1' * 30 + b'\n', b'L123456L\n')),
    # Calls that took any number of arguments could copy a long tuple again and again.
    *(b'\x80\x02' + named + b'(' + b'X\x01\x00\x00\x00x' * 1000 + b'tR.' for named in (
        b'ctorch\ndevice\n', b'ccollections\nOrderedDict\n', TENSOR, b'ctorch._utils\n_rebuild_parameter\n')),
]  # fmt: skip


@pytest.mark.parametrize('cases', [NONSENSE, LENGTHS, ENDLESS], ids=['nonsense', 'lengths', 'endless'])
def test_what_no_checkpoint_holds_is_refused_at_no_cost(cases):
    for data in cases:
        with pytest.raises(CheckpointError):
            read(data)
    assert read(b'\x80\x02}\x8a\x08' + b'\x01' * 8 + b'Ns.') == {0x0101010101010101: None}


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb.',
        b'\x80\x02ccollections\nOrderedDict\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b.',
    ],
    ids=['attributes', 'slots'],
)
def test_state_changes_nothing_of_ours(data):
    """What stands for a global serves all that are read after it."""
    found = read(data)
    assert not vars(found)
    assert found.__defaults__ is None
    assert read(b'\x80\x02ccollections\nOrderedDict\n)R.') == {}


def test_a_pickle_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr('timm_ghn.hub.pickles.MAX_PICKLED', 1000)
    with pytest.raises(CheckpointError, match=r'more than 1,000 bytes beside its tensors'):
        read(b'Nq\x00' * 1000 + b'.')
    assert read(b'Nq\x00' * 300 + b'.') is None
    assert MAX_PICKLED > 1_000_000


def test_plain_values_come_back():
    value = {'a': [1, -5, 2**60, 1.5, 'text', None, True], 'b': ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 'c': {}}
    value['d'] = value['a']
    value[0] = 'x' * 300
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert read(pickle.dumps(value, protocol)) == value


class Claim:
    """A tensor of a shape, an offset and strides that its storage need not have."""

    def __init__(self, shape: tuple[Any, ...], stride: tuple[Any, ...], start: int = 0, numel: int = 4) -> None:
        self.arguments = torch.zeros(numel).untyped_storage(), start, shape, stride

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        storage, start, shape, stride = self.arguments
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, start, shape, stride, False, collections.OrderedDict())


CLAIMS = [
    ((2**40,), (0,), 0), ((2**40, 2**40), (0, 0), 0), ((5,), (1,), 0), ((2,), (1,), 3), ((2,), (-1,), 2),
    ((-2,), (1,), 0), ((2, 2), (1,), 0), ((2,), (2**62,), 0), ((2.0,), (1,), 0), (('2',), (1,), 0),
    ((1,) * 33, (1,) * 33, 0),
]  # fmt: skip


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, writer):
    for shape, stride, start in CLAIMS:
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


def test_nested_pickles_share_their_limit_with_the_others(tmp_path, monkeypatch):
    inner = io.BytesIO()
    torch.save([0] * 2000, inner, _use_new_zipfile_serialization=False)
    data = inner.getvalue()
    load = b'ctorch.storage\n_load_from_bytes\nh\x01\x85Rq\x02'
    path = tmp_path / 'ghn.pt'
    path.write_bytes(b'\x80\x03B' + struct.pack('<I', len(data)) + data + b'q\x01' + load * 200 + b'}.')
    with open_checkpoint(path) as loaded:
        assert loaded == {}
    monkeypatch.setattr('timm_ghn.hub.pickles.MAX_PICKLED', 100_000)
    with pytest.raises(CheckpointError, match='more than 100,000 bytes beside its tensors'), open_checkpoint(path):
        pass


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS.keys())
def test_a_configuration_that_repeats_itself_is_refused(tmp_path, small_ghn, writer):
    shape: tuple[Any, ...] = ()
    for _ in range(60):
        shape = (shape, shape)
    saved = {'state_dict': official_state(small_ghn), 'config': {'max_shape': shape}}
    with pytest.raises(CheckpointError, match='impossible max_shape'):
        load_ghn(writer(saved, tmp_path / 'ghn.pt'))
