"""Draw networks as DeepNets-1M was drawn, in parallel, into a file that a later run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from timm_ghn.architectures.cost import count_parameters
from timm_ghn.architectures.deepnets.isomorphism import is_isomorphic, wl_hash
from timm_ghn.architectures.deepnets.layers import OPS
from timm_ghn.architectures.deepnets.network import DeepNet, Genotype, NetworkConfig
from timm_ghn.architectures.deepnets.records import NetRecord, record_of
from timm_ghn.errors import ConfigError, DataError, UnsupportedModelError

#: Operations that only_pool leaves to a reduction cell.
POOLS = ('none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect')


@dataclasses.dataclass(frozen=True)
class SplitRanges:
    """What a split is drawn from; ranges include both ends.

    Attributes:
        cells: Number of cells.
        depths: Numbers of cells, one of which is drawn as the threshold beyond which a network is deep.
        steps: Fewest and most sums in a cell, and the most in a deep network.
        parameters: Most parameters with 32 channels.
        norm: Which normalisation: 'mixed', 'always' or 'none'.
        preproc: Probability of the 1x1 convolutions where they are not needed and there is no attention.
        width: Factor of the channels for CIFAR-10.
    """

    cells: tuple[int, int] = (4, 18)
    depths: tuple[int, ...] = (7, 8, 9, 10)
    steps: tuple[int, int, int] = (1, 4, 2)
    parameters: int = 10**7
    norm: str = 'mixed'
    preproc: float = 1.0
    width: int = 1


#: The published ranges.
SPLITS = {
    'train': SplitRanges(),
    'val': SplitRanges(),
    'test': SplitRanges(),
    'wide': SplitRanges(width=4),
    'bnfree': SplitRanges(norm='none'),
    'deep': SplitRanges(cells=(10, 36), depths=(18,), parameters=10**8),
    'dense': SplitRanges(steps=(2, 10, 6), parameters=10**8),
    'search': SplitRanges(cells=(6, 20), depths=(10,), steps=(1, 6, 3), norm='always', preproc=0.8),
}


def ranges_of(split: str) -> SplitRanges:
    """The ranges of a split."""
    if split not in SPLITS:
        raise ConfigError(f'expected a split among {", ".join(SPLITS)} (got {split!r})')
    return SPLITS[split]


def _draw_cell(rng: np.random.Generator, steps: int, allowed: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Draw a cell: nearly uniform over operations and over pairs of inputs, as the published logits are."""
    pairs: list[tuple[str, int]] = []
    for step in range(steps):
        logits = 1e-3 * rng.standard_normal((2 + step, len(allowed)))
        probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        strongest = np.argsort(-probability.max(axis=1), kind='stable')[:2]
        pairs += [(allowed[int(probability[state].argmax())], int(state)) for state in strongest]
    return tuple(pairs)


def draw_config(rng: np.random.Generator, split: str) -> NetworkConfig | None:
    """Draw a network of a split; None where the published rules reject it."""
    ranges = ranges_of(split)
    n_cells = int(rng.integers(ranges.cells[0], ranges.cells[1] + 1))
    threshold = int(rng.choice(ranges.depths))
    fewest, most, medium = ranges.steps
    steps = int(rng.integers(fewest, (most if n_cells <= threshold else medium) + 1))
    only_pool = bool(rng.random() < 0.5)
    drop_concat = steps > 1 and bool(rng.random() < 0.5)
    first = 0 if steps > 1 else 1  # a cell of one sum has no 'none'
    normal = _draw_cell(rng, steps, OPS[first:])
    reduce = _draw_cell(rng, steps, (POOLS if only_pool else OPS)[first:])
    concat = tuple(2 + j for j in range(steps) if not drop_concat or j == steps - 1 or rng.random() < 0.5)
    genotype = Genotype(normal, concat, reduce, concat)
    ks = int(rng.choice((3, 5, 7)))
    if _is_rejected(genotype):
        return None
    c_mult = int(rng.choice((1, 2)))
    preproc = steps > 1 or c_mult > 1 or bool(rng.random() < (0.2 if genotype.is_vit else ranges.preproc))
    glob_avg = genotype.is_vit or n_cells > threshold or bool(rng.random() < 0.9)
    norm: str | None = None if ranges.norm == 'none' else 'bnorm'
    if ranges.norm == 'mixed' and n_cells <= ranges.cells[0] + 1 and steps <= medium and rng.random() < 0.5:
        norm = None
    stem_type = int(rng.integers(2))
    stem_pool = stem_type == 0 and bool(rng.random() < 0.5)
    fc_layers = int(rng.choice((1, 2)))
    return NetworkConfig(genotype, n_cells, 32, c_mult, ks, stem_type, stem_pool, norm, preproc, glob_avg, fc_layers)


def _is_rejected(genotype: Genotype) -> bool:
    """Whether the published rules refuse a genotype."""
    cells = ([op for op, _ in genotype.normal], [op for op, _ in genotype.reduce])
    convolves = any('conv' in op for op in genotype.ops)
    if not convolves and ('cse' in genotype.ops or not genotype.is_vit):
        return True
    return any(cell.count('cse') > 1 or cell.count('conv_5x5') + cell.count('conv_7x7') > 1 for cell in cells)


