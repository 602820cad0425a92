"""The benchmark runs and reports what it measured; nothing here looks at the numbers."""

import pytest
import torch

from timm_ghn import trace
from timm_ghn.graph.graph import GraphBatch


@pytest.fixture
def benchmark(script):
    return script('scatter')


def test_tables_of_both_parts_are_written(benchmark, tmp_path, capsys):
    out = tmp_path / 'tables.md'
    options = ['--graphs', '1', '2', '--edges', '50', '--features', '3', '--budget', '0', '--repeat', '1']
    benchmark.main([*options, '--device', 'cpu', '--out', str(out)])
    text = out.read_text()
    for title in ('Sum, forward', 'Sum with gradients', 'Passes of GHN-2'):
        assert f'## {title}' in text
    assert (
        sum(line.startswith(('| 1 timm model ', '| 2 timm models ', '| random ')) for line in text.splitlines()) == 10
    )
    assert 'Left out: triton needs a GPU' in text or torch.cuda.is_available()
    assert text.strip() == capsys.readouterr().out.strip()


def test_what_is_compared_is_the_same(benchmark):
    """Node by node and level by level the results are equal, so that their times can be compared."""
    import timm

    graph = trace(timm.create_model('test_resnet'))
    network = benchmark.ghn_of('ghn2', torch.device('cpu')).gnn
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(len(graph), 32)
    visits = benchmark.visits_of(graph, torch.device('cpu'))
    expected = benchmark.node_by_node(network, graph, x, visits)
    assert torch.allclose(network(x, GraphBatch.of(graph)), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(x, expected, atol=1e-1)
