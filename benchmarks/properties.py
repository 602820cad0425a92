"""What a GHN knows of architectures: drawn networks that are trained for a short time, against what is known before.

For each network: accuracy after a short real training from its own initialisation, the same under noise, seconds of
inference, and how fast the loss falls; against its predicted accuracy without training and after a few steps,
parameters, multiply-accumulates, and the embedding of its graph. The GHN is also asked with other edges in the graph.

Usage: python benchmarks/properties.py --dataset FOLDER [--ghn ghn_tiny] [--out properties.jsonl] [--report]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import timm_ghn
from timm_ghn.analysis.embeddings import graph_embeddings
from timm_ghn.analysis.properties import predict_property, simple_features
from timm_ghn.architectures.cost import cost_of
from timm_ghn.architectures.samplers import TimmSampler, evaluation_set
from timm_ghn.contexts import preserve_rng
from timm_ghn.data.memory import ImageTensors, evaluation_batches, load_images, training_batch
from timm_ghn.data.options import DataOptions
from timm_ghn.data.splits import load_splits
from timm_ghn.graph.graph import Graph
from timm_ghn.runs.results import to_json
from timm_ghn.train.blueprints import Blueprint, Blueprints
from timm_ghn.train.step import accuracies_of, accuracy_with, predict_parameters

FAMILIES = (
    'resnet_basic', 'resnet_bottleneck', 'resnetv2', 'regnet', 'mobilenet', 'efficientnet', 'convnext', 'vit',
    'vit_pooled', 'swin', 'mixer', 'poolformer',
)  # fmt: skip
#: Images in a step, the learning rate of AdamW, and the deviation of the noise on normalised images.
BATCH, RATE, NOISE = 64, 2e-3, 0.5
#: Steps from the prediction, at a rate of SGD with momentum as `timm-ghn search` has it.
AFTER = (10, 30)
SEARCH_RATE = 0.01

Batches = Sequence[tuple[Tensor, Tensor]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', required=True, help='the data set that the GHN was trained on')
    parser.add_argument('--ghn', default='ghn_tiny', help='name or path (default: %(default)s)')
    parser.add_argument('--each', type=int, default=5, help='networks of each family (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=300, help='steps of the real training (default: %(default)s)')
    parser.add_argument('--images', type=int, default=2000, help='images to evaluate on (default: %(default)s)')
    parser.add_argument('--families', nargs='+', default=FAMILIES)
    parser.add_argument('--out', type=Path, default=Path('properties.jsonl'), help='one line for each network')
    parser.add_argument('--report', action='store_true', help='only print the tables')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ghn = timm_ghn.load_ghn(args.ghn)
    sampler = TimmSampler(
        tuple(args.families), num_classes=ghn.config.num_classes, macs=20_000_000, activations=80_000,
        parameters=(200_000, 6_000_000), attempts=1000,
    )  # fmt: skip
    networks = evaluation_set(sampler, seed=1, count=args.each, split='test')
    blueprints = Blueprints(ghn.config, args.out.parent / 'architectures')
    done = {row['key']: row for row in read(args.out)}
    if not args.report:
        splits = load_splits(DataOptions(dataset=args.dataset, val_split='auto'))
        train, val = (load_images(split, (3, 32, 32), progress=True) for split in (splits.train, splits.val))
        config = {'mean': ghn.config.mean, 'std': ghn.config.std}
        batches = list(evaluation_batches(val, args.images, BATCH, seed=0, config=config))
        for architecture in tqdm([one for one in networks if one.key not in done], unit='network'):
            row = measure(ghn, blueprints(architecture), train, batches, args.steps, config)
            done[architecture.key] = row
            with args.out.open('a', encoding='utf-8') as file:
                file.write(to_json(row) + '\n')
    rows = [done[one.key] for one in networks if one.key in done]
    print(report(ghn, rows, [blueprints(one).graph for one in networks if one.key in done]))


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of an earlier run."""
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []


