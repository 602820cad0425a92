"""Whatever a file holds, reading it ends in a GHN or in an error of ours; nothing in it runs, hangs or takes memory.

Seeded mutations of bytes, of JSON, of safetensors and of pickles: ``pytest -m slow tests/hub/test_fuzz.py`` runs
15,000 cases, the default run 90.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from official import WRITERS, official_state, options

if sys.platform != 'linux':
    pytest.skip('its limits are those of Linux', allow_module_level=True)

import resource

from timm_ghn.errors import GHNError
from timm_ghn.hub import GHNEntry, load_ghn
from timm_ghn.hub.converted import read_converted
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN, GHNConfig

TARGETS = ('config', 'header', 'converted', 'torch', 'legacy', 'joblib')
#: Cases of each target.
MANY, FEW = 2500, 15
#: Most memory that a case may take on top of what the process has, and most addresses, in bytes.
MAX_MEMORY, MAX_ADDRESSES = 500_000_000, 2 << 30
#: Longest that a case may take, in seconds; a sound case takes milliseconds.
MAX_SECONDS = 120
#: What an executed payload would do.
EVENTS = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'pickle.find_class')

Mutation = Callable[[random.Random, bytes], bytes]

_watching = False
_executed: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in EVENTS:
        _executed.append(f'{event} {arguments!r}'[:200])


sys.addaudithook(_audit)


def peak() -> int:
    """The most bytes of memory that this process had since :func:`forget_peak`."""
    return 1024 * int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])


def forget_peak() -> None:
    Path('/proc/self/clear_refs').write_text('5')


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bound the time and the memory of a case, and watch for executed payloads."""
    global _watching
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f'took more than {MAX_SECONDS} seconds'))
    forget_peak()
    before = peak()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_ADDRESSES, hard))
    _watching = True
    _executed.clear()
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        _watching = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
    assert peak() - before < MAX_MEMORY


def run_cases(path: Path, mutate: Mutation, read: Callable[[], object], *, cases: int, seed: int, marker: Path) -> int:
    """Write mutations of a file and read each; gives how many were refused with an error of ours."""
    sound, refused = path.read_bytes(), 0
    for case in range(cases):
        path.write_bytes(mutate(random.Random(f'{seed}-{case}'), sound))
        try:
            with limits():
                try:
                    read()
                except GHNError:
                    refused += 1
        except Exception as error:
            raise AssertionError(f'seed {seed}, case {case}: {type(error).__name__}: {error}') from error
        assert not _executed, f'seed {seed}, case {case}: {_executed}'
        assert not marker.exists(), f'seed {seed}, case {case}: executed'
    return refused


