"""A layered drawing keeps its distances, straightens chains and uncrosses what need not cross."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from timm_ghn.drawing.layering import _LINE, _NODE, Layering


def rows_of(layering):
    rows = {}
    for point, layer in enumerate(layering.layer):
        rows.setdefault(layer, []).append(point)
    return rows.values()


@st.composite
def networks(draw):
    layers = sorted(draw(st.lists(st.integers(0, 6), min_size=1, max_size=20)))
    pairs = [(a, b) for a, b in itertools.combinations(range(len(layers)), 2) if layers[a] < layers[b]]
    return layers, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=25)) if pairs else []


@settings(deadline=None, derandomize=True, database=None)
@given(networks())
def test_nothing_in_a_layer_is_too_close(network):
    layers, edges = network
    layering = Layering(layers, edges)
    for row in rows_of(layering):
        for a, b in itertools.pairwise(sorted(row, key=layering.x.__getitem__)):
            least = _NODE if max(a, b) < len(layers) else _LINE
            assert layering.x[b] - layering.x[a] >= least - 1e-9


@settings(deadline=None, derandomize=True, database=None)
@given(networks())
def test_an_edge_has_a_point_in_each_layer_between_its_ends(network):
    layers, edges = network
    layering = Layering(layers, edges)
    for (source, target), chain in zip(edges, layering.chains, strict=True):
        assert (chain[0], chain[-1]) == (source, target)
        assert [layering.layer[point] for point in chain] == list(range(layers[source], layers[target] + 1))


def test_a_chain_is_straight():
    layering = Layering(range(50), list(itertools.pairwise(range(50))))
    assert len(set(layering.x)) == 1


@pytest.mark.parametrize('branches', [2, 3, 5])
def test_branches_do_not_cross(branches):
    # From one node into branches of two layers each, listed in opposite orders, and back into one.
    first, second = range(1, 1 + branches), range(1 + branches, 1 + 2 * branches)
    end = 1 + 2 * branches
    edges = [(0, a) for a in first] + list(zip(first, reversed(second), strict=True)) + [(b, end) for b in second]
    layering = Layering([0, *[1] * branches, *[2] * branches, 3], edges)
    assert layering._crossings() == 0
    assert layering.x[0] == pytest.approx(layering.x[end]), 'symmetrical'


def test_a_line_leads_around_the_nodes_that_it_passes():
    layering = Layering([0, 1, 2, 3], [(0, 1), (1, 2), (2, 3), (0, 3)])
    for point in layering.chains[3][1:-1]:
        node = layering.layer[point]
        assert abs(layering.x[point] - layering.x[node]) >= _LINE - 1e-9
