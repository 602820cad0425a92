"""What the reference implementation predicts is what this package predicts: see golden/README.md.

The tiny GHNs in golden/ are compared by everyone; GHNs of published sizes and 38 networks where those files are found.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from tiny import GOLDEN, LARGE_GOLDEN
from torch import Tensor, nn

from timm_ghn import Graph, Prediction, load_ghn, predict

FILES = sorted(GOLDEN.glob('predictions/*/*.json'))
LARGE_FILES = sorted(LARGE_GOLDEN.glob('predictions/*/*.json'))


def in_default_run(file: Path) -> bool:
    """Each network once, with GHN-3, and one network for each other GHN; not the largest networks."""
    return 'vgg' not in file.stem if file.parent.name == 'ghn3tm8' else file.stem == 'torchvision--resnet50'


CASES = [
    pytest.param(
        file,
        id=f'{file.parent.name}-{file.stem}',
        marks=[] if file in FILES or in_default_run(file) else [pytest.mark.slow],
    )
    for file in (*FILES, *LARGE_FILES)
]

#: Longest shortest path that the published GHNs read.
CUTOFF = 50


#: Golden checkpoints, each loaded once.
load = functools.cache(load_ghn)


def predicted(file: Path) -> tuple[dict, Prediction]:
    """What a golden file says, and our prediction of the same network by the same GHN."""
    record = json.loads(file.read_text())
    prediction = predict(
        build(record['source'], record['architecture']),
        load(file.parents[2] / 'checkpoints' / record['checkpoint']),
        input_size=record['input_size'],
        head='predict',
        rules='published',
    )
    return record, prediction


def build(source: str, name: str) -> nn.Module:
    """A network without weights: on the meta device, where it has shapes only."""
    # RegNet computes its widths with tensors, which must hold values.
    with torch.device('cpu' if name.startswith('regnet') else 'meta'):
        if source == 'timm':
            return timm.create_model(name)
        unused = {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
        return torchvision.models.get_model(name, weights=None, **unused)


def statistics(graph: Graph) -> dict[str, object]:
    """What the golden files say about a graph."""
    distances = graph.distances_NN(CUTOFF)
    source, target = graph.edges_E2.T
    return {
        'nodes': len(graph),
        'op_counts': dict(Counter(node.primitive.name.lower() for node in graph.nodes)),
        'edges_1hop': len(graph.edges_E2),
        'edges_virtual': int((distances > 1).sum()),
        'distance_counts': {str(length): n for length, n in sorted(Counter(distances[distances > 0].tolist()).items())},
        'in_degree_sorted': sorted(torch.bincount(target, minlength=len(graph)).tolist()),
        'out_degree_sorted': sorted(torch.bincount(source, minlength=len(graph)).tolist()),
    }


def disagreements(expected: dict[str, dict], prediction: Prediction) -> list[str]:
    """Tensors that the reference predicted and that are absent or differ by more than the stated tolerance."""
    found = prediction.state_dict
    wanted = {name: record for name, record in expected.items() if record['predicted']}
    return [name for name, record in wanted.items() if name not in found or not agrees(found[name], record)]


def agrees(tensor: Tensor, record: dict) -> bool:
    if list(tensor.shape) != record['shape']:
        return False
    if record.get('random'):
        tensor = tensor.clone()
        tensor[:, 0] = 0  # drawn at random: the row of the class token
        assert record['random'] == tensor[:, 0].numel()
    values = tensor.flatten()
    bound = 1e-6 + 1e-4 * record['norm'] / values.numel() ** 0.5
    at = values[torch.tensor(record['at'])].double()
    return (
        bool((at - torch.tensor(record['values'], dtype=torch.float64)).abs().max() <= bound)
        and torch.linalg.vector_norm(values, dtype=torch.float64).item() == pytest.approx(record['norm'], rel=1e-5)
        and torch.linalg.vector_norm(values, 1, dtype=torch.float64).item() == pytest.approx(record['abssum'], rel=1e-5)
    )


@pytest.mark.parametrize('file', CASES)
def test_graphs_and_predictions_are_those_of_the_reference(file):
    record, prediction = predicted(file)
    assert prediction.plan.graph.rules == 'published'
    assert statistics(prediction.plan.graph) == record['graph']
    assert not disagreements(record['parameters'], prediction)


def test_the_golden_files_are_there(golden):
    assert Counter(file.parent.name for file in FILES) == {'ghn3': 7, 'ghn2_hub': 6, 'ghn2_release': 2}
    assert len(LARGE_FILES) == 80
    assert len({file.stem for file in LARGE_FILES}) == 38


def test_a_disagreement_is_noticed():
    """The comparison itself can fail: one value, one norm, one missing tensor."""
    record, prediction = predicted(GOLDEN / 'predictions' / 'ghn2_hub' / 'torchvision--resnet18.json')
    names = list(prediction.state_dict)[:3]
    prediction.state_dict[names[0]].view(-1)[0] += 0.01
    prediction.state_dict[names[1]].mul_(1.0001)
    del prediction.state_dict[names[2]]
    assert disagreements(record['parameters'], prediction) == names
