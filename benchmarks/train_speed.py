"""Networks per second in meta-training, against a loop that takes one network at a time and traces it each time.

    python benchmarks/train_speed.py [--processes 2]

Both train the same GHN on the same architectures and random images, in turns and on the same cores: with several
processes, 'ours' is as many of one thread, which share the networks of a step and add up their gradients, and
'straightforward' is one process with as many threads.
'straightforward' builds each network with its initialisation, traces it, predicts it alone and differentiates it
together with the GHN; 'ours' is timm_ghn.train's step, its architectures traced before as in any but the first epoch of
a run. Times are wall-clock seconds of --repeat rounds; the least of each kind counts.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import timm_ghn
from timm_ghn import GHN
from timm_ghn.architectures.architecture import Architecture
from timm_ghn.runs.recipes import read_recipe
from timm_ghn.train.blueprints import Blueprints, use_batch_statistics_
from timm_ghn.train.options import TrainOptions
from timm_ghn.train.step import predict_parameters, sum_gradients, train_step

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


def summed(tensor: Tensor) -> Tensor:
    """Sum over processes."""
    torch.distributed.all_reduce(tensor)
    return tensor


def worker(rank: int, args: argparse.Namespace, folder: str, seconds: multiprocessing.Queue[float]) -> None:
    """One of several processes of training; the first tells how long each round took."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=args.processes
    )
    torch.set_num_threads(1)
    work = Work(args)

    def ours() -> None:
        for group in work.groups():
            own = [work.blueprints(architecture) for architecture in group[rank :: args.processes]]
            train_step(work.ghn, own, work.images, work.labels, networks=len(group))
            sum_gradients(work.ghn, summed)

    for _ in range(args.repeat):
        torch.distributed.barrier()
        spent = timed(ours, work.ghn)
        if rank == 0:
            seconds.put(spent)
    torch.distributed.destroy_process_group()


def in_processes(args: argparse.Namespace) -> float:
    """Least seconds of a round of training in several processes."""
    context = multiprocessing.get_context('spawn')
    seconds = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=worker, args=(rank, args, folder, seconds)) for rank in range(args.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit('a process failed')
    return min(float(seconds.get()) for _ in range(args.repeat))


class Work:
    """What both loops train: a GHN, architectures that are traced, and a batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        options = TrainOptions(**{**read_recipe(args.config, TrainOptions), 'dataset': 'random'})
        torch.manual_seed(0)
        self.ghn = GHN(options.config_for(10)).to(args.device)
        sampler = options.sampler_for(10)
        rng = np.random.default_rng(0)
        self.architectures = [sampler.sample(rng) for _ in range(args.count)]
        self.meta_batch: int = args.meta_batch
        side = options.image_size
        self.images = torch.randn(args.batch_size, 3, side, side, device=args.device)
        self.labels = torch.randint(10, (args.batch_size,), device=args.device)
        self.blueprints = Blueprints(self.ghn.config)
        for architecture in self.architectures:
            self.blueprints(architecture)

    def groups(self) -> list[list[Architecture]]:
        """The architectures of each step."""
        firsts = range(0, len(self.architectures), self.meta_batch)
        return [self.architectures[first : first + self.meta_batch] for first in firsts]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', type=Path, default=RECIPE)
    parser.add_argument('--count', type=int, default=16, help='architectures (default: 16)')
    parser.add_argument('--meta-batch', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--processes', type=int, default=1, help='of one thread each, for ours (default: 1)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='Markdown file to write')
    args = parser.parse_args(argv)
    if args.processes > 1:
        args.threads = args.processes
    torch.set_num_threads(args.threads)
    work = Work(args)
    ghn, batch = work.ghn, (work.images, work.labels)

    def ours() -> None:
        for group in work.groups():
            train_step(ghn, [work.blueprints(architecture) for architecture in group], *batch)

    best = {'straightforward': float('inf'), 'ours': float('inf')}
    for _ in range(args.repeat):
        slow = timed(lambda: straightforward(ghn, work.architectures, *batch), ghn)
        best['straightforward'] = min(best['straightforward'], slow)
        if args.processes == 1:
            best['ours'] = min(best['ours'], timed(ours, ghn))
    if args.processes > 1:
        best['ours'] = in_processes(args)
    rates = {name: args.count / seconds for name, seconds in best.items()}
    lines = [
        f'# Speed of meta-training, {datetime.date.today()}',
        '',
        f'Python {platform.python_version()}, timm_ghn {timm_ghn.__version__}, torch {torch.__version__}, '
        f'{args.device}, {args.threads} thread(s), {args.processes} process(es) of ours; {args.count} architectures of '
        f'{args.config.name}, batches of '
        f'{args.batch_size}, {args.meta_batch} networks in a step.',
        '',
        '| loop | networks per second |',
        '| --- | ---: |',
        *(f'| {name} | {rate:.2f} |' for name, rate in rates.items()),
        '',
        f'Ours is {rates["ours"] / rates["straightforward"]:.1f} times as fast. Its time: '
        + stages(ghn, work.blueprints, work.architectures[: args.meta_batch], batch)
        + '.',
    ]
    print('\n'.join(lines))
    if args.out is not None:
        args.out.write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
