"""What the reference implementations predicted for 38 networks is what this package predicts.

The checkpoints have random weights: they test graphs and arithmetic, not the quality of a prediction.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from timm_ghn import GHN, Graph, Prediction, load_ghn, predict, trace

GOLDEN = Path(os.environ.get('TIMM_GHN_GOLDEN') or Path(__file__).parents[2] / 'shared' / 'golden') / 'predictions'
FILES = sorted(GOLDEN.glob('*/*.json'))
#: Over a hundred million parameters: of these, one stays in the default suite.
LARGE = [file for file in FILES if 'vgg' in file.stem and (file.parent.name, file.stem) != ('ghn3tm8', 'timm--vgg11')]
CASES = pytest.mark.parametrize(
    'file',
    [pytest.param(file, marks=[pytest.mark.slow] if file in LARGE else []) for file in FILES],
    ids=[f'{file.parent.name}-{file.stem}' for file in FILES],
)

#: Longest shortest path that the published GHNs read.
CUTOFF = 50


@pytest.fixture(scope='session')
def load(golden) -> Callable[[str], GHN]:
    """Golden checkpoints, each loaded once."""
    loaded: dict[str, GHN] = {}

    def by_file(name: str) -> GHN:
        if name not in loaded:
            loaded[name] = load_ghn(golden / 'checkpoints' / name)
        return loaded[name]

    return by_file


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
        'op_counts': dict(Counter(node.primitive.label for node in graph.nodes)),
        'edges_1hop': len(graph.edges_E2),
        'edges_virtual': int((distances > 1).sum()),
        'distance_counts': {str(length): n for length, n in sorted(Counter(distances[distances > 0].tolist()).items())},
        'in_degree_sorted': sorted(torch.bincount(target, minlength=len(graph)).tolist()),
        'out_degree_sorted': sorted(torch.bincount(source, minlength=len(graph)).tolist()),
    }


def disagreements(expected: dict[str, dict], prediction: Prediction) -> list[str]:
    """Tensors that the reference predicted and that are absent or differ by more than the stated tolerance."""
    found = []
    for name, record in expected.items():
        if not record['predicted']:
            continue
        tensor = prediction.state_dict.get(name)
        if tensor is None or list(tensor.shape) != record['shape']:
            found.append(f'{name}: expected {record["shape"]} (got {tensor if tensor is None else list(tensor.shape)})')
        elif not agrees(tensor, record):
            found.append(f'{name}: values differ')
    return found


def agrees(tensor: Tensor, record: dict) -> bool:
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


@CASES
def test_graphs_and_predictions_are_those_of_the_reference(file, load):
    record = json.loads(file.read_text())
    prediction = predict(
        build(record['source'], record['architecture']),
        load(record['checkpoint']),
        input_size=record['input_size'],
        head='predict',
        rules='published',
    )
    assert prediction.plan.graph.rules == 'published'
    assert statistics(prediction.plan.graph) == record['graph']
    assert not disagreements(record['parameters'], prediction)


def test_the_golden_files_are_there(golden):
    assert len(FILES) == 80
    assert len({file.stem for file in FILES}) == 38


def test_a_disagreement_is_noticed(load):
    """The comparison itself can fail: one value, one norm, one missing tensor."""
    file = GOLDEN / 'ghn3tm8' / 'timm--resnet10t.json'
    record = json.loads(file.read_text())
    prediction = predict(
        build('timm', 'resnet10t'),
        load('ghn3tm8.pt'),
        input_size=record['input_size'],
        head='predict',
        rules='published',
    )
    names = list(prediction.state_dict)[:3]
    prediction.state_dict[names[0]].view(-1)[0] += 0.01
    prediction.state_dict[names[1]].mul_(1.0001)
    del prediction.state_dict[names[2]]
    assert [line.partition(':')[0] for line in disagreements(record['parameters'], prediction)] == names


@pytest.mark.parametrize('name', ['resnet18', 'vit_b_16', 'swin_v2_t'])
def test_the_graph_does_not_depend_on_the_device_of_the_model(name):
    real = torchvision.models.get_model(name, weights=None)
    on_meta = build('torchvision', name)
    assert statistics(trace(real, rules='published')) == statistics(trace(on_meta, rules='published'))


def test_a_dropout_that_the_reference_takes_for_a_gate_is_a_gate(load):
    """Norms of timm's legacy_seresnet18 as the reference predicts it: in its graph the dropout is a 'cse' node."""
    prediction = predict(build('timm', 'legacy_seresnet18'), load('ghn3tm8.pt'), head='predict', rules='published')
    assert len(prediction.state_dict) == 94
    expected = {
        'layer0.conv1.weight': 0.231624,
        'layer1.0.se_module.fc1.weight': 0.052750,
        'layer2.0.downsample.0.weight': 0.287222,
        'layer3.1.bn2.bias': 0.148380,
        'layer4.1.conv2.weight': 0.611911,
        'layer4.1.se_module.fc2.bias': 0.229498,
        'last_linear.weight': 0.073705,
        'last_linear.bias': 0.460584,
    }
    norms = {name: float(prediction.state_dict[name].double().norm()) for name in expected}
    assert norms == pytest.approx(expected, abs=1.5e-6)
