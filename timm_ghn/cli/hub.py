"""The commands about GHNs and the Hub: ``timm-ghn list``, ``convert``, ``cache``, ``verify`` and ``push``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from timm_ghn.analysis import norms
from timm_ghn.cli.tables import aligned
from timm_ghn.errors import ConfigError, GHNError
from timm_ghn.files import new_folder
from timm_ghn.hub.catalogue import known_ghns
from timm_ghn.hub.converted import VARIABLE, cache_folder, converted_ghns, remove_converted
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import WEIGHTS_FILE, save_ghn
from timm_ghn.publish.push import Target, push_path


def run_list(args: argparse.Namespace) -> int:
    """Print the catalogue."""
    entries = known_ghns()
    if args.json:
        print(json.dumps({name: entry.to_dict() for name, entry in entries.items()}, indent=2))
        return 0
    rows = []
    for name, entry in entries.items():
        size = f'{entry.num_parameters:,}' if entry.num_parameters else '-'
        rows.append((name, size, str(entry.config.num_classes), entry.source, entry.description))
    print('\n'.join(aligned(('name', 'parameters', 'classes', 'from', 'what it is'), rows)))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Convert a GHN, and print where it is and how large."""
    folder: Path = args.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{str(folder)!r} exists and is not an empty folder: name another one')
    ghn = load_ghn(args.source)
    with new_folder(folder.absolute()) as partial:
        save_ghn(ghn, partial)
    size = sum(file.stat().st_size for file in folder.iterdir())
    if args.json:
        print(json.dumps({'source': args.source, 'folder': str(folder), 'size': size}, indent=2))
    else:
        print(f'{folder / WEIGHTS_FILE}, {size:,} bytes with its configuration')
        print(f"\nit is read by\n  timm_ghn.load_ghn('{folder}')")
    return 0


def run_cache(args: argparse.Namespace) -> int:
    """Print what the cache holds, or remove from it."""
    cache = cache_folder()
    if cache is None:
        raise ConfigError(f'there is no cache: {VARIABLE} turns it off')
    removed = args.remove is not None
    found = remove_converted(cache, args.remove) if removed else converted_ghns(cache)
    total = sum(size for _, size in found.values())
    if args.json:
        listed = [{'name': name, 'folder': str(path), 'size': size} for path, (name, size) in found.items()]
        facts = {'folder': str(cache), 'removed' if removed else 'converted': listed, 'size': total}
        print(json.dumps(facts, indent=2))
    elif not found:
        print(f'nothing {"was removed from" if removed else "is converted in"} {cache}')
    else:
        rows = [(name, f'{size:,}', str(path)) for path, (name, size) in found.items()]
        print('\n'.join(aligned(('name', 'bytes', 'folder'), rows)))
        print(f'\n{total:,} bytes {"were removed; what was downloaded stays" if removed else "in all"}')
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Compare parameter norms with the published ones, a row for each network as it comes; 1 if any does not agree."""
    expected = norms.published_norms(args.name, known_ghns(), args.arch)
    ghn = load_ghn(args.name, device=args.device)
    width = max(map(len, (*expected, 'network')))
    header = f'{"published":>10}  {"predicted":>10}  {"difference":>10}  below {norms.NORM_TOLERANCE}'
    print(f'{"network":{width}}  {header}', flush=True)
    agreed = 0
    for arch, published in expected.items():
        try:
            measured = norms.predicted_norm(arch, ghn)
        except (GHNError, RuntimeError) as error:  # torch raises the latter for want of memory
            cells, verdict = f'{"-":>10}  {"-":>10}', f'FAILED: {" ".join(str(error).split())}'
        else:
            agrees = abs(measured - published) < norms.NORM_TOLERANCE
            agreed += agrees
            cells, verdict = f'{measured:10.4f}  {measured - published:+10.4f}', 'yes' if agrees else 'NO'
        print(f'{arch:{width}}  {published:10.4f}  {cells}  {verdict}', flush=True)
    print(f'\n{agreed} of {len(expected)} norms agree')
    return 0 if agreed == len(expected) else 1


def run_push(args: argparse.Namespace) -> int:
    """Push a model or a GHN; the token is that of HF_TOKEN or ``hf auth login``."""
    target = Target(args.repo, args.private or None, args.revision, args.create_pr)
    commit = push_path(args.source, target, license=args.license, commit_message=args.message)
    print(commit.pr_url or commit.commit_url)
    return 0
