"""Train a small GHN on a small data set, and predict a network with it.

Usage: python examples/train_ghn.py [STEPS] [DATASET]. Without a data set (a name on the Hub, a folder, a parquet file)
the images are scikit-learn's handwritten digits. 1,000 steps take two minutes of a CPU; for a GHN that is worth
something elsewhere see the recipes beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits

import timm_ghn
from timm_ghn.train import TrainOptions, train

#: Families of timm to draw networks from, and how large these may be.
NETWORKS = {
    'families': ['resnet_basic', 'vgg'],
    'macs': 3_000_000,
    'parameters': [1_000, 200_000],
    'activations': 60_000,
    'attempts': 2000,
}


def save_digits(folder: Path) -> Path:
    """The digits as parquet files of two splits, as on the Hub."""
    digits = load_digits()
    features = Features({'image': Image(), 'label': ClassLabel(names=[str(digit) for digit in range(10)])})
    images = (digits.images * (255 / 16)).astype('uint8')
    for split, rows in {'train': slice(0, 1400), 'validation': slice(1400, None)}.items():
        dataset = Dataset.from_dict({'image': list(images[rows]), 'label': digits.target[rows]}, features=features)
        dataset.to_parquet(folder / f'{split}-00000.parquet')
    return folder


def main(steps: int = 1000, dataset: str | None = None) -> None:
    """Train, and predict a network of a family that was trained, in a size that was not."""
    options = TrainOptions(
        dataset=dataset or str(save_digits(Path('digits'))), image_size=32, augment='none',
        hid=32, layers=2, templates=8, codes=16, max_channels=512,
        sampler_args=NETWORKS, held_out=(), pool=max(4, min(200, steps // 5)),
        steps=steps, warmup_steps=min(50, steps // 2), meta_batch=4, batch_size=32, lr=3e-3,
        eval_steps=steps, eval_count=2, output=Path('my-ghn'),
    )  # fmt: skip
    print(train(options).output)  # the log, the curves, checkpoints, and the GHN itself in ghn/

    timm_ghn.register_ghn('mine', 'my-ghn/ghn')
    model = timm.create_model('resnet10t.mine', num_classes=10)
    print(f'resnet10t.mine: {sum(p.numel() for p in model.parameters()):,} parameters, predicted')


if __name__ == '__main__':
    main(*(int(text) for text in sys.argv[1:2]), *sys.argv[2:3])
