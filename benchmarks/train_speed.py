"""Networks per second in meta-training, against a loop that takes one network at a time and traces it each time.

    python benchmarks/train_speed.py

Both train the same GHN on the same architectures and random images, in turns and with the same number of threads.
'straightforward' builds each network with its initialisation, traces it, predicts it alone and differentiates it
together with the GHN; 'ours' is timm_ghn.train's step, its architectures traced before as in any but the first epoch of
a run. Times are wall-clock seconds of --repeat rounds; the least of each kind counts.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import timm_ghn
from timm_ghn import GHN
from timm_ghn.recipes import read_recipe
from timm_ghn.train.architectures import Architecture
from timm_ghn.train.blueprints import Blueprints, use_batch_statistics_
from timm_ghn.train.options import TrainOptions
from timm_ghn.train.step import predict_parameters, train_step

RECIPE = Path(__file__).resolve().parents[1] / 'examples' / 'recipes' / 'ghn_tiny.yaml'


def straightforward(ghn: GHN, architectures: Sequence[Architecture], images: Tensor, labels: Tensor) -> None:
    """One network after the other."""
    for architecture in architectures:
        network = architecture.build('cpu')
        blueprint = Blueprints(ghn.config)(architecture)
        (parameters,) = predict_parameters(ghn, [blueprint])
        use_batch_statistics_(network)
        logits = torch.func.functional_call(network.to(images.device), parameters, (images,))
        (F.cross_entropy(logits, labels) / len(architectures)).backward()


def timed(action: Callable[[], None], ghn: GHN) -> float:
    started = time.perf_counter()
    action()
    if images_on_gpu(ghn):
        torch.cuda.synchronize()
    ghn.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def images_on_gpu(ghn: GHN) -> bool:
    return ghn.device.type == 'cuda'


def stages(
    ghn: GHN, blueprints: Blueprints, architectures: Sequence[Architecture], batch: tuple[Tensor, Tensor]
) -> str:
    """Where the time of a step goes."""
    from torch.profiler import ProfilerActivity, profile, record_function

    prepared = [blueprints(architecture) for architecture in architectures]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        with record_function('predict'):
            predicted = predict_parameters(ghn, prepared)
        gradients: list[Tensor] = []
        tensors: list[Tensor] = []
        with record_function('networks, forward and backward'):
            for blueprint, parameters in zip(prepared, predicted, strict=True):
                leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
                loss = F.cross_entropy(blueprint(leaves, batch[0]), batch[1])
                gradients += torch.autograd.grad(loss, list(leaves.values()))
                tensors += parameters.values()
        with record_function('GHN, backward'):
            torch.autograd.backward(tensors, gradients)
    names = ('predict', 'networks, forward and backward', 'GHN, backward')
    spent = {event.key: event.cpu_time_total for event in found.key_averages() if event.key in names}
    whole = sum(spent.values())
    return ', '.join(f'{name} {spent[name] / whole:.0%}' for name in names)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', type=Path, default=RECIPE)
    parser.add_argument('--count', type=int, default=16, help='architectures (default: 16)')
    parser.add_argument('--meta-batch', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='Markdown file to write')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    options = TrainOptions(**{**read_recipe(args.config, TrainOptions), 'dataset': 'random'})
    torch.manual_seed(0)
    ghn = GHN(options.config_for(10)).to(args.device)
    sampler = options.sampler_for(10)
    rng = np.random.default_rng(0)
    architectures = [sampler.sample(rng) for _ in range(args.count)]
    side = options.image_size
    images = torch.randn(args.batch_size, 3, side, side, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)
    blueprints = Blueprints(ghn.config)
    for architecture in architectures:
        blueprints(architecture)

    def ours() -> None:
        for first in range(0, len(architectures), args.meta_batch):
            group = architectures[first : first + args.meta_batch]
            train_step(ghn, [blueprints(architecture) for architecture in group], images, labels)

    best = {'straightforward': float('inf'), 'ours': float('inf')}
    for _ in range(args.repeat):
        best['straightforward'] = min(
            best['straightforward'], timed(lambda: straightforward(ghn, architectures, images, labels), ghn)
        )
        best['ours'] = min(best['ours'], timed(ours, ghn))
    rates = {name: len(architectures) / seconds for name, seconds in best.items()}
    lines = [
        f'# Speed of meta-training, {datetime.date.today()}',
        '',
        f'Python {platform.python_version()}, timm_ghn {timm_ghn.__version__}, torch {torch.__version__}, '
        f'{args.device}, {args.threads} thread(s); {args.count} architectures of {args.config.name}, batches of '
        f'{args.batch_size}, {args.meta_batch} networks in a step.',
        '',
        '| loop | networks per second |',
        '| --- | ---: |',
        *(f'| {name} | {rate:.2f} |' for name, rate in rates.items()),
        '',
        f'Ours is {rates["ours"] / rates["straightforward"]:.1f} times as fast. Its time: '
        + stages(ghn, blueprints, architectures[: args.meta_batch], (images, labels))
        + '.',
    ]
    print('\n'.join(lines))
    if args.out is not None:
        args.out.write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