def candidate(split: str, seed: int, number: int) -> NetRecord | None:
    """The network that a number stands for, None where it is rejected: it depends on the arguments alone."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), number])
    config = draw_config(rng, split)
    if config is None:
        return None
    with torch.device('meta'):
        small, large = DeepNet(config), DeepNet(config, image_size=224)
    counts = {'cifar10': count_parameters(small), 'imagenet': count_parameters(large)}
    if max(counts.values()) > ranges_of(split).parameters:
        return None
    try:
        record = record_of(small, counts)
    except UnsupportedModelError:
        return None
    return record if record.is_connected or 'none' not in config.genotype.ops else None


@contextlib.contextmanager
def _candidates(split: str, seed: int, first: int, workers: int) -> Iterator[Iterator[tuple[int, NetRecord | None]]]:
    """Candidates from a number on, in order, whatever the number of processes."""
    make, chunk = functools.partial(candidate, split, seed), 16 * workers
    with contextlib.ExitStack() as stack:
        mapped: Callable[..., Iterator[NetRecord | None]] = map
        if workers > 1:
            pool = multiprocessing.get_context('spawn').Pool(workers, torch.set_num_threads, (1,))
            mapped = stack.enter_context(pool).imap
        parts = (range(start, start + chunk) for start in itertools.count(first, chunk))
        yield itertools.chain.from_iterable(zip(part, mapped(make, part), strict=True) for part in parts)


def generate(path: Path, split: str, num: int, *, seed: int = 0, workers: int = 1, progress: bool = False) -> None:
    """Write ``num`` distinct networks of a split to an Arrow file; the same for the same seed, whatever the processes.

    Each network goes to ``path + '.partial'`` when it is found. A run that was interrupted is continued from there,
    with the same result. No two networks have isomorphic graphs.

    Raises:
        ConfigError: if there is no such split, or a partial file belongs to another split or seed.
        DataError: if it is damaged.
    """
    from timm_ghn.architectures.deepnets.store import write_records  # needs datasets

    ranges_of(split)
    partial = path.with_name(f'{path.name}.partial')
    found = _resume(partial, split, seed)
    by_hash: dict[str, list[int]] = {}
    for number, record in found:
        by_hash.setdefault(wl_hash(record), []).append(number)
    count, first = len(found), found[-1][0] + 1 if found else 0
    del found
    with (
        partial.open('a', encoding='utf-8') as file,
        tqdm(total=num, initial=count, desc='generating', unit='net', disable=None if progress else True) as bar,
        _candidates(split, seed, first, workers) as stream,
    ):
        for number, record in itertools.islice(_distinct(stream, by_hash, split, seed), max(0, num - count)):
            file.write(json.dumps([number, record.to_dict()]) + '\n')
            file.flush()
            bar.update()
    with partial.open(encoding='utf-8') as file:
        lines = itertools.islice(file, 1, 1 + num)
        write_records(path, ((split, NetRecord.from_dict(json.loads(line)[1])) for line in lines))
    partial.unlink()


def distinct(split: str, seed: int) -> Iterator[NetRecord]:
    """Networks that :func:`generate` writes, without end."""
    with _candidates(split, seed, 0, 1) as stream:
        for _, record in _distinct(stream, {}, split, seed):
            yield record


def _distinct(
    stream: Iterator[tuple[int, NetRecord | None]], by_hash: dict[str, list[int]], split: str, seed: int
) -> Iterator[tuple[int, NetRecord]]:
    """Candidates that are no rejected ones and whose graphs are new; their numbers are added to ``by_hash``."""
    for number, record in stream:
        if record is None:
            continue
        alike = by_hash.setdefault(wl_hash(record), [])
        # The graphs of earlier networks are not kept: those with the same hash are made again.
        earlier = (candidate(split, seed, other) for other in alike)
        if not any(other is not None and is_isomorphic(record, other) for other in earlier):
            alike.append(number)
            yield number, record


def _resume(partial: Path, split: str, seed: int) -> list[tuple[int, NetRecord]]:
    """Networks of an interrupted run; the file is cut after the last complete line, or begun."""
    header = json.dumps({'split': split, 'seed': seed}) + '\n'
    data = partial.read_bytes() if partial.exists() else b''
    data = data[: data.rfind(b'\n') + 1]
    if not data:
        partial.write_text(header, encoding='utf-8')
        return []
    first, *lines = data.decode(errors='replace').splitlines(keepends=True)
    if first != header:
        raise ConfigError(f'{partial} was begun with {first.strip()}; remove it, or give that split and seed')
    try:
        found = [(int(number), NetRecord.from_dict(values)) for number, values in map(json.loads, lines)]
    except (ValueError, TypeError) as error:
        raise DataError(f'{partial} is damaged, remove it: {error}') from error
    os.truncate(partial, len(data))
    return found
