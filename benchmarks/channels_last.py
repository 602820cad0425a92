"""Time of a training step in channels-last memory, as a share of that in timm's own layout.

    python benchmarks/channels_last.py

A step is forward, backward and AdamW, as in timm_ghn.finetune with and without --channels-last. Both layouts take
turns; times are CPU seconds of one thread (--threads), the least of --repeat steps.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch
import torch.nn.functional as F

MODELS = (
    'resnet50', 'convnext_atto', 'vit_tiny_patch16_224', 'efficientnet_b0', 'mobilenetv3_small_100', 'regnety_002',
    'poolformer_s12', 'test_nfnet',
)  # fmt: skip


class Step:
    """A step of training on the same batch.

    Args:
        name: Of the timm model.
        layout: Memory format of weights and images.
        batch: Number of images.
        size: Their side in pixels.
    """

    def __init__(self, name: str, layout: torch.memory_format, batch: int, size: int) -> None:
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, num_classes=10, img_size=size)
        except TypeError:
            model = timm.create_model(name, num_classes=10)
        self.model = model.to(memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.images = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
        self.labels = torch.randint(10, (batch,))

    def seconds(self) -> float:
        started = time.process_time()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS))
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeat', type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print('| model | seconds a step | with channels last | share |\n| --- | ---: | ---: | ---: |')
    for name in args.models:
        steps = [Step(name, layout, args.batch, args.size) for layout in (torch.contiguous_format, torch.channels_last)]
        for step in steps:
            step.seconds()  # the first one allocates the optimiser's state
        times = [[step.seconds() for step in steps] for _ in range(args.repeat)]
        plain, last = map(min, zip(*times, strict=True))
        print(f'| {name} | {plain:.3f} | {last:.3f} | {last / plain:.2f} |', flush=True)


if __name__ == '__main__':
    main()