# Mutations


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert a few bytes, more often at the beginning, where a file says what it is."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not found:
            break
        at = rng.randrange(min(len(found), rng.choice((64, 600, 6000, len(found)))))
        kind = rng.randrange(5)
        if kind == 0:
            found[at] ^= rng.randrange(1, 256)
        elif kind == 1:
            del found[at : at + rng.choice((1, 2, 8, 100, len(found)))]
        elif kind == 2:
            found[at:at] = found[at : at + rng.choice((1, 8, 40))]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
        else:
            number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**12))
            width = rng.choice((1, 2, 4, 8))
            found[at : at + width] = (number % 256**width).to_bytes(width, 'little')
    return bytes(found)


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 4, 255, 10**12, 10**18, 2**63, 2**64, 10**400, -(10**12), 0.5, 1e308, -0.0, 1e-320,
    float('inf'), float('-inf'), float('nan'), '', 'x', 'ghn', '../../etc/passwd', '/etc/passwd', 'a\0b', 'é' * 10,
    'x' * 10_000, [], [0], [1, 2, 3], [10**12] * 4, [8, 8, 10**6, 10**6], [[]], {}, {'a': 1}, {'x': {'y': {'z': []}}},
    'graphormer', 'gated', 'mlp', 'conv', 'templates', 'corner', 'published', 'F64', 'BF16', 'I64', 'F8_E4M3',
)  # fmt: skip


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Another value in some place of a value of JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        changed = dict(value)
        key = rng.choice(list(changed))
        kind = rng.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[rng.choice(('', 'surprise', key * 2, '__class__', 'name', 'path', '__metadata__'))] = changed[key]
        else:
            changed[key] = mutate_value(rng, changed[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        items = list(value)
        at = rng.randrange(len(items))
        items[at] = mutate_value(rng, items[at])
        return items if rng.random() < 0.8 else items * rng.choice((0, 2, 50))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**9, f'{value % 2**63}'))
    return rng.choice(HOSTILE)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Other values in JSON, or other bytes."""
    if rng.random() < 0.15:
        return damage(rng, data)
    if rng.random() < 0.02:
        return rng.choice((b'[', b'{"a":')) * rng.choice((10, 1000, 100_000))
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutate_value(rng, value)
    return json.dumps(value).encode()


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Another header, which may lie about types, shapes and places; or other bytes."""
    if rng.random() < 0.3:
        return damage(rng, data)
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2, 5))):
        header = mutate_value(rng, header)
    text = json.dumps(header).encode()
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 10**12, 2**64 - 1))
    return struct.pack('<Q', claimed) + text + data[8 + length :]


def payloads(marker: Path) -> tuple[bytes, ...]:
    """Pieces of pickles that make a file where they are executed."""
    command = f'touch {marker}'.encode()
    short = bytes([len(command)]) + command
    return (
        b'cos\nsystem\n(S"' + command + b'"\ntR',
        b'cposix\nsystem\n\x8c' + short + b'\x85R',
        b'\x8c\x02os\x8c\x06system\x93\x8c' + short + b'\x85R',
        b'(S"' + command + b'"\nios\nsystem\n',
        b'(cos\nsystem\nS"' + command + b'"\no',
        b'cbuiltins\neval\n(S"__import__(\'os\').system(\'' + command + b'\')"\ntR',
        b'csubprocess\nPopen\n((lS"touch"\naS"' + str(marker).encode() + b'"\natR',
        b'ctorch\nload\n(S"' + str(marker).encode() + b'"\ntR',
        b'ctorch._utils\n_rebuild_tensor_v2\n(tR',
        b'cos\nsystem\n)\x81}b',
        b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00', b'P0\n', b'Q', b'b', b'R', b'}', b'(', b't', b'0', b'2',
    )  # fmt: skip


def pickle_mutation(marker: Path) -> Mutation:
    """Mutations of a stream of pickles, half of them with payloads."""
    pieces = payloads(marker)

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.5:
            at = rng.randrange(min(len(data), rng.choice((100, 3000, len(data)))))
            data = data[:at] + rng.choice(pieces) + data[at + rng.choice((0, 0, 1, 5)) :]
        elif rng.random() < 0.5:
            data = data.replace(b'torch._utils\n_rebuild_tensor_v2', b'os\nsystem', rng.choice((1, -1)))
        return damage(rng, data) if rng.random() < 0.6 else data

    return mutate


def zip_mutation(marker: Path) -> Mutation:
    """Mutations of the pickle inside an archive, or of the archive."""
    inner = pickle_mutation(marker)

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.4:
            return damage(rng, data)
        result = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, 'w') as target:
            for info in source.infolist():
                content, name = source.read(info), info.filename
                if name.endswith('data.pkl'):
                    content = inner(rng, content)
                target.writestr(name, content, zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED)
        return result.getvalue()

    return mutate


# Files


