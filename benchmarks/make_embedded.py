"""Makes the GHN that ships inside the package: small, and untrained.

    python benchmarks/make_embedded.py

writes timm_ghn/embedded/ghn_tiny_untrained, from a seed: the same files each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from timm_ghn.hub.default import EMBEDDED
from timm_ghn.nn import GHN, GHNConfig
from timm_ghn.nn.storage import save_ghn

ROOT = Path(__file__).resolve().parents[1]
CONFIG = GHNConfig(
    hid=16, max_shape=(32, 32, 16, 16), num_classes=1000, layers=2, heads=4, trained=False, name=EMBEDDED
)


def make(folder: Path, *, seed: int = 0) -> GHN:
    """Write the GHN. bfloat16 halves the file, and random weights lose nothing by rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ghn = GHN(CONFIG)
    save_ghn(ghn, folder, dtype=torch.bfloat16)
    return ghn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--folder', type=Path, default=ROOT / 'timm_ghn' / 'embedded' / EMBEDDED)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    ghn = make(args.folder, seed=args.seed)
    print(f'{args.folder}: {sum(p.numel() for p in ghn.parameters()):,} parameters')


if __name__ == '__main__':
    main()
