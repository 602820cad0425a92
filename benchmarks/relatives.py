"""A hundred variants of pretrained networks: weights transferred by the graphs, by position alone, predicted, or none.

Each variant (width and depth of one of five networks that timm lists) begins with a donor of the standard width and
depth, pretrained for some CPU-minutes by the protocol of ``initperf``, and is fine-tuned for 60 steps on data that no
donor saw. Each start takes the better of two learning rates. A race between them on the training images then says which
start it would have taken.

Usage: python -m benchmarks.relatives [--data-root DIR] [--out relatives.jsonl] [--report]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.initperf.arms import (
    ArmData,
    NotApplicableError,
    arm,
    find_arm,
    race_between,
    small_network,
    write_start,
)
from benchmarks.initperf.cells import NETWORKS, Cell, Network, data_set
from benchmarks.initperf.donors import Donors
from benchmarks.initperf.protocol import Run, Setting, execute, prepare
from benchmarks.initperf.schedule import add_line, read_lines, runs_by
from timm_ghn.runs.results import versions

#: Donors, with the names of the arguments for width and depth and what timm builds them with.
DONORS: dict[str, tuple[str, Any, str, Any]] = {
    'test_resnet@64': ('channels', (32, 48, 48, 96), 'layers', (1, 1, 1, 1)),
    'test_vit': ('embed_dim', 64, 'depth', 6),
    'test_convnext@64': ('dims', (24, 32, 48, 64), 'depths', (1, 2, 4, 2)),
    'test_mambaout@64': ('dims', (16, 32, 48, 64), 'depths', (1, 1, 3, 1)),
    'test_efficientnet@64': ('channel_multiplier', 1.0, 'depth_multiplier', 1.0),
}
WIDTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
DEPTHS = ('same', 'third stage', 'all stages', 'twice')
#: Those that take longest, and the donor itself.
LEFT_OUT = {(1.0, 'same'), (2.0, 'twice'), (2.0, 'all stages'), (1.5, 'twice')}
ARMS = ('own', 'position', 'relative', 'ghn_orth')
RATES = (1e-3, 4e-3)
#: Starts that race against the network's own.
RACE = ('relative', 'ghn_orth')
DATA, STEPS = 'clothing_128', 60


def variants() -> Iterator[Network]:
    """Twenty of each donor."""
    for label, (width_name, width, depth_name, depth) in DONORS.items():
        base = NETWORKS[label]
        for factor, more in itertools.product(WIDTHS, DEPTHS):
            if (factor, more) not in LEFT_OUT:
                sizes = {width_name: _wider(width, factor), depth_name: _deeper(depth, more)}
                name = f'{base.model} x{factor:g}, {more} deeper' if more != 'same' else f'{base.model} x{factor:g}'
                yield Network(
                    name, base.family, base.seen, base.model, base.image_size, base.small_stem, sizes, donor=label
                )


def _wider(width: Any, factor: float) -> Any:
    if isinstance(width, tuple):
        return [_wider(one, factor) for one in width]
    return round(factor * width) if isinstance(width, int) else factor * width


def _deeper(depth: Any, more: str) -> Any:
    if isinstance(depth, tuple):
        added = {'same': (0,) * 4, 'third stage': (0, 0, 1, 0), 'all stages': (1,) * 4, 'twice': depth}[more]
        return [one + extra for one, extra in zip(depth, added, strict=True)]
    factors = {'same': 1.0, 'third stage': 7 / 6, 'all stages': 1.5, 'twice': 2.0}
    return round(factors[more] * depth) if isinstance(depth, int) else factors[more] * depth


@arm('own', ignorant=True)
def own(model: nn.Module, data: ArmData) -> None:
    """timm's initialisation, with open gates where it closes any."""
    with contextlib.suppress(NotApplicableError):
        find_arm('timm_open').write(model, data)


@arm('position')
@torch.no_grad()
def position(model: nn.Module, data: ArmData) -> None:
    """Tensors at the same relative place among those of as many axes, cut or placed at the centre.

    This is what TLI (arXiv 2101.02757) comes to without its search for the best pairs.
    """
    given: dict[int, list[Tensor]] = {}
    wanted: dict[int, list[Tensor]] = {}
    for network, found in ((small_network(data), given), (model, wanted)):
        for parameter in network.parameters():
            found.setdefault(parameter.dim(), []).append(parameter)
    for axes, targets in wanted.items():
        sources = given.get(axes, [])
        for place, target in enumerate(targets):
            if sources:
                source = sources[round(place * (len(sources) - 1) / max(1, len(targets) - 1))]
                _centred(target, target.shape, source.shape).copy_(_centred(source, source.shape, target.shape))