def fuzz(target: str, tmp_path: Path, ghn: GHN, marker: Path, *, cases: int, seed: int) -> int:
    if target in ('config', 'header'):
        save_ghn(ghn, tmp_path / 'ghn')
        name, mutate = ('config.json', mutate_json) if target == 'config' else ('model.safetensors', mutate_safetensors)
        path, read = tmp_path / 'ghn' / name, lambda: load_ghn(tmp_path / 'ghn')
    elif target == 'converted':
        # The configuration of a conversion: whatever it says, the GHN is the one of the official file.
        file = WRITERS['joblib'](official_state(ghn), tmp_path / 'ghn.pt')
        entry = GHNEntry('mine', '', ghn.config, repo_id='user/repo', filename='ghn.pt')
        read_converted(file, entry, tmp_path / 'cache')
        (place,) = (tmp_path / 'cache').iterdir()
        path, mutate = place / 'config.json', mutate_json

        def read() -> None:
            found = read_converted(file, entry, tmp_path / 'cache').state_dict()
            assert all(found[key].equal(value) for key, value in ghn.state_dict().items())
    else:
        path, read = tmp_path / 'ghn.pt', lambda: load_ghn(tmp_path / 'ghn.pt')
        state = official_state(ghn)
        # All but joblib's state their configuration.
        saved = state if target == 'joblib' else {'state_dict': state, 'config': options(ghn), 'epoch': 3}
        if target == 'torch':  # with what a trainer adds
            arguments = argparse.Namespace(lr=4e-4, betas=(0.9, 0.99), device=torch.device('cpu'), heads=[1, 2])
            saved |= {'optimizer': {'state': {0: {'step': torch.ones(1)}}}, 'args': arguments, 'step': 100}
        WRITERS[target](saved, path)
        mutate = zip_mutation(marker) if target == 'torch' else pickle_mutation(marker)
    return run_cases(path, mutate, read, cases=cases, seed=seed, marker=marker)


@pytest.mark.parametrize(('cases', 'seed'), [(FEW, 0), pytest.param(MANY, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('target', TARGETS)
def test_every_case_is_read_or_refused(target, cases, seed, tmp_path, small_ghn, marker, monkeypatch):
    monkeypatch.setattr('timm_ghn.files.os.fsync', lambda _: None)  # thousands of conversions need not be on the disk
    refused = fuzz(target, tmp_path, small_ghn, marker, cases=cases, seed=seed)
    # Some mutations must be refused, else they are too tame; a changed conversion is always replaced.
    assert bool(refused) != (target == 'converted')


# Sizes that lie


def test_sizes_that_no_memory_holds_are_refused_at_once(tmp_path, small_ghn):
    save_ghn(small_ghn, tmp_path / 'ghn')
    path = tmp_path / 'ghn' / 'config.json'
    record = json.loads(path.read_text())
    huge = [
        {'hid': 10**12}, {'num_classes': 10**12}, {'layers': 10**12}, {'heads': 10**12}, {'max_shape': [10**6] * 4},
        {'max_shape': [8, 8, 10**6, 10**6]}, {'decoder': 'templates', 'templates': 10**12, 'codes': 10**12},
        {'decoder': 'templates', 'codes': 10**6}, {'hid': 4 * 10**5, 'heads': 1}, {'layers': 10**5},
        {'mean': [10**400, 0, 0]}, {'std': [1, 1, 10**400]},
    ]  # fmt: skip
    for changes in huge:
        path.write_text(json.dumps(record | changes))
        with limits(), pytest.raises(GHNError):
            load_ghn(tmp_path / 'ghn')


def test_sizes_up_to_those_of_the_file_cost_little(tmp_path):
    """A configuration that the file is just large enough for: the GHN is built without memory before it is refused."""
    config = GHNConfig(hid=8, max_shape=(8, 8, 3, 3), num_classes=5, layers=2, heads=2)
    save_ghn(GHN(config), tmp_path / 'ghn')
    path = tmp_path / 'ghn' / 'config.json'
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {'num_classes': 10_000, 'hid': 9_000, 'heads': 8, 'layers': 40}))
    forget_peak()
    before = peak()
    with pytest.raises(GHNError):
        load_ghn(path.parent)
    assert peak() - before < 300e6
