"""The commands ``timm-ghn convert`` and ``timm-ghn cache``: GHNs in our form on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ghn.errors import ConfigError, GHNError

if TYPE_CHECKING:
    from timm_ghn.hub.converted import Converted
    from timm_ghn.hub.load import Found

EXAMPLES = {
    'convert': 'timm-ghn convert ghn3_tm8 -o ghn3-t',
    'cache': 'timm-ghn cache --remove ghn3_tm8',
}

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Add the two commands to the parser of the command line."""
    convert = add('convert', convert_ghn, 'Convert a GHN to our form: a folder with config.json and safetensors.')
    convert.add_argument('source', metavar='NAME|PATH', help='a GHN; it is downloaded where necessary')
    convert.add_argument(
        '-o',
        '--output',
        type=Path,
        metavar='FOLDER',
        help="folder to make (default, for names of official checkpoints on the Hub: the cache of 'timm-ghn cache')",
    )
    convert.add_argument('--json', action='store_true', help='print JSON')
    cache = add('cache', show_cache, 'List the official checkpoints that were converted when they were first loaded.')
    cache.add_argument('--remove', metavar='NAME|all', help='remove a conversion, or all; downloads stay')
    cache.add_argument('--json', action='store_true', help='print JSON')


def convert_ghn(args: argparse.Namespace) -> int:
    """Convert a GHN, and print where it is and how large."""
    from timm_ghn.hub.fetch import Access
    from timm_ghn.hub.load import find_files
    from timm_ghn.hub.storage import WEIGHTS_FILE

    if args.output is not None:
        _expect_free(args.output)
    found = find_files(args.source, None, Access())
    if args.output is None:
        folder = _into_cache(args.source, found)
    else:
        _into_folder(found, args.output)
        folder = args.output
    size = sum(file.stat().st_size for file in folder.iterdir())
    if args.json:
        print(json.dumps({'source': args.source, 'folder': str(folder), 'size': size}, indent=2))
        return 0
    print(f'{folder / WEIGHTS_FILE}, {size:,} bytes with its configuration')
    if args.output is not None:
        print(f"\nit is read by\n  timm_ghn.load_ghn('{folder}')")
    return 0


def _expect_free(folder: Path) -> None:
    """Refuse a folder that holds anything, before a large file is downloaded."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{str(folder)!r} exists and is not an empty folder: name another one')
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f'the folder {str(folder.absolute().parent)!r} does not exist')


def _into_cache(source: str, found: Found) -> Path:
    from timm_ghn.hub.converted import VARIABLE, convert_into, discard, place_of
    from timm_ghn.hub.storage import read_ghn

    if found.entry is None or found.repo_id is None or found.is_ours:
        raise ConfigError(f'expected -o FOLDER for {source!r}, which is no official checkpoint on the Hub')
    if found.cache is None:
        raise ConfigError(f'expected -o FOLDER, since {VARIABLE} turns the cache off')
    place = place_of(found.path, found.entry, found.cache, found.commit)
    if place.is_dir():
        try:
            read_ghn(place, config=found.entry.config)
            return place
        except GHNError:
            discard(place)
    convert_into(place, found.path, found.entry, found.commit)
    return place


def _into_folder(found: Found, folder: Path) -> None:
    from timm_ghn.hub.convert import appearing, convert_official
    from timm_ghn.hub.converted import expected_digest
    from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE, read_ghn

    config = None if found.entry is None else found.entry.config
    if not found.is_ours:
        digest = None if found.entry is None else expected_digest(found.path, found.entry)
        convert_official(found.path, folder, config=config, sha256=digest)
        return
    read_ghn(found.path, config=config)  # nothing that cannot be loaded is copied
    source = found.path if found.path.is_dir() else found.path.parent
    weights = source / WEIGHTS_FILE if found.path.is_dir() else found.path
    with appearing(folder.absolute()) as partial:
        shutil.copyfile(source / CONFIG_FILE, partial / CONFIG_FILE)
        shutil.copyfile(weights, partial / WEIGHTS_FILE)


def show_cache(args: argparse.Namespace) -> int:
    """Print what the cache holds, or remove from it."""
    from timm_ghn.cli.tables import aligned
    from timm_ghn.hub.converted import VARIABLE, cache_folder, converted_ghns, remove_converted

    cache = cache_folder()
    if cache is None:
        raise ConfigError(f'there is no cache: {VARIABLE} turns it off')
    removed = args.remove is not None
    found = remove_converted(cache, args.remove) if removed else converted_ghns(cache)
    total = sum(converted.size for converted in found)
    if args.json:
        listed = [_plain(converted) for converted in found]
        print(
            json.dumps({'folder': str(cache), 'removed' if removed else 'converted': listed, 'size': total}, indent=2)
        )
        return 0
    if not found:
        print(f'nothing {"was removed from" if removed else "is converted in"} {cache}')
        return 0
    rows = [
        (c.name, c.repo_id or '-', (c.revision or '-')[:12], f'{c.size:,}', f'{c.path}{" (DAMAGED)" if c.flaw else ""}')
        for c in found
    ]
    header = ('name', 'repository', 'revision', 'bytes', 'folder')
    print('\n'.join(aligned(header, rows)))
    print(f'\n{total:,} bytes {"were removed; what was downloaded stays" if removed else "in all"}')
    return 0


def _plain(converted: Converted) -> dict[str, Any]:
    return {**dataclasses.asdict(converted), 'path': str(converted.path)}
