"""Fine-tune a network that has no weights anywhere, from predicted parameters and from timm's own, and draw the curves.

Usage: python examples/demo.py [GHN]. Without an argument the GHN inside the package predicts. Nothing is downloaded:
the images are the handwritten digits that come with scikit-learn.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from matplotlib.figure import Figure
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import timm_ghn
from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.hub.catalogue import EMBEDDED

MODEL = 'seresnet18'
SHOTS = 20
EPOCHS = 12
SEEDS = (0, 1, 2)
FOLDER = Path('demo-out')
COLOURS = {'random': '#555555', 'ghn': '#d1495b'}


def main(ghn_name: str) -> None:
    """Run the demo with a GHN of `timm-ghn list`, or a path."""
    timm_ghn.set_default_ghn(ghn_name)  # what the tag 'ghn' means
    ghn = timm_ghn.load_ghn('ghn')
    trained = 'trained' if ghn.config.trained else 'NOT trained: what it predicts is no better than random weights'
    print(f'GHN {ghn_name}: {sum(p.numel() for p in ghn.parameters()):,} parameters, {trained}')

    model = timm.create_model(f'{MODEL}.ghn', num_classes=10)
    totals = timm_ghn.predict(model, ghn).plan.summary()
    print(
        f'{MODEL}: predicted {totals["predicted_elements"]:,} of {totals["elements"]:,} parameters in one forward pass'
    )
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f'{MODEL}.safetensors'
    save_file(model.state_dict(), path)
    check(model, timm.create_model(MODEL, num_classes=10, checkpoint_path=path))
    print(f'{path}: read by plain timm, outputs are the same\n')

    dataset = save_digits(FOLDER / 'digits')
    print(f'{MODEL} on {10 * SHOTS} handwritten digits, {EPOCHS} epochs, from both starts, {len(SEEDS)} seeds:')
    curves = {init: torch.tensor([fine_tuned(dataset, init, seed) for seed in SEEDS]) for init in COLOURS}
    print(f'{"epoch":>8}' + ''.join(f'{init:>10}' for init in curves))
    for epoch in range(0, EPOCHS + 1, 3):
        print(f'{epoch:>8}' + ''.join(f'{runs[:, epoch].mean():>9.1f}%' for runs in curves.values()))
    draw(curves, FOLDER / 'curves.png')
    print(f'The curves: {FOLDER / "curves.png"}')


def check(model: torch.nn.Module, reloaded: torch.nn.Module) -> None:
    """Stop the demo unless two models compute the same."""
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if not torch.equal(model.eval()(images), reloaded.eval()(images)):
            sys.exit('the reloaded model computes something else')


def save_digits(folder: Path) -> Path:
    """The digits as parquet files of a training and a validation split, as on the Hub."""
    digits = load_digits()
    features = Features({'image': Image(), 'label': ClassLabel(names=[str(digit) for digit in range(10)])})
    images = (digits.images * (255 / 16)).astype('uint8')
    for split, rows in {'train': slice(0, 1000), 'validation': slice(1000, None)}.items():
        dataset = Dataset.from_dict({'image': list(images[rows]), 'label': digits.target[rows]}, features=features)
        dataset.to_parquet(folder / f'{split}-00000.parquet')
    return folder


def fine_tuned(dataset: Path, init: str, seed: int) -> list[float]:
    """Accuracy in percent before the training and after each epoch."""
    output = FOLDER / f'finetune-{init}'
    shutil.rmtree(output, ignore_errors=True)
    options = FinetuneOptions(
        model=MODEL,
        init=init,
        dataset=str(dataset),
        shots=SHOTS,
        image_size=32,
        small_stem='off',
        hflip=0.0,
        train_crop_mode='pad',
        epochs=EPOCHS,
        seed=seed,
        output=output,
    )
    return [epoch['val_top1'] for epoch in finetune(options).epochs]


def draw(curves: dict[str, torch.Tensor], path: Path) -> None:
    """Draw the accuracy over the epochs: the mean over the seeds, and from the least to the most."""
    figure = Figure(figsize=(6.5, 4), layout='constrained')
    axis = figure.subplots()
    for init, runs in curves.items():
        label = {'random': "timm's own start"}.get(init, 'predicted')
        axis.plot(runs.mean(0), marker='.', color=COLOURS[init], label=f'{label}, mean of {len(runs)} seeds')
        axis.fill_between(range(EPOCHS + 1), runs.amin(0), runs.amax(0), color=COLOURS[init], alpha=0.2, linewidth=0)
    title = f'{MODEL}, a network without weights, on {10 * SHOTS} handwritten digits'
    axis.set(xlabel='epochs', ylabel='validation accuracy, %', title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)
