"""From graphs to raw tensors."""

from timm_ghn.nn.config import GHNConfig as GHNConfig, Origin as Origin
from timm_ghn.nn.ghn import GHN as GHN, register_gnn as register_gnn
from timm_ghn.nn.requests import DecodeKind as DecodeKind, DecodeRequest as DecodeRequest