def _centred(tensor: Tensor, own: Sequence[int], other: Sequence[int]) -> Tensor:
    """The middle of a tensor that another shape covers."""
    for axis, (have, want) in enumerate(zip(own, other, strict=True)):
        length = min(have, want)
        tensor = tensor.narrow(axis, (have - length) // 2, length)
    return tensor


def race(network: Network, setting: Setting) -> dict[str, Any]:
    """Which start wins a race on the training images; it compares on a quarter of them."""
    _, _, start, arm_data = prepare(network, setting.data[DATA], 'report', 0, setting)
    write_start('own', start.model, arm_data)
    found = race_between(start.model, arm_data, RACE)
    winner = found.winner
    return {'network': network.label, 'winner': winner.start, 'rate': winner.lr, 'race_steps': found.steps}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.environ.get('TIMM_GHN_DATA', 'data')
    parser.add_argument('--data-root', type=Path, default=Path(root), help='folder with the data sets')
    parser.add_argument('--minutes', type=float, default=2, help='CPU-minutes of pretraining (default: %(default)g)')
    parser.add_argument('--donors', type=Path, help='pretrained networks (default: donors/ beside the results)')
    parser.add_argument('--networks', nargs='+', help='only these variants')
    parser.add_argument('--steps', type=int, default=STEPS, help='of the fine-tuning (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('relatives.jsonl'), help='one line for each run')
    parser.add_argument('--report', action='store_true', help='only print the table')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    networks = [one for one in variants() if not args.networks or one.label in args.networks]
    NETWORKS.update({one.label: one for one in networks})
    donors = Donors(
        args.donors or args.out.parent / 'donors', str(args.data_root / 'tiny_imagenet_32'), (args.minutes,)
    )
    setting = Setting({DATA: data_set(DATA, args.data_root, {})}, {'': 'ghn_tiny'}, {'': ''}, donors, versions())
    runs = [Run(Cell(one.label, DATA, args.steps), name, 'report', rate, 0, args.steps)
            for one in networks for name in ARMS for rate in RATES]  # fmt: skip
    lines = read_lines(args.out)
    done = runs_by(lines)
    races = {line['network']: line for line in lines if line['kind'] == 'race'}
    if not args.report:
        for label in dict.fromkeys(one.donor for one in networks):
            donors.prepare(NETWORKS[label])
        # In turns over the donors: what is cut short has variants of all.
        order = np.argsort([index % max(1, len(runs) // len(DONORS)) for index in range(len(runs))], kind='stable')
        for run in tqdm([runs[index] for index in order if runs[index] not in done], unit='run'):
            line = {'kind': 'run', **execute(run, setting)}
            add_line(args.out, line)
            done[run] = line
        for network in tqdm([one for one in networks if one.label not in races], unit='race'):
            line = {'kind': 'race', **race(network, setting)}
            add_line(args.out, line)
            races[network.label] = line
    accuracies = {run: line['accuracy'] for run, line in done.items()}
    print(report(networks, args.steps, accuracies, {name: line['winner'] for name, line in races.items()}))


def report(networks: Sequence[Network], steps: int, accuracies: Mapping[Run, float], winners: Mapping[str, str]) -> str:
    """Mean accuracy over variants by kind; 'race' is that of the start that wins the race, begun anew."""
    rows: dict[str, list[np.ndarray]] = {}
    for network in networks:
        cell = Cell(network.label, DATA, steps)
        found = [[accuracies.get(Run(cell, name, 'report', rate, 0, steps)) for rate in RATES] for name in ARMS]
        if any(value is None for values in found for value in values):
            continue
        best = np.array(found, dtype=float).max(axis=1)
        winner = winners.get(network.label)
        best = np.append(best, best[ARMS.index(winner)] if winner else np.nan)
        width = float(network.label.split(' x')[1].partition(',')[0])
        kinds = ['all', network.model, 'the same width' if width == 1 else 'narrower' if width < 1 else 'wider']
        kinds.append('deeper' if 'deeper' in network.label else 'the same depth')
        for kind in kinds:
            rows.setdefault(kind, []).append(best)
    names = [*ARMS, 'race']
    lines = [f'| variants | number | {" | ".join(names)} | relative - position (95 %) | race - own (95 %) |']
    lines.append('| --- | ---: |' + ' ---: |' * len(names) + ' --- | --- |')
    rng = np.random.default_rng(0)
    for kind, values in rows.items():
        table = dict(zip(names, np.stack(values).T, strict=True))
        means = ' | '.join(f'{column.mean():.1f}' for column in table.values())
        gains = [_gain(table[a] - table[b], rng) for a, b in (('relative', 'position'), ('race', 'own'))]
        lines.append(f'| {kind} | {len(values)} | {means} | {" | ".join(gains)} |')
    return '\n'.join(lines)


def _gain(differences: np.ndarray, rng: np.random.Generator) -> str:
    """Mean and its interval, by bootstrap over the variants."""
    draws = rng.choice(differences, (2000, len(differences))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f'{differences.mean():+.1f} ({low:+.1f} to {high:+.1f})'


if __name__ == '__main__':
    main()
