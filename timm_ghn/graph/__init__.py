"""From a network to its graph."""

from timm_ghn.graph.build import trace
from timm_ghn.graph.graph import Graph, GraphBatch, Node, ParameterInfo
from timm_ghn.graph.primitives import Primitive

__all__ = ['Graph', 'GraphBatch', 'Node', 'ParameterInfo', 'Primitive', 'trace']
