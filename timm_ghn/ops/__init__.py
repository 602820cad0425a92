"""Kernels behind one function each."""

from timm_ghn.ops.aggregation import aggregate
from timm_ghn.ops.edges import Edges

__all__ = ['Edges', 'aggregate']
