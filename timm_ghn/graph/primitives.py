"""The vocabulary of the published GHNs: what a graph node can be.

The ids are rows of the ``embed`` table in every published checkpoint, and so an on-disk contract: they are never
reordered or reused.
"""

import enum


class Primitive(enum.IntEnum):
    """Type of a graph node (arXiv 2110.13100, table 1; row order of the published ``embed.weight``)."""

    MAX_POOL = 0
    AVG_POOL = 1
    SEP_CONV = 2
    DIL_CONV = 3
    CONV = 4
    MSA = 5
    CSE = 6
    SUM = 7
    CONCAT = 8
    INPUT = 9
    BIAS = 10
    BN = 11
    LN = 12
    POS_ENC = 13
    GLOB_AVG = 14


#: Weights of linear layers and convolutions.
CONVOLUTIONS = (Primitive.CONV, Primitive.SEP_CONV, Primitive.DIL_CONV)
