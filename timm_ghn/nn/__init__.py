"""From graphs to raw tensors."""

from timm_ghn.nn.config import GHNConfig as GHNConfig, Origin as Origin
from timm_ghn.nn.decoders import DecodeKind as DecodeKind, DecodeRequest as DecodeRequest
from timm_ghn.nn.gated import GatedGNN as GatedGNN  # registers 'gated' and 'mlp'
from timm_ghn.nn.ghn import GHN as GHN
from timm_ghn.nn.graphormer import Graphormer as Graphormer  # registers 'graphormer'
from timm_ghn.nn.registry import known_gnns as known_gnns, register_gnn as register_gnn
