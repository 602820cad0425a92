"""Files that are almost what they should be: seeded mutations of bytes, of JSON, of safetensors and of pickles."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Most memory that a case may take on top of what the process has, in bytes, and for each byte of its file.
MAX_MEMORY = 500_000_000
MAX_GROWTH = 4
#: Addresses that a case may take, in bytes: a stop before the machine is out of memory.
MAX_ADDRESSES = 2 << 30
#: Longest that a case may compute, in seconds; a sound case takes milliseconds.
MAX_SECONDS = 10.0
#: Longest that it may wait, in seconds of the clock: the machine may be busy, or short of memory.
MAX_WAIT = 600.0

#: What an executed payload would do.
EVENTS = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'pickle.find_class')

Mutation = Callable[[random.Random, bytes], bytes]


class Canary:
    """Notes what nothing that is read may do."""

    def __init__(self) -> None:
        self.watching = False
        self.sung: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event in EVENTS:
            self.sung.append(f'{event} {arguments!r}'[:200])


CANARY = Canary()


class TooSlowError(Exception):
    """A case that takes too long."""


class TooLargeError(Exception):
    """A case that takes too much memory."""


def resident(kind: str) -> int:
    """Bytes of memory that this process has ('VmRSS'), or had at most since :func:`forget_peak` ('VmHWM')."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition(f'{kind}:')[2].split()[0])


def forget_peak() -> None:
    """Have the peak of memory measured anew."""
    Path('/proc/self/clear_refs').write_text('5')


def _ring(*_: object) -> None:
    raise TooSlowError


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bound the memory of this process, and watch for executed payloads."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = {kind: signal.signal(kind, _ring) for kind in (signal.SIGALRM, signal.SIGVTALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_ADDRESSES, hard))
    CANARY.watching = True
    CANARY.sung.clear()
    try:
        yield
    finally:
        CANARY.watching = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for kind, handler in old.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def case_limits(size: int) -> Iterator[None]:
    """Bound the time and the memory of a case.

    Args:
        size: Of its file, in bytes.
    """
    before = resident('VmRSS')
    forget_peak()
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    taken = resident('VmHWM') - before
    if taken > MAX_GROWTH * size + MAX_MEMORY:
        raise TooLargeError(f'{taken:,} bytes for a file of {size:,}')


# Bytes


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert a few bytes, more often at the beginning, where a file says what it is."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not found:
            break
        reach = min(len(found), rng.choice((64, 600, 6000, len(found))))
        at = rng.randrange(reach)
        kind = rng.randrange(7)
        if kind == 0:
            found[at] = rng.randrange(256)
        elif kind == 1:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del found[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            found[at:at] = found[at : at + rng.choice((1, 8, 40))]
        elif kind == 4:
            found[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 8))))
        elif kind == 5:
            number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**12))
            width = rng.choice((1, 2, 4, 8))
            found[at : at + width] = (number % 256**width).to_bytes(width, 'little')
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found)


# JSON

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 4, 255, 10**12, 10**18, 2**63, 2**64, 10**400, -(10**12), 0.5, 1e308, -0.0, 1e-320,
    float('inf'), float('-inf'), float('nan'), '', 'x', 'ghn', '../../etc/passwd', '/etc/passwd', 'a\0b', 'é' * 10,
    'x' * 10_000, [], [0], [1, 2, 3], [10**12] * 4, [8, 8, 10**6, 10**6], [[]], {}, {'a': 1}, {'x': {'y': {'z': []}}},
    'graphormer', 'gated', 'mlp', 'conv', 'templates', 'corner', 'published',
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
            changed[rng.choice(('', 'surprise', key * 2, '__class__', 'name', 'path', 'file', 'within'))] = changed[key]
        else:
            changed[key] = mutate_value(rng, changed[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        items = list(value)
        at = rng.randrange(len(items))
        items[at] = mutate_value(rng, items[at])
        return items if rng.random() < 0.8 else items * rng.choice((0, 2, 50))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value * 10**9, float(value % 2**63), f'{value % 2**63}')
        )
    return rng.choice(HOSTILE)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Other values in JSON, or other bytes."""
    if rng.random() < 0.15:
        return damage(rng, data)
    if rng.random() < 0.02:
        opening = rng.choice((b'[', b'{"a":'))
        return opening * rng.choice((10, 1000, 100_000))
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutate_value(rng, value)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Another header, which may lie about types, shapes and places; or other bytes."""
    if rng.random() < 0.3:
        return damage(rng, data)
    (length,) = struct.unpack('<Q', data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice((1, 1, 2, 5))):
        key = rng.choice(list(header))
        entry = header[key]
        kind = rng.randrange(6)
        if kind == 0 and 'shape' in entry:
            shape = list(entry['shape'])
            shape = rng.choice((shape[::-1], [*shape, 1], [*shape, 0], [2**32, 2**32], [10**12], shape[1:]))
            header[key] = {**entry, 'shape': shape}
        elif kind == 1:
            header[key] = {**entry, 'dtype': rng.choice(('F64', 'F16', 'BF16', 'I64', 'BOOL', 'U8', 'F8_E4M3', 'C64'))}
        elif kind == 2 and 'data_offsets' in entry:
            begin, end = entry['data_offsets']
            offsets = rng.choice(((end, begin), (0, end), (begin, end + 4), (begin, 10**12), (2**63, 2**64 - 1)))
            header[key] = {**entry, 'data_offsets': list(offsets)}
        elif kind == 3:
            del header[key]
        elif kind == 4:
            header[rng.choice(('x', 'embed.weight', key + 'x', '__metadata__'))] = entry
        else:
            header = mutate_value(rng, header)
        if not isinstance(header, dict) or not header or not all(isinstance(value, dict) for value in header.values()):
            break
    sys.set_int_max_str_digits(0)
    text = json.dumps(header).encode()
    sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 10**12, 2**64 - 1))
    return struct.pack('<Q', claimed) + text + rest


