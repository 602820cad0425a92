"""The commands ``timm-ghn convert`` and ``timm-ghn cache``: GHNs in the native format on this machine."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from timm_ghn.errors import ConfigError

EXAMPLES = {
    'convert': 'timm-ghn convert ghn3_tm8 -o ghn3-t',
    'cache': 'timm-ghn cache --remove ghn3_tm8',
}

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Add the two commands to the parser of the command line."""
    convert = add('convert', convert_ghn, 'Convert a GHN to the native format: config.json and safetensors.')
    convert.add_argument('source', metavar='NAME|PATH', help='a GHN; it is downloaded where necessary')
    convert.add_argument('-o', '--output', type=Path, required=True, metavar='FOLDER', help='folder to make')
    convert.add_argument('--json', action='store_true', help='print JSON')
    cache = add('cache', show_cache, 'List the official checkpoints that were converted when they were first loaded.')
    cache.add_argument('--remove', metavar='NAME|all', help='remove a conversion, or all; downloads stay')
    cache.add_argument('--json', action='store_true', help='print JSON')


def convert_ghn(args: argparse.Namespace) -> int:
    """Convert a GHN, and print where it is and how large."""
    from timm_ghn.files import new_folder
    from timm_ghn.hub.converted import convert_official
    from timm_ghn.hub.fetch import Access
    from timm_ghn.hub.load import find_files
    from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE, digest_in_name, is_native, read_ghn

    folder: Path = args.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{str(folder)!r} exists and is not an empty folder: name another one')
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f'the folder {str(folder.absolute().parent)!r} does not exist')
    found = find_files(args.source, None, Access())
    config = None if found.entry is None else found.entry.config
    if is_native(found.path):
        read_ghn(found.path, config=config)  # nothing that cannot be loaded is copied
        weights = found.path / WEIGHTS_FILE if found.path.is_dir() else found.path
        with new_folder(folder.absolute()) as partial:
            shutil.copyfile(weights.parent / CONFIG_FILE, partial / CONFIG_FILE)
            shutil.copyfile(weights, partial / WEIGHTS_FILE)
    else:
        convert_official(found.path, folder, config=config, sha256=digest_in_name(found.path))
    size = sum(file.stat().st_size for file in folder.iterdir())
    if args.json:
        print(json.dumps({'source': args.source, 'folder': str(folder), 'size': size}, indent=2))
    else:
        print(f'{folder / WEIGHTS_FILE}, {size:,} bytes with its configuration')
        print(f"\nit is read by\n  timm_ghn.load_ghn('{folder}')")
    return 0


def show_cache(args: argparse.Namespace) -> int:
    """Print what the cache holds, or remove from it."""
    from timm_ghn.cli.tables import aligned
    from timm_ghn.hub.converted import VARIABLE, cache_folder, converted_ghns, remove_converted

    cache = cache_folder()
    if cache is None:
        raise ConfigError(f'there is no cache: {VARIABLE} turns it off')
    removed = args.remove is not None
    found = remove_converted(cache, args.remove) if removed else converted_ghns(cache)
    total = sum(size for _, size in found.values())
    if args.json:
        listed = [{'name': name, 'folder': str(path), 'size': size} for path, (name, size) in found.items()]
        print(
            json.dumps({'folder': str(cache), 'removed' if removed else 'converted': listed, 'size': total}, indent=2)
        )
    elif not found:
        print(f'nothing {"was removed from" if removed else "is converted in"} {cache}')
    else:
        rows = [(name, f'{size:,}', str(path)) for path, (name, size) in found.items()]
        print('\n'.join(aligned(('name', 'bytes', 'folder'), rows)))
        print(f'\n{total:,} bytes {"were removed; what was downloaded stays" if removed else "in all"}')
    return 0
