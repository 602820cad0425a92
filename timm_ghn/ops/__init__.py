"""Sums over edges behind one function."""

from timm_ghn.ops.aggregation import aggregate
from timm_ghn.ops.backends import use_backend
from timm_ghn.ops.edges import Edges

__all__ = ['Edges', 'aggregate', 'use_backend']
