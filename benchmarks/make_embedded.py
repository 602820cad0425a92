"""Makes the GHN that ships inside the package out of one that timm_ghn.train trained.

    python benchmarks/make_embedded.py train-out --postprocess orth --earlier uoft-cs/cifar10 --note NOTE.md

reads the output folder of a run with examples/recipes/ghn_tiny_imagenet.yaml, and writes timm_ghn/embedded/ghn_tiny
(weights in bfloat16, configuration and card) and hub_configs/ghn_tiny.json. NOTE.md is added to the card: what the log
of the run does not say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn import GHN
from timm_ghn.nn.config import POSTPROCESSING
from timm_ghn.publish.card import ghn_card
from timm_ghn.publish.training import MetaTraining
from timm_ghn.train.loop import TRAINED

ROOT = Path(__file__).resolve().parents[1]
#: Stands for a repository in the card, which has none.
_NOWHERE = f'timm_ghn/{EMBEDDED}'


def make(run: Path, folder: Path, *, postprocess: str) -> GHN:
    """Write weights and configuration; bfloat16 halves the file."""
    ghn = load_ghn(run / TRAINED)
    shipped = GHN(dataclasses.replace(ghn.config, name=EMBEDDED, postprocess=postprocess))
    shipped.load_state_dict(ghn.state_dict())
    save_ghn(shipped, folder, dtype=torch.bfloat16)
    return shipped


def card(ghn: GHN, training: MetaTraining, note: str, earlier: Sequence[str]) -> str:
    """The card of the GHN, with the data sets of the runs that came before the last one."""
    made = ghn_card(ghn, _NOWHERE, None, training=training, license='mit')
    made.data.datasets = [*earlier, *(made.data.datasets or [])]
    text = str(made).replace(_NOWHERE, EMBEDDED)
    before, citation = text.split('\n## Citation\n', 1)
    return f'{before}\n{note.strip()}\n\n## Citation\n{citation}' if note else text


def entry(ghn: GHN, description: str) -> dict[str, object]:
    """What the catalogue says."""
    return {
        'name': EMBEDDED,
        'description': description,
        'path': f'embedded/{EMBEDDED}',
        'license': 'mit',
        'num_parameters': sum(parameter.numel() for parameter in ghn.parameters()),
        'config': {key: value for key, value in ghn.config.to_dict().items() if key != 'name'},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path, help='output folder of timm_ghn.train')
    parser.add_argument('--postprocess', choices=POSTPROCESSING, default='none', help='what the GHN recommends')
    parser.add_argument('--description', default='Small GHN inside the package, trained on Tiny-ImageNet at 32 pixels')
    parser.add_argument('--earlier', nargs='+', default=[], metavar='DATASET', help='that runs before this one saw')
    parser.add_argument('--note', type=Path, help='Markdown for the card')
    parser.add_argument('--package', type=Path, default=ROOT / 'timm_ghn')
    parser.add_argument('--configs', type=Path, default=ROOT / 'hub_configs')
    args = parser.parse_args(argv)
    folder = args.package / 'embedded' / EMBEDDED
    ghn = make(args.run, folder, postprocess=args.postprocess)
    training = MetaTraining.read(args.run, load_ghn(args.run / TRAINED).config)
    note = args.note.read_text(encoding='utf-8') if args.note else ''
    (folder / 'README.md').write_text(card(ghn, training, note, args.earlier), encoding='utf-8')
    text = json.dumps(entry(ghn, args.description), indent=2)
    (args.configs / f'{EMBEDDED}.json').write_text(text + '\n', encoding='utf-8')
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f'{folder}: {size / 1e6:.2f} MB')


if __name__ == '__main__':
    main()
