"""Create timm models with predicted parameters, save one, and read it back with plain timm.

Usage: python examples/demo.py [GHN]. Without an argument the GHN inside the package predicts: nothing is downloaded.
"""

import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import timm_ghn

EMBEDDED = 'ghn_tiny_untrained'
MODELS = ('resnet18', 'mobilenetv3_small_100', 'convnext_atto', 'vit_tiny_patch16_224')
FOLDER = Path('demo-out')


def main(ghn_name: str) -> None:
    """Run the demo with a GHN of `timm-ghn list`, or a path."""
    timm_ghn.set_default_ghn(ghn_name)  # what the tag 'ghn' means
    ghn = timm_ghn.load_ghn('ghn')
    trained = 'trained' if ghn.config.trained else 'NOT trained: what it predicts is no better than random weights'
    print(f'GHN {ghn_name}: {sum(p.numel() for p in ghn.parameters()):,} parameters, {trained}\n')

    for name in MODELS:
        model = timm.create_model(f'{name}.ghn', num_classes=ghn.config.num_classes)
        totals = timm_ghn.predict(model, ghn).plan.summary()
        print(
            f'{name}: predicted {totals["predicted_tensors"]} of {totals["tensors"]} tensors, '
            f'{totals["predicted_elements"]:,} of {totals["elements"]:,} elements, from {totals["nodes"]} graph nodes'
        )
        for reason, kept in totals['kept'].items():
            print(f'  kept {kept["tensors"]} ({kept["elements"]:,} elements): {reason}')

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f'{MODELS[0]}.safetensors'
    model = timm.create_model(f'{MODELS[0]}.ghn', num_classes=ghn.config.num_classes)
    save_file(model.state_dict(), path)

    reloaded = timm.create_model(MODELS[0], num_classes=ghn.config.num_classes, checkpoint_path=path)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        same = torch.equal(model.eval()(images), reloaded.eval()(images))
    print(f'\n{path}: read by plain timm, outputs {"are the same" if same else "DIFFER"}')
    if not same:
        sys.exit(1)


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)
