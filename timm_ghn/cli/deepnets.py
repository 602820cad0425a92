"""The command ``timm-ghn deepnets``: generate, convert and describe files of DeepNets-1M."""

from __future__ import annotations

import argparse
import dataclasses
import json

from timm_ghn.architectures.deepnets.generate import generate
from timm_ghn.architectures.deepnets.statistics import statistics
from timm_ghn.cli.tables import aligned
from timm_ghn.errors import ConfigError
from timm_ghn.files import check_output


def run_deepnets(args: argparse.Namespace) -> int:
    """Run the action that the arguments name."""
    return {'generate': _generate, 'stats': _stats, 'convert': _convert}[args.action](args)


def _generate(args: argparse.Namespace) -> int:
    check_output(args.output, ('.arrow',))
    generate(args.output, args.split, args.num, seed=args.seed, workers=args.workers, progress=True)
    print(f'{args.output}: {args.num:,} networks of {args.split}')
    return 0


def _stats(args: argparse.Namespace) -> int:
    from timm_ghn.architectures.deepnets.store import ArrowNets, open_nets  # needs datasets

    nets = open_nets(args.file, args.split)
    if not len(nets):
        raise ConfigError(f'{args.file} holds no networks')
    split = args.split or getattr(nets, 'split', None)
    if isinstance(nets, ArrowNets) and len(set(nets.splits)) == 1:
        split = nets.splits[0]
    rows = statistics(nets, split)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    print(f'{len(nets):,} networks of {split or "several splits"}')
    header = ['per network', 'mean', 'least', 'most', 'published range']
    cells = [[row.name, f'{row.mean:.2f}', f'{row.least:.2f}', f'{row.most:.2f}', row.published] for row in rows]
    print('\n'.join(aligned(header, cells)))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from timm_ghn.architectures.deepnets.store import HDF5, convert  # needs datasets

    check_output(args.output, ('.arrow', *HDF5))
    print(f'{args.output}: {convert(args.file, args.output):,} networks')
    return 0
