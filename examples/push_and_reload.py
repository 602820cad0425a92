"""Push a predicted network to the Hub, and load it with timm alone.

Usage: python examples/push_and_reload.py USER/NAME [MODEL], with HF_TOKEN set or after `hf auth login`.
The repository is private, and is made if it does not exist.
"""

from __future__ import annotations

import sys

import timm
import torch

import timm_ghn


def main(repo: str, name: str = 'resnet18') -> None:
    """Predict, push, load again, compare."""
    model = timm.create_model(f'{name}.ghn_tiny', num_classes=10)
    commit = timm_ghn.push_to_hub(model, repo, private=True, commit_message=f'{name}, predicted, no training')
    print(commit.commit_url)

    # This line needs timm, not timm_ghn.
    reloaded = timm.create_model(f'hf-hub:{repo}', pretrained=True)
    same = all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(model.state_dict().values(), reloaded.state_dict().values(), strict=True)
    )
    print('every tensor is the same' if same else 'something differs')


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
