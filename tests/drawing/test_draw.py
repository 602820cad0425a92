"""Every node and edge of a graph is drawn once, in the colour of its kind; a page needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import timm
import torch

from timm_ghn import ConfigError, Graph, trace
from timm_ghn.drawing import draw_graph
from timm_ghn.drawing.layout import layout_graph
from timm_ghn.drawing.legend import KINDS
from timm_ghn.graph.graph import Node
from timm_ghn.graph.primitives import Primitive

NAMES = ('test_resnet', 'test_vit', 'densenet121', 'inception_v4')


@pytest.fixture(scope='module', params=NAMES)
def graph(request):
    with torch.device('meta'):
        return trace(timm.create_model(request.param))


@pytest.fixture
def small():
    """A graph with a hostile name, an edge longer than all that are led around nodes, and a cycle."""
    chain = [(number, number + 1) for number in range(39)]
    nodes = [Node(Primitive.SUM, '</script><script src="https://x">', None)] + [Node(Primitive.MSA, 'a') for _ in chain]
    return Graph(
        nodes=tuple(nodes), edges_E2=torch.tensor([*chain, (0, 39), (20, 3)]), start=0, class_weights=(),
        class_biases=(), classifier=(), parameters=(), kept={}, input_size=(3, 8, 8), num_classes=None,
        rules='published',
    )  # fmt: skip


def data_of(page: str) -> dict:
    return json.loads(re.search(r'^const G = (.*);$', page, flags=re.MULTILINE)[1])


def test_every_kind_has_a_name_and_a_colour_of_its_own():
    assert set(KINDS) == set(Primitive)
    for values in zip(*KINDS.values(), strict=True):
        assert len(set(values)) == len(KINDS)


def check_layout(graph):
    layout = layout_graph(graph)
    assert len(set(layout.points)) == len(layout.points) == len(graph), 'a place of its own for each node'
    width, height = layout.size
    for points in (layout.points, *(line for _, line in layout.lines)):
        assert all(0 <= x <= width and -0.5 <= y <= height for x, y in points)
    drawn = [number for number, _ in layout.arcs]
    ends = dict(layout.lines)  # the last line of an edge
    starts = dict(reversed(layout.lines))
    assert sorted([*drawn, *ends]) == list(range(len(graph.edges_E2)))
    for number, (source, target) in enumerate(graph.edges_E2.tolist()):
        if number in ends:
            assert starts[number][0] == layout.points[source]
            assert ends[number][-1] == layout.points[target]
    for number, (start, _, end) in layout.arcs:
        source, target = graph.edges_E2[number].tolist()
        assert (start, end) == (layout.points[source], layout.points[target])
    return layout


def test_every_node_has_a_place_and_every_edge_leads_from_its_source_to_its_target(graph):
    layout = check_layout(graph)
    width, height = layout.size
    assert 0.2 < width / height < 4, 'folded: neither a tower nor a ribbon'
    assert layout.labels
    for _, line in layout.lines:
        assert [y for _, y in line] == sorted(y for _, y in line), 'data flows downwards within a column'


def test_edges_over_many_layers_or_back_are_arcs(small):
    assert not small.is_acyclic
    assert [number for number, _ in check_layout(small).arcs] == [39, 40]


def test_an_image_has_a_point_for_each_node_in_the_colour_of_its_kind(graph, tmp_path):
    draw_graph(graph, tmp_path / 'graph.svg', title='my$\\frac$_model')
    text = (tmp_path / 'graph.svg').read_text()
    assert '<!-- my$\\frac$_model -->' in text, 'no formula'
    found = Counter(re.findall(r'<use [^>]*style="fill: (#[0-9a-f]{6})', text))
    kinds = Counter(node.primitive for node in graph.nodes)
    legend = 1
    assert found == {KINDS[kind][1]: count + legend for kind, count in kinds.items()}
    for kind, count in kinds.items():
        assert f'<!-- {KINDS[kind][0]} ({count:,}) -->' in text


@pytest.mark.parametrize(('suffix', 'start'), [('.png', b'\x89PNG'), ('.PNG', b'\x89PNG'), ('.pdf', b'%PDF')])
def test_the_name_of_the_file_says_what_it_is(small, tmp_path, suffix, start):
    draw_graph(small, tmp_path / f'graph{suffix}')
    assert (tmp_path / f'graph{suffix}').read_bytes().startswith(start)


def test_a_page_holds_every_node_and_edge(graph, tmp_path):
    draw_graph(graph, tmp_path / 'graph.html', title='one')
    data = data_of((tmp_path / 'graph.html').read_text())
    assert [node['name'] for node in data['nodes']] == [node.label for node in graph.nodes]
    words = [data['kinds'][node['kind']] for node in data['nodes']]
    assert words == [list(KINDS[node.primitive]) for node in graph.nodes]
    shapes = {info.name: 'x'.join(map(str, info.shape)) for info in graph.parameters}
    for node, drawn in zip(graph.nodes, data['nodes'], strict=True):
        assert node.parameter is None or drawn['shape'] == shapes[node.parameter]
    assert data['edges'] == graph.edges_E2.tolist()
    assert {number for number, _ in data['lines'] + data['arcs']} == set(range(len(data['edges'])))


def test_a_page_needs_no_network_and_runs_no_name(small, tmp_path):
    draw_graph(small, tmp_path / 'graph.html', title='<img src="https://x">')
    page = (tmp_path / 'graph.html').read_text()
    assert data_of(page)['nodes'][0]['name'] == small.nodes[0].label
    markup = re.sub(r'^const G = .*$', '', page, flags=re.MULTILINE)
    assert page.count('</script>') == page.count('<script') == 1
    assert '<img' not in page
    assert not re.search(r'\b(?:src|href)\s*=\s*["\']?(?!&)|@import|url\(|fetch\(', markup.replace('&quot;', '&'))
    assert "default-src 'none'" in markup


def test_virtual_edges_are_those_of_the_graph(small, tmp_path):
    draw_graph(small, tmp_path / 'graph.html', virtual_edges=4)
    expected = small.distances_NN(4)
    pairs = data_of((tmp_path / 'graph.html').read_text())['virtual']
    assert pairs == [list(pair) for pair in zip(*torch.where(expected > 1), strict=True)]
    draw_graph(small, tmp_path / 'graph.svg', virtual_edges=4)
    assert (tmp_path / 'graph.svg').stat().st_size > 0


def test_what_cannot_be_drawn_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match='virtual_edges'):
        draw_graph(small, tmp_path / 'graph.html', virtual_edges=0)
    with pytest.raises(ConfigError, match=r'\.html'):
        draw_graph(small, tmp_path / 'graph.jpg')
    with pytest.raises(FileNotFoundError):
        draw_graph(small, tmp_path / 'nowhere' / 'graph.png')
    assert not list(tmp_path.iterdir())


def test_a_graph_of_one_node_is_drawn(tmp_path):
    node = Node(Primitive.INPUT, 'input')
    edges_E2 = torch.zeros(0, 2, dtype=torch.int64)
    lone = Graph((node,), edges_E2, 0, (), (), (), (), {}, (3, 8, 8), None, 'operators')
    for name in ('graph.svg', 'graph.html'):
        draw_graph(lone, tmp_path / name)
