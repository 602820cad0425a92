"""From a network to its graph."""

from timm_ghn.graph.build import trace
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.structure import Graph, GraphBatch, Node, ParameterInfo

__all__ = ['Graph', 'GraphBatch', 'Node', 'ParameterInfo', 'Primitive', 'trace']
