"""Command line of the measurement."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.initperf.arms import ARMS, find_arm
from benchmarks.initperf.cells import NETWORKS, TIERS, Cell, Tier, data_set
from benchmarks.initperf.donors import Donors
from benchmarks.initperf.protocol import Setting
from benchmarks.initperf.report import write_report
from benchmarks.initperf.schedule import estimate, measure, pretraining_minutes, read_lines
from timm_ghn.hub.load import load_ghn
from timm_ghn.runs.results import versions

EPILOG = """
arms: {arms}
  An arm may have an argument: pretrain:8 is the network itself after 8 CPU-minutes of pretraining, donor:8 a small
  network of its family after as many, resized. Those of a GHN take --ghn; ghn_orth@NAME is that of another one than
  ghn_tiny.
networks: {networks}
examples:
  python -m benchmarks.initperf --tier core                          all that the tier names, or what is missing of it
  python -m benchmarks.initperf --tier core --arms timm ghn_orth --networks test_resnet --steps 60
  python -m benchmarks.initperf --tier core --ghn my/ghn --arms ghn_orth        enters another GHN into the results
  python -m benchmarks.initperf --tier core --report                 the report of what is there
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m benchmarks.initperf',
        description='Fine-tune networks from many initialisations with one protocol, and compare the accuracies.',
        epilog=EPILOG.format(arms=', '.join(ARMS), networks=', '.join(NETWORKS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--tier', choices=list(TIERS), default='core', help='how much to measure (default: core)')
    add('--arms', nargs='+', metavar='ARM', help="instead of the tier's")
    add('--networks', nargs='+', metavar='NETWORK', choices=list(NETWORKS), help="only these of the tier's, or others")
    add('--datasets', nargs='+', metavar='NAME', help="instead of the tier's")
    add('--steps', nargs='+', type=int, metavar='N', help="only these of the tier's, or others")
    add('--seeds', type=int, help='paired seeds of what is reported')
    add('--ghn', nargs='+', default=['ghn_tiny'], metavar='PLACE', help='names or folders of GHNs (default: ghn_tiny)')
    add('--data-root', type=Path, default=Path(os.environ.get('TIMM_GHN_DATA', 'data')), metavar='DIR',
        help="folder with the tier's data sets (default: $TIMM_GHN_DATA)")  # fmt: skip
    add('--data', nargs='+', default=[], metavar='NAME=PLACE', help='data sets of other places')
    add('--pretrain-on', default='tiny_imagenet_32', metavar='NAME', help='data set of the pretraining')
    add('--donors', type=Path, metavar='DIR', help='pretrained networks (default: donors/ beside the results)')
    add(
        '--out',
        type=Path,
        default=Path('initperf.jsonl'),
        help='the results, which are added to (default: %(default)s)',
    )
    add('--workers', type=int, default=2, help='processes of one thread each (default: 2)')
    add('--dry-run', action='store_true', help='only say what it would cost')
    add('--report', action='store_true', help='only write the report, from the results alone')
    args = parser.parse_args(argv)
    args.command = shlex.join(['python', '-m', 'benchmarks.initperf', *(sys.argv[1:] if argv is None else argv)])
    return args


def tier_of(args: argparse.Namespace, labels: Sequence[str]) -> Tier:
    """The tier with what the command line says; the first GHN has no label."""
    tier = TIERS[args.tier]
    cells = tier.cells
    if args.networks or args.datasets or args.steps:
        networks = args.networks or list(dict.fromkeys(cell.network for cell in cells))
        data = args.datasets or list(dict.fromkeys(cell.data for cell in cells))
        asked = [Cell(n, d, s) for s in args.steps or tier.arms for n in networks for d in data]
        # Without a number of steps, only those cells that the tier measures for so long.
        cells = tuple(cell for cell in asked if args.steps or cell in cells or args.networks or args.datasets)
    arms = {cell.steps: tuple(args.arms or tier.arms.get(cell.steps, tier.arms[min(tier.arms)])) for cell in cells}
    for names in arms.values():
        for name in names:
            find_arm(name)
    if labels != ['']:
        arms = {
            steps: tuple(every for name in names for every in _with_ghns(name, labels)) for steps, names in arms.items()
        }
    return dataclasses.replace(tier, cells=cells, arms=arms, seeds=args.seeds or tier.seeds)


def _with_ghns(name: str, labels: Sequence[str]) -> list[str]:
    """An arm of a GHN once for each of them."""
    if not find_arm(name).of_ghn or '@' in name:
        return [name]
    return [f'{name}@{label}' if label else name for label in labels]


def setting_of(args: argparse.Namespace, ghns: dict[str, str], tier: Tier) -> Setting:
    """Where things are."""
    places = dict(pair.partition('=')[::2] for pair in args.data)
    names = {cell.data for cell in tier.cells}
    minutes = {each for arms in tier.arms.values() for each in pretraining_minutes(arms)}
    pretrain_on = data_set(args.pretrain_on, args.data_root, places).place
    return Setting(
        data={name: data_set(name, args.data_root, places) for name in names},
        ghns=ghns,
        hashes={label: _hash(place) for label, place in ghns.items()},
        donors=Donors(args.donors or args.out.parent / 'donors', pretrain_on, tuple(sorted(minutes))),
        versions=versions(),
    )


def _hash(place: str) -> str:
    """SHA-256 of a GHN's file."""
    origin = load_ghn(place).origin
    return (origin and origin.sha256) or 'unknown'


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the report."""
    args = parse(argv)
    ghns = {'' if place == 'ghn_tiny' else Path(place).name: place for place in args.ghn}
    tier = tier_of(args, list(ghns))
    failures = 0
    if not args.report:
        setting = setting_of(args, {'': 'ghn_tiny', **ghns}, tier)
        seconds, rows = estimate(tier, read_lines(args.out), setting)
        print('\n'.join(rows))
        print(f'{seconds / 3600:.1f} CPU-hours are missing: {seconds / 3600 / args.workers:.1f} hours of '
              f'{args.workers} processes', flush=True)  # fmt: skip
        if args.dry_run:
            return 0
        failures = measure(tier, args.out, setting, workers=args.workers)
    report = write_report(args.out, tier, args.out.with_suffix('.report'), command=args.command)
    print(f'report: {report}')
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