# Pickles


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
        b'cpathlib\nPath\n(S"' + str(marker).encode() + b'"\ntRctouch\n\n',
        b'ctorch\nload\n(S"' + str(marker).encode() + b'"\ntR',
        b'ctorch._utils\n_rebuild_tensor_v2\n(tR',
        b'cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81',
        b'cos\nsystem\n)\x81}b',
        b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00', b'P0\n', b'Q', b'b', b'R', b'}', b'(', b't', b'0', b'2',
    )  # fmt: skip


#: Globals that pickles of checkpoints name, and what may stand in their place.
_NAMES = (
    b'torch._utils\n_rebuild_tensor_v2', b'collections\nOrderedDict', b'torch\nFloatStorage',
    b'torch.storage\n_load_from_bytes', b'numpy\ndtype', b'numpy\nndarray', b'torch\nSize',
)  # fmt: skip
_OTHERS = (
    b'os\nsystem', b'builtins\nexec', b'torch\nLongStorage', b'collections\nOrderedDict', b'torch\nSize',
    b'argparse\nNamespace', b'torch._utils\n_rebuild_parameter', b'torch\ndevice',
)  # fmt: skip


def pickle_mutation(marker: Path) -> Mutation:
    """Mutations of a stream of pickles, some of them with payloads."""
    pieces = payloads(marker)

    def mutate(rng: random.Random, data: bytes) -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            at = rng.randrange(min(len(data), rng.choice((100, 3000, len(data)))))
            data = data[:at] + rng.choice(pieces) + data[at + rng.choice((0, 0, 1, 5)) :]
        elif kind == 1:
            data = data.replace(rng.choice(_NAMES), rng.choice(_OTHERS), rng.choice((1, -1)))
        elif kind == 2:
            for piece in rng.sample((b'M', b'K', b'J', b'\x85', b'\x86', b'\x87', b'h', b'q', b'X', b'R', b'b'), 2):
                places = [at for at in range(min(len(data), 4000)) if data[at : at + 1] == piece]
                if places:
                    at = rng.choice(places)
                    number = rng.choice((0, 1, 255, 2**31 - 1, 2**32 - 1))
                    data = data[: at + 1] + number.to_bytes(4, 'little') + data[at + 1 + rng.choice((1, 2, 4)) :]
        return damage(rng, data) if kind == 3 or rng.random() < 0.2 else data

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
                elif rng.random() < 0.02:
                    content = content[: rng.randrange(len(content) + 1)]
                elif rng.random() < 0.02:
                    name = rng.choice((f'../{name}', f'{name}x', '/etc/passwd', ''))
                how = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')  # of names that are there twice
                    target.writestr(name or 'x', content, how)
        found = result.getvalue()
        return damage(rng, found) if rng.random() < 0.1 else found

    return mutate


# Running


def run_cases(
    path: Path,
    mutate: Mutation,
    read: Callable[[], object],
    *,
    cases: int,
    seed: int,
    expected: type[Exception],
    marker: Path,
) -> dict[str, int]:
    """Write mutations of a file and read each: it is read, or refused with an error of ours.

    Args:
        path: The file, which is sound at first and afterwards.
        mutate: Makes other bytes of its bytes.
        read: Reads it.
        cases: How many.
        seed: Of the mutations.
        expected: The kind of errors that are ours.
        marker: The file that an executed payload makes.

    Returns:
        How many ended how, by the name of the error.

    Raises:
        AssertionError: naming seed and case, if anything else happens.
    """
    sound = path.read_bytes()
    ended: dict[str, int] = {}
    try:
        with limits():
            for case in range(cases):
                rng = random.Random(f'{seed}-{case}')
                path.write_bytes(mutate(rng, sound))
                how = 'read'
                try:
                    with case_limits(path.stat().st_size):
                        try:
                            read()
                        except expected as error:
                            how = type(error).__name__
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    kept = os.environ.get('TIMM_GHN_FUZZ_KEEP')
                    if kept:
                        Path(kept).write_bytes(path.read_bytes())
                    raise AssertionError(f'seed {seed}, case {case}: {type(error).__name__}: {error}') from error
                if CANARY.sung or marker.exists():
                    raise AssertionError(f'seed {seed}, case {case}: executed: {CANARY.sung}')
                ended[how] = ended.get(how, 0) + 1
    finally:
        path.write_bytes(sound)
    return ended