def measure(
    ghn: timm_ghn.GHN, blueprint: Blueprint, train: ImageTensors, batches: Batches, steps: int, config: dict[str, Any]
) -> dict[str, Any]:
    """All that is asked of one network."""
    architecture = blueprint.architecture
    cost = cost_of(architecture.build(), architecture.input_size)
    row: dict[str, Any] = {'key': architecture.key, 'family': architecture.family, 'name': str(architecture)}
    row |= {'parameters': cost.parameters, 'macs': cost.macs, 'activations': cost.activations}
    row['predicted'], row['predicted_loss'] = accuracies_of(ghn, blueprint, batches)
    for name, altered in GRAPHS.items():
        row[f'edges: {name}'] = accuracies_of(ghn, with_edges(blueprint, altered), batches)[0]
    with torch.no_grad():
        (parameters,) = predict_parameters(ghn, [blueprint])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(leaves.values(), SEARCH_RATE, momentum=0.9)
    for step in range(max(AFTER)):
        images, labels = training_batch(train, step, BATCH, seed=0, config=config)
        _update(optimizer, F.cross_entropy(blueprint(leaves, images), labels))
        if step + 1 in AFTER:
            row[f'after {step + 1}'] = accuracy_with(blueprint, leaves, batches)[0]
    with preserve_rng(0):
        model = architecture.build('cpu')
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group['lr'] = RATE * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
            images, labels = training_batch(train, step, BATCH, seed=0, config=config)
            loss = F.cross_entropy(model(images), labels)
            _update(optimizer, loss)
            losses.append(float(loss.detach()))
        row['accuracy'] = accuracy(model, batches)
        row['noisy'] = accuracy(model, [(images + NOISE * torch.randn_like(images), y) for images, y in batches])
    # Steps until the loss, averaged over ten, has made half of its way.
    smooth = np.convolve(losses, np.ones(10) / 10, 'valid')
    row['convergence'] = int(np.argmax(smooth <= (smooth[0] + smooth[-1]) / 2)) / steps
    row['seconds'] = inference(model, batches[0][0])
    return row


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], 1.0)
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """In percent; batch normalisation uses the statistics of each batch, as for predicted networks."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


@torch.no_grad()
def inference(model: nn.Module, images: Tensor) -> float:
    """CPU seconds for a batch, the least of five."""
    taken = []
    for _ in range(5):
        began = time.process_time()
        model(images)
        taken.append(time.process_time() - began)
    return min(taken)


def with_edges(blueprint: Blueprint, alter: Callable[[Tensor, np.random.Generator], Tensor]) -> Blueprint:
    """The same network with other edges in its graph; node features, which follow from the order, stay as they are."""
    graph = blueprint.graph
    edges_E2 = alter(graph.edges_E2, np.random.default_rng(0))
    altered: Graph = dataclasses.replace(graph, edges_E2=edges_E2)
    for name in ('forward_levels_N', 'backward_levels_N'):
        vars(altered)[name] = getattr(graph, name)
    return dataclasses.replace(blueprint, graph=altered)


def _shuffled(edges_E2: Tensor, rng: np.random.Generator) -> Tensor:
    order = torch.from_numpy(rng.permutation(len(edges_E2)))
    return torch.stack([edges_E2[:, 0], edges_E2[order, 1]], 1).unique(dim=0)


def _dropped(edges_E2: Tensor, rng: np.random.Generator) -> Tensor:
    return edges_E2[torch.from_numpy(rng.random(len(edges_E2)) < 0.5)]


#: How the edges are altered.
GRAPHS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    'targets shuffled': _shuffled,
    'half dropped': _dropped,
    'none': lambda edges_E2, rng: edges_E2[:0],
}


def report(ghn: timm_ghn.GHN, rows: Sequence[dict[str, Any]], graphs: Sequence[Graph]) -> str:
    """Tables in Markdown."""
    numbers = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in numbers}
    orders = {name: columns[name] for name in ('predicted', *(f'after {k}' for k in AFTER), 'parameters', 'macs')}
    orders['loss of the prediction'] = -columns['predicted_loss']
    simple_GF, forest = simple_features(graphs), RandomForestRegressor(300, random_state=0)
    features = {
        'embedding, support vectors': (graph_embeddings(ghn, graphs).numpy(), None),
        'counts and depth, random forest': (simple_GF, forest),
        'counts and depth, support vectors': (simple_GF, None),
    }
    lines = [f'{len(rows)} networks.', '']
    lines += ['| before training | tau with the trained accuracy | 95 % |', '| --- | ---: | --- |']
    for name, (x_GF, regressor) in features.items():
        found = predict_property(x_GF, columns['accuracy'], regressor=regressor)
        orders[f'{name} (five folds)'] = found.predicted
    for name, values in orders.items():
        low, high = interval(values, columns['accuracy'])
        lines.append(f'| {name} | {tau(values, columns["accuracy"]):.2f} | {low:.2f} to {high:.2f} |')
    lines += ['', '| tau by cross-validation | ' + ' | '.join(features) + ' |', '| --- |' + ' ---: |' * len(features)]
    for name in ('accuracy', 'noisy', 'seconds', 'convergence'):
        taus = [predict_property(x, columns[name], regressor=regressor).tau for x, regressor in features.values()]
        lines.append(f'| {name} | ' + ' | '.join(f'{one:.2f}' for one in taus) + ' |')
    lines += ['', '| edges of the graph | predicted, no training: accuracy in % |', '| --- | ---: |']
    lines.append(f'| as they are | {columns["predicted"].mean():.2f} |')
    lines += [f'| {name} | {columns[f"edges: {name}"].mean():.2f} |' for name in GRAPHS]
    return '\n'.join(lines)


def tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's rank correlation."""
    return float(kendalltau(first, second).statistic)


def interval(first: np.ndarray, second: np.ndarray, *, draws: int = 2000) -> tuple[float, float]:
    """95 % of Kendall's tau by a bootstrap over networks."""
    rng = np.random.default_rng(0)
    found = [tau(first[rows], second[rows]) for rows in rng.integers(len(first), size=(draws, len(first)))]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


if __name__ == '__main__':
    main()
