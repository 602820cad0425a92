"""The colour and the name in words of each kind of node: relatives have one hue."""

from __future__ import annotations

from timm_ghn.graph.primitives import Primitive

#: In the order of the legend.
KINDS: dict[Primitive, tuple[str, str]] = {
    Primitive.INPUT: ('input', '#111111'),
    Primitive.CONV: ('convolution or linear', '#1f5fa8'),
    Primitive.SEP_CONV: ('grouped convolution', '#4fa3e0'),
    Primitive.DIL_CONV: ('dilated grouped convolution', '#a8d4f5'),
    Primitive.BIAS: ('bias', '#b5b5b5'),
    Primitive.BN: ('batch normalisation', '#f2a93b'),
    Primitive.LN: ('layer normalisation', '#f7d774'),
    Primitive.MSA: ('attention', '#c9302c'),
    Primitive.CSE: ('multiplication', '#f08fb4'),
    Primitive.SUM: ('sum', '#2e8b57'),
    Primitive.CONCAT: ('concatenation', '#8fd18a'),
    Primitive.POS_ENC: ('positions', '#8c564b'),
    Primitive.MAX_POOL: ('max pooling', '#5b3a8e'),
    Primitive.AVG_POOL: ('average pooling', '#9b7bd1'),
    Primitive.GLOB_AVG: ('global average', '#d3c0f0'),
}
